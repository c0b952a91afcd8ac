"""Cells of another format as h5ad, block by block."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import sparse_dataset, write_elem
from scipy.sparse import csr_matrix

from screformer.tokenization.anndata_file import open_zarr
from screformer.tokenization.count_matrix import CountMatrix
from screformer.tokenization.stored_table import Element, is_array

CELLS_AT_ONCE = 1024
VALUES_AT_ONCE = 1 << 22
MAX_INTEGER = 2**53  # float64 holds all below


def new_h5ad(matrix: CountMatrix, file: h5py.File) -> None:
    """Write counts as `X`, cell and gene names, and what else is known of both, to an empty HDF5 file.

    Features that are no gene expression are kept too. Columns of numbers become numbers, others categories.
    """
    write_elem(file, "/", {})
    file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    obs = pd.DataFrame(
        {name: _typed(matrix.obs_column(name)) for name in matrix.obs_columns},
        index=pd.Index(matrix.cell_ids, dtype=object),
    )
    var = matrix.var
    var = pd.DataFrame({name: _typed(var[name].tolist()) for name in var.columns}, index=var.index)
    write_elem(file, "obs", obs)
    write_elem(file, "var", var)
    stored = None
    for block in matrix.blocks(CELLS_AT_ONCE, every_feature=True):
        block = csr_matrix(block)
        block.sum_duplicates()
        if stored is None:
            write_elem(file, "X", block, dataset_kwargs={"compression": "gzip", "compression_opts": 1})
            stored = sparse_dataset(file["X"])
        else:
            stored.append(block)
    for name in ("obsm", "varm", "obsp", "varp", "layers", "uns"):
        write_elem(file, name, {})


def zarr_as_h5ad(matrix: CountMatrix, file: h5py.File) -> None:
    """Copy all that an AnnData in zarr holds to an empty HDF5 file: anndata writes the same tree in both."""
    assert not isinstance(matrix.path, str)
    _copy_group(open_zarr(matrix.path), file)


def _copy_group(source: Element, target: h5py.Group) -> None:
    _copy_attributes(source.attrs, target)
    for name in source:
        element = source[name]
        if is_array(element):
            _copy_array(element, target, name)
        else:
            _copy_group(element, target.create_group(name))


def _copy_array(source: Element, target: h5py.Group, name: str) -> None:
    is_text = source.dtype.kind in "OUST"
    dtype = h5py.string_dtype() if is_text else source.dtype
    if source.shape == ():
        value = source[()]
        made = target.create_dataset(name, data=str(np.asarray(value).item()) if is_text else value, dtype=dtype)
        _copy_attributes(source.attrs, made)
        return
    options = {} if is_text or not all(source.shape) else {"compression": "gzip", "compression_opts": 1}
    made = target.create_dataset(name, shape=source.shape, dtype=dtype, **options)
    per_row = max(1, int(np.prod(source.shape[1:])))
    step = max(1, VALUES_AT_ONCE // per_row)
    for first in range(0, source.shape[0], step):
        values = np.asarray(source[first : first + step])
        made[first : first + step] = values.astype(object) if is_text else values
    _copy_attributes(source.attrs, made)


def _copy_attributes(source: Mapping[str, Any], target: h5py.Group | h5py.Dataset) -> None:
    for name, value in dict(source).items():
        if isinstance(value, list):
            is_text = not value or isinstance(value[0], str)
            value = np.array(value, dtype=h5py.string_dtype()) if is_text else np.array(value)
        if value is not None:
            target.attrs[name] = value


def _typed(values: Sequence[str | None]) -> pd.Series | pd.Categorical | np.ndarray:
    """Return text as numbers where each is written as a number would be, else as categories.

    Names such as 007, 1_1 and 1e3 stay names: as numbers, different ones could become the same.
    """
    present = [value for value in values if value is not None]
    names = set(present)
    if not present or not all(map(_is_number, names)) or len({float(name) for name in names}) < len(names):
        return pd.Categorical(values)
    numbers = np.array(present, dtype=np.float64)
    if len(present) == len(values) and (numbers == np.floor(numbers)).all() and (np.abs(numbers) < MAX_INTEGER).all():
        return numbers.astype(np.int64)
    return np.array([np.nan if value is None else float(value) for value in values])


def _is_number(text: str) -> bool:
    """Whether a finite number is written in this way, and float64 holds it."""
    if re.fullmatch(r"0|-?[1-9][0-9]*", text):
        return abs(int(text)) < MAX_INTEGER
    return bool(re.fullmatch(r"-?[0-9.]+(e[+-][0-9]+)?", text)) and _is_float(text)


def _is_float(text: str) -> bool:
    try:
        return repr(float(text)) == text
    except ValueError:
        return False
