"""A graph of genes from an edge list, such as protein interactions of STRING, and walks on it (node2vec).

Any text with one edge a line is read: two names and, optionally, a score in the last column, between tabs, commas or
spaces, compressed or not. STRING names proteins (``9606.ENSP…``); its file ``protein.info`` says which genes they are.
"""

from __future__ import annotations

import csv
import gzip
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from screformer.tokenization.gene_vocabulary import GeneVocabulary

logger = logging.getLogger(__name__)
LINES_A_READ = 1_000_000
WALKS_A_STEP = 100_000
MAX_TRIES = 1000  # of a step; a proposal is taken with a chance of 1 in 100 or more

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class GeneGraph:
    """An undirected graph of genes, each edge in both directions, compressed by rows.

    Attributes
    ----------
    indptr
        int64 (num_genes + 1,): where the neighbours of each gene of the vocabulary begin.
    neighbors
        int32 (2 * num_edges,): positions in the vocabulary, rising for each gene.
    weights
        float64, of each neighbour, above 0.
    num_lines
        Edges read.
    unknown
        Examples of names that mean no gene of the vocabulary; edges with one are left out.
    """

    indptr: Integers
    neighbors: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float64]
    num_lines: int
    unknown: list[str]

    @property
    def num_edges(self) -> int:
        """Undirected edges."""
        return len(self.neighbors) // 2

    def __str__(self) -> str:
        num_genes = int((np.diff(self.indptr) > 0).sum())
        text = f"{self.num_edges:,} edges of {num_genes:,} genes, from {self.num_lines:,} lines"
        return text + (f"; not in the vocabulary: {', '.join(self.unknown)} ..." if self.unknown else "")


def read_gene_graph(
    path: str | Path,
    vocabulary: GeneVocabulary,
    *,
    min_score: float | None = None,
    protein_names: str | Path | None = None,
) -> GeneGraph:
    """Read an edge list.

    Edges of a gene with itself are left out; of an edge that is there several times, the highest score is its weight.

    Parameters
    ----------
    path
        The text file.
    vocabulary
        The genes.
    min_score
        The least score of an edge; STRING calls 700 high confidence. Needs a column of scores.
    protein_names
        A table whose first two columns are the names in the edge list and gene names: STRING's `protein.info`.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is no edge list, scores are missing or not positive, or no edge is between two known genes.
    """
    path = Path(path)
    gene_of = None if protein_names is None else _read_protein_names(Path(protein_names))
    positions: dict[str, int] = {}
    ends: list[Integers] = []
    scores: list[npt.NDArray[np.float64]] = []
    num_lines = 0
    for lines in _read_lines(path):
        new = pd.unique(lines[["first", "second"]].to_numpy().ravel()).tolist()
        new = [name for name in new if name not in positions]
        names = new if gene_of is None else [gene_of.get(name, name) for name in new]
        positions.update(zip(new, vocabulary.map_names(names).positions.tolist(), strict=True))
        pairs = np.stack([lines[end].map(positions).to_numpy(np.int64) for end in ("first", "second")], axis=1)
        num_lines += len(lines)
        is_edge = (pairs >= 0).all(axis=1) & (pairs[:, 0] != pairs[:, 1])
        weights = np.ones(len(lines)) if "score" not in lines else lines["score"].to_numpy(np.float64)
        if min_score is not None:
            if "score" not in lines:
                msg = f"min_score={min_score} needs a third column with scores; {path.name} has two columns"
                raise ValueError(msg)
            is_edge &= weights >= min_score
        if not (weights[is_edge] > 0).all():
            msg = f"{path.name}: scores must be above 0, got {weights[is_edge].min()}; leave such edges out"
            raise ValueError(msg)
        ends.append(pairs[is_edge])
        scores.append(weights[is_edge])
    unknown = [name for name, position in positions.items() if position < 0]
    if not any(map(len, ends)):
        hint = "STRING's proteins need its protein.info file: --protein-names. " if gene_of is None else ""
        limit = "" if min_score is None else f" with a score of {min_score} or more"
        msg = f"{path.name}: no edge between two known genes{limit}; unknown are such as {unknown[:5]}. {hint}"
        raise ValueError(msg.strip())
    graph = _compress(np.concatenate(ends), np.concatenate(scores), len(vocabulary), num_lines, unknown[:5])
    logger.info("%s: %s", path.name, graph)
    return graph


def walk_graph(
    graph: GeneGraph,
    *,
    num_walks: int = 10,
    length: int = 40,
    return_parameter: float = 1.0,
    in_out_parameter: float = 1.0,
    seed: int = 2022,
) -> npt.NDArray[np.int32]:
    """Return walks from every gene that has a neighbour, (num_walks * such genes, length), as positions.

    A step goes to a neighbour with a probability in proportion to the edge's weight, times 1 / return_parameter for the
    gene that the walk came from and 1 / in_out_parameter for one that is no neighbour of it (node2vec, Grover and
    Leskovec 2016; p and q there). It is drawn by rejection, so that no table of all pairs of edges is needed.

    Raises
    ------
    ValueError
        A number is out of its range.
    """
    for name, value, least in (("num_walks", num_walks, 1), ("length", length, 2)):
        if value < least:
            msg = f"{name}: at least {least}, got {value}"
            raise ValueError(msg)
    for name, parameter in (("return_parameter", return_parameter), ("in_out_parameter", in_out_parameter)):
        if not 0.1 <= parameter <= 10:
            msg = f"{name}: 0.1 to 10, got {parameter}"
            raise ValueError(msg)
    starts = np.repeat(np.flatnonzero(np.diff(graph.indptr)), num_walks)
    walks = np.empty((len(starts), length), np.int32)
    walker = _Walker(graph, return_parameter, in_out_parameter, np.random.default_rng(seed))
    for first in range(0, len(starts), WALKS_A_STEP):
        part = walks[first : first + WALKS_A_STEP]
        part[:, 0] = starts[first : first + WALKS_A_STEP]
        part[:, 1] = walker.draw_neighbors(part[:, 0])
        for step in range(2, length):
            part[:, step] = walker.step(part[:, step - 2], part[:, step - 1])
    return walks


