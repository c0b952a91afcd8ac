"""Every system on every fold: the table of a comparison, with spreads, intervals and paired differences."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from screformer.benchmarks.cell_type_systems import CellTypeSystem
from screformer.benchmarks.measuring import describe_device
from screformer.benchmarks.protocol import Kind, LabelledData, make_folds, run_system, write_split_file
from screformer.model_cards.markdown import table
from screformer.train.figures import plot_comparison
from screformer.train.result_files import software_versions, write_json

logger = logging.getLogger("screformer.benchmarks.comparison")
SCORES = ("accuracy", "macro_f1", "balanced_accuracy", "macro_auc")
BASELINE = "logistic_regression"
NUM_RESAMPLES = 10_000
MEGABYTE = 1e6
# Where the baseline errs so little, no difference says anything.
WEAK_ABOVE = 0.995


def compare_systems(
    data: LabelledData,
    systems: Mapping[str, Callable[[], CellTypeSystem]],
    *,
    kind: Kind,
    output: str | Path,
    work: str | Path,
    seeds: int = 1,
    command: str = "compare_systems",
) -> dict[str, Any]:  # Any: JSON
    """Run all systems on all folds with all seeds; write the split file, JSON, table and figure; return the JSON.

    A system whose package is missing is left out, with the remedy in ``left_out`` and in the log.

    Parameters
    ----------
    data
        Labelled cells.
    systems
        Name -> what makes one.
    kind
        Of the folds.
    output
        Folder for ``comparison-DATA.*`` and the split file.
    work
        Folder for the result of every run, which is not repeated.
    seeds
        Of each system and fold: 0, 1, and so on.
    command
        What the result file says that it was made by.

    Raises
    ------
    ValueError
        `seeds` is below 1, or as `make_folds`.
    """
    if seeds < 1:
        raise ValueError(f"seeds got {seeds}; it must be at least 1")
    folds, folder, left_out = make_folds(data, kind), Path(output), {}
    folder.mkdir(parents=True, exist_ok=True)
    write_split_file(folder / f"comparison-{data.name}-split.json", data, folds, kind=kind, seed=2022)
    runs = []
    for name, make in systems.items():
        try:
            runs += [
                run_system(make(), name, data, fold, seed=seed, work=work) for fold in folds for seed in range(seeds)
            ]
        except ImportError as error:
            left_out[name] = str(error)
            logger.warning("%s is left out: %s", name, error)
    results: dict[str, Any] = {
        "question": f"How well do systems name the cell types of {data.name}?",
        "date": date.today().isoformat(),
        "command": command,
        "device": describe_device("cpu"),
        "versions": software_versions(),
        "kind": kind,
        "num_folds": len(folds),
        "seeds": seeds,
        "systems": summarize_systems(runs),
        "left_out": left_out,
        "runs": runs,
    }
    write_json(folder / f"comparison-{data.name}.json", results)
    (folder / f"comparison-{data.name}.md").write_text(format_comparison(results), encoding="utf-8")
    rows = results["systems"].values()
    scores = {row["title"]: {name: row[name] for name in ("accuracy", "macro_f1")} for row in rows}
    plot_comparison(scores, folder / f"comparison-{data.name}.png", title=f"{data.name}, {kind.replace('_', ' ')}")
    return results


def summarize_systems(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:  # Any: JSON
    """Return system -> means over folds and seeds, best macro-F1 first.

    Beside each of accuracy, macro_f1, balanced_accuracy and macro_auc its ``_sd`` (over folds, seeds averaged) and
    ``_interval`` (95%, folds drawn anew 10,000 times; None for one fold); ``less_baseline``, the mean difference of
    macro_f1 to logistic regression on the same folds, with its interval; ``fit_seconds``, ``predict_seconds``,
    ``peak_megabytes`` and ``rejected``, means.
    """
    by_system: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        by_system.setdefault(run["system"], []).append(run)
    folds = sorted({run["fold"] for run in runs})
    found: dict[str, Any] = {}
    for name, own in by_system.items():
        row: dict[str, Any] = {"title": own[0]["title"], "num_runs": len(own)}
        for score in SCORES:
            row |= _spread(score, _by_fold(own, folds, score))
        if name != BASELINE and BASELINE in by_system:
            ours, theirs = (_by_fold(each, folds, "macro_f1") for each in (own, by_system[BASELINE]))
            row["less_baseline"] = _spread("macro_f1", ours - theirs)
        for key in ("fit_seconds", "predict_seconds", "rejected"):
            row[key] = float(np.mean([run[key] for run in own]))
        row["peak_megabytes"] = float(np.mean([run["peak_bytes"] for run in own])) / MEGABYTE
        found[name] = row
    return dict(sorted(found.items(), key=lambda pair: -pair[1]["macro_f1"]))


def _by_fold(runs: Sequence[Mapping[str, Any]], folds: Sequence[str], score: str) -> np.ndarray:
    """Return the mean over seeds of each fold; NaN where a score is not known."""
    values = [[run[score] for run in runs if run["fold"] == fold] for fold in folds]
    return np.array([np.nan if not own or None in own else np.mean(own) for own in values], dtype=np.float64)


def _spread(name: str, values: np.ndarray) -> dict[str, Any]:
    known = values[~np.isnan(values)]
    if not len(known):
        return {name: None, f"{name}_sd": None, f"{name}_interval": None}
    draws = np.random.default_rng(0).choice(known, (NUM_RESAMPLES, len(known))).mean(axis=1)
    several = len(known) > 1
    return {
        name: float(known.mean()),
        f"{name}_sd": float(known.std(ddof=1)) if several else None,
        f"{name}_interval": [float(end) for end in np.quantile(draws, [0.025, 0.975])] if several else None,
    }


def format_comparison(results: Mapping[str, Any]) -> str:
    """Return the table as Markdown."""
    systems = results["systems"]
    header = ["system", "accuracy", "macro-F1", "SD", "macro-F1 less logistic regression", "macro-AUC", "fit s", "MB"]
    rows = [
        [
            row["title"],
            _number(row["accuracy"]),
            _number(row["macro_f1"]),
            _number(row["macro_f1_sd"]),
            _difference(row.get("less_baseline")),
            _number(row["macro_auc"]),
            f"{row['fit_seconds']:.1f}",
            f"{row['peak_megabytes']:.0f}",
        ]
        for row in systems.values()
    ]
    folds = f"{results['num_folds']} fold{'s' if results['num_folds'] > 1 else ''}"
    lines = [
        f"# {results['question']}",
        "",
        f"{results['date']}, `{results['command']}`, {results['kind'].replace('_', ' ')}, {folds}, {results['seeds']} "
        f"seed{'s' if results['seeds'] > 1 else ''}, screformer {results['versions']['screformer']}. SD over folds; "
        "intervals (95%) by drawing folds anew.",
        "",
        table(header, rows),
    ]
    if BASELINE in systems and systems[BASELINE]["accuracy"] > WEAK_ABOVE:
        lines += ["", "**Weak set**: logistic regression errs so little that no difference here says anything."]
    lines += [f"\nLeft out: {name} ({why})." for name, why in results["left_out"].items()]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _difference(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    interval = row["macro_f1_interval"]
    return f"{row['macro_f1']:+.3f}" + ("" if interval is None else f" ({interval[0]:+.3f} to {interval[1]:+.3f})")
