"""What is known of a file of counts before anything is made of it: its passport, and whether it may pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from screformer.tokenization.count_evidence import CountEvidence
from screformer.tokenization.count_matrix import CountMatrix, open_count_matrix
from screformer.tokenization.count_tally import CountTally, Distribution
from screformer.tokenization.gene_vocabulary import GeneMapping, GeneVocabulary, is_ensembl_id
from screformer.tokenization.mitochondrial_genes import is_mitochondrial
from screformer.tokenization.organism import OrganismGuess, guess_organism, organism_of_ids
from screformer.tokenization.passport_problems import Problem, check_allowed, find_problems, find_problems_of_names
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer

CELLS_PER_BLOCK = 1024
NUM_EXAMPLES = 20
# The names of more cells would take more memory than all the rest.
MOST_CELL_IDS_COMPARED = 1_000_000
CELL_IDS_AT_ONCE = 10_000
# A list of names is called of one type if no more than this share is of the other.
MOST_OF_OTHER_TYPE = 0.05


class GeneIds(NamedTuple):
    """What the gene names of a file are.

    Attributes
    ----------
    type
        "ensembl", "symbol", "mixed", or "unknown" (no Ensembl ids, and the vocabulary knows none of the symbols).
    share_ensembl, share_symbols, share_others
        Of the names, 0 to 1: Ensembl ids of any species; symbols and aliases that the vocabulary knows; the rest.
    """

    type: str
    share_ensembl: float
    share_symbols: float
    share_others: float


class UnmatchedGene(NamedTuple):
    """A gene that is not mapped, its counts, and why: "unknown", or "ambiguous" (the name could mean several)."""

    name: str
    counts: float
    reason: str


@dataclass(frozen=True)
class InputPassport:
    """What one reading of a file of counts found.

    Attributes
    ----------
    file, format
        Name and format of the file.
    num_cells, num_genes
        Rows and columns.
    count_source, evidence
        Where the counts are, and what was seen of every place that might hold some, the chosen one first.
    gene_source, gene_ids
        Where the gene names are, and what they are.
    vocabulary
        Name of the vocabulary they are compared to.
    gene_mapping
        What became of the names: the numbers and lists of `GeneMappingReport`, with `aliases` ("OLD: CURRENT") and
        `summed` ("SYMBOL: NAME, NAME") as texts, at most 20 examples of each.
    gene_coverage
        Share (0 to 1) of the counts that fall on genes of the vocabulary.
    unmatched
        Genes that are not mapped, those with most counts first.
    num_without_counts, num_empty_cells
        Cells without any counts, and without counts on known genes: a corpus leaves these out, annotation gives them
        no label.
    min_genes, num_cells_below_minimum
        Genes with counts that a cell should have, and how many cells have fewer.
    genes_per_cell, counts_per_cell
        Quantiles over cells, of all genes of the file.
    largest_count
        The largest count of the file.
    mitochondrial_share
        Share of the counts that fall on mitochondrial genes; None if none is named.
    num_repeated_cells
        Cells whose name an earlier cell of the file has; None in a file of more than a million cells.
    organism
        The species that the gene names are of, with the evidence.
    problems
        Why the file would be refused, each with its remedy; the cause before what follows from it.
    allowed
        Codes of problems that the caller accepts.
    notes
        What a reader of reports should know, such as a conversion.
    """

    file: str
    format: str
    num_cells: int
    num_genes: int
    count_source: str
    evidence: tuple[CountEvidence, ...]
    gene_source: str
    gene_ids: GeneIds
    vocabulary: str
    gene_mapping: dict[str, Any]  # Any: JSON
    gene_coverage: float
    unmatched: tuple[UnmatchedGene, ...]
    num_without_counts: int
    num_empty_cells: int
    min_genes: int
    num_cells_below_minimum: int
    genes_per_cell: Distribution
    counts_per_cell: Distribution
    largest_count: float
    mitochondrial_share: float | None
    num_repeated_cells: int | None
    organism: OrganismGuess
    problems: tuple[Problem, ...]
    allowed: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def refusals(self) -> tuple[Problem, ...]:
        """Problems that are not allowed."""
        return tuple(problem for problem in self.problems if problem.code not in self.allowed)

    def to_dict(self, *, max_unmatched: int | None = None) -> dict[str, Any]:
        """Return everything as plain JSON values by field name; `num_unmatched` counts those left out too."""
        content = asdict(self)
        for name in ("gene_ids", "genes_per_cell", "counts_per_cell", "organism"):
            content[name] = content[name]._asdict()
        content["evidence"] = [{**one._asdict(), "cell_sums": list(one.cell_sums)} for one in self.evidence]
        content["unmatched"] = [gene._asdict() for gene in self.unmatched[:max_unmatched]]
        content["num_unmatched"] = len(self.unmatched)
        content["problems"] = [asdict(problem) for problem in self.problems]
        content["allowed"], content["notes"] = list(self.allowed), list(self.notes)
        return content

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> InputPassport:
        """Build from what `to_dict` gave."""
        content = {key: value for key, value in content.items() if key != "num_unmatched"}
        return cls(
            **content
            | {
                "evidence": tuple(
                    CountEvidence(**{**one, "cell_sums": tuple(one["cell_sums"])}) for one in content["evidence"]
                ),
                "gene_ids": GeneIds(**content["gene_ids"]),
                "unmatched": tuple(UnmatchedGene(**gene) for gene in content["unmatched"]),
                "genes_per_cell": Distribution(**content["genes_per_cell"]),
                "counts_per_cell": Distribution(**content["counts_per_cell"]),
                "organism": OrganismGuess(**content["organism"]),
                "problems": tuple(Problem(**problem) for problem in content["problems"]),
                "allowed": tuple(content["allowed"]),
                "notes": tuple(content["notes"]),
            }
        )

    def __str__(self) -> str:
        """Give a readable report."""
        from screformer.tokenization.passport_report import format_passport

        return format_passport(self)


def inspect_counts(
    matrix: CountMatrix,
    tokenizer: ScReformerTokenizer,
    *,
    min_genes: int = 200,
    allow: Sequence[str] = (),
    progress: bool = True,
    refuse: bool = False,
) -> InputPassport:
    """Read all counts of a file once, block by block, and say what it holds.

    Parameters
    ----------
    matrix
        Opened; stays so.
    tokenizer
        Whose vocabulary and least gene coverage the file is measured by.
    min_genes
        Genes with counts that a cell should have; cells with fewer are counted.
    allow
        Codes of problems to accept (`PROBLEM_CODES`).
    progress
        Whether to show a progress bar.
    refuse
        Raise as `check_passport` does; before the counts are read, if the names are reason enough.

    Raises
    ------
    ValueError
        `allow` has an unknown code; the file changed while it was read, or is damaged; or, with `refuse`, there is a
        problem that is not allowed.
    """
    allowed = check_allowed(allow)
    mapping = matrix.map_genes(tokenizer.gene_vocabulary)
    if refuse:
        _refuse(matrix.name, find_problems_of_names(matrix, mapping, tokenizer), allowed)
    tally = CountTally(mapping.positions >= 0, min_genes=min_genes)
    state = _state_of(matrix.path)
    with tqdm(total=matrix.num_cells, desc="inspect", unit="cell", disable=not progress) as bar:
        for block in matrix.blocks(CELLS_PER_BLOCK):
            tally.add(block)
            bar.update(block.shape[0])
    if _state_of(matrix.path) != state:
        raise ValueError(f"{matrix.name} changed while it was read. Wait until it is written, then try again")
    passport = _make_passport(matrix, mapping, tokenizer, tally, allowed)
    if refuse:
        check_passport(passport)
    return passport


def inspect_file(
    path: str | Path,
    tokenizer: ScReformerTokenizer,
    *,
    layer: str | None = None,
    gene_column: str | None = None,
    min_genes: int = 200,
    allow: Sequence[str] = (),
    progress: bool = True,
) -> InputPassport:
    """Open a file of counts, even one that holds none, and say what it holds; parameters as for `inspect_counts`.

    Raises
    ------
    OSError, ValueError
        There is no such file, it cannot be read, or it is of no known format; `allow` has an unknown code.
    """
    allowed = check_allowed(allow)
    options: dict[str, Any] = {
        "layer": layer, "gene_column": gene_column, "vocabulary": tokenizer.gene_vocabulary
    }  # fmt: skip
    try:
        matrix = open_count_matrix(path, **options, allow=allowed)
    except ValueError as refused:
        try:
            # No counts were found: say what is there instead.
            matrix = open_count_matrix(path, **options, allow=(*allowed, "not-counts"))
        except (OSError, ValueError):
            raise refused from None
    with matrix:
        return inspect_counts(matrix, tokenizer, min_genes=min_genes, allow=allowed, progress=progress)


def check_passport(passport: InputPassport) -> None:
    """Refuse a file that has problems.

    Raises
    ------
    ValueError
        There are problems that are not allowed; the message has each with its remedy.
    """
    _refuse(passport.file, passport.problems, passport.allowed)


def _refuse(file: str, problems: Sequence[Problem], allowed: Sequence[str]) -> None:
    refusals = [problem for problem in problems if problem.code not in allowed]
    if refusals:
        raise ValueError(f"{file}: {' '.join(map(str, refusals))}")


def _make_passport(
    matrix: CountMatrix,
    mapping: GeneMapping,
    tokenizer: ScReformerTokenizer,
    tally: CountTally,
    allowed: tuple[str, ...],
) -> InputPassport:
    total = tally.total_counts
    coverage = float(tally.gene_counts[mapping.positions >= 0].sum()) / total if total else 0.0
    expected = organism_of_ids(tokenizer.gene_vocabulary.ensembl_ids)
    organism = guess_organism(
        matrix.gene_names, gene_counts=tally.gene_counts, known_share=coverage if expected == "human" else None
    )
    mitochondrial = is_mitochondrial(matrix.gene_names)
    return InputPassport(
        file=matrix.name,
        format=matrix.format,
        num_cells=matrix.num_cells,
        num_genes=matrix.num_genes,
        count_source=matrix.count_source,
        evidence=tuple(matrix.evidence),
        gene_source=matrix.gene_source,
        gene_ids=_describe_ids(matrix.gene_names, mapping),
        vocabulary=tokenizer.gene_vocabulary.name,
        gene_mapping=_describe_mapping(matrix.gene_names, mapping, tokenizer.gene_vocabulary),
        gene_coverage=coverage,
        unmatched=_unmatched_genes(matrix.gene_names, mapping, tally.gene_counts),
        num_without_counts=tally.num_without_counts,
        num_empty_cells=tally.num_empty_cells,
        min_genes=tally.min_genes,
        num_cells_below_minimum=tally.num_below_minimum,
        genes_per_cell=tally.genes_per_cell,
        counts_per_cell=tally.counts_per_cell,
        largest_count=tally.largest,
        mitochondrial_share=(
            float(tally.gene_counts[mitochondrial].sum()) / total if total and mitochondrial.any() else None
        ),
        num_repeated_cells=_count_repeated(matrix),
        organism=organism,
        problems=tuple(find_problems(matrix, mapping, tokenizer, tally, coverage, organism)),
        allowed=allowed,
        notes=tuple(matrix.notes),
    )


def _describe_ids(names: Sequence[str], mapping: GeneMapping) -> GeneIds:
    is_id = np.array([is_ensembl_id(name.strip()) for name in names], dtype=bool)
    num_names = max(1, len(names))
    ensembl = float(is_id.sum()) / num_names
    symbols = float(((mapping.positions >= 0) & ~is_id).sum()) / num_names
    if ensembl > 1 - MOST_OF_OTHER_TYPE:
        kind = "ensembl"
    elif ensembl > MOST_OF_OTHER_TYPE:
        kind = "mixed"
    else:
        kind = "symbol" if symbols else "unknown"
    return GeneIds(kind, ensembl, symbols, float(len(names)) / num_names - ensembl - symbols)


def _describe_mapping(names: Sequence[str], mapping: GeneMapping, vocabulary: GeneVocabulary) -> dict[str, Any]:
    """Numbers and examples for the record. As texts: gene symbols are not safe as keys of an HDF5 file."""
    content = mapping.report.to_dict(max_names=NUM_EXAMPLES)
    content["summed"] = [f"{symbol}: {', '.join(several)}" for symbol, several in content["summed"].items()]
    content["aliases"] = []
    for name, position in zip(names, mapping.positions.tolist(), strict=True):
        symbol = vocabulary.symbols[position]
        is_symbol = name.strip().upper().replace(".", "-") == symbol.upper().replace(".", "-")
        if position >= 0 and not is_symbol and not is_ensembl_id(name.strip()):
            content["aliases"].append(f"{name}: {symbol}")
    content["aliases"] = content["aliases"][:NUM_EXAMPLES]
    return content


def _unmatched_genes(
    names: Sequence[str], mapping: GeneMapping, gene_counts: npt.NDArray[np.float64]
) -> tuple[UnmatchedGene, ...]:
    ambiguous = set(mapping.report.ambiguous)
    lost = np.flatnonzero(mapping.positions < 0)
    ordered = lost[np.argsort(-gene_counts[lost], kind="stable")]
    return tuple(
        UnmatchedGene(names[at], float(gene_counts[at]), "ambiguous" if names[at].strip() in ambiguous else "unknown")
        for at in ordered.tolist()
    )


def _count_repeated(matrix: CountMatrix) -> int | None:
    if matrix.num_cells > MOST_CELL_IDS_COMPARED:
        return None
    # Numbers instead of the names, a part at a time: 8 bytes a cell.
    hashes = np.zeros(matrix.num_cells, dtype=np.int64)
    for first in range(0, matrix.num_cells, CELL_IDS_AT_ONCE):
        names = matrix.read_cell_ids(start=first, stop=first + CELL_IDS_AT_ONCE)
        hashes[first : first + len(names)] = [hash(name) for name in names]
    return matrix.num_cells - len(np.unique(hashes))


def _state_of(path: Path | str) -> tuple[int, int] | None:
    """Size and time of a file; None for what is no local file."""
    if isinstance(path, Path) and path.is_file():
        state = path.stat()
        return state.st_size, state.st_mtime_ns
    return None
