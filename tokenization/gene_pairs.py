"""Gene pairs that rise and fall together in the cells of a corpus: what our own Gene2vec is trained on.

A corpus keeps bins, not counts, and the bins are correlated as they are: with the default rule, "log2", a bin is
log2(1 + counts per 10,000) rounded down, so this is the correlation of log counts to a resolution of one doubling, cut
off at the highest bin. (A corpus made with more bins keeps the high end; the rule "quantile" gives a rank correlation.)

Each group of cells (a file, or a value of an obs column) is correlated by itself, because what differs between studies
makes every gene that one of them lacks look co-expressed. Pairs found in several groups count several times.

Out of core: cells pass in blocks, and the genes x genes sums are held for as many genes at a time as the memory allows;
with n genes and m bytes the cells are read ``1 + ceil(4 n^2 / m)`` times. Memory grows with the cells by 12
bytes each, which is the list of those to read.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from tqdm.auto import tqdm

from screformer.tokenization.corpus import Corpus

logger = logging.getLogger(__name__)
CELLS_PER_BLOCK = 512
VALUES_A_READ = 100_000
ROWS_PER_CHOICE = 256  # genes whose neighbours are chosen at once
MIN_STANDARD_DEVIATION = 1e-6

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class CellGroup(NamedTuple):
    """Cells that are correlated together: a name, and the rows of the corpus, rising."""

    name: str
    rows: Integers


class GeneMoments(NamedTuple):
    """What each gene of the vocabulary does in a group of cells.

    Attributes
    ----------
    num_cells
        Cells looked at.
    num_expressing
        int64 (num_genes,): cells that express the gene.
    means, standard_deviations
        float64 (num_genes,), of the bin.
    """

    num_cells: int
    num_expressing: Integers
    means: npt.NDArray[np.float64]
    standard_deviations: npt.NDArray[np.float64]


@dataclass(frozen=True)
class PairRules:
    """Which pairs count as co-expressed.

    Attributes
    ----------
    min_correlation
        The least Pearson correlation of the bins.
    min_z
        The least z score of a correlation, ``atanh(r) * sqrt(cells - 3)``: in few cells, chance correlates more.
    num_neighbors
        The most pairs a gene starts: its highest correlations. It can be in more, as the neighbour of others.
    min_cell_share, min_cells
        A gene is left out of a group if fewer cells express it than this share of them, or this number.
    max_cells
        The most cells of a group that are looked at, drawn at random; more change a correlation little.

    Raises
    ------
    ValueError
        A number is out of its range.
    """

    min_correlation: float = 0.1
    min_z: float = 5.0
    num_neighbors: int = 100
    min_cell_share: float = 0.01
    min_cells: int = 10
    max_cells: int = 20_000

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, least, most in (
            ("min_correlation", 0, 1),
            ("min_z", 0, math.inf),
            ("num_neighbors", 1, math.inf),
            ("min_cell_share", 0, 1),
            ("min_cells", 1, math.inf),
            ("max_cells", 10, math.inf),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                allowed = f"{least} to {most}" if most < math.inf else f"at least {least}"
                msg = f"{name}: {allowed}, got {value}"
                raise ValueError(msg)

    def threshold(self, num_cells: int) -> float:
        """Return the least correlation that passes in so many cells."""
        return max(self.min_correlation, math.tanh(self.min_z / math.sqrt(max(1, num_cells - 3))))

    def least_cells(self, num_cells: int) -> int:
        """Return how many of so many cells must express a gene."""
        return max(self.min_cells, math.ceil(self.min_cell_share * num_cells))


@dataclass(frozen=True)
class GenePairs:
    """Co-expressed pairs.

    Attributes
    ----------
    genes
        int32 (num_pairs, 2): positions in the vocabulary, the smaller first; once a group.
    correlations
        float32 (num_pairs,).
    groups
        int32 (num_pairs,): index in `group_names`.
    group_names
        The groups that were looked at.
    num_cells, num_genes
        Cells and genes that were correlated, a group each.
    """

    genes: npt.NDArray[np.int32]
    correlations: Floats
    groups: npt.NDArray[np.int32]
    group_names: list[str]
    num_cells: list[int]
    num_genes: list[int]

    def __len__(self) -> int:
        """Count the pairs."""
        return len(self.genes)

    def nearest(self, num_neighbors: int) -> GenePairs:
        """Return the pairs that are, for either gene and in their group, among its highest correlations."""
        genes = self.genes.T.ravel()  # each pair twice: as seen from either gene
        groups, correlations = np.tile(self.groups, 2), np.tile(self.correlations, 2)
        order = np.lexsort((-correlations, genes, groups))
        keys = np.stack([groups[order], genes[order]])
        is_first = np.concatenate([[True], (keys[:, 1:] != keys[:, :-1]).any(axis=0)])
        ranks = np.empty(len(order), np.int64)
        ranks[order] = np.arange(len(order)) - np.flatnonzero(is_first)[np.cumsum(is_first) - 1]
        best = ranks.reshape(2, -1).min(axis=0)
        kept = best < num_neighbors
        return replace(self, genes=self.genes[kept], correlations=self.correlations[kept], groups=self.groups[kept])

    def describe(self) -> list[dict[str, str | int]]:
        """Return a JSON row for each group: name, cells, genes and pairs."""
        num_pairs = np.bincount(self.groups, minlength=len(self.group_names)).tolist()
        return [
            {"group": name, "num_cells": cells, "num_genes": genes, "num_pairs": pairs}
            for name, cells, genes, pairs in zip(
                self.group_names, self.num_cells, self.num_genes, num_pairs, strict=True
            )
        ]


def find_gene_pairs(
    corpus: Corpus,
    rules: PairRules | None = None,
    *,
    group_column: str | None = None,
    memory: float = 1.0,
    seed: int = 2022,
) -> GenePairs:
    """Find the pairs of genes that are co-expressed in a corpus, group by group.

    Parameters
    ----------
    corpus
        The cells.
    rules
        Which pairs count; the defaults of `PairRules` when left out.
    group_column
        Column of obs kept in the corpus; cells of one value are correlated together. When left out, those of one file.
    memory
        GB for the sums of products.
    seed
        Draws the cells of groups with more than `max_cells`.

    Raises
    ------
    ValueError
        `memory` is not positive, there is no such column, or no pair passes.
    """
    if not memory > 0:
        msg = f"memory: more than 0 GB, got {memory}"
        raise ValueError(msg)
    rules = rules or PairRules()
    groups = cell_groups(corpus, group_column=group_column, max_cells=rules.max_cells, seed=seed)
    num_vocabulary = len(corpus.tokenizer().gene_vocabulary)
    found: list[tuple[npt.NDArray[np.int32], Floats]] = []
    num_genes: list[int] = []
    for group in tqdm(groups, desc="co-expression", unit="group", disable=None):
        moments = measure_genes(corpus, group, num_vocabulary)
        is_kept = moments.num_expressing >= rules.least_cells(moments.num_cells)
        genes = np.flatnonzero(is_kept & (moments.standard_deviations > MIN_STANDARD_DEVIATION))
        found.append(_group_pairs(corpus, group, moments, genes, rules, memory))
        num_genes.append(len(genes))
        logger.info("%s: %d cells, %d genes, %d pairs", group.name, len(group.rows), len(genes), len(found[-1][0]))
    if not any(len(pairs) for pairs, _ in found):
        msg = f"no pair of genes passes in {len(corpus)} cells with {rules}: loosen the rules, or give more cells"
        raise ValueError(msg)
    return GenePairs(
        genes=np.concatenate([pairs for pairs, _ in found]),
        correlations=np.concatenate([correlations for _, correlations in found]),
        groups=np.repeat(np.arange(len(found), dtype=np.int32), [len(pairs) for pairs, _ in found]),
        group_names=[group.name for group in groups],
        num_cells=[len(group.rows) for group in groups],
        num_genes=num_genes,
    )


def cell_groups(
    corpus: Corpus, *, group_column: str | None = None, max_cells: int = 20_000, seed: int = 2022
) -> list[CellGroup]:
    """Groups of a corpus's cells, at most `max_cells` of each, drawn by `seed`.

    Raises
    ------
    ValueError
        There is no such column.
    """
    if group_column is None:
        names, labels = _files_of_cells(corpus)
    else:
        if group_column not in corpus.dataset.column_names:
            msg = f"group_column={group_column!r} is not in the corpus, which has {corpus.dataset.column_names}"
            raise ValueError(msg)
        names, labels = _values_of_cells(corpus, group_column)
    generator = np.random.default_rng(seed)
    groups = []
    for label, name in enumerate(names):
        rows = np.flatnonzero(labels == label)
        if len(rows) > max_cells:
            rows = np.sort(generator.choice(rows, max_cells, replace=False))
        groups.append(CellGroup(name, rows))
    return groups


def measure_genes(corpus: Corpus, group: CellGroup, num_genes: int) -> GeneMoments:
    """Return how often and how high each gene of the vocabulary is expressed in a group, from one reading."""
    num_expressing = np.zeros(num_genes, np.int64)
    sums, squares = np.zeros(num_genes), np.zeros(num_genes)
    for _, block in read_bins(corpus, group.rows):
        bins = block.bins.astype(np.float64)
        num_expressing += np.bincount(block.genes, minlength=num_genes)
        sums += np.bincount(block.genes, weights=bins, minlength=num_genes)
        squares += np.bincount(block.genes, weights=bins * bins, minlength=num_genes)
    means = sums / max(1, len(group.rows))
    variances = np.maximum(squares / max(1, len(group.rows)) - means**2, 0)
    return GeneMoments(len(group.rows), num_expressing, means, np.sqrt(variances))


class BinBlock(NamedTuple):
    """Expressed genes of some cells: the row in the block, the gene, its bin."""

    num_cells: int
    rows: Integers
    genes: Integers
    bins: npt.NDArray[np.uint8]


def _group_pairs(
    corpus: Corpus,
    group: CellGroup,
    moments: GeneMoments,
    genes: Integers,
    rules: PairRules,
    memory: float,
) -> tuple[npt.NDArray[np.int32], Floats]:
    """Pairs of `genes`, as positions of the vocabulary, and their correlations."""
    threshold = rules.threshold(moments.num_cells)
    keys: list[Integers] = []
    values: list[Floats] = []
    for first, tile in _correlation_tiles(corpus, group.rows, moments, genes, memory):
        for start in range(0, len(tile), ROWS_PER_CHOICE):
            chosen = tile[start : start + ROWS_PER_CHOICE]
            rows, columns = _choose_neighbors(chosen, first + start, threshold, rules.num_neighbors)
            values.append(chosen[rows, columns])
            own = rows + first + start
            keys.append(np.minimum(own, columns) * len(genes) + np.maximum(own, columns))
    if not keys:
        return np.zeros((0, 2), np.int32), np.zeros(0, np.float32)
    unique, where = np.unique(np.concatenate(keys), return_index=True)
    pairs = genes[np.stack(np.divmod(unique, len(genes)), axis=1)].astype(np.int32)
    return pairs, np.concatenate(values)[where]


def _correlation_tiles(
    corpus: Corpus, rows: Integers, moments: GeneMoments, genes: Integers, memory: float
) -> Iterator[tuple[int, Floats]]:
    """Yield the first gene of a tile, and the correlations of the tile's genes with all `genes`."""
    tile_size = max(1, min(len(genes), int(memory * 1e9 / (4 * max(1, len(genes))))))
    column_of = np.full(len(moments.means), -1)
    column_of[genes] = np.arange(len(genes))
    means = moments.means[genes].astype(np.float32)
    scales = (1 / moments.standard_deviations[genes]).astype(np.float32)
    for first in range(0, len(genes), tile_size):
        stop = min(first + tile_size, len(genes))
        sums = np.zeros((stop - first, len(genes)), np.float32)
        for _, block in read_bins(corpus, rows):
            scores = np.zeros((block.num_cells, len(genes)), np.float32)
            columns = column_of[block.genes]
            is_kept = columns >= 0
            scores[block.rows[is_kept], columns[is_kept]] = block.bins[is_kept]
            scores -= means
            scores *= scales
            sums += scores[:, first:stop].T @ scores
        sums /= len(rows)
        yield first, sums


