"""Tables of marker genes like CellMatch, and which of their cell types stand for which labels of a comparison.

CellMatch is GPL: it is never packaged, the user names a file. Which of its types is which label is packaged, in
``marker_types.json``; it was written from what the types are, not from what scores best.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from screformer.train.result_files import read_json

COLUMNS = ("species", "tissue", "cancer", "celltype", "gene", "pmid")
MARKER_TYPES = Path(__file__).with_name("marker_types.json")


class MarkersMissingError(ImportError):
    """No marker table was named, or none of its types stands for the labels; the system is left out."""


class Marker(NamedTuple):
    """One row of a marker table: a paper says that a gene marks a cell type."""

    cell_type: str
    gene: str
    paper: str


class MarkerTypes(NamedTuple):
    """What of a table belongs to some labels.

    Attributes
    ----------
    name
        For messages.
    tissues
        Of the table.
    label_of_type
        Cell type of the table -> label.
    """

    name: str
    tissues: tuple[str, ...]
    label_of_type: Mapping[str, str]


class MarkerTable(NamedTuple):
    """A csv file with the columns of CellMatch.

    Attributes
    ----------
    path
        Of the file.
    tissues
        To use in place of those of `types`; empty is no choice.
    types
        JSON file, {name: {"tissues": [tissue of the table], "types": {cell type of the table: label}}}; of its entries
        the one is used that has the most of the labels.
    """

    path: str | Path
    tissues: tuple[str, ...] = ()
    types: str | Path = MARKER_TYPES

    @classmethod
    def parse(cls, text: str, types: str | Path | None = None) -> MarkerTable:
        """Return it of ``FILE[:TISSUE,TISSUE]``."""
        path, _, tissues = text.partition(":")
        return cls(path, tuple(filter(None, tissues.split(","))), types or MARKER_TYPES)

    def describe(self) -> str:
        """Return the file's name with what tells its content and the settings from others': sha256, tissues."""
        hashes = [hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12] for path in (self.path, self.types)]
        return f"{Path(self.path).name} {hashes[0]}, types {hashes[1]}, tissues {','.join(self.tissues) or 'by labels'}"

    def types_of(self, labels: Sequence[str]) -> MarkerTypes:
        """Return the tissues and types that fit the labels best, the first of equals.

        Raises
        ------
        MarkersMissingError
            No type stands for one of the labels.
        ValueError
            The JSON file has another form.
        """
        entries = read_marker_types(self.types)
        best = max(entries, key=lambda entry: len(set(entry.label_of_type.values()) & set(labels)))
        if not set(best.label_of_type.values()) & set(labels):
            raise MarkersMissingError(
                f"no type of {Path(self.types).name} stands for one of the labels {sorted(set(labels))}: "
                "--marker-types FILE"
            )
        return best._replace(tissues=self.tissues or best.tissues)


def read_marker_types(path: str | Path) -> list[MarkerTypes]:
    """Return the entries of a JSON file as `MarkerTable` has it.

    Raises
    ------
    ValueError
        The file has another form, or is empty.
    """
    stored = read_json(path)
    is_right = isinstance(stored, dict) and all(
        isinstance(entry, dict) and entry.keys() == {"tissues", "types"} for entry in stored.values()
    )
    if not stored or not is_right:
        raise ValueError(
            f'{Path(path).name} must be {{name: {{"tissues": [tissue], "types": {{type of the table: label}}}}}}, got '
            f"{str(stored)[:80]}"
        )
    return [MarkerTypes(name, tuple(entry["tissues"]), entry["types"]) for name, entry in stored.items()]


def read_markers(path: str | Path, *, tissues: Sequence[str] = ()) -> list[Marker]:
    """Return the human markers of normal tissue in a csv file with the columns of CellMatch.

    Raises
    ------
    ValueError
        Columns are missing, or no row is left.
    """
    table = pd.read_csv(path, dtype=str)
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise ValueError(f"markers lacks the columns {missing}; give a csv file with {list(COLUMNS)}")
    kept = table[(table["species"] == "Human") & (table["cancer"] == "Normal")]
    kept = kept[kept["tissue"].isin(list(tissues))] if tissues else kept
    rows = kept[["celltype", "gene", "pmid"]].dropna()
    if rows.empty:
        raise ValueError(f"markers has no human row of normal tissue in tissues={list(tissues)}; name others")
    return [Marker(*map(str, row)) for row in rows.itertuples(index=False)]
