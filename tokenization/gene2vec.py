"""Vectors of genes: reading the released Gene2vec files, our own, and laying them out in a vocabulary's order.

Formats, told apart by the name's ending and the first line:

* the matrix text of Gene2vec, ``gene2vec_dim_200_iter_9.txt``: no header, ``GENE<TAB>v1 v2 ... v200`` a line;
* the word2vec text, ``gene2vec_dim_200_iter_9_w2v.txt``: a header ``24447 200``, then ``GENE v1 ... v200`` a line;
* ``.npy`` and a list of genes, one a line, in the order of the rows (scBERT's way; the list is a file of its own);
* ``.safetensors``: the tensor ``vectors``, and in the metadata ``genes`` (a list) and ``record`` (how they were made).

Text may be compressed (``.gz``). Nothing is ever unpickled.
"""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt

from screformer.tokenization.gene_vocabulary import GeneVocabulary

Vectors = npt.NDArray[np.float32]
TENSOR = "vectors"
GENE_LIST_ENDING = ".genes.txt"
SAVED_AS = (".safetensors", ".npy")


class AlignmentReport(NamedTuple):
    """How the names of vectors and the genes of a vocabulary fit.

    Attributes
    ----------
    num_vectors, num_genes
        Vectors given, genes of the vocabulary.
    num_matched
        Genes of the vocabulary that have a vector.
    num_used
        Vectors that became, alone or in a mean, that of a gene.
    num_averaged
        Genes whose vector is the mean of several, all found by former names.
    without_vector
        Symbols of the other genes.
    unknown
        Names of vectors that mean no gene of the vocabulary, or several.
    """

    num_vectors: int
    num_genes: int
    num_matched: int
    num_used: int
    num_averaged: int
    without_vector: list[str]
    unknown: list[str]

    def __str__(self) -> str:
        text = (
            f"{self.num_matched:,} of the {self.num_genes:,} genes ({self.num_matched / self.num_genes:.1%}) have a "
            f"vector, from {self.num_used:,} of {self.num_vectors:,} vectors"
        )
        if self.num_averaged:
            text += f"; {self.num_averaged:,} genes take the mean of several former names"
        if self.unknown:
            text += f"; {len(self.unknown):,} names are not in the vocabulary, such as {', '.join(self.unknown[:5])}"
        return text


class AlignedVectors(NamedTuple):
    """Vectors in a vocabulary's order, (num_genes, num_dimensions); a gene without one has a row of NaN."""

    vectors: Vectors
    report: AlignmentReport


