"""Why a file of counts is refused: each problem has a code, what was found, and the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from screformer.tokenization.count_matrix import CountMatrix
from screformer.tokenization.count_tally import LARGEST_COUNT, CountTally
from screformer.tokenization.gene_vocabulary import GeneMapping
from screformer.tokenization.organism import OrganismGuess, guess_organism, organism_of_ids
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer

# Code -> what is accepted when it is allowed.
PROBLEM_CODES = {
    "not-counts": "what does not look like raw counts, such as counts corrected for ambient RNA, are taken for them",
    "low-coverage": "less of the counts is on known genes than the tokenizer asks for",
    "wrong-species": "the gene names look like those of another species than the vocabulary's, or of several",
}
# These cannot be allowed: there would be nothing to tokenize, or nothing that means anything.
FATAL_CODES = ("no-counts", "invalid-values", "no-known-genes")


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
    names = find_problems_of_names(matrix, mapping, tokenizer)
    problems = [*_value_problems(matrix, tally), *_species_problem(tokenizer, organism)]
    problems += [one for one in names if one.code not in {problem.code for problem in problems}]
    if tally.total_counts == 0 or any(problem.code in FATAL_CODES for problem in names):
        return problems  # what would follow is of no use
    return [*problems, *_coverage_problem(matrix, mapping, tokenizer, coverage)]


def find_problems_of_names(matrix: CountMatrix, mapping: GeneMapping, tokenizer: ScReformerTokenizer) -> list[Problem]:
    """Return the problems that can be told before the counts are read."""
    report, names = mapping.report, matrix.gene_names
    are_numbers = sum(name.strip().isdecimal() for name in names) > len(names) / 2
    if report.num_mapped == 0 or are_numbers:
        what = "most of them are numbers"
        if not are_numbers:
            what = f"none of the {report.num_names} names is in the vocabulary {tokenizer.gene_vocabulary.name!r}"
        message = f"gene names: {what}; they begin with {[str(name) for name in names[:5]]}"
        species = _species_problem(tokenizer, guess_organism(names, known_share=0.0))
        return [*species, Problem("no-known-genes", message, _gene_remedy(matrix, tokenizer))]
    if report.num_case_folded > report.num_mapped / 2:
        known = [name for name, position in zip(names, mapping.positions.tolist(), strict=True) if position >= 0]
        message = (
            f"gene names: these are not {_expected_genes(tokenizer)}: {report.num_case_folded} of {report.num_mapped} "
            f"known names match only when upper and lower case are ignored, as mouse symbols ({', '.join(known[:3])})"
        )
        return [Problem("wrong-species", message, _species_remedy(tokenizer))]
    return []


def _value_problems(matrix: CountMatrix, tally: CountTally) -> Iterator[Problem]:
    where, remedy, seen = matrix.count_source, _layer_remedy(matrix), matrix.evidence[0]
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
    if tally.total_counts == 0:
        if not tally.first_found:
            yield Problem("no-counts", f"counts: the values are all 0. Found in {where}", remedy)
        return
    if tally.num_fractional:
        value, row = tally.first_found["fractional"]
        message = (
            f"counts: {tally.num_fractional} of {tally.num_values} values are not integers, such as {value:g} in row "
            f"{row}; this looks normalised or log-transformed. Found in {where}"
        )
    elif not seen.is_counts and not tally.first_found:
        message = f"{seen.problem or 'counts: they are none'} Found in {where}"
    else:
        return
    yield Problem("not-counts", message, f"{remedy}; if they are to be taken as counts: --allow not-counts")


def _species_problem(tokenizer: ScReformerTokenizer, organism: OrganismGuess) -> Iterator[Problem]:
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


def _coverage_problem(
    matrix: CountMatrix, mapping: GeneMapping, tokenizer: ScReformerTokenizer, coverage: float
) -> Iterator[Problem]:
    if coverage >= tokenizer.min_gene_coverage:
        return
    unmatched = mapping.report.unknown + mapping.report.ambiguous
    message = (
        f"gene names: {coverage:.1%} of the counts fall on genes of the vocabulary {tokenizer.gene_vocabulary.name!r}"
        f", at least {tokenizer.min_gene_coverage:.1%} must. {len(unmatched)} of {mapping.report.num_names} names are "
        f"not known, such as {unmatched[:5]}"
    )
    yield Problem(
        "low-coverage", message, f"{_gene_remedy(matrix, tokenizer)}; if that is meant so: --allow low-coverage"
    )


def _layer_remedy(matrix: CountMatrix) -> str:
    """Name the places of the file that do hold counts."""
    good = [one.source for one in matrix.evidence if one.is_counts and one.source != matrix.count_source]
    if good:
        return f"Raw counts are in {', '.join(good)}: --layer {good[0].removeprefix('layers/')}"
    return "Name the layer with the raw counts (--layer NAME), or ask the file's authors for them"


def _gene_remedy(matrix: CountMatrix, tokenizer: ScReformerTokenizer) -> str:
    """Name the column of `var` whose names the vocabulary knows best, if there is a better one."""
    var, vocabulary = matrix.var, tokenizer.gene_vocabulary
    names = {"var_names": list(map(str, var.index))} | {
        str(key): [str(name) for name in var[key] if isinstance(name, str)] for key in var.columns
    }
    num_known = {key: vocabulary.map_names(values).report.num_mapped for key, values in names.items()}
    best = max(num_known, key=lambda key: num_known[key])
    if num_known[best] > matrix.map_genes(vocabulary).report.num_mapped:
        return f"{num_known[best]} of {len(var)} are known by {best}: --gene-column {best}"
    return "Name the column of var with Ensembl ids or symbols: --gene-column NAME; or check the species"


def _species_remedy(tokenizer: ScReformerTokenizer) -> str:
    expected = _expected_genes(tokenizer)
    return (
        f"Map them to {expected} first, by orthology, and name that column: --gene-column NAME; if they are "
        f"{expected}: --allow wrong-species"
    )


def _expected_genes(tokenizer: ScReformerTokenizer) -> str:
    organism = organism_of_ids(tokenizer.gene_vocabulary.ensembl_ids)
    known = organism in ("human", "mouse")
    return f"{organism} genes" if known else f"genes of the vocabulary {tokenizer.gene_vocabulary.name!r}"
