"""What the runs of a comparison of calibrations say together, as a table and a figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from screformer.model_cards.markdown import table
from screformer.train.figures import COLORS, FONT_SIZE, MARKERS, RESOLUTION
from screformer.train.result_files import write_json, written_aside

WITHIN = 0.02  # what may lie between the error that was asked for and the one that came true
Runs = Sequence[Mapping[str, Any]]  # Any: JSON


def write_calibration_results(results: Mapping[str, Any], path: Path) -> None:
    """Write `path`.json, .md and .png."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {**results, "tasks": summarize_calibrations(results)}
    write_json(path.with_suffix(".json"), results)
    path.with_suffix(".md").write_text(format_calibrations(results), encoding="utf-8")
    plot_asked_errors(results, path.with_suffix(".png"))


def summarize_calibrations(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return task -> source -> means over groups and seeds, and the worst group.

    ``expected_calibration_error``; ``error_of_all``, where every cell is answered; and ``answers``, a row for each
    error rate: ``asked``, ``error`` and ``answered`` (means), ``worst_error`` with its ``worst_group`` (means over
    seeds), and ``groups_within``: in how many of ``num_groups`` the error is no more than two points above the one
    asked for. ``num_without``: groups without an answer at that rate; they are in no mean of errors.
    """
    summary: dict[str, Any] = {}
    for task in sorted({run["task"] for run in results["runs"]}):
        runs = [run for run in results["runs"] if run["task"] == task]
        summary[task] = {source: _summarize(runs, source, results["asked"]) for source in results["sources"]}
    return summary


def _summarize(runs: Runs, source: str, asked: Sequence[float]) -> dict[str, Any]:
    found = [run["sources"][source] for run in runs]
    return {
        "expected_calibration_error": float(np.mean([one["expected_calibration_error"] for one in found])),
        "error_of_all": float(np.mean([one["error_of_all"] for one in found])),
        "answers": list(_answers(runs, source, asked)),
    }


def _answers(runs: Runs, source: str, asked: Sequence[float]) -> Iterator[dict[str, Any]]:
    for number, rate in enumerate(asked):
        errors: dict[str, list[float]] = {}
        answered = []
        groups = {run["group"] for run in runs}
        for run in runs:
            row = run["sources"][source]["answers"][number]
            if row["error"] is not None:
                errors.setdefault(run["group"], []).append(row["error"])
            if row["answered"] is not None:
                answered.append(row["answered"])
        means = {group: float(np.mean(values)) for group, values in errors.items()}
        worst = max(means, key=means.__getitem__, default=None)
        yield {
            "asked": rate,
            "error": float(np.mean(list(means.values()))) if means else None,
            "answered": float(np.mean(answered)) if answered else None,
            "worst_group": worst,
            "worst_error": None if worst is None else means[worst],
            "groups_within": sum(error <= rate + WITHIN for error in means.values()),
            "num_groups": len(groups),
            "num_without": len(groups) - len(means),
        }


def format_calibrations(results: Mapping[str, Any]) -> str:
    """Return the tables as Markdown."""
    lines = [
        "# Error rates: asked for, and come true",
        "",
        f"{results['question']} {results['date']}, `{results['command']}`, {results['device']['machine']} without a "
        f"GPU, screformer {results['versions']['screformer']}, torch {results['versions']['torch']}.",
        "",
        "The recipe finetune-small with a fifth of the training cells kept for validation; each group held out once. "
        "Error: share of wrong answers among the answered. Within: groups whose error is at most two points above the "
        "one asked for. Where fewer errors are made than asked for, everything is answered.",
    ]
    lines += ["", results.get("selection", "")]
    for task, sources in results["tasks"].items():
        lines += ["", f"## {task}", ""]
        seeds = len({run["seed"] for run in results["runs"] if run["task"] == task})
        lines += [f"{seeds} seed{'s' if seeds > 1 else ''}.", ""]
        header = ["threshold from", "asked", "error", "worst group", "answered", "within"]
        rows = [
            [
                results["sources"][source] if not number else "",
                f"{row['asked']:.0%}",
                _percent(row["error"], "no answers" if row["answered"] == 0 else "cannot vouch"),
                "" if row["worst_group"] is None else f"{_percent(row['worst_error'])} ({row['worst_group']})",
                _percent(row["answered"], ""),
                f"{row['groups_within']} of {row['num_groups']}",
            ]
            for source, one in sources.items()
            for number, row in enumerate(one["answers"])
        ]
        lines += [table(header, rows), ""]
        rows = [
            [results["sources"][source], f"{one['expected_calibration_error']:.4f}", _percent(one["error_of_all"])]
            for source, one in sources.items()
        ]
        lines.append(table(["", "expected calibration error", "error when all are answered"], rows))
    return "\n".join(lines) + "\n"


def _percent(share: float | None, otherwise: str = "") -> str:
    return otherwise if share is None else f"{share:.1%}"


def plot_asked_errors(results: Mapping[str, Any], path: Path) -> None:
    """Draw the error that came true over the one asked for, a panel a task, a mark a group and seed."""
    tasks = list(results["tasks"])
    figure = Figure(figsize=(5.2 * len(tasks) + 0.4, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    highest = max(results["asked"])
    for number, task in enumerate(tasks):
        axes = figure.add_subplot(1, len(tasks), number + 1)
        axes.fill_between([0, 1], [0, 1], [WITHIN, 1 + WITHIN], color="0.92", label="up to two points above")
        axes.plot([0, 1], [0, 1], color="0.5", linewidth=1)
        for index, source in enumerate(results["sources"]):
            runs = [run for run in results["runs"] if run["task"] == task]
            points = [
                (row["asked"], row["error"])
                for run in runs
                for row in run["sources"][source]["answers"]
                if row["error"] is not None
            ]
            if points:
                shift = (index - 1.5) * 0.012 * highest
                axes.scatter(
                    [asked + shift for asked, _ in points],
                    [error for _, error in points],
                    color=COLORS[index],
                    marker=MARKERS[index],
                    s=22,
                    alpha=0.75,
                    label=results["sources"][source],
                )
        axes.set_xlim(0, highest * 1.1)
        axes.set_ylim(-0.002, highest * 1.1)
        axes.set_xlabel("Error rate asked for")
        axes.set_ylabel("Share of wrong answers among the answered")
        axes.set_title(task, fontsize=FONT_SIZE)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, fontsize=FONT_SIZE - 2)
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=RESOLUTION)
