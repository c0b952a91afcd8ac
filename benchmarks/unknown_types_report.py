"""What the left-out types say together: areas under the curve by type, differences with intervals; as files."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from screformer.benchmarks.unknown_types_runs import MODEL, SHIPPED
from screformer.model_cards.markdown import table
from screformer.train.figures import plot_comparison
from screformer.train.result_files import software_versions, write_json

NUM_RESAMPLES = 10_000
SOFTMAX, MODEL_SOFTMAX = "softmax", f"{MODEL}: softmax"
TITLES = {
    SHIPPED: "**the detector** (one-vs-rest + gene excess)",
    MODEL_SOFTMAX: "**the classifier's softmax**",
    SOFTMAX: "the regression's softmax",
    "entropy": "the regression's entropy",
    "margin": "the regression's margin between the two likeliest types",
    "max_logit": "the regression's largest logit",
    "energy": "the regression's energy, logsumexp of logits (Liu et al. 2020)",
    "one_vs_rest_32": "one-vs-rest regressions on 32 components",
    "one_vs_rest_128": "one-vs-rest regressions on 128 components",
    "gene_excess_1": "gene excess: the gene furthest above every type's mean",
    "gene_excess_3": "gene excess, mean of 3 genes",
    "gene_excess_10": "gene excess, mean of 10 genes",
    "standardised_excess_3": "3 genes furthest above the predicted type, in deviations",
    "standardised_excess_10": "10 genes furthest above the predicted type, in deviations",
    "missing_genes_3": "3 genes furthest below the predicted type",
    "markers_10": "lack of the predicted type's 10 markers",
    "correlation_500_genes": "correlation with the nearest type's mean, 500 genes",
    "fifth_neighbour_64": "distance to the 5th nearest training cell",
    "fifth_neighbour_by_type_64": "distance to the 5th nearest training cell, as a multiple of its type's own",
    "residual_64": "residual outside 64 components",
    "residual_share_64": "residual outside 64 components, as a share of the cell",
    "num_genes": "number of expressed genes",
    "one-vs-rest + gene excess": "one-vs-rest + gene excess, fitted apart",
}
TITLES |= {
    f"{name}_{number}": f"{title}, {number} components"
    for number in (32, 128)
    for name, title in {
        "mahalanobis": "Mahalanobis distance to the nearest type (Lee et al. 2018)",
        "relative_mahalanobis": "relative Mahalanobis distance (Ren et al. 2021)",
        "mahalanobis_across_donors": "Mahalanobis distance, covariance of cells and other donors' means",
    }.items()
}
TITLES |= {f"{MODEL}: {name}": f"the classifier's {name.replace('_', ' ')}" for name in ("entropy", "margin", "energy")}
TITLES[f"{MODEL}: max_logit"] = "the classifier's largest logit"

Runs = Sequence[Mapping[str, Any]]  # Any: JSON


def summarize_unknown_types(
    measures: Runs, classifiers: Runs, *, common: Sequence[str], confirmed_by: Sequence[str]
) -> dict[str, Any]:
    """Return the JSON of the comparison.

    The area of a type is that over all pairs of an unknown and a known cell of one donor: its donors' areas, weighed by
    their pairs. Means are over types. Intervals of differences come of drawing types anew, 10,000 times.

    Parameters
    ----------
    measures, classifiers
        Records of runs: ``donor``, ``cell_type``, ``num_unknown``, ``num_known``, ``auroc``, ``found_at_5_percent``.
    common
        Types with enough cells to count in the means; the others have a mean of their own.
    confirmed_by
        Donors that did not choose the detector.
    """
    of_pair = {(run["donor"], run["cell_type"]): run for run in classifiers}
    runs = [_join(run, of_pair.get((run["donor"], run["cell_type"]))) for run in measures]
    parts = {
        "chosen_by": [run for run in runs if run["donor"] not in confirmed_by and run["cell_type"] in common],
        "confirmed_by": [run for run in runs if run["donor"] in confirmed_by and run["cell_type"] in common],
        "all": [run for run in runs if run["cell_type"] in common],
        "rare": [run for run in runs if run["cell_type"] not in common],
    }
    names = list(dict.fromkeys(name for run in runs for name in run["auroc"]))
    return {
        "question": "Are cells of a type that was left out of training called unknown?",
        "date": date.today().isoformat(),
        "device": {"machine": platform.machine(), "gpu": None},
        "versions": software_versions(),
        "parts": {part: _describe_part(chosen) for part, chosen in parts.items()},
        "systems": {
            name: {part: _summarize(chosen, name) for part, chosen in parts.items()} for name in names
        },
        "differences": {
            f"{ours} - {theirs}": {part: _difference(chosen, ours, theirs) for part, chosen in parts.items()}
            for ours, theirs in ((SHIPPED, MODEL_SOFTMAX), (SHIPPED, SOFTMAX))
        },
        "called_unknown": _called_unknown(parts["confirmed_by"]),
        "runs": runs,
    }  # fmt: skip


def _join(measured: Mapping[str, Any], classified: Mapping[str, Any] | None) -> dict[str, Any]:
    if classified is None:
        return dict(measured)
    joined = {name: {**measured[name], **classified[name]} for name in ("auroc", "found_at_5_percent")}
    return {**measured, **joined, "share_below_half": classified["share_below_half"]}


def _describe_part(runs: Runs) -> dict[str, Any]:
    return {
        "donors": sorted({run["donor"] for run in runs}),
        "types": sorted({run["cell_type"] for run in runs}),
        "num_left_out_cells": sum(run["num_unknown"] for run in runs),
    }


def _summarize(runs: Runs, name: str) -> dict[str, Any] | None:
    """Return means over types and each type's area; None unless every run has it."""
    if not runs or not all(name in run["auroc"] for run in runs):
        return None
    areas, found = (_by_type(runs, name, score) for score in ("auroc", "found_at_5_percent"))
    return {
        "auroc": round(float(np.mean(list(areas.values()))), 4),
        "found_at_5_percent": round(float(np.mean(list(found.values()))), 4),
        "types": {label: round(area, 4) for label, area in areas.items()},
    }


