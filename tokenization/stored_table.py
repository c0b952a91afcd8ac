"""Tables about cells or genes on disk (`obs`, `var`), of which only the column and the rows asked for are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

# A group or an array of h5py or of zarr, which have the same methods.
Element = Any


class StoredTable:
    """A table as anndata writes it, in HDF5 or zarr, since version 0.6.

    Parameters
    ----------
    element
        The table.
    categories
        `uns` of the file, where anndata before 0.7 kept the categories of a column, as "NAME_categories".

    Attributes
    ----------
    columns
        Names of the columns.
    num_rows
        Length.
    """

    def __init__(self, element: Element, categories: Mapping[str, Element] | None = None) -> None:
        self._element = element
        self._categories = {} if categories is None else categories
        if is_array(element):  # anndata before 0.7: one array of records
            fields = list(element.dtype.names or ())
            self._index = next((name for name in ("index", "_index") if name in fields), fields[0] if fields else "")
            self.columns = [name for name in fields if name != self._index]
            self.num_rows = int(element.shape[0])
            return
        self._index = as_texts([element.attrs.get("_index", "_index")])[0] or ""
        if self._index not in element:
            msg = f"{element.name} has no index {self._index!r}: it is no table as anndata writes it"
            raise ValueError(msg)
        default = [name for name in element if name not in (self._index, "__categories")]
        order = element.attrs.get("column-order", default)
        self.columns = [text or "" for text in as_texts(order)]
        self.num_rows = _num_values(element[self._index])

    def index(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Names of the rows `start` to `stop`."""
        return [text or "" for text in self._read(self._index, start, stop)]

    def column(self, name: str, start: int = 0, stop: int | None = None) -> list[str | None]:
        """Return values of a column as text, None where one is missing."""
        return self._read(name, start, stop)

    def to_frame(self) -> pd.DataFrame:
        """Return the whole table as text."""
        columns = {name: self.column(name) for name in self.columns}
        return pd.DataFrame(columns, index=pd.Index(self.index(), dtype=object), dtype=object)

    def _read(self, name: str, start: int, stop: int | None) -> list[str | None]:
        if is_array(self._element):
            return self._read_records(name, start, stop)
        column = self._element[name]
        if is_array(column) and "categories" in column.attrs:  # anndata 0.7
            categories = as_texts(self._element["__categories"][name][:])
            return _of_categories(column[start:stop], categories)
        return read_texts(column, start, stop)

    def _read_records(self, name: str, start: int, stop: int | None) -> list[str | None]:
        values = self._element[start:stop][name]
        stored = self._categories.get(f"{name}_categories")
        if stored is None or not is_array(stored) or values.dtype.kind not in "iu":
            return as_texts(values)
        categories = as_texts(np.atleast_1d(stored[()]))  # a single one is a scalar
        return _of_categories(values, categories) if values.max(initial=-1) < len(categories) else as_texts(values)


def read_texts(element: Element, start: int = 0, stop: int | None = None) -> list[str | None]:
    """Return values of a column that anndata has written as text, None where one is missing.

    Raises
    ------
    ValueError
        It is encoded in a way that is not known.
    """
    if is_array(element):
        return as_texts(element[start:stop])
    if "codes" in element and "categories" in element:
        return _of_categories(element["codes"][start:stop], read_texts(element["categories"]))
    if "values" in element and "mask" in element:
        pairs = zip(read_texts(element["values"], start, stop), element["mask"][start:stop], strict=True)
        return [None if is_missing else text for text, is_missing in pairs]
    msg = (
        f"{element.name} is encoded as {element.attrs.get('encoding-type', 'nothing known')!r}, which cannot be read "
        "as a column; convert it to numbers, text or categories"
    )
    raise ValueError(msg)


def as_texts(values: Any) -> list[str | None]:  # Any: numpy's arrays, with objects or numbers
    """Return each value as text; None for None and NaN."""
    array = np.asarray(values)
    if array.dtype.kind in "biu":
        return list(map(str, array.tolist()))
    if array.dtype.kind == "f":
        return [None if np.isnan(value) else str(value) for value in array]
    if array.dtype.kind == "S":
        return [value.decode("utf-8", "replace") for value in array.tolist()]
    return [_as_text(value) for value in array.tolist()]


def is_array(element: Element) -> bool:
    """Whether it is an array, not a group."""
    return hasattr(element, "shape") and hasattr(element, "dtype")


def _as_text(value: object) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return None if pd.isna(value) else str(value)


def _of_categories(codes: Any, categories: Sequence[str | None]) -> list[str | None]:  # Any: h5py's and zarr's slices
    return [None if code < 0 else categories[code] for code in np.asarray(codes).tolist()]


def _num_values(element: Element) -> int:
    if is_array(element):
        return int(element.shape[0])
    return int(element["codes" if "codes" in element else "values"].shape[0])
