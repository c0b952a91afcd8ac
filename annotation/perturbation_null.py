"""Genes of the same expression as others, and how rare the shift by a gene is among the shifts by those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy.stats import false_discovery_control, rankdata

from screformer.annotation.perturbed_cells import GeneSet, Int64Array

MAX_RANK_DIFFERENCE = 0.1  # of all ranks
FloatArray = npt.NDArray[np.floating]


def match_genes(
    targets: Sequence[int],
    pool: Int64Array,
    num_expressing: Int64Array,
    mean_bins: npt.NDArray[np.float64],
    *,
    number: int,
    seed: int,
) -> dict[int, list[int]]:
    """Return target -> the genes of the pool that are expressed most alike, at most `number`.

    Genes are ranked by how many cells express them, and by their mean bin in those. How far two genes are apart is the
    larger of both differences in rank; the nearest are taken, at random where several are equally near, and none
    that is further than a tenth of all ranks.

    Parameters
    ----------
    targets
        Positions in the vocabulary.
    pool
        Positions to take from, without the targets.
    num_expressing, mean_bins
        Of all genes of the vocabulary, see `CellTokens`.
    number
        How many are wanted for each target.
    seed
        Draws among equally near genes; a target's draw does not depend on the other targets.
    """
    ranked = np.concatenate([np.array(targets, dtype=np.int64), pool])
    ranks = np.stack([rankdata(values[ranked]) for values in (num_expressing, mean_bins)])
    matches = {}
    for place, target in enumerate(targets):
        apart = np.abs(ranks[:, len(targets) :] - ranks[:, [place]]).max(axis=0)
        order = np.lexsort([np.random.default_rng([seed, target]).random(len(pool)), apart])
        near = order[apart[order] <= MAX_RANK_DIFFERENCE * len(ranked)]
        matches[target] = pool[near[:number]].tolist()
    return matches


def match_sets(genes: GeneSet, matches: Mapping[int, Sequence[int]]) -> list[GeneSet]:
    """Return sets in which each gene is replaced by one of its matches; as many as the least matched gene has."""
    sets = []
    for number in range(min(len(matches[gene]) for gene in genes)):
        members: list[int] = []
        for gene in genes:
            turned = [*matches[gene][number:], *matches[gene][:number]]
            members += [match for match in turned if match not in members][:1]
        if len(members) == len(genes):
            sets.append(tuple(sorted(members)))
    return sorted(set(sets))


def empirical_p_values(shift: FloatArray, null: FloatArray) -> FloatArray:
    """Return two-sided p-values (statistics,): (1 + shifts of the null at least as large) / (1 + shifts of the null).

    Parameters
    ----------
    shift
        (statistics,).
    null
        (genes, statistics).
    """
    return (1 + (np.abs(null) >= np.abs(shift)).sum(axis=0)) / (1 + len(null))


def adjust_p_values(p_values: Sequence[FloatArray | None]) -> list[FloatArray | None]:
    """Return Benjamini-Hochberg's false discovery rates over genes, of each statistic by itself.

    Parameters
    ----------
    p_values
        Of each gene, (statistics,); None of one without a null, which stays so.
    """
    known = [values for values in p_values if values is not None]
    adjusted = iter(false_discovery_control(np.stack(known), axis=0) if known else ())
    return [None if values is None else next(adjusted) for values in p_values]
