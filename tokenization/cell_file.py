"""What every format of cells offers to the reader of counts."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pandas as pd

from screformer.tokenization.stored_rows import StoredColumns, StoredRows

# The machine's limits, which say nothing about a file: disk space, open files, memory.
OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class Place(NamedTuple):
    """A matrix of a file.

    Attributes
    ----------
    source
        Its name: "X", "layers/NAME", "raw", "matrix", "RNA/X/raw".
    is_tried
        Whether it is taken without being named, if it holds counts. Other layers may hold whole numbers that are not
        the cells' counts, such as unspliced ones alone.
    """

    source: str
    is_tried: bool


class CellFile(ABC):
    """An open file or folder of one format.

    Attributes
    ----------
    name
        What messages call it.
    format
        Name of the format.
    places
        Its matrices; those that are tried in their order.
    obs_columns
        Columns known of the cells.
    num_cells
        Cells.
    """

    name: str
    format: str
    places: list[Place]
    obs_columns: list[str]
    num_cells: int

    @abstractmethod
    def open_matrix(self, source: str) -> StoredRows | StoredColumns:
        """Open a matrix.

        Raises
        ------
        ValueError
            It is damaged, or in a form that is not known.
        """

    def choose(self, source: str) -> None:  # noqa: B027 - most have the same cells everywhere
        """Make `num_cells` and `cell_ids` those of a matrix."""

    @abstractmethod
    def var(self, source: str) -> pd.DataFrame:
        """Names of a matrix' genes, as index, and what else is known of them, as text."""

    @abstractmethod
    def cell_ids(self, start: int, stop: int) -> list[str]:
        """Names of the cells `start` to `stop`."""

    @abstractmethod
    def obs_column(self, name: str, start: int, stop: int) -> list[str | None]:
        """Values of a column of the cells `start` to `stop` as text, None where one is missing."""

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    @property
    def layers(self) -> list[str]:
        """What `layer` may name, besides "X" and "raw"."""
        return [place.source.removeprefix("layers/") for place in self.places if place.source not in ("X", "raw")]

    def find_place(self, layer: str) -> Place | None:
        """Return the matrix that `layer` names: whole, or the part after the last slash where that is one alone."""
        whole = [place for place in self.places if place.source in (layer, f"layers/{layer}")]
        parts = [place for place in self.places if place.source.endswith(f"/{layer}")]
        found = sorted(whole, key=lambda place: place.source != layer) or (parts if len(parts) == 1 else [])
        return found[0] if found else None


@contextmanager
def reading(name: str, what: str) -> Iterator[None]:
    """Turn what libraries say of damaged files into one ValueError that names the file.

    Raises
    ------
    ValueError
        Reading failed.
    OSError
        The file is not there, may not be read, or the machine has no disk space, open files or memory left.
    """
    try:
        yield
    except ValueError as error:
        if name in str(error):
            raise
        msg = f"{name}: {error}"
        raise ValueError(msg) from error
    except (FileNotFoundError, PermissionError):
        raise
    except (OSError, EOFError, KeyError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
            raise
        text = str(error).strip() or type(error).__name__
        remedy = (
            "It was compressed by a plugin: `pip install hdf5plugin` and import it first, or write the file with gzip"
            if "filter" in text
            else "It is damaged or was cut off: copy or download it again"
        )
        msg = f"{name}: {what} cannot be read ({text}). {remedy}"
        raise ValueError(msg) from error
