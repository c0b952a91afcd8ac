"""The figures of one comparison, each with its caption and what it shows in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from screformer.benchmarks.comparison_statistics import BASELINE, OURS
from screformer.model_cards.page_blocks import Picture
from screformer.train.calibration_record import plot_reliability_of_systems
from screformer.train.figures import (
    plot_comparison,
    plot_confusion_matrix,
    plot_cost,
    plot_proportions,
    plot_roc_curves,
)

Results = Mapping[str, Any]  # Any: JSON
SCORES = ("accuracy", "macro_f1")
NO_COST = "majority_class"  # it learns nothing, and would squeeze the others together
SHORTEST = 1e-3  # seconds; times are rounded to that, and 0 has no place on a logarithmic axis


def comparison_pictures(results: Results, title: str, folder: Path) -> list[Picture]:
    """Draw scores, cost, cell types, ROC, confusion matrices and calibration; what was not measured is left out.

    ROC, confusion matrix and calibration are of ours, or of the best system where ours is missing, and the latter two
    of logistic regression as well.
    """
    stem = f"{results['data']}-{results['kind']}"
    leading = OURS if OURS in results["systems"] else next(iter(results["systems"]))
    shown = {name: results["systems"][name] for name in (leading, BASELINE) if name in results["systems"]}
    pictures = [
        _scores(results, title, folder / f"{stem}-scores.png"),
        _cost(results["systems"], leading, title, folder / f"{stem}-cost.png"),
        _cell_types(shown[leading], results["data"], folder / f"{stem}-cell_types.png"),
        _roc(results["systems"], leading, title, folder / f"{stem}-roc.png"),
        *(_confusion(row, title, folder / f"{stem}-confusion-{name}.png") for name, row in shown.items()),
        _reliability(shown, title, folder / f"{stem}-reliability.png"),
    ]
    return [picture for picture in pictures if picture is not None]


def plot_system_scores(systems: Mapping[str, Mapping[str, Any]], path: str | Path, *, title: str) -> None:
    """Draw accuracy and macro-F1 of each system of `summarize_systems`, with intervals over folds, into a PNG file."""
    values, intervals = (
        {row["title"]: {score: row[score + ending] for score in SCORES} for row in systems.values()}
        for ending in ("", "_interval")
    )
    plot_comparison(values, path, title=title, intervals=intervals)


def _scores(results: Results, title: str, path: Path) -> Picture:
    rows = list(results["systems"].values())
    plot_system_scores(results["systems"], path, title=title)
    alt_text = f"Bars of accuracy and macro-F1 of {len(rows)} systems"
    if not results["is_weak"]:
        alt_text += f"; the best macro-F1 is that of {rows[0]['title']}, {rows[0]['macro_f1']:.3f}"
    return Picture(path, "Accuracy and macro-F1, means over folds; the black lines are 95% intervals.", f"{alt_text}.")


def _cost(systems: Results, leading: str, title: str, path: Path) -> Picture | None:
    points = {
        row["title"]: (max(row["fit_seconds"] + row["predict_seconds"], SHORTEST), row["macro_f1"])
        for name, row in systems.items()
        if name != NO_COST
    }
    if not points:
        return None
    plot_cost(points, path, title=title, emphasized=systems[leading]["title"])
    return Picture(
        path,
        "What a system costs beside how well it does; one run on a CPU. The majority class is left out.",
        f"Macro-F1 over seconds of {len(points)} systems, from {min(points.values())[0]:.2g} to "
        f"{max(points.values())[0]:.2g} seconds.",
    )


def _cell_types(row: Mapping[str, Any], data: str, path: Path) -> Picture:
    counts = {name: sum(own) for name, own in zip(row["label_names"], row["confusion_matrix"], strict=True) if sum(own)}
    plot_proportions({data: counts}, path, title="Cell types", group_name="data set")
    most = max(counts, key=lambda name: counts[name])
    return Picture(
        path,
        "Cell types of the test cells of all folds.",
        f"Shares of {len(counts)} cell types; the commonest is {most}, {counts[most] / sum(counts.values()):.0%}.",
    )


def _roc(systems: Results, leading: str, title: str, path: Path) -> Picture | None:
    having = [name for name in (leading, *systems) if any(systems[name]["roc_curves"].values())]
    if not having:
        return None
    row = systems[having[0]]
    plot_roc_curves(row["roc_curves"], path, title=f"{row['title']}\n{title}")
    areas = {label: curve["auc"] for label, curve in row["roc_curves"].items() if curve is not None}
    worst = min(areas, key=areas.__getitem__)
    return Picture(
        path,
        f"{row['title']}: one cell type against the rest, test cells of all folds together.",
        f"ROC curves of {len(areas)} cell types; the smallest area is that of {worst}, {areas[worst]:.3f}.",
    )


def _confusion(row: Mapping[str, Any], title: str, path: Path) -> Picture:
    matrix, names = np.array(row["confusion_matrix"]), row["label_names"]
    plot_confusion_matrix(row["confusion_matrix"], names, path, title=f"{row['title']}\n{title}")
    wrong = matrix - np.diag(np.diag(matrix))
    true, given = np.unravel_index(int(wrong.argmax()), wrong.shape)
    told = f"; most often {names[true]} is called {names[given]}, {wrong.max():,} cells" if wrong.any() else ""
    return Picture(
        path,
        f"{row['title']}: test cells of all folds by true and predicted cell type.",
        f"Confusion matrix of {row['title']}: {np.trace(matrix):,} of {matrix.sum():,} cells are right{told}.",
    )


def _reliability(systems: Results, title: str, path: Path) -> Picture | None:
    rows = {
        row["title"]: (row["reliability"], row["expected_calibration_error"])
        for row in systems.values()
        if row["reliability"]
    }
    if not rows:
        return None
    plot_reliability_of_systems(rows, path, title=title)
    errors = ", ".join(f"{name} {error:.3f}" for name, (_, error) in rows.items())
    return Picture(
        path,
        "Probabilities beside the share that came true; on the dashed line they are right. The area of a mark is its "
        "number of cells.",
        f"Share of right labels over their probability. Expected calibration error: {errors}.",
    )