def _by_type(runs: Runs, name: str, score: str) -> dict[str, float]:
    areas = {}
    for label in sorted({run["cell_type"] for run in runs}):
        own = [run for run in runs if run["cell_type"] == label]
        pairs = [run["num_unknown"] * run["num_known"] for run in own]
        areas[label] = float(np.average([run[score][name] for run in own], weights=pairs))
    return areas


def _difference(runs: Runs, ours: str, theirs: str) -> dict[str, Any] | None:
    if not runs or not all(ours in run["auroc"] and theirs in run["auroc"] for run in runs):
        return None
    areas = [_by_type(runs, name, "auroc") for name in (ours, theirs)]
    differences = np.array([areas[0][label] - areas[1][label] for label in areas[0]])
    draws = np.random.default_rng(0).choice(differences, (NUM_RESAMPLES, len(differences))).mean(axis=1)
    return {
        "mean": round(float(differences.mean()), 4),
        "interval_95": [round(float(end), 4) for end in np.quantile(draws, [0.025, 0.975])],
        "types_lost": [label for label, difference in zip(areas[0], differences, strict=True) if difference < 0],
    }


def _called_unknown(runs: Runs) -> dict[str, Any]:
    """Return what thresholds call unknown of known and of left-out cells, means over types and donors."""
    shares: dict[str, Any] = {
        f"{SHIPPED} below {level}": _mean_shares([{k: run["share_below"][k][level] for k in KINDS} for run in runs])
        for level in ("0.01", "0.05")
        if runs
    }
    by_half = [run["share_below_half"] for run in runs if "share_below_half" in run]
    return shares | ({f"{MODEL_SOFTMAX} below 0.5": _mean_shares(by_half)} if by_half else {})


KINDS = ("known", "unknown")


