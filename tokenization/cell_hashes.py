"""A number for each cell by which it is recognised in any file: duplicates, splits, and what a model has seen.

The hash of a cell is a mixture of the sum, modulo 2^64, over the genes of the vocabulary, of (a random number of the
gene's id) x (a random number of its raw count, 0 for no count): multilinear hashing (Carter and Wegman, 1979). A sum
does not depend on the order of genes, so neither file format nor the order of columns or of the vocabulary matters;
columns of the same gene are summed first. All cells without counts on known genes have hash 0.

Two cells that differ in many genes have the same hash with a probability of 2^-64; among n cells some pair has with
about n^2 / 2^65: 6 in a million for 15 million cells. Cells with very few counts can *be* the same, such as one count
of one gene, without being the same cell. And a cell is recognised only while its counts stay: one aligned anew,
denoised, or stripped of some of the vocabulary's genes is another cell.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix

from screformer.tokenization.corpus_files import (
    CELL_HASHES,
    MANIFEST,
    Manifest,
    aside,
    checksum,
    read_json,
    write_json,
)
from screformer.tokenization.count_matrix import CountMatrix
from screformer.tokenization.expression_bins import CountsCSR, as_counts_csr
from screformer.tokenization.gene_vocabulary import GeneVocabulary
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer

# Changes with anything that changes a hash.
HASH_RULE = 1
SEEN_CELLS = "seen_cells.npy"
SEEN_CELLS_FACTS = "seen_cells.json"
CELLS_PER_BLOCK = 1024
CELLS_AT_ONCE = 64  # so that what is made of them stays in the processor's cache

UInt64Array = npt.NDArray[np.uint64]


class CellHasher:
    """Hashes cells of one file.

    Parameters
    ----------
    vocabulary
        The genes that count.
    positions
        Of each column of the file in the vocabulary, -1 where it has none.
    """

    def __init__(self, vocabulary: GeneVocabulary, positions: npt.NDArray[np.int32]) -> None:
        is_known = positions >= 0
        times = np.bincount(positions[is_known], minlength=1)[np.where(is_known, positions, 0)]
        self._genes = np.where(is_known, _hash_genes(vocabulary)[positions], np.uint64(0))
        # Of columns that share a gene the counts are summed first; the others go straight to their product.
        self._is_shared = is_known & (times > 1)
        self._has_shared = bool(self._is_shared.any())
        self._genes_alone = np.where(self._is_shared, np.uint64(0), self._genes)
        self._positions = positions

    def hash_cells(self, counts: CountsCSR) -> UInt64Array:
        """Return the hash of each cell, uint64 (num_cells,), of its raw counts."""
        if not _ascends(counts):
            matrix = csr_matrix((counts.data, counts.indices, counts.indptr), (counts.num_cells, counts.num_genes))
            matrix.sum_duplicates()
            counts = CountsCSR(matrix.indptr.astype(np.int64), matrix.indices, matrix.data, counts.num_genes)
        firsts = range(0, counts.num_cells, CELLS_AT_ONCE)
        parts = [self._sum_products(_rows(counts, first, first + CELLS_AT_ONCE)) for first in firsts]
        return _mix(np.concatenate([np.zeros(0, np.uint64), *parts]))

    def _sum_products(self, counts: CountsCSR) -> UInt64Array:
        products = self._genes_alone.take(counts.indices)
        products *= _hash_counts(counts.data)
        sums = _sum_rows(products, counts.indptr)
        if self._has_shared:
            shared = np.flatnonzero(self._is_shared.take(counts.indices))
            sums += self._sum_shared(counts, shared)
        return sums

    def _sum_shared(self, counts: CountsCSR, entries: npt.NDArray[np.int64]) -> UInt64Array:
        """Return the part of each cell's sum that comes of columns that share their gene with another."""
        rows = np.searchsorted(counts.indptr, entries, side="right") - 1
        columns = counts.indices[entries]
        places, first, group = np.unique(
            (rows << 32) + self._positions[columns], return_index=True, return_inverse=True
        )
        summed = np.bincount(group, weights=counts.data[entries])
        products = self._genes[columns[first]] * _hash_counts(summed)
        indptr = np.searchsorted(places >> 32, np.arange(counts.num_cells + 1))
        return _sum_rows(products, indptr)


