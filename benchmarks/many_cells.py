"""Files of any number of made cells, from a few real ones: for tests of scale, never for accuracy.

A made cell is a mixture of two real cells of one type: each count of the one is kept with a probability, each count of
the other with the rest of it, by binomial draws (thinning, as in `scuttle::downsampleMatrix`). So depth, sparsity,
ties and the order of genes are those of real data; cells differ from each other as two draws of some thousand counts
do. Cells are made and written block by block; each block has a random generator of its own, so that a block is the same
whatever the length of the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem
from scipy.sparse import csr_matrix, vstack
from tqdm.auto import tqdm

from screformer.tokenization.count_matrix import CountMatrix, open_count_matrix
from screformer.tokenization.example_cells import example_cells_path
from screformer.train.result_files import written_aside

CELLS_PER_BLOCK = 2048
ENTRIES_PER_CHUNK = 1 << 15
LEAST_COUNTS = 200  # fewer in a real cell, and two draws of it might be the same
SHARES, KEPT = (0.2, 0.8), (0.6, 1.0)
GZIP_LEVEL = 4  # h5py's and anndata's own
UNKNOWN = "unknown"

Compression = Literal["gzip", "lzf", "none"]


class RealCells(NamedTuple):
    """Cells to make others from, in memory.

    Attributes
    ----------
    counts
        int32, cells x genes.
    cell_types, donors
        One a cell.
    var
        The genes, as in the file.
    same_type
        For each cell, the cells of its type: a slice of `by_type`.
    by_type
        Cells in the order of their types.
    """

    counts: csr_matrix
    cell_types: np.ndarray
    donors: np.ndarray
    var: pd.DataFrame
    same_type: np.ndarray
    by_type: np.ndarray


class MadeBlock(NamedTuple):
    """Made cells: counts, and the real cell whose type and donor each has."""

    counts: csr_matrix
    first_parents: np.ndarray


def make_many_cells(
    output: str | Path,
    num_cells: int,
    *,
    source: str | Path | None = None,
    seed: int = 0,
    compression: Compression = "gzip",
    dtype: str = "float32",
    cells_per_block: int = CELLS_PER_BLOCK,
    progress: bool | None = None,
) -> Path:
    """Write an h5ad file of `num_cells` made cells (see the module's text) and return its path.

    Memory does not grow with the number of cells. `obs` has `cell_type` and `donor`, those of the first of the two real
    cells, and `dataset`, "made-SEED".

    Parameters
    ----------
    output
        The file; it is written aside and renamed when whole.
    num_cells
        How many.
    source
        An h5ad file with raw counts and at least two cells; the packaged pancreas when left out. It is held in memory.
    seed
        Another seed gives other cells.
    compression
        "gzip" (as anndata writes it, level 4), "lzf" or "none".
    dtype
        Of the counts: "float32", as most published files have them, or an integer type.
    cells_per_block
        Cells made and written at once; another number gives other cells.
    progress
        Whether to show a bar; None: on a terminal.

    Raises
    ------
    FileExistsError
        `output` is there already.
    ValueError
        A number is out of its range, an option unknown, or too few cells of the source have enough counts.
    """
    output = Path(output)
    _check_options(num_cells, cells_per_block, compression, dtype)
    if output.exists():
        msg = f"output: {output} exists already; delete it or choose another name"
        raise FileExistsError(msg)
    real = read_real_cells(example_cells_path() if source is None else source)
    made_by = {"cells": num_cells, "seed": seed, "cells_per_block": cells_per_block, "from_cells": len(real.donors)}
    filters: dict[str, Any] = {} if compression == "none" else {"compression": compression}
    if compression == "gzip":
        filters["compression_opts"] = GZIP_LEVEL
    bar = tqdm(total=num_cells, desc="make cells", unit="cell", disable=None if progress is None else not progress)
    with bar, written_aside(output) as aside, h5py.File(aside, "w") as file:
        writer = _Writer(file, real, f"made-{seed}", np.dtype(dtype), filters)
        for block in make_blocks(real, num_cells, seed=seed, cells_per_block=cells_per_block):
            writer.add(block)
            bar.update(block.counts.shape[0])
        writer.finish(made_by)
    return output


def make_blocks(
    real: RealCells, num_cells: int, *, seed: int = 0, cells_per_block: int = CELLS_PER_BLOCK
) -> Iterator[MadeBlock]:
    """Yield made cells, `cells_per_block` at a time."""
    for number, first in enumerate(range(0, num_cells, cells_per_block)):
        # Whole blocks are drawn, so that a longer file begins with the same cells.
        block = _make_block(real, cells_per_block, np.random.default_rng([seed, number]))
        kept = min(cells_per_block, num_cells - first)
        yield block if kept == cells_per_block else MadeBlock(block.counts[:kept], block.first_parents[:kept])


def read_real_cells(path: str | Path) -> RealCells:
    """Read the cells of a file that have at least `LEAST_COUNTS` counts.

    Raises
    ------
    ValueError
        Fewer than two cells have.
    """
    with open_count_matrix(path) as matrix:
        counts = vstack(list(matrix.blocks(CELLS_PER_BLOCK)), format="csr").astype(np.int32)
        cell_types, donors = _obs_or_unknown(matrix, "cell_type"), _obs_or_unknown(matrix, "donor")
        var = pd.DataFrame(index=pd.Index(matrix.gene_names, dtype=object).astype(str))
    is_deep = np.asarray(counts.sum(axis=1)).ravel() >= LEAST_COUNTS
    if is_deep.sum() < 2:
        msg = f"source: {int(is_deep.sum())} cells of {Path(path).name} have {LEAST_COUNTS} counts; two are needed"
        raise ValueError(msg)
    counts, cell_types, donors = counts[is_deep], cell_types[is_deep], donors[is_deep]
    _, kind = np.unique(cell_types, return_inverse=True)
    by_type = np.argsort(kind, kind="stable")
    ends = np.concatenate([[0], np.cumsum(np.bincount(kind))])
    return RealCells(counts, cell_types, donors, var, np.stack([ends[kind], ends[kind + 1]], axis=1), by_type)


def _obs_or_unknown(matrix: CountMatrix, name: str) -> np.ndarray:
    if name not in matrix.obs_columns:
        return np.full(matrix.num_cells, UNKNOWN, dtype=object)
    return np.array([UNKNOWN if value is None else value for value in matrix.obs_column(name)], dtype=object)


def _make_block(real: RealCells, num_cells: int, generator: np.random.Generator) -> MadeBlock:
    first = generator.integers(len(real.donors), size=num_cells)
    low, high = real.same_type[first].T
    second = real.by_type[generator.integers(low, high)]
    shares, kept = generator.uniform(*SHARES, num_cells), generator.uniform(*KEPT, num_cells)
    counts = _thin(real.counts[first], shares * kept, generator) + _thin(
        real.counts[second], (1 - shares) * kept, generator
    )
    counts.sort_indices()
    return MadeBlock(counts, first)


def _thin(counts: csr_matrix, kept: np.ndarray, generator: np.random.Generator) -> csr_matrix:
    """Keep each count with its cell's probability."""
    shares = np.repeat(kept, np.diff(counts.indptr))
    # Most counts are 1, for which one comparison is a binomial draw.
    drawn = (generator.random(len(shares), dtype=np.float32) < shares).astype(np.int32)
    many = np.flatnonzero(counts.data > 1)
    drawn[many] = generator.binomial(counts.data[many], shares[many])
    thinned = csr_matrix((drawn, counts.indices, counts.indptr), shape=counts.shape)
    thinned.eliminate_zeros()
    return thinned


class _Writer:
    """An h5ad file that grows by blocks of cells, in anndata's layout (encodings 0.1.0 and 0.2.0)."""

    def __init__(
        self, file: h5py.File, real: RealCells, dataset: str, dtype: np.dtype, filters: dict[str, Any]
    ) -> None:
        self._file, self._num_cells, self._num_entries = file, 0, 0
        self._num_genes = real.counts.shape[1]
        _encode(file, "anndata", "0.1.0")
        write_elem(file, "var", real.var)
        matrix = _encode(file.create_group("X"), "csr_matrix", "0.1.0")
        chunks = {"shape": (0,), "maxshape": (None,), "chunks": (ENTRIES_PER_CHUNK,), **filters}
        self._data = matrix.create_dataset("data", dtype=dtype, **chunks)
        self._indices = matrix.create_dataset("indices", dtype=np.int32, **chunks)
        # Left to itself, h5py makes chunks of one number here, a million of them in a file of a million cells.
        names = {"shape": (0,), "maxshape": (None,), "chunks": (ENTRIES_PER_CHUNK,)}
        self._indptr = matrix.create_dataset("indptr", dtype=np.int64, **names)
        _append(self._indptr, np.zeros(1, np.int64))
        obs = _encode(file.create_group("obs"), "dataframe", "0.2.0")
        obs.attrs["_index"] = "_index"
        obs.attrs["column-order"] = ["cell_type", "donor", "dataset"]
        self._cell_ids = _encode(
            obs.create_dataset("_index", dtype=h5py.string_dtype(), **names), "string-array", "0.2.0"
        )
        self._codes: dict[str, tuple[h5py.Dataset, np.ndarray]] = {}
        values = {"cell_type": real.cell_types, "donor": real.donors, "dataset": np.full(len(real.donors), dataset)}
        for name, column in values.items():
            categories, codes = np.unique(column.astype(str), return_inverse=True)
            group = _encode(obs.create_group(name), "categorical", "0.2.0")
            group.attrs["ordered"] = False
            write_elem(group, "categories", categories.astype(object))
            dataset_of_codes = group.create_dataset("codes", dtype=np.int16, **names)
            self._codes[name] = _encode(dataset_of_codes, "array", "0.2.0"), codes.astype(np.int16)

    def add(self, block: MadeBlock) -> None:
        counts, first = block.counts, self._num_cells
        _append(self._data, counts.data)
        _append(self._indices, counts.indices)
        _append(self._indptr, self._num_entries + counts.indptr[1:].astype(np.int64))
        _append(self._cell_ids, [f"made-cell-{number}" for number in range(first, first + counts.shape[0])])
        for dataset, codes in self._codes.values():
            _append(dataset, codes[block.first_parents])
        self._num_cells += counts.shape[0]
        self._num_entries += counts.nnz

    def finish(self, made_by: dict[str, int]) -> None:
        self._file["X"].attrs["shape"] = [self._num_cells, self._num_genes]
        write_elem(self._file, "uns", {"made_cells": json.dumps(made_by)})
        for name in ("layers", "obsm", "varm", "obsp", "varp"):
            write_elem(self._file, name, {})


def _encode(element: Any, kind: str, version: str) -> Any:  # an h5py group or dataset, which is returned
    element.attrs["encoding-type"], element.attrs["encoding-version"] = kind, version
    return element


def _append(dataset: h5py.Dataset, values: Any) -> None:  # an array, or a list of text
    length = dataset.shape[0]
    dataset.resize((length + len(values),))
    dataset[length:] = values


def _check_options(num_cells: int, cells_per_block: int, compression: str, dtype: str) -> None:
    for name, value in (("num_cells", num_cells), ("cells_per_block", cells_per_block)):
        if value < 1:
            msg = f"{name}: at least 1, got {value}"
            raise ValueError(msg)
    if compression not in ("gzip", "lzf", "none"):
        msg = f"compression: one of 'gzip', 'lzf', 'none', got {compression!r}"
        raise ValueError(msg)
    allowed = ("float32", "float64", "int32", "int64", "uint16", "uint32")
    if dtype not in allowed:
        msg = f"dtype: one of {', '.join(map(repr, allowed))}, got {dtype!r}"
        raise ValueError(msg)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and make a file."""
    parser = argparse.ArgumentParser(
        prog="python -m screformer.benchmarks.many_cells",
        description="Make an h5ad file of any number of cells by thinning and mixing real ones.",
        epilog="example: python -m screformer.benchmarks.many_cells 100000 --output many.h5ad",
    )
    parser.add_argument("num_cells", type=int, help="How many cells.")
    parser.add_argument("--output", "-o", required=True, help="The h5ad file to write.")
    parser.add_argument("--source", help="h5ad file of real cells (default: the packaged pancreas).")
    parser.add_argument("--seed", type=int, default=0, help="Another seed gives other cells (default: %(default)s).")
    parser.add_argument("--compression", choices=["gzip", "lzf", "none"], default="gzip", help="Default: %(default)s.")
    parser.add_argument("--dtype", default="float32", help="Type of the counts (default: %(default)s).")
    options = vars(parser.parse_args(argv))
    try:
        path = make_many_cells(options.pop("output"), options.pop("num_cells"), **options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
