"""The paper's heart data, as their portals give them, through the comparison: check a file, then run systems on it.

The paper (Li et al. 2025) tells first-tier cell types of the heart apart, on a 60/20/20 split of the cells (section
2.5), and in five folds on two further data sets (section 3.5). It does not name its nine types; here all that a file
has of uHAF's twelve are compared. `heart_sources` has the recipe of each source.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from screformer.benchmarks.comparison import compare_systems, provenance
from screformer.benchmarks.heart_sources import HeartSource, first_tier, heart_source
from screformer.benchmarks.labelled_data import LabelledData, Strings, read_cells, sample_by_label
from screformer.benchmarks.protocol import Kind
from screformer.benchmarks.suites import known_systems
from screformer.benchmarks.wang2020 import convert_wang2020
from screformer.tokenization.count_matrix import CountMatrix, open_count_matrix
from screformer.tokenization.gene_vocabulary import GeneVocabulary
from screformer.train.result_files import write_json

MIN_CELLS = 10  # of a type: with fewer, F1 is a matter of luck
MIN_MAPPED = 0.5  # of the labelled cells: with fewer it is another release, or another column
MIN_KNOWN_GENES = 100
TEXT_ENDINGS = (".csv", ".tsv", ".txt")
CONVERTED = "wang2020"
NO_LABEL = "(no label)"


class HeartCheck(NamedTuple):
    """A file that fits its source.

    Attributes
    ----------
    source, path
        What it is, and where.
    num_genes, num_known_genes
        Columns, and how many of them the tokenizer's vocabulary has.
    count_source, gene_source
        Where in the file the counts and the names of the genes are.
    source_labels
        Of each cell, as the file has them; "" if it has none.
    types
        Of each cell, of the first tier; "" if it is left out.
    donors
        Of each cell.
    is_elsewhere
        Whether a cell is of another organ.
    """

    source: HeartSource
    path: Path
    num_genes: int
    num_known_genes: int
    count_source: str
    gene_source: str
    source_labels: Strings
    types: Strings
    donors: Strings
    is_elsewhere: npt.NDArray[np.bool_]

    @property
    def type_counts(self) -> dict[str, int]:
        """Type -> cells that are compared on, in the order of the tree."""
        counts = Counter(self.types.tolist())
        return {type_: counts[type_] for type_ in first_tier() if counts[type_]}

    @property
    def left_out_counts(self) -> dict[str, int]:
        """Label of the file -> cells that are left out for it, most first; not those of other organs."""
        return dict(Counter(self._label_counts(~self._is_kept)).most_common())

    @property
    def unknown_labels(self) -> list[str]:
        """Labels of the file that the source's map lacks, most cells first."""
        known = {*self.source.labels, *self.source.left_out, NO_LABEL}
        return [label for label in self.left_out_counts if label not in known]

    @property
    def _is_kept(self) -> npt.NDArray[np.bool_]:
        return self.types != ""

    def _label_counts(self, rows: npt.NDArray[np.bool_]) -> dict[str, int]:
        return Counter(label or NO_LABEL for label in self.source_labels[rows & ~self.is_elsewhere].tolist())


def cells_of_source(
    name: str, cells: Sequence[str | Path], *, annotation: str | Path | None = None, work: str | Path
) -> Path:
    """Return the one file with the cells of a source; text matrices are converted into ``WORK/wang2020.h5ad``.

    Parameters
    ----------
    name
        Of the source.
    cells
        A file or folder that `open_count_matrix` takes, or text matrices.
    annotation
        Of text matrices, see `convert_wang2020`.
    work
        Folder for what is converted.

    Raises
    ------
    ValueError
        There is no such source, or the files do not fit it.
    """
    source = heart_source(name)
    paths = [Path(path) for path in cells]
    is_text = [any(path.name.removesuffix(".gz").endswith(ending) for ending in TEXT_ENDINGS) for path in paths]
    if name == CONVERTED and paths and all(is_text) and annotation is not None:
        converted = Path(work, f"{CONVERTED}.h5ad")
        converted.parent.mkdir(parents=True, exist_ok=True)
        convert_wang2020(paths, annotation, converted)
        return converted
    if len(paths) != 1 or is_text[0] or annotation is not None:
        given = [path.name for path in paths]
        raise ValueError(
            f"cells got {given}, annotation got {annotation and Path(annotation).name!r}; {name} takes "
            f"{' and '.join(source.files) if name == CONVERTED else 'one file, ' + ' or '.join(source.files)}"
        )
    return paths[0]


