"""Fine-tuning on labelled cells: predict the cell type (paper, sections 2.5, 2.8 and 2.9)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from screformer.annotation.unknown_types import write_unknown_types
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.corpus import Corpus, open_corpus
from screformer.train.argument_parser import parse_arguments
from screformer.train.arguments import (
    FineTuningArguments,
    FineTuningDataArguments,
    ModelArguments,
)
from screformer.train.batch_size import fit_training_batch_size, longest_cell
from screformer.train.cell_dataset import CellDataset
from screformer.train.cell_type_trainer import CellTypeTrainer
from screformer.train.class_weights import class_weighted_loss
from screformer.train.classifier_start import ClassifierArguments, start_classifier
from screformer.train.collator import CellCollator
from screformer.train.corpus_columns import describe_corpus
from screformer.train.labelled_cells import LabelledCells, split_labelled_cells, write_split
from screformer.train.metrics import compute_cell_type_metrics, keep_logits
from screformer.train.starting_model import starting_model
from screformer.train.trainable import choose_trainable
from screformer.train.training_run import (
    TrainingResult,
    begin_run,
    describe_run,
    early_stopping,
    leave_process_group,
    log_to_console,
    set_seeds,
    train_and_save,
)
from screformer.train.tree_targets import TreeLoss, TreeTargets, open_label_tree, tree_weights

# By name, because run with `python -m` this module is called __main__.
logger = logging.getLogger("screformer.train.finetune")

EXAMPLE = """\
  python -m screformer.train.finetune --corpus corpus --checkpoint pretrained --group_column donor --test_groups human4
  python -m screformer.train.finetune finetune-paper --corpus corpus --checkpoint pretrained
  python -m screformer.train.finetune finetune.yaml --learning_rate 3e-4
  accelerate launch -m screformer.train.finetune --corpus corpus --checkpoint pretrained --bf16"""


def finetune(
    model_arguments: ModelArguments,
    data: FineTuningDataArguments,
    training: FineTuningArguments,
    classifier: ClassifierArguments | None = None,
) -> TrainingResult:
    """Train a cell type classifier and return its folder and validation metrics.

    The cells are split as `data` says, and ``splits.json`` keeps the names of each part's cells. Validation accuracy
    selects the best epoch and decides when to stop; with a `validation_fraction` of 0 all cells train and the last
    epoch is kept. The test cells are not touched here: see
    `screformer.train.evaluate`. Labels are those of the training part; validation cells with another label are left
    out, with a logged warning. Beside the checkpoint lies a detector of cells of other types, fitted to the training
    cells before the training starts (`screformer.annotation.unknown_types`). A run that was interrupted in
    `training.output_dir` is resumed; a finished one is returned as it is.

    The classifier is calibrated (see `annotation.calibration`) by validation cells; where these are not whole groups,
    and it starts as a regression that was cross-validated over groups, by what that said of the groups it had not seen.

    Raises
    ------
    ValueError
        A column is not in the corpus, there are fewer than two labels, one is not in `label_tree`, a part is empty, the
        checkpoint belongs to another tokenizer than the corpus, or the output folder holds a run with other settings.
    """
    corpus = open_corpus(data.corpus)
    classifier = classifier or ClassifierArguments()
    record = describe_run(
        "fine-tuning", training, describe_corpus(corpus), model=model_arguments, cells=data, classifier=classifier
    )
    begun = begin_run(training, record)
    if isinstance(begun, TrainingResult):
        return begun
    cells = split_labelled_cells(corpus, data, training.seed)
    _check_selection(cells, training)
    targets = _tree_targets(cells, data, training)
    label_names = sorted(set(cells.labels[cells.split.train].tolist())) if targets is None else list(targets.leaves)
    if len(label_names) < 2:
        raise ValueError(f"label_column={data.label_column!r} has the labels {label_names} in training; two are needed")
    if training.process_index == 0:
        write_split(corpus, cells, data, training)
    set_seeds(training)
    model = starting_model(
        ScReformerForCellClassification,
        corpus.tokenizer(),
        model_arguments,
        label_names=label_names,
        head={
            **classifier.config_values,
            "label_parents": None if targets is None else targets.tree.parents,
            "calibration": None,
        },
    )
    started = start_classifier(model, classifier, corpus, cells, seed=training.seed)
    batch = fit_training_batch_size(training, model, longest=longest_cell(CellDataset(corpus)))
    model = choose_trainable(model, model_arguments, training)
    if training.unknown_types and training.process_index == 0:
        folder, is_resumed = str(training.output_dir), begun is not None
        write_unknown_types(folder, corpus, cells, label_names, seed=training.seed, is_resumed=is_resumed)
    trainer = _make_trainer(model, corpus, cells, data, training, targets)
    trainer.calibration = _kept_calibration(started.pop("calibration", None), cells, data)
    return train_and_save(
        trainer,
        {**record, **started, **batch},
        checkpoint=begun,
        held_out_name="validation",
        scores=("accuracy", "macro_f1"),
        corpus=corpus,
        used_rows=cells.rows[np.concatenate([cells.split.train, cells.split.validation])],
    )


def _kept_calibration(
    of_start: dict[str, Any] | None, cells: LabelledCells, data: FineTuningDataArguments
) -> dict[str, Any] | None:  # Any: JSON
    """Return the calibration that the classifier started with, None where that by validation cells is better.

    Groups that were not trained on say more of new groups than other cells of the same groups do.
    """
    if data.validation_groups or of_start is None:
        return None
    return of_start if of_start["by_group"] or not len(cells.split.validation) else None


def _check_selection(cells: LabelledCells, training: FineTuningArguments) -> None:
    """Refuse to choose the best epoch by cells that are not there."""
    if len(cells.split.validation) or (training.eval_strategy == "no" and not training.load_best_model_at_end):
        return
    raise ValueError(
        "validation_fraction=0 leaves no cells to choose the best epoch by. To train on all of them and keep the last "
        "epoch, add --eval_strategy no --load_best_model_at_end false; or choose a larger validation_fraction"
    )


def _tree_targets(
    cells: LabelledCells, data: FineTuningDataArguments, training: FineTuningArguments
) -> TreeTargets | None:
    """Return the targets of a label tree, None without one."""
    if data.label_tree is None:
        return None
    if training.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={training.label_smoothing_factor} and label_tree={data.label_tree!r}: a label "
            "that is not a leaf has no share to give to the others; leave one of them out"
        )
    labels = cells.labels[cells.split.train]
    return TreeTargets(open_label_tree(data.label_tree, labels), labels)


def _make_trainer(
    model: ScReformerForCellClassification,
    corpus: Corpus,
    cells: LabelledCells,
    data: FineTuningDataArguments,
    training: FineTuningArguments,
    targets: TreeTargets | None = None,
) -> CellTypeTrainer:
    label2id = model.config.label2id if targets is None else targets.label2id
    labels = cells.labels[cells.split.train]
    loss: Callable[..., Any] | None  # Any: model outputs
    if targets is None:
        loss = class_weighted_loss(labels, model.config.label2id, training)
    else:
        loss = TreeLoss(targets, tree_weights(targets, labels) if training.class_weights == "balanced" else None)

    def collator(gene_dropout: float) -> CellCollator:
        return CellCollator.from_config(
            model.config,
            gene_dropout=gene_dropout,
            label_column=data.label_column,
            label2id=label2id,
            seed=training.seed,
        )

    return CellTypeTrainer(
        model=model,
        label_names=list(model.config.id2label.values()) if targets is None else targets.names,
        args=training,
        train_dataset=CellDataset(corpus, cells.rows[cells.split.train], columns=[data.label_column]),
        eval_dataset=CellDataset(corpus, cells.rows[cells.split.validation], columns=[data.label_column]),
        data_collator=collator(data.gene_dropout),
        eval_data_collator=collator(0.0),
        processing_class=corpus.tokenizer(),
        compute_loss_func=loss,
        compute_metrics=compute_cell_type_metrics if targets is None else targets.compute_metrics,
        preprocess_logits_for_metrics=keep_logits,
        callbacks=early_stopping(training),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, fine-tune, and log where the results are."""
    data, model, classifier, training = parse_arguments(
        [FineTuningDataArguments, ModelArguments, ClassifierArguments, FineTuningArguments],
        argv,
        program="python -m screformer.train.finetune",
        description="Fine-tune scReformer-BERT on labelled cells. The test cells stay untouched: see train.evaluate.",
        example=EXAMPLE,
        recipes="finetune",
    )
    log_to_console(training)
    try:
        result = finetune(model, data, training, classifier)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    logger.info("checkpoint and results: %s", result.output_dir)
    leave_process_group()


if __name__ == "__main__":
    main()