@dataclass(frozen=True)
class GeneVectors:
    """One vector a gene name.

    Attributes
    ----------
    genes
        Symbols or Ensembl ids, each once.
    vectors
        float32 (number of names, num_dimensions), all finite.
    record
        How they were made, as JSON values; empty where a file does not say.

    Raises
    ------
    ValueError
        The two do not fit, a name is empty or there twice, or a value is not finite.
    """

    genes: list[str]
    vectors: Vectors
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that every name has one vector."""
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.genes) or self.vectors.size == 0:
            msg = f"vectors: one row a gene is needed, got shape {self.vectors.shape} for {len(self.genes)} genes"
            raise ValueError(msg)
        repeated = [gene for gene, number in Counter(self.genes).items() if number > 1 or not gene]
        if repeated:
            msg = f"genes: each name once and none empty, got {repeated[:5]} again or empty ({len(repeated)} names)"
            raise ValueError(msg)
        is_finite = np.isfinite(self.vectors).all(axis=1)
        if not is_finite.all():
            names = [self.genes[row] for row in np.flatnonzero(~is_finite)[:5]]
            msg = f"vectors: {int((~is_finite).sum())} rows hold NaN or infinity, of {names}; leave these genes out"
            raise ValueError(msg)

    @property
    def num_dimensions(self) -> int:
        """Length of a vector."""
        return int(self.vectors.shape[1])

    def align(self, vocabulary: GeneVocabulary) -> AlignedVectors:
        """Lay the vectors out in a vocabulary's order.

        Where several names mean one gene, its current symbol or own Ensembl id wins; several former names are averaged.

        Raises
        ------
        ValueError
            No name is known.
        """
        positions = vocabulary.map_names(self.genes).positions
        rows_of: dict[int, list[int]] = {}
        for row in np.flatnonzero(positions >= 0).tolist():
            rows_of.setdefault(int(positions[row]), []).append(row)
        if not rows_of:
            msg = f"genes: none of {len(self.genes)} names is in the vocabulary {vocabulary.name!r}; they begin with "
            msg += f"{self.genes[:5]}. Symbols or Ensembl ids of that species are needed."
            raise ValueError(msg)
        aligned = np.full((len(vocabulary), self.num_dimensions), np.nan, np.float32)
        num_used = num_averaged = 0
        for position, rows in rows_of.items():
            own = {vocabulary.symbols[position].upper(), vocabulary.ensembl_ids[position].upper()}
            current = [row for row in rows if self.genes[row].upper() in own]
            kept = current[:1] or rows
            aligned[position] = self.vectors[kept].mean(axis=0)
            num_used += len(kept)
            num_averaged += len(kept) > 1
        report = AlignmentReport(
            num_vectors=len(self.genes),
            num_genes=len(vocabulary),
            num_matched=len(rows_of),
            num_used=num_used,
            num_averaged=num_averaged,
            without_vector=[symbol for at, symbol in enumerate(vocabulary.symbols) if at not in rows_of],
            unknown=[self.genes[row] for row in np.flatnonzero(positions < 0).tolist()],
        )
        return AlignedVectors(aligned, report)


def read_gene_vectors(path: str | Path, *, gene_list: str | Path | None = None) -> GeneVectors:
    """Read vectors of genes from a file of any of the formats above.

    Parameters
    ----------
    path
        The file.
    gene_list
        For `.npy`: a text file with the genes, one a line. When left out, the file of the same name with the ending
        `.genes.txt`.

    Raises
    ------
    FileNotFoundError
        There is no such file, or no list of genes for a `.npy`.
    ValueError
        It is of no known format, or damaged; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"path: there is no file {path}"
        raise FileNotFoundError(msg)
    if gene_list is not None and path.suffix != ".npy":
        msg = f"gene_list: only a .npy file has its genes elsewhere, {path.name} names its own; leave it out"
        raise ValueError(msg)
    try:
        if path.suffix == ".npy":
            return _read_npy(path, gene_list)
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        return _read_text(path)
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        msg = f"{path.name}: {error}"
        raise ValueError(msg) from error


def save_gene_vectors(vectors: GeneVectors, path: str | Path) -> None:
    """Write `.safetensors`, which holds everything, or `.npy` with a list of genes beside it; whole or not at all.

    Raises
    ------
    ValueError
        The name ends otherwise.
    """
    path = Path(path)
    if path.suffix not in SAVED_AS:
        msg = f"path: a name that ends in {' or '.join(SAVED_AS)} is needed, got {path.name}"
        raise ValueError(msg)
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.ascontiguousarray(vectors.vectors, np.float32)
    if path.suffix == ".safetensors":
        from safetensors.numpy import save

        metadata = {"genes": json.dumps(vectors.genes), "record": json.dumps(vectors.record, sort_keys=True)}
        _write(path, save({TENSOR: values}, metadata=metadata))
        return
    # The list first: an array without its list would be of no use.
    _write(path.with_suffix(GENE_LIST_ENDING), "".join(f"{gene}\n" for gene in vectors.genes).encode())
    aside = path.with_name(path.name + ".part")
    with aside.open("wb") as file:
        np.save(file, values, allow_pickle=False)
    os.replace(aside, path)