def check_heart_cells(
    name: str, path: str | Path, *, label_column: str | None = None, donor_column: str | None = None
) -> HeartCheck:
    """Return what a file holds, if it fits the source; no counts are read but samples.

    Parameters
    ----------
    name
        Of the source.
    path
        As for `open_count_matrix`.
    label_column, donor_column
        Columns of `obs`, where they are others than the source's.

    Raises
    ------
    ValueError
        There is no such source, a column is missing, values are not raw counts, the vocabulary knows too few genes, or
        the map knows the labels of fewer than half of the cells or of fewer than two types.
    """
    source = heart_source(name)
    source = source._replace(
        label_column=label_column or source.label_column, donor_column=donor_column or source.donor_column
    )
    with open_count_matrix(path) as matrix:
        _check_columns(matrix, source)
        num_known = matrix.map_genes(GeneVocabulary.human_v1()).report.num_mapped
        if num_known < MIN_KNOWN_GENES:
            raise ValueError(
                f"{matrix.name}: the vocabulary knows {num_known} of {matrix.num_genes} genes, such as "
                f"{matrix.gene_names[:3]}; at least {MIN_KNOWN_GENES} human symbols or Ensembl ids are needed"
            )
        source_labels, donors = (_read_strings(matrix, column) for column in (source.label_column, source.donor_column))
        is_elsewhere = np.zeros(matrix.num_cells, dtype=bool)
        for column, values in source.only.items():
            if column in matrix.obs_columns:
                is_elsewhere |= ~np.isin(_read_strings(matrix, column), values)
        _check_labels(matrix.name, source, source_labels[~is_elsewhere])
        types = np.array([source.labels.get(label, "") for label in source_labels.tolist()], dtype=np.str_)
        types[is_elsewhere] = ""
        rare = [type_ for type_, number in Counter(types.tolist()).items() if number < MIN_CELLS]
        types[np.isin(types, rare)] = ""
        checked = HeartCheck(
            source, Path(path), matrix.num_genes, num_known, matrix.count_source, matrix.gene_source, source_labels,
            types, donors, is_elsewhere,
        )  # fmt: skip
    if len(checked.type_counts) < 2:
        raise ValueError(
            f"{Path(path).name} has the types {checked.type_counts} with at least {MIN_CELLS} cells; two are needed"
        )
    return checked


def _check_columns(matrix: CountMatrix, source: HeartSource) -> None:
    options = {"label_column": source.label_column, "donor_column": source.donor_column}
    missing = {option: column for option, column in options.items() if column not in matrix.obs_columns}
    if missing:
        named = " and ".join(f"{column!r} ({option})" for option, column in missing.items())
        remedy = " and ".join(f"--{option.replace('_', '-')}" for option in missing)
        raise ValueError(
            f"{matrix.name} lacks the obs columns {named} of {source.name}, expected of {' or '.join(source.files)}; "
            f"it has {matrix.obs_columns}. Name them with {remedy}"
        )


def _read_strings(matrix: CountMatrix, column: str) -> Strings:
    return np.array([value or "" for value in matrix.obs_column(column)], dtype=np.str_)


def _check_labels(name: str, source: HeartSource, labels: Strings) -> None:
    given = labels[labels != ""]
    is_known = np.isin(given, [*source.labels, *source.left_out])
    if not len(given) or is_known.mean() < MIN_MAPPED:
        others = [label for label, _ in Counter(given[~is_known].tolist()).most_common(10)]
        raise ValueError(
            f"{name}: {source.name}'s map knows the labels of {int(is_known.sum())} of {len(labels)} heart cells; "
            f"{source.label_column!r} has such as {others}. Is it {' or '.join(source.files)} of {source.page}? For "
            "another release give a map of your own: screformer benchmark --suite full --cells FILE:LABELS:DONORS "
            "--label-map MAP"
        )


