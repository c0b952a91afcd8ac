"""What each part of the method is worth (table 2 of Li et al. 2025): models that lack one part, on the same cells.

Every variant is a system of the comparison: gene vectors, pretraining and variable genes come from the training cells
alone, and the same folds, seeds and scores are used. What a step costs at all genes, in time and memory, with exact
attention too, is in `ablation_costs`.

A CPU takes the tiny preset, on expressed genes, 50 labelled cells of each type: what the table says is of these toy
widths. ``--preset base --gene-space full --cells-per-label 0`` is the paper's, on a GPU.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from screformer.benchmarks.ablation_costs import COST_LIMITS, COSTS, NUM_VARIABLE_GENES, measure_costs, write_costs
from screformer.benchmarks.cell_type_systems import CellTypeSystem
from screformer.benchmarks.comparison import RUN_KEYS, SPLIT_SEED, made_with, provenance, run_systems
from screformer.benchmarks.comparison_figures import plot_system_scores
from screformer.benchmarks.comparison_statistics import pool_cells, pooled_macro_f1, summarize_systems
from screformer.benchmarks.comparison_tables import difference, number
from screformer.benchmarks.fine_tuning_runs import without_folders
from screformer.benchmarks.labelled_data import LabelledData, read_labelled_data
from screformer.benchmarks.protocol import Kind, make_folds, read_predictions
from screformer.benchmarks.suites import CellsToCompareOn
from screformer.benchmarks.system_ours import ScReformerSystem
from screformer.benchmarks.systems_simple import LogisticRegressionSystem
from screformer.configuration_screformer import ScReformerConfig
from screformer.model_cards.markdown import table
from screformer.tokenization.example_cells import example_cells_path
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer
from screformer.train.result_files import write_json

logger = logging.getLogger("screformer.benchmarks.ablations")
FULL, REGRESSION = "full", "logistic_regression"
# All cells outside the test set train; the last epoch is kept, so that no cell chooses anything.
FINETUNING = (
    "--validation_fraction 0 --eval_strategy no --load_best_model_at_end False --early_stopping_patience 0 "
    "--class_weights balanced --per_device_train_batch_size 16 --gradient_accumulation_steps 1 --unknown_types False "
    "--gene_dropout 0.5"
)
PRETRAINING = "pretrain-tiny --gene_start random --early_stopping_patience 0"


class Settings(NamedTuple):
    """What all variants share.

    Attributes
    ----------
    preset
        Width of the models.
    gene_space
        ``"expressed"`` or ``"full"``.
    cells_per_label
        Labelled cells of each type, drawn by the seed; 0 for all.
    learning_rate, epochs
        Of fine-tuning.
    pretraining_epochs
        Of masked genes.
    """

    preset: str = "tiny"
    gene_space: str = "expressed"
    cells_per_label: int = 50
    learning_rate: float = 3e-3
    epochs: float = 6
    pretraining_epochs: float = 1

    def system(
        self,
        title: str,
        *,
        overrides: str = "",
        finetuning: str = "",
        gene_space: str | None = None,
        is_pretrained: bool = True,
        has_gene_vectors: bool = True,
        num_variable_genes: int | None = None,
        encoder: Literal["reformer", "standard"] = "reformer",
        tokenizer: ScReformerTokenizer | None = None,
    ) -> CellTypeSystem:
        """Return the whole method but for what is said."""
        space = f"--gene_space {gene_space or self.gene_space}"
        cells = f" --cells_per_label {self.cells_per_label}" if self.cells_per_label else ""
        pretraining = f"{PRETRAINING} {space} --num_train_epochs {self.pretraining_epochs}"
        return ScReformerSystem(
            f"{FINETUNING} {space} --learning_rate {self.learning_rate} --num_train_epochs {self.epochs}{cells} "
            f"{finetuning}",
            model=f"--preset {self.preset} --config_overrides reversible=false {overrides}",
            pretraining=pretraining if is_pretrained else None,
            gene_vectors=ScReformerConfig.preset(self.preset).hidden_size if has_gene_vectors else None,
            num_variable_genes=num_variable_genes,
            encoder=encoder,
            tokenizer=tokenizer,
            title=title,
        )


DEFAULTS = Settings()


def ablations(settings: Settings) -> dict[str, Callable[[], CellTypeSystem]]:
    """Return name -> what makes the variant; the whole method first, logistic regression last."""
    make = partial(partial, settings.system)
    rounds = ScReformerConfig.preset(settings.preset).num_hashes
    return {
        FULL: make("The whole method"),
        "exact_attention": make("Exact attention (SDPA)", overrides="attention=exact"),
        "variable_genes": make(f"{NUM_VARIABLE_GENES:,} variable genes", num_variable_genes=NUM_VARIABLE_GENES),
        "standard_transformer": make(
            f"Standard transformer, {NUM_VARIABLE_GENES:,} variable genes",
            encoder="standard",
            num_variable_genes=NUM_VARIABLE_GENES,
        ),
        "not_pretrained": make("No pretraining", is_pretrained=False),
        "no_gene2vec": make("No Gene2vec", has_gene_vectors=False),
        "other_gene_space": make(
            "Every gene" if settings.gene_space == "expressed" else "Expressed genes alone",
            gene_space="full" if settings.gene_space == "expressed" else "expressed",
        ),
        "one_round": make("One hash round", overrides="num_hashes=1"),
        "more_rounds": make(f"{4 * rounds} hash rounds", overrides=f"num_hashes={4 * rounds}"),
        "few_bins": make("3 bins", tokenizer=ScReformerTokenizer(num_bins=3)),
        "many_bins": make("12 bins", tokenizer=ScReformerTokenizer(num_bins=12)),
        "pooled": make("Pooled head", finetuning="--classifier_paths pooled"),
        "frozen": make("Encoder frozen", finetuning="--freeze encoder"),
        REGRESSION: LogisticRegressionSystem,
    }  # fmt: skip


def run_ablations(
    data: LabelledData,
    *,
    kind: Kind,
    settings: Settings = DEFAULTS,
    names: Sequence[str] = (),
    seeds: int = 1,
    output: str | Path = "benchmarks/results",
    work: str | Path = "runs/ablations",
    command: str = "run_ablations",
    note: str | None = None,
) -> dict[str, Any]:  # Any: JSON
    """Run the variants on all folds; write ``ablations-DATA.json``, table and figure; return the JSON.

    Parameters
    ----------
    data, kind, seeds, output, work, command, note
        As for `compare_systems`.
    settings
        What all variants share.
    names
        Of `ablations`; default all. The whole method is always run.

    Raises
    ------
    ValueError
        A name is unknown, or as `make_folds`.
    """
    known = ablations(settings)
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"names got {unknown}; there are {', '.join(known)}")
    chosen = {name: make for name, make in known.items() if not names or name in {FULL, *names}}
    folds = make_folds(data, kind, seed=SPLIT_SEED)
    runs, left_out = run_systems(data, chosen, folds, seeds=seeds, work=work)
    systems = summarize_systems(runs, baseline=FULL)
    for name, row in systems.items():
        own = [read_predictions(run, work) for run in runs if run["system"] == name and run["seed"] == 0]
        row["pooled_macro_f1"] = pooled_macro_f1(pool_cells(own))
    columns = [
        "variant", "accuracy", "macro-F1", "macro-F1 less the whole method", "macro-F1, all cells", "fit s", "MB",
    ]  # fmt: skip
    rows = [
        [
            row["title"],
            number(row["accuracy"]),
            number(row["macro_f1"]),
            difference(row.get("less_baseline")),
            number(row["pooled_macro_f1"]),
            f"{row['fit_seconds']:.1f}",
            "-" if row["peak_megabytes"] is None else f"{row['peak_megabytes']:.0f}",
        ]
        for row in systems.values()
    ]
    notes = [_describe(data, kind, len(folds), seeds, settings), *([] if note is None else [note])]
    results = {
        "question": f"What is each part of the method worth? {data.name}, preset {settings.preset}",
        "data": data.name,
        "kind": kind,
        "num_folds": len(folds),
        "seeds": seeds,
        **provenance(command),
        "made_with": made_with(runs),
        "settings": settings._asdict(),
        "columns": columns,
        "rows": rows,
        "notes": notes + [f"Left out: {name} ({why})." for name, why in left_out.items()],
        "left_out": left_out,
        "systems": systems,
        "runs": [{key: run[key] for key in RUN_KEYS} for run in runs],
    }
    stem = Path(output, f"ablations-{data.name}")
    write_json(f"{stem}.json", results)
    Path(f"{stem}.md").write_text(format_ablations(results), encoding="utf-8")
    plot_system_scores(systems, f"{stem}.png", title=f"Ablations, {data.name}, {settings.preset}")
    return results


def _describe(data: LabelledData, kind: Kind, num_folds: int, seeds: int, settings: Settings) -> str:
    cells = f"at most {settings.cells_per_label}" if settings.cells_per_label else "all"
    genes = "expressed genes" if settings.gene_space == "expressed" else "every gene"
    width = "" if settings.preset == "base" else ", **a toy width**, whose figures do not say what the paper's would be"
    return (
        f"{data.adata.n_obs:,} cells of {data.name}, {kind.replace('_', ' ')}, {num_folds} folds, {seeds} "
        f"seed{'s' if seeds > 1 else ''}. Preset {settings.preset}{width}; {genes}; {cells} labelled cells of each "
        f"type; epochs: {settings.pretraining_epochs:g} of pretraining and {settings.epochs:g} of fine-tuning at "
        f"{settings.learning_rate:g}, on the training cells alone. The classifier is the paper's: no regression helps "
        "it. Intervals (95%) by Student's t over folds; of fewer than five no difference is a claim. Logistic "
        "regression has every labelled training cell. Seconds: all of a variant's training, mean of its runs; MB: the "
        "most of any run, beyond the data."
    )


def format_ablations(results: Mapping[str, Any]) -> str:
    """Return the result as Markdown."""
    lines = [
        f"# {results['question']}",
        f"{results['date']}, `{results['command']}`, screformer {results['versions']['screformer']}.",
        *results["notes"],
        table(results["columns"], results["rows"]),
    ]
    return "\n\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        prog="screformer benchmark ablations",
        description="What pretraining, Gene2vec, LSH attention, gene space, rounds, bins and head are worth.",
        epilog="example: screformer benchmark ablations --names not_pretrained no_gene2vec; all of them: eleven hours "
        "of one core, of which every gene takes nine. The paper's, on a GPU: screformer benchmark ablations --preset "
        "base --gene-space full --cells-per-label 0 --learning-rate 1e-4 --epochs 3 --pretraining-epochs 5 --device "
        "cuda",
    )
    parser.add_argument("--cells", help="FILE[:LABELS[:DONORS]]; default: the packaged pancreas.")
    parser.add_argument("--output", default="benchmarks/results", help="Folder for the results (default: %(default)s).")
    parser.add_argument("--work", default="runs/ablations", help="Folder for the runs (default: %(default)s).")
    parser.add_argument("--names", nargs="+", default=[], help=f"Some of {', '.join(ablations(DEFAULTS))}.")
    parser.add_argument(
        "--costs", nargs="*", default=[], help=f"Only measure steps: some of {', '.join(COSTS)}, or all."
    )
    parser.add_argument("--preset", default=DEFAULTS.preset, choices=["tiny", "base", "large"])
    parser.add_argument("--gene-space", default=DEFAULTS.gene_space, choices=["expressed", "full"])
    parser.add_argument("--cells-per-label", type=int, default=DEFAULTS.cells_per_label, help="0: all.")
    parser.add_argument("--learning-rate", type=float, default=DEFAULTS.learning_rate, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=DEFAULTS.epochs, help="Of fine-tuning (default: %(default)s).")
    parser.add_argument("--pretraining-epochs", type=float, default=DEFAULTS.pretraining_epochs)
    parser.add_argument("--note", help="Sentence for readers of the table: what ran beside.")
    parser.add_argument("--seeds", type=int, default=1, help="Of each variant and fold (default: %(default)s).")
    parser.add_argument("--device", default="cpu", help="Where steps are measured; training takes the GPU there is.")
    parser.add_argument("--memory-limit", type=float, default=COST_LIMITS.memory_limit, help="GB a measured step.")
    parser.add_argument("--time-limit", type=float, default=COST_LIMITS.time_limit, help="Seconds a measured step.")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("screformer.benchmarks").setLevel(logging.INFO)
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = " ".join(["screformer benchmark ablations", *without_folders(arguments)])
    try:
        if given.costs:
            limits = replace(
                COST_LIMITS, memory_limit=given.memory_limit, time_limit=given.time_limit, device=given.device
            )
            rows = measure_costs(list(COSTS) if given.costs == ["all"] else given.costs, limits=limits)
            results = write_costs(rows, given.output, provenance=provenance(command))
        else:
            one = CellsToCompareOn(str(example_cells_path()), group_column="donor")
            one = one if given.cells is None else CellsToCompareOn.parse(given.cells)
            data = read_labelled_data(one.path, label_column=one.label_column, group_column=one.group_column)
            results = run_ablations(
                data,
                kind="five_fold" if data.groups is None else "leave_one_group_out",
                settings=Settings(**{name: getattr(given, name) for name in Settings._fields}),
                names=given.names,
                seeds=given.seeds,
                output=given.output,
                work=given.work,
                command=command,
                note=given.note,
            )
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(table(results["columns"], results["rows"]) + "\n")


if __name__ == "__main__":
    main()
