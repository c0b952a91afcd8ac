"""What perturbations did beside their null: a record of numbers for each, and a table of genes and classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from screformer.annotation.perturbation_null import adjust_p_values, empirical_p_values
from screformer.annotation.perturbed_cells import SHIFTS, CellTokens, ChangedCells, GeneSet
from screformer.train.result_files import finite

INTERVAL = (2.5, 97.5)  # percentiles of the null
WANTED_P = 0.05
# From which difference on a null is said to be expressed otherwise: of the share of cells, and in bins.
OTHER_SHARE, OTHER_BIN = 0.1, 0.5
FloatArray = npt.NDArray[np.floating]
Record = dict[str, Any]  # Any: JSON


class MeasuredGenes(NamedTuple):
    """A perturbation, what it does, and what matched ones do.

    Attributes
    ----------
    name
        Symbol, or symbols joined by " + ".
    genes
        Positions in the vocabulary.
    changed
        The cells it changes.
    shift
        Columns of `PerturbationMeasure`.
    null_genes
        The matched genes, or sets of them.
    null
        (matched, statistics): their shifts; without those that change no cell.
    """

    name: str
    genes: GeneSet
    changed: ChangedCells
    shift: FloatArray
    null_genes: list[GeneSet]
    null: FloatArray


def describe_results(
    measured: Sequence[MeasuredGenes],
    tokens: CellTokens,
    *,
    symbols: Sequence[str],
    ensembl_ids: Sequence[str],
    class_names: Sequence[str],
    in_file: npt.NDArray[np.int32],
    num_null: int,
) -> list[Record]:
    """Return, as JSON, what each perturbation did beside its null.

    Parameters
    ----------
    measured
        The perturbations.
    tokens
        The cells.
    symbols, ensembl_ids
        Of the vocabulary.
    class_names
        Of the model.
    in_file
        Positions of the genes that the file has.
    num_null
        Matched genes that were asked for.
    """
    num_statistics = len(SHIFTS) + 2 * len(class_names)
    p_values = [
        empirical_p_values(one.shift[:num_statistics], one.null) if len(one.null) and len(one.changed.cells) else None
        for one in measured
    ]
    rates = adjust_p_values(p_values)
    records = []
    for one, p, q in zip(measured, p_values, rates, strict=True):
        statistics = [
            _statistic(one.shift[at], one.null[:, at], None if p is None else p[at], None if q is None else q[at])
            for at in range(num_statistics)
        ]
        of_classes = statistics[len(SHIFTS) :]
        expression, of_null = _expression([one.genes], tokens), _expression(one.null_genes, tokens)
        record = {
            "gene": one.name,
            "symbols": [symbols[gene] for gene in one.genes],
            "ensembl_ids": [ensembl_ids[gene] for gene in one.genes],
            "num_changed_cells": len(one.changed.cells),
            "num_unchanged_cells": len(tokens) - len(one.changed.cells) - one.changed.num_emptied,
            "num_emptied_cells": one.changed.num_emptied,
            **expression,
            **dict(zip(SHIFTS, statistics, strict=False)),
            "label_changes": _label_changes(one.shift[num_statistics:], class_names),
            "classes": {
                name: {"probability": of_classes[at], "logit": of_classes[len(class_names) + at]}
                for at, name in enumerate(class_names)
            },
            "null": {
                "num_genes": len(one.null),
                "genes": [" + ".join(symbols[gene] for gene in genes) for genes in one.null_genes],
                **of_null,
            },
            "notes": [*_notes(one, num_null, in_file), *_differences(expression, of_null)],
        }
        records.append(finite(record))
    return records


def make_table(record: Record) -> pd.DataFrame:
    """Return a row a gene and class: what happened to its probability and logit."""
    rows = []
    for result in record["results"]:
        for name, of_class in result["classes"].items():
            row = {key: result[key] for key in ("gene", "num_changed_cells")} | {"class": name}
            for kind, statistic in of_class.items():
                null = statistic["null"] or {}
                row |= {
                    f"{kind}_change": statistic["mean"],
                    f"{kind}_null_mean": null.get("mean"),
                    f"{kind}_null_std": null.get("std"),
                    f"{kind}_p": statistic["p"],
                    f"{kind}_q": statistic["q"],
                }
            rows.append(row)
    numbers = [name for name in rows[0] if name.endswith(("_change", "_mean", "_std", "_p", "_q"))]
    return pd.DataFrame(rows).astype(dict.fromkeys(numbers, np.float64))


def _statistic(value: float, null: FloatArray, p: float | None, q: float | None) -> Record:
    if not len(null):
        return {"mean": float(value), "null": None, "p": None, "q": None}
    low, high = np.percentile(null, INTERVAL)
    spread = {
        "mean": float(null.mean(dtype=np.float64)),
        "std": float(null.std(dtype=np.float64)),
        "median": float(np.median(null)),
        "interval_95": [float(low), float(high)],
        "lowest": float(null.min()),
        "highest": float(null.max()),
    }
    return {
        "mean": float(value), "null": spread, "p": None if p is None else float(p), "q": None if q is None else float(q)
    }  # fmt: skip


def _expression(sets: Sequence[GeneSet], tokens: CellTokens) -> Record:
    genes = [gene for one in sets for gene in one]
    if not genes:
        return {"share_expressing": None, "mean_bin": None}
    share = tokens.num_expressing[genes].mean() / len(tokens)
    return {"share_expressing": float(share), "mean_bin": float(tokens.mean_bins[genes].mean())}


def _label_changes(counts: FloatArray, class_names: Sequence[str]) -> dict[str, dict[str, int]]:
    pairs = counts.reshape(len(class_names), len(class_names)).astype(np.int64)
    np.fill_diagonal(pairs, 0)
    return {
        class_names[before]: {
            class_names[after]: int(pairs[before, after]) for after in np.flatnonzero(pairs[before]).tolist()
        }
        for before in np.flatnonzero(pairs.any(axis=1)).tolist()
    }


def _notes(one: MeasuredGenes, num_null: int, in_file: npt.NDArray[np.int32]) -> list[str]:
    notes = []
    if not np.isin(one.genes, in_file).all():
        notes.append("not all of it is among the file's genes")
    if not len(one.changed.cells):
        return [*notes, "the change changes no cell"]
    if len(one.null) < num_null:
        least = 1 / (1 + len(one.null))
        found = f"too few genes are expressed alike, {len(one.null)} of {num_null}"
        limit = f": p cannot be below {least:.2g}" if least > WANTED_P else ""
        notes.append(f"{found}{limit}" if len(one.null) else f"{found}: there is no p")
    if one.changed.num_emptied:
        notes.append(f"{one.changed.num_emptied} cells would have no expressed gene left, and are not counted")
    return notes


def _differences(own: Record, of_null: Record) -> list[str]:
    """Say where the ranks are near and the expression is not, as that of the highest genes may be."""
    if of_null["mean_bin"] is None:
        return []
    differences = []
    if abs(own["share_expressing"] - of_null["share_expressing"]) > OTHER_SHARE:
        differences.append(
            f"in {of_null['share_expressing']:.0%} of the cells, itself in {own['share_expressing']:.0%}"
        )
    if abs(own["mean_bin"] - of_null["mean_bin"]) > OTHER_BIN:
        differences.append(f"mean bin {of_null['mean_bin']:.2f}, its own {own['mean_bin']:.2f}")
    return [f"its null is expressed otherwise: {'; '.join(differences)}"] if differences else []