def format_check(checked: HeartCheck) -> str:
    """Return what a file holds as lines: the proportions of types (figure 2B), and what is left out."""
    counts, total = checked.type_counts, len(checked.types)
    kept, num_donors = sum(counts.values()), len(set(checked.donors.tolist()) - {""})
    lines = [
        f"{checked.path.name}: {checked.source.title}",
        f"{total:,} cells, counts in {checked.count_source}; {checked.num_genes:,} genes by {checked.gene_source}, "
        f"{checked.num_known_genes:,} in the vocabulary; {num_donors} donor{'s' if num_donors != 1 else ''}",
        "",
        f"{'type':<24}{'cells':>10}{'share':>8}",
        *(f"{type_:<24}{number:>10,}{number / kept:>8.1%}" for type_, number in counts.items()),
        f"{'together':<24}{kept:>10,}{1:>8.1%}",
    ]
    if checked.left_out_counts:
        lines += ["", "left out:"]
        lines += [
            f"  {label:<30}{number:>10,}  {_why_left_out(checked.source, label)}"
            for label, number in checked.left_out_counts.items()
        ]
    if checked.is_elsewhere.any():
        lines += ["", f"{int(checked.is_elsewhere.sum()):,} cells are not of {dict(checked.source.only)}"]
    return "\n".join(lines)


def _why_left_out(source: HeartSource, label: str) -> str:
    if label == NO_LABEL:
        return "not labelled"
    if label in source.labels:
        return f"{source.labels[label]} has fewer than {MIN_CELLS} cells"
    return "no type" if label in source.left_out else "not in the map"


def read_heart_cells(checked: HeartCheck, *, max_cells: int | None = None) -> LabelledData:
    """Return the cells of a checked file, all or some drawn by type, with types and donors.

    Raises
    ------
    ValueError
        `max_cells` is too small for ten of each type.
    """
    rows = np.flatnonzero(checked.types != "")
    name = checked.source.name
    if max_cells is not None:
        rows = rows[sample_by_label(checked.types[rows], max_cells, least=MIN_CELLS)]
        name = f"{name}-{max_cells}_cells"
    with open_count_matrix(checked.path) as matrix:
        adata = read_cells(matrix, rows)
    return LabelledData(name, adata, checked.types[rows], checked.donors[rows])


def compare_on_heart(
    checked: HeartCheck,
    *,
    kind: Kind = "random",
    systems: Sequence[str] = (),
    seeds: int = 1,
    max_cells: int | None = None,
    output: str | Path = "benchmarks/results",
    work: str | Path = "runs/comparison",
    command: str = "compare_on_heart",
) -> dict[str, Any]:  # Any: JSON
    """Compare systems on a checked file; return the result and write it, with the counts of ``heart-NAME.json``.

    Parameters
    ----------
    checked
        By `check_heart_cells`.
    kind
        ``"random"`` is the paper's 60/20/20.
    systems
        Names; default all.
    max_cells
        Draw so many, each type by its share, so that memory is bounded.
    seeds, output, work, command
        As for `compare_systems`; the runs are in a folder of `work` for these very cells.

    Raises
    ------
    ValueError
        As `read_heart_cells`, `known_systems` and `compare_systems`.
    """
    chosen = known_systems(systems)
    data = read_heart_cells(checked, max_cells=max_cells)
    write_json(
        Path(output, f"heart-{data.name}.json"),
        {
            "source": checked.source.name,
            "title": checked.source.title,
            "reference": checked.source.reference,
            "file": checked.path.name,
            "num_cells": len(checked.types),
            "num_compared": data.adata.n_obs,
            "types": checked.type_counts,
            "left_out": checked.left_out_counts,
            "not_in_the_map": checked.unknown_labels,
            "num_elsewhere": int(checked.is_elsewhere.sum()),
            **provenance(command),
        },
    )
    return compare_systems(
        data, chosen, kind=kind, output=output, work=Path(work, _fingerprint(data)), seeds=seeds, command=command
    )


def _fingerprint(data: LabelledData) -> str:
    """Return a name for these cells with these labels, so that runs on others are not taken for theirs."""
    told = json.dumps([data.adata.obs_names.tolist(), data.labels.tolist(), data.adata.n_vars])
    return f"{data.name}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