def _mean_shares(shares: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {kind: round(float(np.mean([each[kind] for each in shares])), 4) for kind in KINDS}


def write_unknown_types_report(results: Mapping[str, Any], path: Path) -> None:
    """Write `path`.json, .md and .png."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path.with_suffix(".json"), results)
    path.with_suffix(".md").write_text(format_unknown_types(results), encoding="utf-8")
    systems = results["systems"]
    part = "confirmed_by" if systems.get(MODEL_SOFTMAX, {}).get("confirmed_by") else "all"
    bars = {SHIPPED: "detector", MODEL_SOFTMAX if part == "confirmed_by" else SOFTMAX: "softmax"}
    scores = {
        label: {title: systems[name][part]["types"][label] for name, title in bars.items() if systems[name][part]}
        for label in results["parts"][part]["types"]
    }
    title = f"AUROC of types left out of training ({_part_title(results, part)})"
    plot_comparison(scores, path.with_suffix(".png"), title=title, score_names=list(bars.values()))


def _title(name: str) -> str:
    return TITLES.get(name, name).replace("**", "")


def format_unknown_types(results: Mapping[str, Any]) -> str:
    """Return the tables as Markdown."""
    parts = results["parts"]
    lines = [f"# {results['question']}", ""]
    lines += [
        f"{results['date']}. Each type is left out of training, and so is the donor whose cells are asked about, where "
        f"it has at least {results['min_cells']} cells of the type. Area under the ROC curve of cells of the type "
        "against cells of known types of the same donor; means over types with at least twenty cells, and over rarer "
        f"ones. Made by `{results['command']}`.",
        "",
        f"{results['selection']} The classifier is a whole training with the recipe finetune-small; all other rows "
        "need no network, and the regression is one such as that classifier starts as.",
        "",
        *_difference_lines(results),
        *_other_cells_lines(results.get("other_cells")),
        "## Everything that was tried",
        "",
        _table_of_systems(results),
        "",
        "## By type, " + _part_title(results, "confirmed_by"),
        "",
        _table_of_types(results["systems"], parts["confirmed_by"]["types"], "confirmed_by"),
        "",
        "## By type, all donors, and rare types",
        "",
        _table_of_types(results["systems"], parts["all"]["types"], "all"),
        "",
        _table_of_types(results["systems"], parts["rare"]["types"], "rare"),
        "",
    ]
    return "\n".join(lines)


def _difference_lines(results: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, of_parts in results["differences"].items():
        ours, theirs = name.split(" - ")
        for part, difference in of_parts.items():
            if difference is not None:
                low, high = difference["interval_95"]
                lost = difference["types_lost"]
                rows.append([
                    f"{_title(ours)} less {_title(theirs)}", _part_title(results, part),
                    f"{difference['mean']:+.3f} ({low:+.3f} to {high:+.3f})",
                    f"{len(lost)} of {len(results['parts'][part]['types'])}: {', '.join(lost)}" if lost else "none",
                ])  # fmt: skip
    called = [
        [threshold, f"{shares['known']:.1%}", f"{shares['unknown']:.1%}"]
        for threshold, shares in results["called_unknown"].items()
    ]
    return [
        "## Differences", "",
        table(["AUROC", "Cells of", "Mean over types (95% interval, types drawn anew)", "Types lost"], rows), "",
        "## Called unknown, " + _part_title(results, "confirmed_by"), "",
        table(["Threshold", "Cells of known types", "Cells of the type left out"], called), "",
    ]  # fmt: skip


def _other_cells_lines(other: Mapping[str, Any] | None) -> list[str]:
    if other is None:
        return []
    shown = [[TITLES.get(name, name), f"{other['auroc'][name]:.3f}", f"{other['found_at_5_percent'][name]:.3f}"]
             for name in (SHIPPED, SOFTMAX, "energy", "one_vs_rest_128", "gene_excess_1")]  # fmt: skip
    shares = other["share_below"]
    return [
        f"## Cells of another tissue, {other['cell_type']}", "",
        f"All types and all donors but {other['donor']} train; its {other['num_known']} cells of known types against "
        f"{other['num_unknown']} cells of the file, whatever their type. The detector is below 0.01 for "
        f"{shares['unknown']['0.01']:.1%} of these, and for {shares['known']['0.01']:.1%} of {other['donor']}'s.", "",
        table(["Strangeness of a cell", "AUROC", "found at 5% false alarms"], shown), "",
    ]  # fmt: skip


def _part_title(results: Mapping[str, Any], part: str) -> str:
    donors = ", ".join(results["parts"][part]["donors"])
    return {"all": "all donors", "rare": "all donors, rare types"}.get(part, donors)


def _table_of_systems(results: Mapping[str, Any]) -> str:
    systems = results["systems"]
    parts = ("chosen_by", "confirmed_by", "all", "rare")
    titles = [_part_title(results, part) for part in parts]
    header = ["Strangeness of a cell", *titles, f"found at 5% false alarms, {titles[1]}"]
    rows = [
        [
            TITLES.get(name, name),
            *(_number(systems[name][part], "auroc") for part in parts),
            _number(systems[name]["confirmed_by"], "found_at_5_percent"),
        ]
        for name in sorted(systems, key=lambda name: -_order(systems[name]))
    ]
    return table(header, rows)


def _order(of_parts: Mapping[str, Any]) -> float:
    best = of_parts["confirmed_by"] or of_parts["all"] or of_parts["rare"]
    return 0.0 if best is None else float(best["auroc"])


def _table_of_types(systems: Mapping[str, Any], types: Iterable[str], part: str) -> str:
    shown = [name for name in (SHIPPED, MODEL_SOFTMAX, SOFTMAX, "one_vs_rest_128", "gene_excess_1")
             if systems.get(name, {}).get(part)]  # fmt: skip
    rows = [[label, *(f"{systems[name][part]['types'][label]:.3f}" for name in shown)] for label in types]
    return table(["Type left out", *map(_title, shown)], rows)


def _number(summary: Mapping[str, Any] | None, score: str) -> str:
    return "" if summary is None else f"{summary[score]:.3f}"