def _read_npy(path: Path, gene_list: str | Path | None) -> GeneVectors:
    names = path.with_suffix(GENE_LIST_ENDING) if gene_list is None else Path(gene_list)
    if not names.is_file():
        msg = f"gene_list: {path.name} has no names of its own and there is no {names}; give one name a line, in order"
        raise FileNotFoundError(msg)
    values = np.load(path, allow_pickle=False)
    if values.ndim != 2 or values.dtype.kind != "f":
        msg = f"an array of fractions, genes x dimensions, is needed; got {values.dtype} of shape {values.shape}"
        raise ValueError(msg)
    genes = names.read_text(encoding="utf-8").split()
    if len(genes) != len(values):
        msg = f"{len(values)} rows, but {names.name} has {len(genes)} genes; one a line is needed, in the rows' order"
        raise ValueError(msg)
    return GeneVectors(genes, values.astype(np.float32))


def _read_safetensors(path: Path) -> GeneVectors:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            keys = list(file.keys())
            if TENSOR not in keys or "genes" not in metadata:
                msg = (
                    f"the tensor {TENSOR!r} and the metadata 'genes' are needed, found the tensors {keys} and the "
                    f"metadata {sorted(metadata)}. Files of `screformer gene2vec` have both."
                )
                raise ValueError(msg)
            values = file.get_tensor(TENSOR)
    except SafetensorError as error:
        msg = f"not a whole safetensors file ({error})"
        raise ValueError(msg) from error
    return GeneVectors(
        json.loads(metadata["genes"]), values.astype(np.float32), json.loads(metadata.get("record", "{}"))
    )


def _read_text(path: Path) -> GeneVectors:
    with _open_text(path) as file:
        first = file.readline()
        fields = first.split()
        header = [int(one) for one in fields] if len(fields) == 2 and all(map(str.isdigit, fields)) else None
        lines = file if header else _chain(first, file)
        genes, vectors = _parse_lines(lines, first_line=2 if header else 1)
    if header and header != [len(genes), vectors.shape[1]]:
        msg = f"the header says {header[0]} x {header[1]}, the lines hold {len(genes)} x {vectors.shape[1]}; cut short?"
        raise ValueError(msg)
    return GeneVectors(genes, vectors)


def _parse_lines(lines: Iterator[str] | TextIO, *, first_line: int) -> tuple[list[str], Vectors]:
    genes: list[str] = []
    rows: list[Vectors] = []
    for number, line in enumerate(lines, start=first_line):
        name, *values = line.split() or [""]
        if not name and not values:
            continue
        try:
            row = np.array(values, np.float64).astype(np.float32)
        except ValueError as error:
            msg = f"line {number} is not GENE v1 v2 ...: {error}"
            raise ValueError(msg) from error
        if len(row) == 0 or (rows and len(row) != len(rows[0])):
            expected = f"{len(rows[0])} as before" if rows else "at least one"
            msg = f"line {number} ({name}) has {len(row)} numbers, {expected} are needed"
            raise ValueError(msg)
        genes.append(name)
        rows.append(row)
    if not rows:
        msg = "no vectors; the text formats have one gene and its numbers a line"
        raise ValueError(msg)
    return genes, np.stack(rows)


def _chain(first: str, file: TextIO) -> Iterator[str]:
    yield first
    yield from file


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    """Open text, compressed or not.

    Raises
    ------
    ValueError
        It is not text.
    """
    is_compressed = path.suffix == ".gz"
    with gzip.open(path, "rt", encoding="utf-8") if is_compressed else path.open(encoding="utf-8") as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            msg = "not text; .txt, .txt.gz, .npy and .safetensors are read (convert a binary word2vec file to text)"
            raise ValueError(msg) from error


def _write(path: Path, content: bytes) -> None:
    aside = path.with_name(path.name + ".part")
    aside.write_bytes(content)
    os.replace(aside, path)


def names_of(vocabulary: GeneVocabulary, positions: Sequence[int] | npt.NDArray[np.int32]) -> list[str]:
    """Ensembl ids of positions of a vocabulary, the names that our own vectors are saved under."""
    return [vocabulary.ensembl_ids[int(position)] for position in positions]
