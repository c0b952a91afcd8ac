"""Sections of the benchmark report: one comparison with its figures, data sets against each other, few labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from screformer.benchmarks.comparison_figures import comparison_pictures
from screformer.benchmarks.comparison_statistics import pooled_macro_f1
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
from screformer.train.figures import plot_comparison

Results = Mapping[str, Any]  # Any: JSON
KIND_TITLES = {
    "five_fold": "five random folds of cells",
    "leave_one_group_out": "each donor or data set held out once",
    "random": "one random split of cells",
}
WEAK_MARK = " (weak set)"
RANDOM, UNSEEN = "random folds", "unseen donors"


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
    blocks += _left_out(results)
    blocks += comparison_pictures(results, heading_of(results), figures)
    blocks += [Heading("F1 by cell type", 3), Cells("F1 by cell type", *cell_type_rows(results))]
    if results["paired_tests"]:
        blocks += [Heading("Paired differences", 3), Text(PAIRS_SENTENCE)]
        blocks.append(Cells("Paired differences", *pairs_rows(results)))
    return blocks


def _left_out(results: Results) -> list[Block]:
    lines = [f"Left out: {name} ({remedy})." for name, remedy in results["left_out"].items()]
    return [Bullets(lines)] if lines else []


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
    kinds = {(results["data"], results["kind"]): results for results in comparisons}
    found: list[Block] = []
    for (data, kind), results in kinds.items():
        unseen = kinds.get((data, "leave_one_group_out"))
        if kind == "five_fold" and unseen is not None and results["systems"].keys() & unseen["systems"].keys():
            found += _gap(results, unseen, figures / f"{data}-gap.png")
    if not found:
        return []
    note = (
        "Random folds have cells of the same donors in training and test; the difference is what new donors cost a "
        "system. Macro-F1 is that of all test cells together: the mean over folds would also fall because a donor has "
        "but one cell of a type."
    )
    return [Heading("Random folds and unseen donors"), Text(note), *found]


def _gap(known: Results, unseen: Results, path: Path) -> list[Block]:
    is_weak = known["is_weak"] or unseen["is_weak"]
    pairs = [(row, unseen["systems"][name]) for name, row in known["systems"].items() if name in unseen["systems"]]
    scores = {row["title"]: {RANDOM: pooled_macro_f1(row), UNSEEN: pooled_macro_f1(other)} for row, other in pairs}
    rows = [
        [shown_title(row), *map(number, both.values()), f"{both[UNSEEN] - both[RANDOM]:+.3f}"]
        for (row, _), both in zip(pairs, scores.values(), strict=True)
    ]
    title = f"{known['data']}{WEAK_MARK if is_weak else ''}"
    plot_comparison(scores, path, title=f"{title}: macro-F1", score_names=(RANDOM, UNSEEN))
    return [
        Heading(title, 3),
        *([Text(WEAK_SENTENCE.replace("*", ""))] if is_weak else []),
        Cells(f"{title}: both kinds of folds", ["system", f"macro-F1, {RANDOM}", UNSEEN, "difference"], rows),
        Picture(
            path,
            "Macro-F1 on random folds of cells and on donors that were held out.",
            f"Bars of macro-F1 of {len(pairs)} systems on random folds of {known['data']} and on unseen donors.",
        ),
    ]


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
        found += _left_out(results)
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