def _choose_neighbors(
    correlations: Floats, first_gene: int, threshold: float, num_neighbors: int
) -> tuple[Integers, Integers]:
    """Rows and columns of each row's highest correlations, itself left out, that reach the threshold."""
    own = np.arange(len(correlations))
    correlations[own, first_gene + own] = -np.inf
    num_chosen = min(num_neighbors, correlations.shape[1])
    columns = np.argpartition(-correlations, num_chosen - 1, axis=1)[:, :num_chosen]
    rows = np.repeat(own, num_chosen)
    columns = columns.ravel()
    is_high = correlations[rows, columns] >= threshold
    return rows[is_high], columns[is_high]


def read_bins(corpus: Corpus, rows: Integers) -> Iterator[tuple[int, BinBlock]]:
    """Yield cells of the corpus in blocks, each with the number of the first of them in `rows`."""
    cells: datasets.Dataset = corpus.dataset.select_columns(["input_ids", "gene_ids"]).with_format("arrow")
    for start in range(0, len(rows), CELLS_PER_BLOCK):
        table = cells[rows[start : start + CELLS_PER_BLOCK]]
        lengths = pc.list_value_length(table["gene_ids"]).to_numpy()
        block = BinBlock(
            num_cells=len(lengths),
            rows=np.repeat(np.arange(len(lengths)), lengths),
            genes=pc.list_flatten(table["gene_ids"]).to_numpy().astype(np.int64),
            bins=pc.list_flatten(table["input_ids"]).to_numpy(),
        )
        yield start, block