class _Walker:
    """Draws steps of many walks at once."""

    def __init__(
        self, graph: GeneGraph, return_parameter: float, in_out_parameter: float, generator: np.random.Generator
    ) -> None:
        self._graph = graph
        self._generator = generator
        self._cumulated = np.concatenate([np.zeros(1), np.cumsum(graph.weights)])
        num_genes = len(graph.indptr) - 1
        self._keys = np.repeat(np.arange(num_genes), np.diff(graph.indptr)) * num_genes + graph.neighbors
        self._chances = np.array([1 / return_parameter, 1.0, 1 / in_out_parameter])
        self._chances /= self._chances.max()

    def draw_neighbors(self, genes: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Draw a neighbour of each gene in proportion to the weights."""
        indptr = self._graph.indptr
        low, high = self._cumulated[indptr[genes]], self._cumulated[indptr[genes + 1]]
        drawn = low + self._generator.random(len(genes)) * (high - low)
        places = np.searchsorted(self._cumulated, drawn, side="right") - 1
        return self._graph.neighbors[np.clip(places, indptr[genes], indptr[genes + 1] - 1)]

    def step(self, before: npt.NDArray[np.int32], at: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Draw the next gene of each walk, given the last two."""
        chosen = np.empty(len(at), np.int32)
        open_walks = np.arange(len(at))
        for _ in range(MAX_TRIES):
            proposed = self.draw_neighbors(at[open_walks])
            chosen[open_walks] = proposed
            came_from = before[open_walks]
            kind = np.where(proposed == came_from, 0, np.where(self._are_neighbors(came_from, proposed), 1, 2))
            open_walks = open_walks[self._generator.random(len(kind)) >= self._chances[kind]]
            if len(open_walks) == 0:
                break
        return chosen

    def _are_neighbors(self, first: npt.NDArray[np.int32], second: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        keys = first.astype(np.int64) * (len(self._graph.indptr) - 1) + second
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return self._keys[places] == keys


def _compress(
    pairs: Integers, scores: npt.NDArray[np.float64], num_genes: int, num_lines: int, unknown: list[str]
) -> GeneGraph:
    both = np.concatenate([pairs, pairs[:, ::-1]])
    weights = np.concatenate([scores, scores])
    keys = both[:, 0] * num_genes + both[:, 1]
    order = np.lexsort((-weights, keys))  # the highest score of an edge first
    keys, first = np.unique(keys[order], return_index=True)
    genes, neighbors = np.divmod(keys, num_genes)
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(genes, minlength=num_genes))])
    return GeneGraph(indptr, neighbors.astype(np.int32), weights[order][first], num_lines, unknown)


def _read_lines(path: Path) -> Iterator[pd.DataFrame]:
    """Yield columns first, second and, where the file has one, score."""
    if not path.is_file():
        msg = f"path: there is no file {path}"
        raise FileNotFoundError(msg)
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            line = file.readline().rstrip()
        separator = next((one for one in ("\t", ",", " ") if one in line), None)
        if separator is None:
            msg = f"two names a line are needed, between tabs, commas or spaces; the first line is {line[:80]!r}"
            raise ValueError(msg)
        fields = line.split(separator)
        has_score = len(fields) > 2
        columns = [0, 1, len(fields) - 1] if has_score else [0, 1]
        has_header = has_score and not _is_number(fields[-1])
        reader = pd.read_csv(
            path, sep=separator, header=None, names=range(len(fields)), usecols=columns, dtype=str,
            keep_default_na=False, quoting=csv.QUOTE_NONE, skiprows=int(has_header), chunksize=LINES_A_READ,
        )  # fmt: skip
        with reader:
            for chunk in reader:
                lines = chunk.set_axis(["first", "second", "score"][: len(columns)], axis=1)
                yield lines.assign(score=pd.to_numeric(lines["score"])) if has_score else lines
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        msg = f"{path.name}: not an edge list: {error}"
        raise ValueError(msg) from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_protein_names(path: Path) -> dict[str, str]:
    if not path.is_file():
        msg = f"protein_names: there is no file {path}"
        raise FileNotFoundError(msg)
    options = {"header": None, "dtype": str, "keep_default_na": False, "quoting": csv.QUOTE_NONE}
    try:
        table = pd.read_csv(path, sep="\t", usecols=[0, 1], **options)
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        msg = f"protein_names: {path.name} is no table of two columns between tabs: {error}"
        raise ValueError(msg) from error
    return dict(zip(table[0], table[1], strict=True))
