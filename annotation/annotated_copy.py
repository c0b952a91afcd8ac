"""Cells as an h5ad file with elements added: what was in it is kept, and the result is whole or absent."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem, write_elem

from screformer.annotation.h5ad_conversion import new_h5ad, zarr_as_h5ad
from screformer.tokenization.count_matrix import CountMatrix
from screformer.train.result_files import software_versions, written_aside

logger = logging.getLogger(__name__)
VALUES_PER_CHUNK = 1 << 16


def taken_names(path: Path, *, obs: Sequence[str] = (), obsm: Sequence[str] = (), uns: Sequence[str] = ()) -> list[str]:
    """Return those of these elements that an h5ad file has, such as ``obs['cell_type']``."""
    with h5py.File(path, "r") as file:
        return [
            f"{group}[{name!r}]"
            for group, names in (("obs", obs), ("obsm", obsm), ("uns", uns))
            for name in names
            if group in file and name in _names_in(file[group])
        ]


@contextmanager
def _without_warnings_of_age() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", anndata.OldFormatWarning)
        yield


def _names_in(element: h5py.Group | h5py.Dataset) -> Sequence[str]:
    # anndata before 0.7 wrote arrays of records.
    return (element.dtype.names or ()) if isinstance(element, h5py.Dataset) else list(element)


def _is_of_records(path: Path) -> bool:
    with h5py.File(path, "r") as file:
        return isinstance(file["obs"], h5py.Dataset)


@contextmanager
def annotated_copy(matrix: CountMatrix, target: Path) -> Iterator[h5py.File]:
    """Give the cells as h5ad, open for writing, that become `target` on success and vanish on an error.

    An h5ad file is copied as it is, a zarr folder element by element; of other formats counts, names and columns are
    taken over (see `new_h5ad`).
    """
    with written_aside(target) as aside:
        if matrix.format == "h5ad" and _is_of_records(Path(matrix.path)):
            # anndata before 0.7. Such files are small, and what reads all of them is anndata.
            logger.info("%s was written by anndata before 0.7: read whole, and written anew", matrix.name)
            with _without_warnings_of_age():
                anndata.read_h5ad(matrix.path).write_h5ad(aside)
        elif matrix.format == "h5ad":
            shutil.copyfile(matrix.path, aside)
        else:
            with h5py.File(aside, "w") as file:
                (zarr_as_h5ad if matrix.format == "zarr" else new_h5ad)(matrix, file)
        with h5py.File(aside, "r+") as file:
            yield file


def add_obs_columns(file: h5py.File, columns: dict[str, pd.Categorical | np.ndarray]) -> None:
    """Add columns to `obs`, or replace them; the others stay as they are."""
    group = file["obs"]
    if group.attrs.get("encoding-version") != "0.2.0":  # anndata before 0.8 stored columns in another way
        with _without_warnings_of_age():
            write_elem(file, "obs", read_elem(group).assign(**columns))
        return
    for name, values in columns.items():
        write_elem(group, name, values)
    order = [str(name) for name in group.attrs["column-order"]]
    order += [name for name in columns if name not in order]
    group.attrs["column-order"] = np.array(order, dtype=h5py.string_dtype())


def remove_elements(file: h5py.File, *, obs: Sequence[str], obsm: Sequence[str]) -> None:
    """Take columns out of an `obs` of today's form, as `add_obs_columns` leaves it, and matrices out of `obsm`."""
    for name in obsm:
        del file["obsm"][name]
    group = file["obs"]
    for name in obs:
        del group[name]
    order = [str(name) for name in group.attrs["column-order"] if str(name) not in obs]
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
    """Add to `uns` what was done; None values are left out."""
    if "uns" not in file:
        write_elem(file, "uns", {})
    write_elem(file["uns"], name, storable(record))


def dated(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with the date and the versions of the software."""
    return {
        **record,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {**software_versions(), "anndata": version("anndata")},
    }


def storable(value: Any) -> Any:  # Any: JSON on one side, what anndata stores on the other
    """Return JSON as anndata stores it: a list becomes an array, a list of objects a column for each of their keys."""
    if isinstance(value, dict):
        return {key: storable(item) for key, item in value.items() if item is not None}
    if not isinstance(value, list):
        return value
    if value and isinstance(value[0], dict):
        return {key: storable([row[key] for row in value]) for key in value[0]}
    if value and all(isinstance(one, int | float | list) for one in value):
        return np.array(value)
    return np.array(["" if one is None else one for one in value], dtype=np.str_)
