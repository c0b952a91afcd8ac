"""Sections of the benchmark report: one comparison with its figures, data sets against each other, few labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from screformer.benchmarks.comparison_statistics import BASELINE, OURS
from screformer.benchmarks.comparison_tables import (
    PAIRS_SENTENCE,
    WEAK_SENTENCE,
    cell_type_rows,
    number,
    pairs_rows,
    provenance_sentence,
    shown_title,
    systems_rows,
)
from screformer.benchmarks.comparison_verdicts import outcome
from screformer.benchmarks.few_labels import few_labels_rows, plot_few_labels
from screformer.model_cards.page_blocks import Block, Bullets, Cells, Heading, Picture, Text
from screformer.train.calibration_record import plot_reliability_of_systems
from screformer.train.figures import plot_comparison, plot_confusion_matrix, plot_cost, plot_roc_curves

Results = Mapping[str, Any]  # Any: JSON
KIND_TITLES = {
    "five_fold": "five random folds of cells",
    "leave_one_group_out": "each donor or data set held out once",
    "random": "one random split of cells",
}
WEAK_MARK = " (weak set)"
SHORTEST = 1e-3  # seconds; times are rounded to that, and 0 has no place on a logarithmic axis
SCORES = ("accuracy", "macro_f1")


def heading_of(results: Results) -> str:
    """Return data, kind, and whether the set is weak."""
    return f"{results['data']}, {KIND_TITLES[results['kind']]}{WEAK_MARK if results['is_weak'] else ''}"


def comparison_blocks(results: Results, figures: Path) -> list[Block]:
    """Return all of one comparison; its figures are drawn into the folder `figures`."""
    blocks: list[Block] = [
        Heading(heading_of(results)),
        outcome(results),
        Text(provenance_sentence(results)),
        Cells("Systems", *systems_rows(results)),
    ]
    if results["left_out"]:
        left_out = [f"Left out: {name}. {remedy}" for name, remedy in results["left_out"].items()]
        blocks.append(Bullets([line if line.endswith(".") else f"{line}." for line in left_out]))
    blocks += _pictures(results, figures)
    blocks += [Heading("F1 by cell type", 3), Cells("F1 by cell type", *cell_type_rows(results))]
    if results["paired_tests"]:
        blocks += [Heading("Paired differences", 3), Text(PAIRS_SENTENCE)]
        blocks.append(Cells("Paired differences", *pairs_rows(results)))
    return blocks


def _pictures(results: Results, figures: Path) -> list[Block]:
    systems = results["systems"]
    named = f"{results['data']}-{results['kind']}"
    shown = f"{results['data']}, {KIND_TITLES[results['kind']]}"
    leading = OURS if OURS in systems else next(iter(systems))

    def draw(ending: str, plot: Callable[[Path], None], caption: str, alt_text: str) -> Picture:
        path = figures / f"{named}-{ending}.png"
        plot(path)
        return Picture(path, caption, alt_text)

    def scores(path: Path) -> None:
        values = {row["title"]: {name: row[name] for name in SCORES} for row in systems.values()}
        ends = {row["title"]: {name: row[f"{name}_interval"] for name in SCORES} for row in systems.values()}
        plot_comparison(values, path, title=shown, intervals=ends)

    best = next(iter(systems.values()))
    found: list[Block] = [
        draw(
            "scores",
            scores,
            "Accuracy and macro-F1, means over folds; the black lines are 95% intervals.",
            f"Bars of accuracy and macro-F1 of {len(systems)} systems on {shown}; the best macro-F1 is that of "
            f"{best['title']}, {best['macro_f1']:.3f}.",
        )
    ]
    points = {
        row["title"]: (max(row["fit_seconds"] + row["predict_seconds"], SHORTEST), row["macro_f1"])
        for name, row in systems.items()
        if name != "majority_class"
    }
    if points:
        found.append(
            draw(
                "cost",
                lambda path: plot_cost(points, path, title=shown, emphasized=systems[leading]["title"]),
                "What a system costs beside how well it does; one run on a CPU. The majority class is left out.",
                f"Macro-F1 over seconds of {len(points)} systems, from {min(points.values())[0]:.2g} to "
                f"{max(points.values())[0]:.2g} seconds.",
            )
        )
    with_curves = [name for name in dict.fromkeys([leading, *systems]) if any(systems[name]["roc_curves"].values())]
    if with_curves:
        row = systems[with_curves[0]]
        areas = {label: curve["auc"] for label, curve in row["roc_curves"].items() if curve is not None}
        worst = min(areas, key=areas.__getitem__)
        found.append(
            draw(
                "roc",
                lambda path: plot_roc_curves(row["roc_curves"], path, title=f"{row['title']}\n{shown}"),
                f"{row['title']}: one cell type against the rest, test cells of all folds together.",
                f"ROC curves of {len(areas)} cell types; the smallest area is that of {worst}, {areas[worst]:.3f}.",
            )
        )
    for name in dict.fromkeys([leading, BASELINE]):
        if name in systems:
            found.append(_confusion(systems[name], figures / f"{named}-confusion-{name}.png"))
    calibrated = {
        systems[name]["title"]: (systems[name]["reliability"], systems[name]["expected_calibration_error"])
        for name in dict.fromkeys([leading, BASELINE])
        if name in systems and systems[name]["reliability"]
    }
    if calibrated:
        errors = ", ".join(f"{title} {error:.3f}" for title, (_, error) in calibrated.items())
        found.append(
            draw(
                "reliability",
                lambda path: plot_reliability_of_systems(calibrated, path, title=shown),
                "Probabilities beside the share that came true; on the dashed line they are right. The area of a mark "
                "is its number of cells.",
                f"Share of right labels over their probability. Expected calibration error: {errors}.",
            )
        )
    return found


def _confusion(row: Mapping[str, Any], path: Path) -> Picture:
    matrix, names = np.array(row["confusion_matrix"]), row["label_names"]
    plot_confusion_matrix(row["confusion_matrix"], names, path, title=row["title"])
    wrong = matrix - np.diag(np.diag(matrix))
    true, given = np.unravel_index(int(wrong.argmax()), wrong.shape)
    told = f"; most often {names[true]} is called {names[given]}, {wrong.max():,} cells" if wrong.any() else ""
    return Picture(
        path,
        f"{row['title']}: test cells of all folds by true and predicted cell type.",
        f"Confusion matrix of {row['title']}: {np.trace(matrix):,} of {matrix.sum():,} cells are right{told}.",
    )


def across_blocks(comparisons: Sequence[Results]) -> list[Block]:
    """Return a table a kind of folds: macro-F1 on each data set, its mean and the mean rank; without weak sets.

    Means are of systems that were run on all of them.
    """
    blocks: list[Block] = []
    for kind, title in KIND_TITLES.items():
        chosen = [results for results in comparisons if results["kind"] == kind and not results["is_weak"]]
        if len(chosen) > 1:
            blocks += [Heading(title.capitalize(), 3), Cells(f"Data sets, {title}", *_across_rows(chosen))]
    if not blocks:
        return []
    note = (
        "Macro-F1 of each data set, weak ones left out. Mean and mean rank (1 is best) are of the systems that were "
        "run on all of them."
    )
    return [Heading("Across data sets"), Text(note), *blocks]


def _across_rows(chosen: Sequence[Results]) -> tuple[list[str], list[list[str]]]:
    titles = {name: shown_title(row) for results in chosen for name, row in results["systems"].items()}
    complete = [name for name in titles if all(name in results["systems"] for results in chosen)]
    scores = np.array([[results["systems"][name]["macro_f1"] for results in chosen] for name in complete])
    scores = scores.reshape(len(complete), len(chosen))
    means = dict(zip(complete, scores.mean(axis=1).tolist(), strict=True))
    ranks = dict(zip(complete, rankdata(-scores, axis=0).mean(axis=1).tolist(), strict=True)) if complete else {}
    rows = []
    for name in sorted(titles, key=lambda name: (-means.get(name, -1), titles[name])):
        row = [titles[name], number(means.get(name)), f"{ranks[name]:.1f}" if name in ranks else "-"]
        rows.append(row + [number(results["systems"].get(name, {}).get("macro_f1")) for results in chosen])
    return ["system", "mean", "mean rank", *(results["data"] for results in chosen)], rows


def gap_blocks(comparisons: Sequence[Results], figures: Path) -> list[Block]:
    """Return, for data with both kinds of folds, what each system loses where donors are new."""
    found: list[Block] = []
    kinds = {(results["data"], results["kind"]): results for results in comparisons}
    for results in comparisons:
        unseen = kinds.get((results["data"], "leave_one_group_out"))
        if results["kind"] != "five_fold" or unseen is None:
            continue
        pairs = {
            row["title"]: (row["macro_f1"], unseen["systems"][name]["macro_f1"], shown_title(row))
            for name, row in results["systems"].items()
            if name in unseen["systems"]
        }
        is_weak = results["is_weak"] or unseen["is_weak"]
        rows = [[shown, number(known), number(new), f"{new - known:+.3f}"] for known, new, shown in pairs.values()]
        path = figures / f"{results['data']}-gap.png"
        plot_comparison(
            {title: {"random folds": known, "unseen donors": new} for title, (known, new, _) in pairs.items()},
            path,
            title=f"{results['data']}: macro-F1",
            score_names=("random folds", "unseen donors"),
        )
        found += [Heading(f"{results['data']}{WEAK_MARK if is_weak else ''}", 3)]
        found += [Text(WEAK_SENTENCE.replace("*", ""))] if is_weak else []
        found.append(Cells(f"Random folds and unseen donors, {results['data']}", [
            "system", "macro-F1, random folds", "macro-F1, unseen donors", "difference"
        ], rows))  # fmt: skip
        alt_text = (
            f"Bars of macro-F1 of {len(pairs)} systems on random folds of {results['data']} and on unseen donors."
        )
        found.append(Picture(path, "Macro-F1 on random folds of cells and on donors that were held out.", alt_text))
    if not found:
        return []
    note = (
        "Random folds have cells of the same donors in training and test. What a system loses where donors are held "
        "out is what a new donor costs."
    )
    return [Heading("Random folds and unseen donors"), Text(note), *found]


def few_labels_blocks(curves: Sequence[Results], weak: Sequence[tuple[str, str]], figures: Path) -> list[Block]:
    """Return table and curves of each few-label comparison; those in `weak` (data, kind) are marked."""
    found: list[Block] = [Heading("Few labelled cells")] if curves else []
    for results in curves:
        is_weak = (results["data"], results["kind"]) in weak
        named = f"{results['data']}, {KIND_TITLES[results['kind']]}"
        path = figures / f"{results['data']}-{results['kind']}-few-labels.png"
        plot_few_labels(results, path)
        counts = list(results["points"])
        found += [
            Heading(f"{named}{WEAK_MARK if is_weak else ''}", 3),
            Text(f"{results['date']}, `{results['command']}`. In brackets the difference to logistic regression."),
            Cells(f"Few labelled cells, {named}", *few_labels_rows(results)),
            Picture(
                path,
                "Macro-F1 of the same test cells by the number of training cells of each type.",
                f"Curves of macro-F1 for {' and '.join(counts)} training cells of each type, a line a system.",
            ),
        ]
        found += (
            [Bullets([f"Left out: {name}. {why}" for name, why in results["left_out"].items()])]
            if results["left_out"]
            else []
        )
    return found


def ablation_blocks(tables: Sequence[Results]) -> list[Block]:
    """Return the tables of what parts of the method are worth."""
    found: list[Block] = [Heading("What parts of the method are worth")] if tables else []
    for results in tables:
        found += [
            Heading(results["question"], 3),
            Text(f"{results['date']}, `{results['command']}`."),
            Cells(results["question"], results["columns"], [list(map(_shown, row)) for row in results["rows"]]),
        ]
        found += [Bullets(results["notes"])] if results.get("notes") else []
    return found


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
