"""The sections of a model card that depend on what was recorded and measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from screformer.model_cards.calibration_section import calibration_limitations, confidence_paragraphs
from screformer.model_cards.checkpoint_records import Checkpoint, Json
from screformer.model_cards.comparison import (
    FEW_CELLS,
    LOGISTIC_REGRESSION,
    METRIC_TITLES,
    MODEL,
    Metrics,
    Results,
    by_support,
    compare,
    majority_sentence,
    ordered_rows,
    rare_classes,
    row_title,
    untested_classes,
)
from screformer.model_cards.distillation_section import DISTILLATION, distillation_paragraphs, is_distilled
from screformer.model_cards.downstream_section import downstream_paragraphs
from screformer.model_cards.markdown import flat_rows, format_share, format_value, plain, table
from screformer.model_cards.masked_genes import (
    BIN_COLUMNS,
    BY_BIN,
    masked_gene_rows,
    masked_gene_sentence,
    shown_elsewhere,
)
from screformer.model_cards.other_splits import other_splits_paragraphs

EXTRA_METRIC_TITLES = {"macro_auc": "Macro-AUC", "expected_calibration_error": "Calibration error"}
# Of the hundred settings of a run, those that decide what is learned.
TRAINING_SETTINGS = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "early_stopping_patience", "class_weights",
    "label_smoothing_factor", "layer_lr_decay", "freeze", "bf16", "fp16", "seed",
)  # fmt: skip


def training_procedure_section(checkpoint: Checkpoint, pretraining: Checkpoint | None) -> str:
    """Return settings and outcome of the run, and of the pretraining that it began from."""
    paragraphs = [] if pretraining is None else _run(pretraining)
    paragraphs += _run(checkpoint)
    paragraphs += distillation_paragraphs(checkpoint)
    if pretraining is None and checkpoint.training.get("task") in ("fine-tuning", DISTILLATION):
        start = checkpoint.training.get("model", {}).get("checkpoint")
        paragraphs.append(
            "There was no pretraining: the weights began at random."
            if start is None
            else f"It began from {format_value(start)}; how that was pretrained is not recorded here."
        )
    return "\n\n".join(paragraphs)


def _run(checkpoint: Checkpoint) -> list[str]:
    record = checkpoint.training
    if not record:
        return ["The training procedure is not recorded."]
    settings = {name: record["training"][name] for name in TRAINING_SETTINGS if name in record.get("training", {})}
    if settings.get("max_steps", -1) < 0:  # transformers' way to say that epochs decide
        settings.pop("max_steps", None)
    sections = (record.get("model", {}), record.get("cells", {}), record.get("classifier", {}), settings)
    rows = [row for section in sections for row in flat_rows(section)]
    paragraphs = [f"### {plain(record.get('task', 'training')).capitalize()}", table(("Setting", "Value"), rows)]
    rows = list(flat_rows({name: value for name, value in checkpoint.metrics.items() if not shown_elsewhere(name)}))
    if rows:
        paragraphs.append(table(("Outcome", "Value"), rows))
    if starts_as_regression(record):
        paragraphs.append(
            f"The classifier began as a logistic regression on {_start_of(record)} of the training cells, fitted "
            "before the training; what the network learned is added to it."
        )
    return paragraphs + _masked_genes(checkpoint.metrics)


def starts_as_regression(record: Json) -> bool:
    """Return whether a classifier began as a regression on its training cells."""
    return record.get("classifier", {}).get("linear_start", "zeros") != "zeros"


def _start_of(record: Json) -> str:
    """Return what that regression reads."""
    start = record["classifier"]["linear_start"]
    what = {"logistic_regression": "the bins of genes"}.get(start, f"the {start.replace('_', ' ')}")
    chosen = record.get("linear_start", {}).get("chosen")
    return plain(what + (f" ({chosen})" if chosen else ""))


def _masked_genes(metrics: Json) -> list[str]:
    """Return what a pretraining says of masked genes: the verdict in words, all answers, and those by expression."""
    answers = masked_gene_rows(metrics)
    if not answers:
        return []
    sentence = masked_gene_sentence(metrics)
    rows = ((row.title, format_share(row.accuracy), format_share(row.loss)) for row in answers)
    paragraphs = [sentence] if sentence else []
    paragraphs.append(table(("Answer to a masked gene of a held-out cell", "Accuracy", "Loss"), rows))
    if metrics.get(BY_BIN):
        columns = ("True bin", "Masked genes", *BIN_COLUMNS.values())
        bins = (
            (str(row["bin"]), format_value(row["num_masked_genes"]), *(format_share(row[name]) for name in BIN_COLUMNS))
            for row in metrics[BY_BIN]
        )
        paragraphs.append(table(columns, bins))
    return paragraphs


def evaluation_section(results: Results | None, checkpoint: Checkpoint, other_splits: Sequence[Json] = ()) -> str:
    """Return the table of the model and its rivals, the verdict in words, other splits, and the scores by cell type."""
    if results is None and checkpoint.downstream:
        return "\n\n".join(downstream_paragraphs(checkpoint.downstream))
    if results is None and not checkpoint.cell_types and masked_gene_sentence(checkpoint.metrics):
        return (
            "It labels nothing by itself. How well it predicts masked genes, beside what each gene's frequencies say, "
            "stands above, with the pretraining. What a classifier that starts from it is worth beside logistic "
            "regression is for you to find out on your own labels."
        )
    if results is None:
        return (
            "No evaluation on test cells is recorded. Measure it on labelled cells of your own before you rely on it."
        )
    model, comparison, majority = results[MODEL], compare(results), majority_sentence(results)
    size = f" of {format_value(model['num_cells'])} cells" if "num_cells" in model else ""
    extra = {
        metric: title
        for metric, title in EXTRA_METRIC_TITLES.items()
        if any(row.get(metric) is not None for row in results.values())
    }
    columns = METRIC_TITLES | extra
    rows = [
        (plain(row_title(name)), *(format_share(row.get(metric)) for metric in columns))
        for name, row in ordered_rows(results)
    ]
    paragraphs = [
        f"On the {plain(model.get('part', 'test'))} set{size}. Every row was fitted on the same training cells and "
        "tested on the same test cells; macro-F1 is the mean over the classes that occur, true or predicted.",
        table(("", *columns.values()), rows),
        comparison.sentence if comparison else "Logistic regression was not measured on this test set.",
    ]
    paragraphs += _seen_test_cells(model)
    paragraphs += [majority] if majority else []
    paragraphs += [_regression_note(results)] if comparison else []
    paragraphs += other_splits_paragraphs(results, checkpoint, other_splits)
    paragraphs += confidence_paragraphs(model)
    paragraphs += ["### By cell type", _per_class_table(results)] if "per_class" in model else []
    return "\n\n".join(paragraphs)


def _seen_test_cells(model: Metrics) -> list[str]:
    """Return whether test cells were among those that training or pretraining has read."""
    seen = model.get("seen_cells")
    if seen is None:
        return []
    told = "None of the test cells was" if not seen["num_seen"] else f"{format_value(seen['num_seen'])} test cells were"
    limit = "" if seen["is_complete"] else ", as far as that is recorded: what it began with does not say"
    return [f"{told} read while the model was trained, its pretraining included{limit}."]


def _regression_note(results: Results) -> str:
    row = results[LOGISTIC_REGRESSION]
    facts = [f"C = {row['inverse_strength']:g}"] if row.get("inverse_strength") is not None else []
    facts += [f"{row['seconds']:.1f} s, search included"] if row.get("seconds") is not None else []
    return (
        "The logistic regression reads log1p CP10k of the same genes, with an L2 penalty and balanced classes; its "
        "C was searched by cross-validation within the training cells" + (f" ({'; '.join(facts)})." if facts else ".")
    )


def _per_class_table(results: Results) -> str:
    regression = results.get(LOGISTIC_REGRESSION, {}).get("per_class", {})
    columns = ["Cell type", "Test cells", "Precision", "Recall", "F1"]
    columns += ["F1, logistic regression"] if regression else []
    rows = []
    for name, scores in by_support(results[MODEL]):
        shown = [scores[metric] for metric in ("precision", "recall", "f1")]
        shown += [regression.get(name, {}).get("f1")] if regression else []
        is_tested = scores["support"] > 0
        numbers = [format_share(value if is_tested else None) for value in shown]
        rows.append((plain(name), format_value(scores["support"]), *numbers))
    return table(columns, rows)


def limitations(results: Results | None, checkpoint: Checkpoint, other_splits: Sequence[Json] = ()) -> Iterable[str]:
    """Give one sentence a limitation, as plain text, those first that follow from the records."""
    splits, seed = checkpoint.splits, checkpoint.training.get("training", {}).get("seed")
    if "num_cells" in splits:
        unlabelled = len(splits.get("unlabelled_train", ()))
        more = f" and {format_value(unlabelled)} without a label" if unlabelled else ""
        size = format_value(splits["num_cells"]["train"])
        yield f"Trained on {size} labelled cells{more}: all it has seen of these types."
    groups, column = splits.get("test_groups") or [], splits.get("group_column")
    if len(groups) == 1 and not any(other["split"]["group_column"] == column for other in other_splits):
        yield f"Tested on one {column} only ({groups[0]}): how scores differ from one to another is open."
    elif splits and not groups:
        yield "The test cells come from the same donors as the training cells. On a new donor expect lower scores."
    run = "one training run" + (f" (seed {seed})" if seed is not None else "")
    if results is None and checkpoint.downstream:
        yield f"The weights are of {run}: how much the figures owe to that one is open."
    elif other_splits:
        yield f"Of each split {run}: what another seed would give is open."
    else:
        yield f"One split and {run}: there is no error bar, and gaps of a few points may be chance."
    if starts_as_regression(checkpoint.training):
        yield (
            "Its classifier began as a regression on the training cells: how much of the score is the transformer's "
            "own doing is not measured here."
        )
    if results is not None:
        yield from _measured_limitations(results)
    if checkpoint.cell_types:
        yield (
            "Unless an error rate is asked for, or cells unlike its training cells are marked (--max-error, "
            f"--unknown-below), it answers with one of its {len(checkpoint.cell_types)} labels, also for a cell type "
            "that it has never seen, a doublet or debris."
        )
        yield "The labels are those of the data's authors; their errors and their granularity are learned with them."
    if is_distilled(checkpoint):
        yield "It imitates another model: what that one gets wrong, it has learned to get wrong."


def _measured_limitations(results: Results) -> Iterable[str]:
    model, comparison = results[MODEL], compare(results)
    if comparison is not None and comparison.verdict == "loses":
        yield "For these labels a logistic regression is better and cheaper: prefer it, if labels are all you need."
    if comparison is not None and comparison.verdict == "draws":
        yield "For these labels a logistic regression is as good, and cheaper."
    rare, untested = rare_classes(model), untested_classes(model)
    if rare:
        yield f"Fewer than {FEW_CELLS} test cells, so that single cells decide the F1: {', '.join(rare)}."
    if untested:
        yield f"Not tested at all, for lack of test cells: {', '.join(untested)}."
    if model.get("unknown_labels"):
        unknown = ", ".join(model["unknown_labels"])
        yield f"Labels of the test set that the model does not know, counted as errors: {unknown}."
    yield from calibration_limitations(model)


def versions_section(checkpoint: Checkpoint) -> str:
    """Return the versions that the training recorded."""
    versions = checkpoint.training.get("versions")
    return table(("Software", "Version"), flat_rows(versions)) if versions else "Not recorded."
