"""The tables of a comparison as Markdown: systems, cell types, pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from screformer.benchmarks.comparison_statistics import BASELINE, pooled_macro_f1
from screformer.model_cards.markdown import table

Results = Mapping[str, Any]
Rows = tuple[list[str], list[list[str]]]
WEAK_SENTENCE = "**Weak set**: logistic regression errs so little that no difference here says anything."
PAIRS_SENTENCE = (
    "Between the best system and each other one, and logistic regression and each other one. Over folds: signs of the "
    "folds' differences flipped. Over cells: McNemar's exact test, adjusted for all pairs (Benjamini and Hochberg); "
    "cells of one donor are not independent, so that it is the weaker evidence."
)


def format_comparison(results: Results) -> str:
    """Return one comparison: what was done, the systems, F1 by cell type, paired tests with ours, what was left out."""
    lines = [f"# {results['question']}", "", provenance_sentence(results), "", systems_table(results)]
    if results["is_weak"]:
        lines += ["", WEAK_SENTENCE]
    lines += ["", "## F1 by cell type", "", cell_type_table(results)]
    if results["paired_tests"]:
        lines += ["", "## Paired differences", "", PAIRS_SENTENCE, "", pairs_table(results)]
    lines += [f"\nLeft out: {name} ({why})." for name, why in results["left_out"].items()]
    return "\n".join(lines) + "\n"


def provenance_sentence(results: Results) -> str:
    """Return when, how and on how much it was measured, and what the table's numbers are."""
    return (
        f"{measured_sentence(results)} Means and SD over folds; intervals (95%) of differences by Student's t over "
        "folds. Macro-F1 of all cells is that of the test cells of all folds together: a type with one cell in a fold "
        "weighs like any other in that fold's. Seconds and memory of one run; memory is that of the CPU beyond the "
        "data, Seurat's without R. Systems with * are not inductive: a cell's label depends on which others are named "
        f"with it.{_made_with(results.get('made_with', []))}{' ' + results['note'] if results.get('note') else ''}"
    )


def _made_with(groups: Sequence[Mapping[str, Any]]) -> str:
    """Return when and with what the single runs were made, which may be older than the page."""
    told = [
        f"{one['num_runs']} of {' to '.join(dict.fromkeys((one['dates'][0], one['dates'][-1])))}, screformer "
        f"{one['versions']['screformer']}, torch {one['versions']['torch']}"
        + (f", {one['device']}" if one["device"] else "")
        for one in groups
    ]
    return f" Runs: {'; '.join(told)}." if told else ""


def measured_sentence(results: Results) -> str:
    """Return when, how and on how much it was measured."""
    folds = f"{results['num_folds']} fold{'s' if results['num_folds'] > 1 else ''}"
    seeds = f"{results['seeds']} seed{'s' if results['seeds'] > 1 else ''}"
    return (
        f"{results['date']}, `{results['command']}`, {results['num_cells']:,} cells, {results['num_genes']:,} genes, "
        f"{results['kind'].replace('_', ' ')}, {folds}, {seeds}, screformer {results['versions']['screformer']}."
    )


def systems_table(results: Results) -> str:
    """Return `systems_rows` as Markdown."""
    return table(*systems_rows(results))


def systems_rows(results: Results) -> Rows:
    """Return columns and a row a system: scores, spreads, difference to logistic regression, calibration, cost."""
    header = [
        "system", "accuracy", "macro-F1", "SD", "macro-F1 less logistic regression", "macro-F1, all cells", "macro-AUC",
        "calibration error", "fit s", "predict s", "MB",
    ]  # fmt: skip
    rows = [
        [
            shown_title(row),
            number(row["accuracy"]),
            number(row["macro_f1"]),
            number(row["macro_f1_sd"]),
            difference(row.get("less_baseline")),
            number(pooled_macro_f1(row)),
            number(row["macro_auc"]),
            number(row["expected_calibration_error"]),
            f"{row['fit_seconds']:.1f}",
            f"{row['predict_seconds']:.1f}",
            "-" if row["peak_megabytes"] is None else f"{row['peak_megabytes']:.0f}",
        ]
        for row in results["systems"].values()
    ]
    return header, rows


def cell_type_table(results: Results) -> str:
    """Return `cell_type_rows` as Markdown."""
    return table(*cell_type_rows(results))


def cell_type_rows(results: Results) -> Rows:
    """Return columns, and a row a cell type with its number of cells, a column a system."""
    systems = list(results["systems"].values())
    names, matrix = systems[0]["label_names"], systems[0]["confusion_matrix"]
    support = {name: sum(row) for name, row in zip(names, matrix, strict=True)}
    labels = sorted({label for row in systems for label in row["f1"]}, key=lambda label: -support[label])
    rows = [[label, f"{support[label]:,}", *(number(row["f1"].get(label)) for row in systems)] for label in labels]
    return ["cell type", "cells", *(shown_title(row) for row in systems)], rows


def pairs_table(results: Results) -> str:
    """Return `pairs_rows` as Markdown."""
    return table(*pairs_rows(results))


def pairs_rows(results: Results) -> Rows:
    """Return columns, and the pairs of the best system, and of logistic regression, with each other system."""
    best = next(iter(results["systems"]))
    titles = {name: row["title"] for name, row in results["systems"].items()}
    shown = [row for row in results["paired_tests"] if {row["first"], row["second"]} & {best, BASELINE}]
    rows = [
        [
            titles[row["first"]],
            titles[row["second"]],
            "-" if row["macro_f1"] is None else f"{row['macro_f1']:+.3f}",
            p_value(row["p_folds"]),
            f"{row['only_first_right']} : {row['only_second_right']}",
            p_value(row["p_cells_adjusted"]),
        ]
        for row in shown
    ]
    return ["first", "second", "macro-F1", "p over folds", "cells only one has right", "p over cells"], rows


def shown_title(row: Mapping[str, Any]) -> str:
    """Return a system's title, with * where it is not inductive."""
    return row["title"] + ("" if row["is_inductive"] else " *")


def number(value: float | None) -> str:
    """Return three decimals, or a dash."""
    return "-" if value is None else f"{value:.3f}"


def p_value(value: float | None) -> str:
    """Return two decimals, or ``< .001``, or a dash."""
    return "-" if value is None else "< .001" if value < 0.001 else f"{value:.3f}"


def difference(row: Mapping[str, Any] | None) -> str:
    """Return a difference of macro-F1 with its interval; empty for the baseline itself."""
    if row is None or row["macro_f1"] is None:
        return ""
    interval = row["macro_f1_interval"]
    return f"{row['macro_f1']:+.3f}" + ("" if interval is None else f" ({interval[0]:+.3f} to {interval[1]:+.3f})")