def mix_with(hashes: UInt64Array, seed: int) -> UInt64Array:
    """Return other hashes of the same cells, one family for each seed."""
    salt = np.frombuffer(hashlib.sha256(f"seed {seed}".encode()).digest()[:8], dtype="<u8").astype(np.uint64)
    return _mix(hashes ^ salt)


def describe_genes(vocabulary: GeneVocabulary) -> Manifest:
    """Return what two sets of hashes must share to be compared: the rule and the genes, in any order."""
    genes = "\n".join(sorted(vocabulary.ensembl_ids))
    return {"rule": HASH_RULE, "genes": hashlib.sha256(genes.encode()).hexdigest()}


def write_cell_hashes(path: Path, hashes: UInt64Array, vocabulary: GeneVocabulary) -> Manifest:
    """Write the index of `hashes`, ascending, each once, without that of empty cells; return its facts."""
    index = np.unique(hashes)
    index = index[index != 0]
    beside = aside(path)
    with beside.open("wb") as file:
        np.save(file, index.astype("<u8"), allow_pickle=False)
    os.replace(beside, path)
    return {"file": path.name, "sha256": checksum(path), "num_cells": len(index), **describe_genes(vocabulary)}


def write_seen_cells(
    folder: Path, hashes: Sequence[UInt64Array], vocabulary: GeneVocabulary, *, is_complete: bool = True
) -> None:
    """Write which cells a checkpoint in `folder` has seen: its index, and the index's facts."""
    facts = write_cell_hashes(folder / SEEN_CELLS, np.concatenate(hashes), vocabulary)
    write_json(folder / SEEN_CELLS_FACTS, facts | {"is_complete": is_complete})


@dataclass(frozen=True)
class SeenCells:
    """How many cells of a file an index has.

    Attributes
    ----------
    num_cells, num_seen, num_empty
        Cells of the file; those that are in the index; those without counts on known genes, which are never in it.
    num_indexed, is_complete
        Cells in the index; False if the model began with a checkpoint that did not say what it had seen.
    is_seen
        bool (num_cells,): of each cell in the file's order.
    """

    num_cells: int
    num_seen: int
    num_empty: int
    num_indexed: int
    is_complete: bool
    is_seen: npt.NDArray[np.bool_]

    @property
    def share(self) -> float:
        """Share of the file's cells that are in the index, 0 to 1."""
        return self.num_seen / self.num_cells if self.num_cells else 0.0


def hash_file(matrix: CountMatrix, vocabulary: GeneVocabulary) -> UInt64Array:
    """Return the hash of each cell of a file, 0 of those without counts on known genes; all blocks are read once."""
    hasher = CellHasher(vocabulary, matrix.map_genes(vocabulary).positions)
    parts = [hasher.hash_cells(as_counts_csr(block)) for block in matrix.blocks(CELLS_PER_BLOCK)]
    return np.concatenate([np.zeros(0, np.uint64), *parts])


def seen_cells(matrix: CountMatrix, tokenizer: ScReformerTokenizer, folder: str | Path) -> SeenCells:
    """Return which cells of a file a corpus holds, or a checkpoint has seen; all blocks are read once.

    Parameters
    ----------
    matrix
        The file, opened.
    tokenizer
        Of the corpus or checkpoint.
    folder
        A corpus, or a checkpoint that was trained on one.

    Raises
    ------
    FileNotFoundError
        The folder has no index.
    ValueError
        The index is damaged, or of other genes than the tokenizer's.
    """
    index = read_index(folder, tokenizer.gene_vocabulary)
    hashes = hash_file(matrix, tokenizer.gene_vocabulary)
    is_seen, num_empty = is_in(index, hashes), int((hashes == 0).sum())
    is_complete = _find_index(Path(folder))[1].get("is_complete", True)
    return SeenCells(matrix.num_cells, int(is_seen.sum()), num_empty, len(index), is_complete, is_seen)


