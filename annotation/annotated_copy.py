"""An h5ad file copied with elements added: what was in it is not read, and the result is whole or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem, write_elem

from screformer.tokenization.count_matrix import CountMatrix
from screformer.train.result_files import software_versions, written_aside

VALUES_PER_CHUNK = 1 << 16
H5AD_NEEDED = (
    "the results are written into a copy of an h5ad file. Read it with anndata or scanpy and write it with write_h5ad"
)


def check_paths(cells: str | Path, output: str | Path, *, overwrite: bool) -> tuple[Path, Path]:
    """Return both as paths.

    Raises
    ------
    FileNotFoundError, FileExistsError
        `cells` is not there; `output` is, and may not be replaced.
    ValueError
        `cells` is a folder; `output` does not end in .h5ad, is a folder, or is `cells` itself.
    """
    source, target = Path(cells), Path(output)
    if source.is_dir():
        raise ValueError(f"cells: {source} is a folder; {H5AD_NEEDED}")
    if not source.is_file():
        raise FileNotFoundError(f"cells: there is no file {source}")
    if target.suffix != ".h5ad" or target.is_dir():
        raise ValueError(f"output: the name of a file that ends in .h5ad is needed, got {str(target)!r}")
    if target.exists() and os.path.samefile(source, target):
        raise ValueError(f"output: {target} is the file that is read; choose another name")
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"output: {target} exists; choose another name, or replace it with overwrite=True (--overwrite)"
        )
    return source, target


def check_format(matrix: CountMatrix) -> None:
    """Refuse a file that is not h5ad.

    Raises
    ------
    ValueError
        As said.
    """
    if matrix.format != "h5ad":
        raise ValueError(f"cells: {matrix.name} is of the format {matrix.format}; {H5AD_NEEDED}")


def check_names_free(
    path: Path, key: str, *, obs: Sequence[str] = (), obsm: Sequence[str] = (), uns: Sequence[str] = (), overwrite: bool
) -> None:
    """Refuse to write over elements that the file has.

    Raises
    ------
    ValueError
        It has some of these names and `overwrite` is False, or `key` cannot be part of a name.
    """
    if not key or "/" in key:
        raise ValueError(f"key: the beginning of the new names, without '/', is needed; got {key!r}")
    with h5py.File(path, "r") as file:
        taken = [
            f"{group}[{name!r}]"
            for group, names in (("obs", obs), ("obsm", obsm), ("uns", uns))
            for name in names
            if group in file and name in file[group]
        ]
    if taken and not overwrite:
        raise ValueError(
            f"key={key!r}: {path.name} has {', '.join(taken)} already; choose another key (--key), or replace them "
            "with overwrite=True (--overwrite)"
        )


@contextmanager
def annotated_copy(source: Path, target: Path) -> Iterator[h5py.File]:
    """Give a copy of `source`, open for writing, that becomes `target` on success and vanishes on an error."""
    with written_aside(target) as aside:
        shutil.copyfile(source, aside)
        with h5py.File(aside, "r+") as file:
            yield file


def add_obs_columns(file: h5py.File, columns: dict[str, pd.Categorical | np.ndarray]) -> None:
    """Add columns to `obs`, or replace them; the others stay as they are."""
    group = file["obs"]
    if group.attrs.get("encoding-version") != "0.2.0":  # anndata before 0.8 stored columns in another way
        write_elem(file, "obs", read_elem(group).assign(**columns))
        return
    for name, values in columns.items():
        write_elem(group, name, values)
    order = [str(name) for name in group.attrs["column-order"]]
    order += [name for name in columns if name not in order]
    group.attrs["column-order"] = np.array(order, dtype=h5py.string_dtype())


def add_cell_matrix(file: h5py.File, name: str, num_cells: int, width: int) -> h5py.Dataset:
    """Add a float32 matrix of NaN, (num_cells, width), to `obsm`, to be filled block by block."""
    if "obsm" not in file:
        write_elem(file, "obsm", {})
    rows_per_chunk = max(1, min(num_cells, VALUES_PER_CHUNK // width))
    storage = {"maxshape": (None, width), "chunks": (rows_per_chunk, width), "fillvalue": np.nan}
    # anndata writes no rows, with its own marks; HDF5 then adds rows that take no memory.
    write_elem(file["obsm"], name, np.empty((0, width), np.float32), dataset_kwargs=storage)
    matrix = file["obsm"][name]
    matrix.resize(num_cells, axis=0)
    return matrix


def add_record(file: h5py.File, name: str, record: dict[str, Any]) -> None:
    """Add to `uns` what was done, with the date and the versions of the software; None values are left out."""
    if "uns" not in file:
        write_elem(file, "uns", {})
    facts = {
        **record,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {**software_versions(), "anndata": version("anndata")},
    }
    write_elem(file["uns"], name, _storable(facts))


def _storable(value: Any) -> Any:  # Any: JSON on one side, what anndata stores on the other
    """Return JSON as anndata stores it: a list becomes an array, a list of objects a column for each of their keys."""
    if isinstance(value, dict):
        return {key: _storable(item) for key, item in value.items() if item is not None}
    if not isinstance(value, list):
        return value
    if value and isinstance(value[0], dict):
        return {key: _storable([row[key] for row in value]) for key in value[0]}
    if value and all(isinstance(one, int | float | list) for one in value):
        return np.array(value)
    return np.array(["" if one is None else one for one in value], dtype=np.str_)
