"""What the runs of a comparison of fine-tuning say together: means, spreads, differences with intervals; as files."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from screformer.model_cards.markdown import table
from screformer.train.figures import plot_comparison
from screformer.train.result_files import software_versions, write_json

SCORES = {"accuracy": "Accuracy", "macro_f1": "Macro-F1"}
NUM_RESAMPLES = 10_000


def summarize(runs: Sequence[Mapping[str, Any]], titles: Mapping[str, str], *, baseline: str) -> dict[str, Any]:
    """Return the JSON of a comparison.

    A system's score in a group is its mean over seeds (and over the runs that tested the group); its score in a task
    the mean over groups. ``sd_over_seeds`` is the standard deviation of the task's score between seeds. The interval of
    the difference to the baseline comes of drawing seeds anew, 10,000 times (groups are not drawn: they are few, and
    what another donor would give is not known).

    Parameters
    ----------
    runs
        Records of runs: ``task``, ``system``, ``seed``, ``groups`` (group -> score -> number), ``training_seconds``.
    titles
        System -> title; their order is that of the tables.
    baseline
        The system that others are compared with.
    """
    results: dict[str, Any] = {
        "question": "Does fine-tuning beat a logistic regression on few cells?",
        "date": date.today().isoformat(),
        "device": {"machine": platform.machine(), "gpu": None},
        "versions": software_versions(),
        "titles": dict(titles),
        "tasks": {},
        "runs": list(runs),
    }
    for task in sorted({run["task"] for run in runs}):
        own = [run for run in runs if run["task"] == task]
        results["tasks"][task] = {
            name: _summarize_system([run for run in own if run["system"] == name]) for name in titles
        }
        for name in titles:
            results["tasks"][task][name]["difference"] = {
                score: _difference(own, name, baseline, score) for score in SCORES if name != baseline
            }
    return results


def _summarize_system(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    groups = sorted({group for run in runs for group in run["groups"]})
    by_group = {group: {score: _mean(runs, [group], score) for score in SCORES} for group in groups}
    per_seed = _scores_of_seeds(runs)
    summary: dict[str, Any] = {
        "num_seeds": len(per_seed["macro_f1"]),
        "groups": by_group,
        **{score: round(float(np.mean(list(values.values()))), 4) for score, values in per_seed.items()},
        "sd_over_seeds": {
            score: round(float(np.std(list(values.values()), ddof=1)), 4) if len(values) > 1 else None
            for score, values in per_seed.items()
        },
    }
    seconds = [run["training_seconds"] for run in runs if "training_seconds" in run]
    return summary | ({"training_seconds": round(float(np.mean(seconds)), 1)} if seconds else {})


def _scores_of_seeds(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Return score -> seed -> mean over groups."""
    seeds = sorted({run["seed"] for run in runs})
    groups = sorted({group for run in runs for group in run["groups"]})
    of_seed = {seed: [run for run in runs if run["seed"] == seed] for seed in seeds}
    return {
        score: {seed: float(np.mean([_mean(own, [group], score) for group in groups])) for seed, own in of_seed.items()}
        for score in SCORES
    }


def _mean(runs: Sequence[Mapping[str, Any]], groups: Sequence[str], score: str) -> float:
    return float(np.mean([run["groups"][group][score] for run in runs for group in groups if group in run["groups"]]))


def _difference(runs: Sequence[Mapping[str, Any]], name: str, baseline: str, score: str) -> dict[str, Any]:
    ours = list(_scores_of_seeds([run for run in runs if run["system"] == name])[score].values())
    theirs = list(_scores_of_seeds([run for run in runs if run["system"] == baseline])[score].values())
    draws = np.random.default_rng(0).choice(np.array(ours), (NUM_RESAMPLES, len(ours))).mean(axis=1) - np.mean(theirs)
    interval = [round(float(end), 4) for end in np.quantile(draws, [0.025, 0.975])]
    return {
        "mean": round(float(np.mean(ours) - np.mean(theirs)), 4),
        "interval_95": interval if len(ours) > 1 else None,
    }


def write_fine_tuning(results: Mapping[str, Any], path: Path) -> None:
    """Write `path`.json, .md and .png."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path.with_suffix(".json"), results)
    path.with_suffix(".md").write_text(format_fine_tuning(results), encoding="utf-8")
    bars = {
        name.replace("_", " "): {
            f"{task}: {title}": systems[name][score] for task, systems in results["tasks"].items()
            for score, title in SCORES.items()
        }
        for name in results["titles"]
    }  # fmt: skip
    names = [f"{task}: {title}" for task in results["tasks"] for title in SCORES.values()]
    title = "Fine-tuning on few cells, mean over groups and seeds"
    plot_comparison(bars, path.with_suffix(".png"), title=title, score_names=names)


def format_fine_tuning(results: Mapping[str, Any]) -> str:
    """Return the tables as Markdown."""
    lines = [f"# {results['question']}", ""]
    about = "Trained on two donors, tested on the others" if results["is_trial"] else "Each group held out in turn"
    about = (
        f"{about}; labels with fewer than ten cells are left out. Intervals are between seeds alone, on the same "
        f"folds: they do not say what other donors or cells would give. Made by `{results['command']}`."
    )
    lines += [f"{results['date']}. {about}", "", results["selection"], ""]
    for task, systems in results["tasks"].items():
        lines += [f"## {task}", ""]
        rows = []
        for name, title in results["titles"].items():
            system = systems[name]
            difference = system["difference"].get("macro_f1")
            rows.append([
                title, str(system["num_seeds"]), f"{system['accuracy']:.3f}", f"{system['macro_f1']:.3f}",
                "" if system["sd_over_seeds"]["macro_f1"] is None else f"{system['sd_over_seeds']['macro_f1']:.3f}",
                "" if difference is None else _format_difference(difference),
                *(f"{scores['accuracy']:.3f} / {scores['macro_f1']:.3f}" for scores in system["groups"].values()),
            ])  # fmt: skip
        groups = list(next(iter(systems.values()))["groups"])
        header = ["System", "Seeds", "Accuracy", "Macro-F1", "SD", "Macro-F1 less that of regression", *groups]
        lines += [table(header, rows), ""]
    return "\n".join(lines)


def _format_difference(difference: Mapping[str, Any]) -> str:
    interval = difference["interval_95"]
    return f"{difference['mean']:+.3f}" + ("" if interval is None else f" ({interval[0]:+.3f} to {interval[1]:+.3f})")
