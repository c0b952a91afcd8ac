"""Why a file of counts is refused: each problem has a code, what was found, and the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from screformer.tokenization.count_matrix import CountMatrix
from screformer.tokenization.count_tally import LARGEST_COUNT, CountTally
from screformer.tokenization.gene_vocabulary import GeneMapping, is_ensembl_id
from screformer.tokenization.organism import OrganismGuess, organism_of_ids
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer

# Code -> what is accepted when it is allowed.
PROBLEM_CODES = {
    "not-counts": "values that are no whole numbers (such as counts corrected for ambient RNA) are taken as they are",
    "rounded-values": "whole numbers that look like rounded normalised or log values are taken as counts",
    "low-coverage": "less of the counts is on known genes than the tokenizer asks for",
    "wrong-species": "the gene names look like those of another species than the vocabulary's, or of several",
}
# These cannot be allowed: there would be nothing to tokenize, or nothing that means anything.
FATAL_CODES = ("no-cells", "no-counts", "invalid-values", "transposed", "no-known-genes")

# round(log2(1 + 10,000)): no larger value comes of rounding logarithms of counts that were scaled to 10,000 a cell.
LARGEST_ROUNDED_LOG = 14
LEAST_GENES_TO_JUDGE = 200
# Of raw counts it is 0: in every cell some gene was seen once. Of CP10k, rounded, more than half of 10x cells.
MOST_WITHOUT_ONES = 0.1
NUM_CELL_IDS_LOOKED_AT = 1000


@dataclass(frozen=True)
class Problem:
    """Why a file would be refused.

    Attributes
    ----------
    code
        One of `PROBLEM_CODES` (which may be allowed) or `FATAL_CODES`.
    message
        What was found.
    remedy
        What to type or to do.
    """

    code: str
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.message}. {self.remedy}."


def check_allowed(allow: Sequence[str]) -> tuple[str, ...]:
    """Return the codes, each once, in the order of `PROBLEM_CODES`.

    Raises
    ------
    ValueError
        One of them is not a code, or of a problem that cannot be allowed.
    """
    given = (allow,) if isinstance(allow, str) else tuple(allow)
    unknown = [code for code in given if code not in PROBLEM_CODES]
    if unknown:
        why = "cannot be allowed" if unknown[0] in FATAL_CODES else "is no code of a problem"
        raise ValueError(f"allow: {unknown[0]!r} {why}; these can be allowed: {', '.join(PROBLEM_CODES)}")
    return tuple(code for code in PROBLEM_CODES if code in given)


def find_problems(
    matrix: CountMatrix,
    mapping: GeneMapping,
    tokenizer: ScReformerTokenizer,
    tally: CountTally,
    coverage: float,
    organism: OrganismGuess,
) -> list[Problem]:
    """Return all problems of a file that was read, the cause before what follows from it."""
    if not matrix.num_cells or not matrix.num_genes:
        shape = f"{matrix.num_cells} cells x {matrix.num_genes} genes"
        return [Problem("no-cells", f"{matrix.count_source} is empty: {shape}", "Give a file with cells and genes")]
    problems = [*_value_problems(matrix, tally), *_species_problem(matrix, mapping, tokenizer, organism)]
    names = find_problems_of_names(matrix, mapping, tokenizer)
    problems += [one for one in names if one.code not in {problem.code for problem in problems}]
    if tally.total_counts == 0 or any(problem.code in FATAL_CODES for problem in names):
        return problems  # what would follow is of no use
    return [*problems, *_coverage_problem(mapping, tokenizer, coverage)]


def find_problems_of_names(matrix: CountMatrix, mapping: GeneMapping, tokenizer: ScReformerTokenizer) -> list[Problem]:
    """Return the problems that can be told before the counts are read."""
    report, vocabulary = mapping.report, tokenizer.gene_vocabulary
    if not report.num_names:
        return []
    if report.num_mapped < report.num_names / 10:
        cell_ids = [name.strip() for name in matrix.read_cell_ids(stop=NUM_CELL_IDS_LOOKED_AT)]
        are_genes = sum(is_ensembl_id(name) for name in cell_ids) > len(cell_ids) / 2
        if cell_ids and (are_genes or vocabulary.map_names(cell_ids).report.num_mapped > len(cell_ids) / 2):
            message = f"gene names: the cells have names of genes ({', '.join(cell_ids[:3])}): the matrix is transposed"
            return [Problem("transposed", message, "Write it the other way round: adata.T.write_h5ad(...)")]
    are_numbers = sum(name.strip().isdecimal() for name in matrix.gene_names) > report.num_names / 2
    if report.num_mapped == 0 or are_numbers:
        shown = [str(name) for name in matrix.gene_names[:5]]
        what = "most are numbers" if are_numbers else f"none of the {report.num_names} names is in the vocabulary"
        message = f"gene names: {what}{'' if are_numbers else f' {vocabulary.name!r}'}; they begin with {shown}"
        return [Problem("no-known-genes", message, _gene_remedy())]
    if report.num_case_folded > report.num_mapped / 2:
        message = (
            f"gene names: {report.num_case_folded} of {report.num_mapped} known names match only when upper and lower "
            f"case are ignored, as mouse symbols do ({', '.join(_mapped_names(matrix, mapping)[:3])})"
        )
        return [Problem("wrong-species", message, _species_remedy(tokenizer))]
    return []


def _value_problems(matrix: CountMatrix, tally: CountTally) -> Iterator[Problem]:
    where, remedy = matrix.count_source, _layer_remedy(matrix)
    for name, what in (
        ("not_finite", "values are NaN or infinite"),
        ("negative", "values are negative, which looks scaled"),
        ("too_large", f"values are larger than {LARGEST_COUNT}, which no count is"),
    ):
        number = getattr(tally, f"num_{name}")
        if number:
            value, row = tally.first_found[name]
            message = f"counts: {number} {what}, such as {value:g} in row {row}. Found in {where}"
            yield Problem("invalid-values", message, remedy)
    if tally.num_fractional:
        value, row = tally.first_found["fractional"]
        message = (
            f"counts: {tally.num_fractional} of {tally.num_values} values are not integers, such as {value:g} in row "
            f"{row}; this looks normalised or log-transformed. Found in {where}"
        )
        correction = "if they are counts corrected for ambient RNA: --allow not-counts"
        yield Problem("not-counts", message, f"{remedy}; {correction}")
    elif tally.total_counts == 0 and not tally.first_found:
        yield Problem("no-counts", f"counts: all values are 0. Found in {where}", remedy)
    else:
        yield from _rounded_problem(where, remedy, tally)


def _rounded_problem(where: str, remedy: str, tally: CountTally) -> Iterator[Problem]:
    """See whether whole numbers are what rounding left of normalised values."""
    median_genes = tally.genes_per_cell.median
    without_ones = tally.num_without_ones / max(1, tally.num_judged_for_ones)
    if tally.largest <= LARGEST_ROUNDED_LOG and median_genes >= LEAST_GENES_TO_JUDGE:
        sign = f"the largest is {tally.largest:g}, though the median cell has {median_genes:g} genes"
    elif without_ones > MOST_WITHOUT_ONES:
        sign = f"{without_ones:.1%} of the cells with 100 genes and more have no gene with a count of 1"
    else:
        return
    message = f"counts: whole numbers, but they look normalised and then rounded: {sign}. Found in {where}"
    yield Problem("rounded-values", message, f"{remedy}; if these are the raw counts: --allow rounded-values")


def _species_problem(
    matrix: CountMatrix, mapping: GeneMapping, tokenizer: ScReformerTokenizer, organism: OrganismGuess
) -> Iterator[Problem]:
    expected = organism_of_ids(tokenizer.gene_vocabulary.ensembl_ids)
    if organism.name in ("unknown", expected) or expected in ("unknown", "mixed"):
        return
    if organism.name == "mixed":
        message = f"gene names: several species in one file ({organism.evidence})"
        remedy = f"Keep the {expected} cells and genes only, without a prefix of the genome before the names"
        yield Problem("wrong-species", message, f"{remedy}; or --allow wrong-species")
        return
    message = f"gene names: these are not {expected} genes ({organism.evidence})"
    yield Problem("wrong-species", message, _species_remedy(tokenizer))


def _coverage_problem(mapping: GeneMapping, tokenizer: ScReformerTokenizer, coverage: float) -> Iterator[Problem]:
    if coverage >= tokenizer.min_gene_coverage:
        return
    unmatched = mapping.report.unknown + mapping.report.ambiguous
    message = (
        f"gene names: {coverage:.1%} of the counts fall on genes of the vocabulary {tokenizer.gene_vocabulary.name!r}"
        f", at least {tokenizer.min_gene_coverage:.1%} must. {len(unmatched)} of {mapping.report.num_names} names are "
        f"not known, such as {unmatched[:5]}"
    )
    yield Problem("low-coverage", message, f"{_gene_remedy()}; if that is meant so: --allow low-coverage")


def _layer_remedy(matrix: CountMatrix) -> str:
    """Name the places of the file that do hold counts."""
    good = [one.source for one in matrix.evidence if one.is_counts and one.source != matrix.count_source]
    if good:
        return f"Raw counts are in {', '.join(good)}: --layer {good[0].removeprefix('layers/')}"
    return "Name the layer with the raw counts (--layer NAME), or ask the file's authors for them"


def _gene_remedy() -> str:
    return "Name the column of var with Ensembl ids or symbols: --gene-column NAME; or check the species"


def _species_remedy(tokenizer: ScReformerTokenizer) -> str:
    expected = organism_of_ids(tokenizer.gene_vocabulary.ensembl_ids)
    return (
        f"Map the genes to their {expected} orthologues first and name that column: --gene-column NAME; if they are "
        f"{expected} genes: --allow wrong-species"
    )


def _mapped_names(matrix: CountMatrix, mapping: GeneMapping) -> list[str]:
    pairs = zip(matrix.gene_names, mapping.positions.tolist(), strict=True)
    return [name for name, position in pairs if position >= 0]
