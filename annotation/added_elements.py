"""What is added to cells, and the places it can be written to: h5ad, a table, an AnnData object."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd

from screformer.annotation.annotated_copy import (
    add_cell_matrix,
    add_obs_columns,
    add_record,
    annotated_copy,
    remove_elements,
    storable,
    taken_names,
)
from screformer.tokenization.count_matrix import CountMatrix
from screformer.train.result_files import write_json, written_aside

if TYPE_CHECKING:
    from anndata import AnnData

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
OUTPUT_SUFFIXES = (".h5ad", *TABLE_SUFFIXES)
FloatArray = npt.NDArray[np.float32]
Blocks = Callable[[], Iterator[tuple[slice, Mapping[str, FloatArray]]]]


@dataclass(frozen=True)
class EarlierElements:
    """What an annotation of the same key may have left, which goes where it is not replaced.

    Attributes
    ----------
    columns
        Pattern of the columns of `obs`.
    matrix, record
        A matrix of `obsm`, which goes if this name is in `uns`.
    kept_by
        A name in `uns`: where it is, something else wrote the matrix.
    """

    columns: re.Pattern[str]
    matrix: str
    record: str
    kept_by: str

    def columns_in(self, columns: Iterable[str], new: Collection[str]) -> list[str]:
        """Return those of the columns that go."""
        return [name for name in columns if name not in new and self.columns.fullmatch(name)]

    def matrices_in(self, obsm: Collection[str], uns: Collection[str], new: Collection[str]) -> list[str]:
        """Return those of the matrices that go."""
        is_left = self.matrix in obsm and self.matrix not in new and self.record in uns and self.kept_by not in uns
        return [self.matrix] if is_left else []


@dataclass
class AddedElements:
    """New elements of cells, in anndata's words.

    Attributes
    ----------
    obs
        Column -> a value a cell.
    obsm
        Matrix -> names of its columns.
    uns
        Name -> record of what was done.
    blocks
        Gives (cells, matrix -> its rows) of all cells, in order, each time it is called.
    earlier
        What goes in exchange; None: nothing but what has the same name.
    """

    obs: dict[str, pd.Categorical | npt.NDArray[Any]] = field(default_factory=dict)
    obsm: dict[str, list[str]] = field(default_factory=dict)
    uns: dict[str, dict[str, Any]] = field(default_factory=dict)
    blocks: Blocks = lambda: iter(())
    earlier: EarlierElements | None = None


def check_output(cells: str | Path, output: str | Path, *, overwrite: bool) -> Path:
    """Return the path to write to.

    Raises
    ------
    FileNotFoundError, FileExistsError
        `cells` is not there; the output is, and may not be replaced.
    ValueError
        It ends in none of .h5ad, .csv, .tsv and .parquet, is a folder, or is `cells` itself.
    """
    if "://" not in str(cells) and not Path(cells).exists():
        raise FileNotFoundError(f"cells: there is no file or folder {cells}")
    target = Path(output)
    if target.suffix not in OUTPUT_SUFFIXES or target.is_dir():
        allowed = ", ".join(OUTPUT_SUFFIXES)
        raise ValueError(f"output: the name of a file that ends in {allowed} is needed, got {str(target)!r}")
    if target.exists() and Path(cells).exists() and target.samefile(cells):
        raise ValueError(f"output: {target} is the file that is read; choose another name")
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"output: {target} exists; choose another name, or replace it with overwrite=True (--overwrite)"
        )
    return target


def check_names_free(
    matrix: CountMatrix,
    target: Path,
    key: str,
    *,
    obs: Sequence[str] = (),
    obsm: Sequence[str] = (),
    uns: Sequence[str] = (),
    overwrite: bool,
) -> None:
    """Refuse to write over elements that the cells have.

    Raises
    ------
    ValueError
        They have some of these names and `overwrite` is False, or `key` cannot be part of a name.
    """
    check_key(key)
    if target.suffix in TABLE_SUFFIXES:  # which has none of the cells' own columns
        return
    if matrix.format == "h5ad":
        taken = taken_names(Path(matrix.path), obs=obs, obsm=obsm, uns=uns)
    else:
        taken = [f"obs[{name!r}]" for name in obs if name in matrix.obs_columns]
    if taken and not overwrite:
        raise ValueError(
            f"key={key!r}: {matrix.name} has {', '.join(taken)} already; choose another key (--key), or replace them "
            "with overwrite=True (--overwrite)"
        )


def check_key(key: str) -> None:
    """Raise ValueError unless `key` can begin a name."""
    if not key or "/" in key:
        raise ValueError(f"key: the beginning of the new names, without '/', is needed; got {key!r}")


def write_elements(matrix: CountMatrix, target: Path, added: AddedElements) -> None:
    """Write the cells with what is added: all of them in order, whole or not at all.

    A table has a row a cell: its name, the columns of `obs`, and those of the matrices; the record goes beside it, into
    a file whose name ends in .json too.
    """
    if target.suffix in TABLE_SUFFIXES:
        _write_table(matrix, target, added)
        write_json(target.with_name(f"{target.name}.json"), added.uns)
        return
    with annotated_copy(matrix, target) as file:
        add_obs_columns(file, added.obs)
        _remove_earlier(file, added)
        stored = {
            name: add_cell_matrix(file, name, matrix.num_cells, len(columns)) for name, columns in added.obsm.items()
        }
        for cells, matrices in added.blocks():
            for name, values in matrices.items():
                stored[name][cells] = values
        for name, record in added.uns.items():
            add_record(file, name, record)


def _remove_earlier(file: h5py.File, added: AddedElements) -> None:
    if added.earlier is not None:
        obs, obsm, uns = (list(file[name]) if name in file else [] for name in ("obs", "obsm", "uns"))
        remove_elements(
            file,
            obs=added.earlier.columns_in(obs, added.obs),
            obsm=added.earlier.matrices_in(obsm, uns, added.obsm),
        )


def add_to_anndata(adata: AnnData, added: AddedElements) -> None:
    """Set the new elements of an AnnData object, in place of those of the same names, and take the earlier ones out."""
    goes = ([], []) if added.earlier is None else (
        added.earlier.columns_in(adata.obs.columns, added.obs),
        added.earlier.matrices_in(list(adata.obsm), list(adata.uns), added.obsm),
    )  # fmt: skip
    for name, values in added.obs.items():
        adata.obs[name] = values
    held = {name: np.full((adata.n_obs, len(columns)), np.nan, np.float32) for name, columns in added.obsm.items()}
    for cells, matrices in added.blocks():
        for name, values in matrices.items():
            held[name][cells] = values
    for name, values in held.items():
        adata.obsm[name] = values
    for name, record in added.uns.items():
        adata.uns[name] = storable(record)
    for name in goes[0]:
        del adata.obs[name]
    for name in goes[1]:
        del adata.obsm[name]


def _write_table(matrix: CountMatrix, target: Path, added: AddedElements) -> None:
    with written_aside(target) as aside:
        write = write_parquet if target.suffix == ".parquet" else _write_text
        write(_frames(matrix, added), aside)


def _frames(matrix: CountMatrix, added: AddedElements) -> Iterator[pd.DataFrame]:
    for cells, matrices in added.blocks():
        names = matrix.read_cell_ids(start=cells.start, stop=cells.stop)
        columns: dict[str, Any] = {"cell_id": names, **{name: values[cells] for name, values in added.obs.items()}}
        for name, values in matrices.items():
            columns |= dict(zip(added.obsm[name], values.T, strict=True))
        yield pd.DataFrame(columns)


def _write_text(frames: Iterator[pd.DataFrame], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        for number, frame in enumerate(frames):
            separator = "\t" if path.suffix == ".tsv" else ","
            frame.to_csv(file, sep=separator, index=False, header=not number, float_format="%.6g", lineterminator="\n")


def write_parquet(frames: Iterator[pd.DataFrame], path: Path) -> None:
    """Write tables of the same columns one after another into one Parquet file."""
    import pyarrow as pa
    from pyarrow import parquet

    writer = None
    try:
        for frame in frames:
            table = pa.Table.from_pandas(frame, preserve_index=False)
            writer = writer or parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()