def read_index(folder: str | Path, vocabulary: GeneVocabulary) -> UInt64Array:
    """Return the ascending hashes of the cells of a corpus, or of those that a checkpoint has seen.

    Raises
    ------
    FileNotFoundError
        The folder has no index.
    ValueError
        The index is damaged, or of other genes than `vocabulary`.
    """
    folder = Path(folder)
    path, facts = _find_index(folder)
    expected = describe_genes(vocabulary)
    if {key: facts.get(key) for key in expected} != expected:
        msg = (
            f"folder: the cells of {folder} were hashed over other genes than those of the vocabulary "
            f"{vocabulary.name!r}, so they cannot be compared; use the tokenizer of that folder"
        )
        raise ValueError(msg)
    if checksum(path) != facts["sha256"]:
        msg = f"folder: {path} is damaged, its checksum is not the recorded one; copy it again or build it again"
        raise ValueError(msg)
    return np.load(path, allow_pickle=False).astype(np.uint64, copy=False)


def is_in(index: UInt64Array, hashes: UInt64Array) -> npt.NDArray[np.bool_]:
    """Whether each of `hashes` is in the ascending `index`."""
    if not len(index):
        return np.zeros(len(hashes), dtype=bool)
    at = np.minimum(np.searchsorted(index, hashes), len(index) - 1)
    return index[at] == hashes


def _find_index(folder: Path) -> tuple[Path, Manifest]:
    if (folder / MANIFEST).is_file():
        facts = read_json(folder / MANIFEST).get("cell_hashes")
        if facts is not None and (folder / CELL_HASHES).is_file():
            return folder / CELL_HASHES, facts
        msg = f"folder: the corpus {folder} has no {CELL_HASHES}; build it again with this release"
        raise FileNotFoundError(msg)
    if (folder / SEEN_CELLS_FACTS).is_file() and (folder / SEEN_CELLS).is_file():
        return folder / SEEN_CELLS, read_json(folder / SEEN_CELLS_FACTS)
    msg = (
        f"folder: {folder} says nothing of the cells it has seen: it is neither a corpus ({MANIFEST}, {CELL_HASHES}) "
        f"nor a checkpoint with {SEEN_CELLS}"
    )
    raise FileNotFoundError(msg)


def _hash_genes(vocabulary: GeneVocabulary) -> UInt64Array:
    digests = [hashlib.sha256(gene.encode()).digest()[:8] for gene in vocabulary.ensembl_ids]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def _hash_counts(values: npt.NDArray[Any]) -> UInt64Array:  # counts of any type
    """Return a number for each count, the same whatever its type, 0 for 0."""
    if values.dtype.kind in "biu" and values.max(initial=0) < len(_SMALL_COUNTS):
        return _SMALL_COUNTS.take(values)
    # Adding 0.0 gives -0.0 the bits of 0.0.
    return _mix((values.astype(np.float64) + 0.0).view(np.uint64))


def _sum_rows(values: UInt64Array, indptr: npt.NDArray[np.int64]) -> UInt64Array:
    """Return the sum, modulo 2^64, of each row; `reduceat` would give an empty row the value that follows it."""
    sums = np.zeros(len(indptr) - 1, np.uint64)
    has_entries = indptr[1:] > indptr[:-1]
    if has_entries.any():
        sums[has_entries] = np.add.reduceat(values, indptr[:-1][has_entries])
    return sums


def _rows(counts: CountsCSR, first: int, stop: int) -> CountsCSR:
    indptr = counts.indptr[first : stop + 1]
    entries = slice(indptr[0], indptr[-1])
    return CountsCSR(indptr - indptr[0], counts.indices[entries], counts.data[entries], counts.num_genes)


def _ascends(counts: CountsCSR) -> bool:
    """Whether the columns of each cell ascend, so that none is there twice."""
    ascends = counts.indices[1:] > counts.indices[:-1]
    between = counts.indptr[1:-1]
    ascends[between[(between > 0) & (between < len(counts.indices))] - 1] = True
    return bool(ascends.all())


def _mix(numbers: Any) -> Any:  # uint64 arrays: numpy's own types lose the shape
    """Return the last step of splitmix64 (Steele, Lea and Flood, 2014): every bit reaches all 64, and 0 stays 0."""
    mixed = numbers ^ (numbers >> np.uint64(30))
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


_SMALL_COUNTS: UInt64Array = _mix(np.arange(4096).astype(np.float64).view(np.uint64))