def _files_of_cells(corpus: Corpus) -> tuple[list[str], npt.NDArray[np.int32]]:
    """Names of the files, and the number of the file that each cell is from."""
    shards = corpus.manifest["shards"]
    sources = np.array([shard["source"] for shard in shards], np.int32)
    labels = np.repeat(sources, [shard["num_cells"] for shard in shards])
    return [source["name"] for source in corpus.manifest["sources"]], labels


def _values_of_cells(corpus: Corpus, column: str) -> tuple[list[str], npt.NDArray[np.int32]]:
    """Values of a column, sorted, and the number of each cell's; an empty text where it is missing."""
    number_of: dict[str, int] = {}
    parts = []
    cells = corpus.dataset.select_columns([column]).with_format("arrow")
    for table in cells.iter(batch_size=VALUES_A_READ):
        texts = ["" if value is None else value for value in table[column].to_pylist()]
        values, inverse = np.unique(texts, return_inverse=True)
        numbers = [number_of.setdefault(value, len(number_of)) for value in values.tolist()]
        parts.append(np.array(numbers, np.int32)[inverse])
    names = sorted(number_of)
    rank = np.empty(len(names), np.int32)
    rank[[number_of[name] for name in names]] = np.arange(len(names))
    return names, rank[np.concatenate(parts)]
