"""Build `cell_ontology_<version>.tsv.gz`, the packaged table of the Cell Ontology, from cellxgene-ontology-guide.

Run ``python -m screformer.annotation.build_cell_ontology --wheel cellxgene_ontology_guide-1.11.1-py3-none-any.whl -o
annotation`` after ``pip download --no-deps cellxgene-ontology-guide==1.11.1``. ATTRIBUTION.md says what it holds.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import logging
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

logger = logging.getLogger(__name__)
COLUMNS = ("id", "name", "synonyms", "parents", "replaced_by", "is_broad")
ROOT = "CL:0000000"
DATA_FOLDER = "cellxgene_ontology_guide/data/"
BROAD_LISTS = ("cell_class_list.json", "cell_subclass_list.json")
ONTOLOGY_PATTERN = re.compile(re.escape(DATA_FOLDER) + r"CL-ontology-v(\d{4}-\d{2}-\d{2})\.json\.zst")
# Names of the lists that say what a cell does or where it stands in development, not what kind it is. Most types have
# several, and a tree would then take monocytes, as progenitors, away from the leukocytes.
NOT_KINDS = {
    "abnormal cell", "ciliated cell", "contractile cell", "motile cell", "neoplastic cell", "phagocyte",
    "precursor cell", "progenitor cell", "secretory cell", "stem cell", "stuff accumulating cell", "supporting cell",
    "transit amplifying cell",
}  # fmt: skip

Terms = Mapping[str, Mapping[str, Any]]  # Any: JSON


class OntologySource(NamedTuple):
    """What the wheel holds: date of the release, id -> term, and ids of its lists of cell classes and subclasses."""

    version: str
    terms: Terms
    broad: list[str]


@dataclass
class CellOntologyReport:
    """What the build kept and left out.

    Attributes
    ----------
    version
        Date of the Cell Ontology's release.
    num_terms
        Cell types written.
    num_synonyms
        Exact synonyms of theirs.
    num_replaced
        Obsolete terms written, each with the cell type that replaces it.
    num_left_out
        Obsolete terms without such a replacement, and terms that are no cells.
    num_broad
        Cell types marked as broad.
    """

    version: str
    num_terms: int = 0
    num_synonyms: int = 0
    num_replaced: int = 0
    num_left_out: int = 0
    num_broad: int = 0


def build_cell_ontology(source: OntologySource) -> tuple[list[dict[str, str]], CellOntologyReport]:
    """Return the rows of the table, sorted by id, and a report.

    Raises
    ------
    ValueError
        A name or synonym has a character that the table uses to divide.
    """
    report = CellOntologyReport(source.version)
    rows = []
    for term_id, term in sorted(source.terms.items()):
        synonyms, replaced_by = sorted(term.get("synonyms", [])), ""
        parents = sorted(other for other, steps in term["ancestors"].items() if steps == 1)
        if term["deprecated"]:
            synonyms, parents, replaced_by = [], [], _replacement(source.terms, term_id)
        is_cell = term_id == ROOT or bool(parents)  # nuclei and cytoplasm have parents in other ontologies only
        if not (replaced_by or (is_cell and not term["deprecated"])):
            report.num_left_out += 1
            continue
        if any(mark in text for text in (term["label"], *synonyms) for mark in "\t\n|"):
            raise ValueError(f"{term_id} has a tab, a line break or '|' in a name: {[term['label'], *synonyms]}")
        is_broad = term_id in source.broad and not term["deprecated"] and term["label"] not in NOT_KINDS
        report.num_terms += not replaced_by
        report.num_replaced += bool(replaced_by)
        report.num_synonyms += len(synonyms)
        report.num_broad += is_broad
        values = (
            term_id, term["label"], "|".join(synonyms), "|".join(parents), replaced_by, str(int(is_broad)),
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows, report


def _replacement(terms: Terms, term_id: str) -> str:
    """Return the id of the cell type that replaces an obsolete term, maybe by way of others; "" if there is none."""
    seen = set()
    while term_id in terms and terms[term_id]["deprecated"] and term_id not in seen:
        seen.add(term_id)
        term_id = terms[term_id].get("replaced_by") or ""
    return term_id if term_id in terms and not terms[term_id]["deprecated"] else ""


def read_wheel(path: Path) -> OntologySource:
    """Return the newest release of the Cell Ontology that a wheel of cellxgene-ontology-guide holds.

    Raises
    ------
    ValueError
        It holds none.
    """
    with zipfile.ZipFile(path) as wheel:
        found = [match for match in map(ONTOLOGY_PATTERN.fullmatch, wheel.namelist()) if match]
        if not found:
            raise ValueError(f"--wheel {path}: there is no {DATA_FOLDER}CL-ontology-v*.json.zst in it")
        newest = max(found, key=lambda match: match[1])
        with pa.input_stream(io.BytesIO(wheel.read(newest[0])), compression="zstd") as stream:
            terms = json.loads(stream.read())
        broad = [term_id for name in BROAD_LISTS for term_id in json.loads(wheel.read(DATA_FOLDER + name))]
    return OntologySource(newest[1], terms, broad)


def write_cell_ontology(rows: list[dict[str, str]], path: Path) -> None:
    """Write the rows as a gzipped TSV; the same rows give the same bytes."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE, quotechar=None)
    writer.writeheader()
    writer.writerows(rows)
    aside = path.with_name(path.name + ".part")
    aside.write_bytes(gzip.compress(text.getvalue().encode(), compresslevel=9, mtime=0))
    os.replace(aside, path)


def main() -> None:
    """Read the arguments, build, write, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True, help="wheel of cellxgene-ontology-guide")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the table")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    source = read_wheel(arguments.wheel)
    rows, report = build_cell_ontology(source)
    write_cell_ontology(rows, arguments.output / f"cell_ontology_{source.version}.tsv.gz")
    logger.info("%s", json.dumps(asdict(report), indent=2))


if __name__ == "__main__":
    main()
