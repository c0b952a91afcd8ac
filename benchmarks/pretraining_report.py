"""What the runs with and without pretraining say together: means, paired differences with intervals; as files."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from screformer.benchmarks.comparison_statistics import difference_spread
from screformer.benchmarks.speed_figures import style_axes
from screformer.model_cards.markdown import table
from screformer.train.figures import COLORS, LINE_STYLES, MARKERS, save_figure
from screformer.train.result_files import software_versions, write_json

SCORES = {"macro_f1": "Macro-F1", "accuracy": "Accuracy"}
HELD_OUT_SCORES = {
    "loss": "Loss",
    "masked_accuracy": "Accuracy",
    "cell_majority_accuracy": "The cell's commonest visible bin",
    "gene_majority_accuracy": "Each gene's commonest bin",
    "gene_frequency_loss": "Loss of gene frequencies",
}
ALL_CELLS = "all"

Runs = Sequence[Mapping[str, Any]]
FloatArray = npt.NDArray[np.float64]


def summarize_pretraining(
    runs: Runs, titles: Mapping[str, str], compared: Sequence[tuple[str, str]]
) -> dict[str, Any]:  # Any: JSON
    """Return the JSON of a comparison.

    ``scores`` has, for each number of labelled cells and each system, the mean over donors and seeds, and the standard
    deviation of the mean over donors between seeds. ``differences`` pairs runs of the same donor and seed (which train
    on the same cells); their 95% intervals are Student's over donors (or folds), seeds averaged within each.

    Parameters
    ----------
    runs
        Records of runs: ``system``, ``seed``, ``cells_per_label`` if it is not all, ``groups`` (group -> score).
    titles
        System -> title; their order is that of the tables.
    compared
        Pairs of systems: the second is subtracted from the first.
    """
    numbers = sorted({run["cells_per_label"] for run in runs if "cells_per_label" in run})
    scores: dict[str, Any] = {}
    differences: list[dict[str, Any]] = []
    for number in [*numbers, None]:
        own = [run for run in runs if run.get("cells_per_label") == number]
        key = ALL_CELLS if number is None else str(number)
        grids = {name: {score: _grid(own, name, score) for score in SCORES} for name in titles}
        scores[key] = {name: _describe(grids[name]) for name in titles}
        for first, second in compared:
            for score in SCORES:
                found = _difference(grids[first][score], grids[second][score])
                differences.append({"cells": key, "system": first, "less": second, "score": score, **found})
    return {
        "question": "Does pretraining help to name cell types?",
        "date": date.today().isoformat(),
        "device": {"machine": platform.machine(), "gpu": None},
        "versions": software_versions(),
        "titles": dict(titles),
        "scores": scores,
        "differences": differences,
        "runs": list(runs),
    }


def _grid(runs: Runs, name: str, score: str) -> FloatArray:
    """Return the score of each seed and donor, (seeds, donors)."""
    own = [run for run in runs if run["system"] == name]
    groups = sorted({group for run in own for group in run["groups"]})
    of = {(run["seed"], group): found[score] for run in own for group, found in run["groups"].items()}
    return np.array([[of[seed, group] for group in groups] for seed in sorted({run["seed"] for run in own})])


def _describe(grids: Mapping[str, FloatArray]) -> dict[str, Any]:
    facts: dict[str, Any] = {"num_seeds": len(grids["macro_f1"])}
    for score, grid in grids.items():
        of_seeds = grid.mean(axis=1)
        spread = round(float(of_seeds.std(ddof=1)), 4) if len(of_seeds) > 1 else None
        facts[score] = {
            "mean": round(float(grid.mean()), 4),
            "sd_over_seeds": spread,
            "donors": [round(float(value), 4) for value in grid.mean(axis=0)],
        }
    return facts


def _difference(ours: FloatArray, theirs: FloatArray) -> dict[str, Any]:
    """Pair seeds as far as both have them; a single row stands for every seed."""
    if len(theirs) == 1 or len(ours) == 1:
        paired = ours - theirs
    else:
        shared = min(len(ours), len(theirs))
        paired = ours[:shared] - theirs[:shared]
    seeds, donors = paired.shape
    found = difference_spread("score", paired.mean(axis=0))
    ends = found["score_interval"]
    return {
        "mean": round(float(paired.mean()), 4),
        "interval_95": None if ends is None else [round(end, 4) for end in ends],
        "num_donors_better": int((paired.mean(axis=0) > 0).sum()),
        "num_donors": donors,
        "num_seeds": seeds,
    }


def write_pretraining(results: Mapping[str, Any], path: Path) -> None:
    """Write `path`.json, .md and .png."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path.with_suffix(".json"), results)
    path.with_suffix(".md").write_text(format_pretraining(results), encoding="utf-8")
    plot_pretraining(results, path.with_suffix(".png"))


