"""How well systems do with few labelled cells of each type: the few-shot curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from screformer.benchmarks.comparison import SPLIT_SEED, Systems, provenance, run_systems
from screformer.benchmarks.comparison_statistics import BASELINE, summarize_systems
from screformer.benchmarks.comparison_tables import Rows, difference, number, shown_title
from screformer.benchmarks.labelled_data import LabelledData
from screformer.benchmarks.protocol import Kind, few_labelled_cells, make_folds
from screformer.model_cards.markdown import table
from screformer.train.figures import plot_score_curves
from screformer.train.result_files import write_json

ROW_KEYS = ("title", "is_inductive", "macro_f1", "macro_f1_sd", "macro_f1_interval", "accuracy", "less_baseline")


def compare_with_few_labels(
    data: LabelledData,
    systems: Systems,
    numbers: Sequence[int],
    *,
    kind: Kind,
    output: str | Path,
    work: str | Path,
    seeds: int = 1,
    command: str = "compare_with_few_labels",
    num_workers: int = 1,
) -> dict[str, Any]:  # Any: JSON
    """Run all systems on all folds with at most so many training cells a label; write JSON, table and figure.

    Parameters
    ----------
    data, systems, kind, output, work, seeds, command, num_workers
        As for `compare_systems`; the files are ``few-labels-DATA-KIND.*``.
    numbers
        Training cells of each label.

    Raises
    ------
    ValueError
        `numbers` is empty or one is below 1, `seeds` is below 1, or as `make_folds`.
    """
    if not numbers:
        raise ValueError("numbers is empty; name at least one number of training cells a label")
    folds, stem = make_folds(data, kind, seed=SPLIT_SEED), Path(output, f"few-labels-{data.name}-{kind}")
    points: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for num_cells in sorted(set(numbers)):
        fewer = [few_labelled_cells(data, fold, num_cells, seed=SPLIT_SEED) for fold in folds]
        runs, missing = run_systems(data, systems, fewer, seeds=seeds, work=work, num_workers=num_workers)
        left_out |= missing
        points[str(num_cells)] = {
            name: {key: row.get(key) for key in ROW_KEYS} for name, row in summarize_systems(runs).items()
        }
    results = {
        "question": f"How many labelled cells of each type do systems need on {data.name}?",
        "data": data.name,
        "kind": kind,
        "num_folds": len(folds),
        "seeds": seeds,
        **provenance(command),
        "points": points,
        "left_out": left_out,
    }
    write_json(f"{stem}.json", results)
    Path(f"{stem}.md").write_text(format_few_labels(results), encoding="utf-8")
    plot_few_labels(results, f"{stem}.png")
    return results


def few_labels_table(results: Mapping[str, Any]) -> str:
    """Return `few_labels_rows` as Markdown."""
    return table(*few_labels_rows(results))


def few_labels_rows(results: Mapping[str, Any]) -> Rows:
    """Return columns (numbers of training cells), a row a system: macro-F1 (difference to logistic regression)."""
    points = results["points"]
    last = list(points.values())[-1]
    rows = []
    for name, row in last.items():
        cells = [points[num_cells].get(name) for num_cells in points]
        rows.append([shown_title(row), *(_shown(cell, name) for cell in cells)])
    return ["system", *(f"{num_cells} a type" for num_cells in points)], rows


def _shown(row: Mapping[str, Any] | None, name: str) -> str:
    if row is None:
        return "-"
    gap = "" if name == BASELINE else difference(row["less_baseline"])
    return number(row["macro_f1"]) + (f" ({gap.split()[0]})" if gap else "")


def format_few_labels(results: Mapping[str, Any]) -> str:
    """Return the result as Markdown."""
    lines = [
        f"# {results['question']}",
        "",
        f"{results['date']}, `{results['command']}`, {results['kind'].replace('_', ' ')}, {results['num_folds']} "
        f"folds, {results['seeds']} seed{'s' if results['seeds'] > 1 else ''}. Macro-F1 of the same test cells, "
        "trained on at most so many cells of each type; in brackets the difference to logistic regression.",
        "",
        few_labels_table(results),
        *(f"\nLeft out: {name} ({why})." for name, why in results["left_out"].items()),
    ]
    return "\n".join(lines) + "\n"


def plot_few_labels(results: Mapping[str, Any], path: str | Path) -> None:
    """Draw a curve a system, in the legend from the highest to the lowest at their ends."""
    points = results["points"]
    curves: dict[str, dict[float, float]] = {}
    for num_cells, rows in points.items():
        for row in rows.values():
            curves.setdefault(row["title"], {})[int(num_cells)] = row["macro_f1"]
    ends = {name: places[max(places)] for name, places in curves.items()}
    plot_score_curves(
        dict(sorted(curves.items(), key=lambda pair: -ends[pair[0]])),
        path,
        title=f"{results['data']}: few labelled cells",
        xlabel="Training cells of each type, at most",
    )
