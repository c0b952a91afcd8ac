"""What an explanation is worth: whether values add up and stay the same, and what the model says without the genes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy import sparse
from scipy.stats import hypergeom, spearmanr
from sklearn.linear_model import LogisticRegression

from screformer.annotation.attributions import Sampling, mean_embedding
from screformer.annotation.explained_cells import SomeCells
from screformer.annotation.explained_score import Bins, ClassScore
from screformer.annotation.explanation_run import Explainer
from screformer.train.inference import BatchInference

Json = dict[str, Any]
FloatArray = npt.NDArray[np.float64]
NUM_TOP = 100
STEPS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)
NUM_RESAMPLES = 2_000
EXPLANATION, REGRESSION, RANDOM = "explanation", "logistic regression", "random genes"
MARKER_COLUMNS = ("gene", "symbol", "marker")


def completeness(
    explainer: Explainer,
    score: ClassScore,
    bins: Bins,
    values: npt.NDArray[np.float32],
    sampling: Sampling,
    *,
    numbers: Sequence[int] | None = None,
) -> Json:
    """Return by how much the values of cells miss what they explain: the score less the background's mean score.

    The background's is of all its cells at the cell's tokens; of integrated gradients it is the score of their mean
    embedding.

    Parameters
    ----------
    explainer, score
        As they were explained.
    bins, values
        (cells, num_genes).
    sampling
        By which.
    numbers
        Of the cells, by which their points were drawn: where sums may have been found by forward passes, ``as_drawn``
        is the median gap that the points alone leave, which says what the passes mended. None: it is not looked at.
    """

    def effect(own: Bins) -> float:
        cell = explainer.cell(score, own)
        there = explainer.background[:, cell.positions]
        if sampling.method == "integrated_gradients":
            with torch.no_grad():
                start = float(cell.at_embeddings(mean_embedding(cell, there)[None])[0])
        else:
            start = float(cell.at_bins(there).mean())
        return cell.score - start

    effects = list(explainer.map(effect, list(bins)))
    gaps = values.sum(axis=1, dtype=np.float64) - effects
    relative = np.abs(gaps) / np.maximum(np.abs(effects), np.finfo(np.float32).tiny)
    as_drawn = None
    if numbers is not None and sampling.method == "expected_gradients" and sampling.max_sum_error is not None:
        alone = sampling._replace(max_sum_error=None)
        sums = explainer.map(
            lambda row: explainer.values(score, bins[row], alone, number=numbers[row]).sum(dtype=np.float64),
            range(len(bins)),
        )
        left = np.abs(np.array(list(sums)) - effects) / np.maximum(np.abs(effects), np.finfo(np.float32).tiny)
        as_drawn = float(np.median(left))
    return {
        "num_cells": len(bins),
        "median_gap": float(np.median(relative)),
        "largest_gap": float(relative.max()),
        "as_drawn": as_drawn,
        "mean_effect": float(np.mean(effects)),
    }


def stability(first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> Json:
    """Return how much two estimates (cells, num_genes) of the same cells agree on the genes that count most.

    Spearman's correlation of the mean absolute values, over the 100 genes that are highest in the first, and the share
    of these that are so in the second too.
    """
    ours, theirs = (np.abs(values).mean(axis=0) for values in (first, second))
    number = min(NUM_TOP, int((ours > 0).sum()))
    top, other = (set(np.argsort(-values, kind="stable")[:number].tolist()) for values in (ours, theirs))
    places = sorted(top)
    correlation = float(spearmanr(ours[places], theirs[places]).statistic) if number > 1 else None
    return {
        "num_cells": len(first),
        "num_genes": number,
        "rank_correlation": None if correlation is None or np.isnan(correlation) else correlation,
        "shared": len(top & other) / max(number, 1),
    }


class Curves(NamedTuple):
    """The class's score and probability as genes go, or come, in some order.

    Attributes
    ----------
    steps
        Numbers of genes.
    deletion, insertion
        Order -> (cells, steps): the score without its first genes, and with them alone.
    deletion_probability, insertion_probability
        The same of the probability.
    """

    steps: tuple[int, ...]
    deletion: dict[str, FloatArray]
    insertion: dict[str, FloatArray]
    deletion_probability: dict[str, FloatArray]
    insertion_probability: dict[str, FloatArray]

    def describe(self, seed: int = 0) -> Json:
        """Return mean curves, areas (means over the steps), and ours less each other with a 95% interval over cells.

        A cell without any gene says nothing: it is left out of the steps at which it has none left.
        """
        found: Json = {"steps": list(self.steps), "num_cells": len(self.deletion[EXPLANATION])}
        for name in ("deletion", "insertion", "deletion_probability", "insertion_probability"):
            curves: Mapping[str, FloatArray] = getattr(self, name)
            areas = {order: _mean(values[:, 1:], axis=1) for order, values in curves.items()}
            found[name] = {
                "curves": {order: _mean(values, axis=0).tolist() for order, values in curves.items()},
                "areas": {order: float(own.mean()) for order, own in areas.items()},
                "less": {
                    order: _difference(areas[EXPLANATION] - own, seed)
                    for order, own in areas.items()
                    if order != EXPLANATION
                },
            }
        return found


def _mean(values: FloatArray, *, axis: int) -> FloatArray:
    """Return the mean of what is known; NaN where nothing is."""
    known = ~np.isnan(values)
    number = known.sum(axis=axis)
    means: FloatArray = np.where(known, values, 0.0).sum(axis=axis) / np.where(number, number, np.nan)
    return means


def _difference(values: FloatArray, seed: int) -> Json:
    draws = np.random.default_rng(seed).choice(values, (NUM_RESAMPLES, len(values))).mean(axis=1)
    return {"mean": float(values.mean()), "interval": [float(end) for end in np.quantile(draws, [0.025, 0.975])]}


def deletion_and_insertion(
    explainer: Explainer,
    score: ClassScore,
    bins: Bins,
    orders: Mapping[str, npt.NDArray[np.floating]],
) -> Curves:
    """Take the genes of cells away, and put them back, the highest first.

    Only genes that a cell expresses are taken: to bin 0, in the expressed space their tokens. Steps beyond a cell's
    genes are as all of them; a cell without genes has no score (NaN).

    Parameters
    ----------
    explainer, score
        As they were explained.
    bins
        (cells, num_genes).
    orders
        Name -> (cells, num_genes): what genes are ordered by.
    """
    most = int(np.count_nonzero(bins, axis=1).max())
    steps = tuple(step for step in STEPS if step < most)
    inference = BatchInference(explainer.model, "logits", gene_space=explainer.gene_space)
    parts: dict[str, dict[str, FloatArray]] = {}
    for order, heights in orders.items():
        ranked = [_ranked(own, of_genes) for own, of_genes in zip(bins, heights, strict=True)]
        for kind in ("deletion", "insertion"):
            rows = [_row(own, genes[step:] if kind == "deletion" else genes[:step])
                    for own, genes in zip(bins, ranked, strict=True) for step in steps]  # fmt: skip
            scores, probabilities = _say(inference, score, rows)
            parts.setdefault(kind, {})[order] = scores.reshape(len(bins), len(steps))
            parts.setdefault(f"{kind}_probability", {})[order] = probabilities.reshape(len(bins), len(steps))
    return Curves(steps, **parts)


def _ranked(bins: Bins, heights: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
    """Return the expressed genes of a cell, the highest first."""
    genes = np.flatnonzero(bins)
    return genes[np.argsort(-heights[genes], kind="stable")]


def _row(bins: Bins, genes: npt.NDArray[np.int64]) -> Json:
    kept = np.sort(genes)
    return {"input_ids": bins[kept], "gene_ids": kept.astype(np.uint16)}


def _say(inference: BatchInference, score: ClassScore, rows: Sequence[Json]) -> tuple[FloatArray, FloatArray]:
    """Return the score and the probability of the class for each row; those of a cell without genes are NaN."""
    scores, probabilities = np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    known = [number for number, row in enumerate(rows) if len(row["gene_ids"])]
    logits = torch.from_numpy(inference([rows[number] for number in known]))
    scores[known] = score(logits).double().numpy()
    probabilities[known] = logits.softmax(dim=1)[:, list(score.members)].sum(dim=1).double().numpy()
    return scores, probabilities


def regression_weights(cells: SomeCells, labels: Sequence[str]) -> FloatArray | None:
    """Return what a logistic regression adds for a bin of each gene, (num_genes,): the class against the rest.

    It is fitted to the background's cells and their labels; None where they have no cell of the class, or no other.

    Parameters
    ----------
    cells
        The background.
    labels
        Of the class.
    """
    is_class = np.isin(cells.labels, list(labels))
    if is_class.all() or not is_class.any():
        return None
    scale = np.float64(max(1, int(cells.bins.max())))
    fitted = LogisticRegression(max_iter=2000).fit(sparse.csr_array(cells.bins / scale), is_class)
    weights: FloatArray = fitted.coef_[0] / scale
    return weights


def random_order(num_cells: int, num_genes: int, seed: int) -> FloatArray:
    """Return heights by which genes come in random order, of each cell another."""
    return np.random.default_rng(seed).random((num_cells, num_genes))


def read_marker_genes(path: str | Path, *, cell_types: Sequence[str] = ()) -> list[str]:
    """Return gene names: of a text file with one a line, or of a csv file with a column gene, symbol or marker.

    Parameters
    ----------
    path
        The file; of a csv file like CellMatch the human rows of normal tissue.
    cell_types
        Of a csv file: the values of its column celltype to take; default all.

    Raises
    ------
    ValueError
        No gene is left, or the csv file has no such column.
    """
    source = Path(path)
    if ".csv" not in source.suffixes:
        genes = [line.strip() for line in source.read_text(encoding="utf-8").splitlines()]
    else:
        rows = pd.read_csv(source, dtype=str)
        column = next((name for name in MARKER_COLUMNS if name in rows), None)
        if column is None:
            raise ValueError(f"markers: {source.name} has the columns {list(rows)}; one of {MARKER_COLUMNS} is needed")
        for name, value in (("species", "Human"), ("cancer", "Normal")):
            rows = rows[rows[name] == value] if name in rows else rows
        if cell_types:
            if "celltype" not in rows:
                raise ValueError(f"markers: {source.name} has no column celltype to choose {list(cell_types)} by")
            rows = rows[rows["celltype"].isin(list(cell_types))]
        genes = rows[column].dropna().tolist()
    found = sorted({gene for gene in genes if gene})
    if not found:
        raise ValueError(f"markers: {source.name} has no gene for cell types {list(cell_types) or 'any'}")
    return found


def marker_overlap(importance: FloatArray, is_marker: npt.NDArray[np.bool_], is_seen: npt.NDArray[np.bool_]) -> Json:
    """Return how many of the 100 genes that count most are markers, beside chance (hypergeometric).

    Parameters
    ----------
    importance
        (num_genes,).
    is_marker
        (num_genes,).
    is_seen
        (num_genes,): genes that some explained cell expresses, among which chance draws.
    """
    order = np.argsort(-importance, kind="stable")
    top = [gene for gene in order[: min(NUM_TOP, int((importance > 0).sum()))] if is_seen[gene]]
    hits, markers, seen = int(is_marker[top].sum()), int((is_marker & is_seen).sum()), int(is_seen.sum())
    return {
        "num_top": len(top),
        "num_markers": markers,
        "num_seen": seen,
        "hits": hits,
        "expected": len(top) * markers / max(seen, 1),
        "p": float(hypergeom.sf(hits - 1, seen, markers, len(top))),
    }