def format_pretraining(results: Mapping[str, Any]) -> str:
    """Return the tables as Markdown."""
    numbers = list(results["scores"])
    lines = [f"# {results['question']}", ""]
    lines += [
        f"{results['date']}. Each donor of the packaged pancreas held out in turn, also from pretraining; so many "
        "labelled cells of each type of the other donors train, drawn by the seed; labels with fewer than ten cells "
        "are left out. "
        f"One pretrained checkpoint a donor. Made by `{results['command']}`.",
        "",
    ]
    for score, title in SCORES.items():
        rows = []
        for name, system in results["titles"].items():
            of_numbers = [results["scores"][number][name] for number in numbers]
            rows.append([system, *(_format_mean(facts[score]) for facts in of_numbers)])
        lines += [f"## {title}, mean over donors and seeds ± standard deviation between seeds", ""]
        lines += [table(["System", *map(_name_cells, numbers)], rows), ""]
    lines += ["## Macro-F1 with, less that without", ""]
    pairs = list(dict.fromkeys((row["system"], row["less"]) for row in results["differences"]))
    found = {(row["system"], row["less"], row["cells"], row["score"]): row for row in results["differences"]}
    rows = [
        [
            results["titles"][first],
            results["titles"][second],
            *(_format_difference(found[first, second, number, "macro_f1"]) for number in numbers),
        ]
        for first, second in pairs
    ]
    lines += [
        "Paired by donor and seed; in brackets the 95% interval (Student's, over donors, seeds averaged within each), "
        "and with how many of the donors the difference is above 0. Four donors are few: no difference here is a "
        "claim.",
        "",
        table(["With", "Without", *map(_name_cells, numbers)], rows),
        "",
        "## Masked genes of held-out cells, mean over the checkpoints",
        "",
        table(["Checkpoint", *HELD_OUT_SCORES.values()], _held_out_rows(results["held_out"])),
        "",
        "## What was run",
        "",
    ]
    told = [[name, f"`{text}`"] for name, text in results["pretrainings"].items()]
    told += [[results["titles"][name], f"`{text}`"] for name, text in results["arguments"].items()]
    lines += [table(["Checkpoint, system", "Settings"], told), ""]
    return "\n".join(lines)


def _held_out_rows(held_out: Mapping[str, Sequence[Mapping[str, float]]]) -> list[list[str]]:
    return [
        [name, *(f"{np.mean([scores[score] for scores in checkpoints]):.3f}" for score in HELD_OUT_SCORES)]
        for name, checkpoints in held_out.items()
    ]


def _name_cells(number: str) -> str:
    return "all cells" if number == ALL_CELLS else f"{number} a type"


def _format_mean(facts: Mapping[str, Any]) -> str:
    spread = facts["sd_over_seeds"]
    return f"{facts['mean']:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def _format_difference(row: Mapping[str, Any]) -> str:
    if row["interval_95"] is None:
        return f"{row['mean']:+.3f}"
    low, high = row["interval_95"]
    return f"{row['mean']:+.3f} ({low:+.3f} to {high:+.3f}; {row['num_donors_better']} of {row['num_donors']})"


def plot_pretraining(results: Mapping[str, Any], path: str | Path) -> None:
    """Draw macro-F1 by the number of labelled cells, a line for each system, as a PNG."""
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    numbers = list(results["scores"])
    for index, (name, title) in enumerate(results["titles"].items()):
        facts = [results["scores"][number][name]["macro_f1"] for number in numbers]
        axes.errorbar(
            np.arange(len(numbers)) + (index - len(results["titles"]) / 2) * 0.02,
            [fact["mean"] for fact in facts],
            yerr=[fact["sd_over_seeds"] or 0.0 for fact in facts],
            label=title,
            color=COLORS[index % len(COLORS)],
            linestyle=LINE_STYLES[index % len(LINE_STYLES)],
            marker=MARKERS[index % len(MARKERS)],
            capsize=2,
        )
    axes.set_xticks(range(len(numbers)), [_name_cells(number) for number in numbers])
    axes.set_xlabel("Labelled cells that train")
    axes.set_ylabel("Macro-F1 on unseen donors")
    axes.set_title("With and without pretraining, human pancreas")
    style_axes(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    save_figure(figure, path)
