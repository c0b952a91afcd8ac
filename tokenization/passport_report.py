"""A passport as text for a reader: what was found where, the evidence, the verdict, and the fix for every problem."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import fill
from typing import TYPE_CHECKING

from screformer.tokenization.count_evidence import CountEvidence
from screformer.tokenization.count_tally import Distribution

if TYPE_CHECKING:
    from screformer.tokenization.passport import InputPassport

WIDTH = 110
NAMES_SHOWN = 8
_ID_TYPES = {
    "ensembl": "Ensembl ids",
    "symbol": "symbols",
    "mixed": "Ensembl ids and symbols",
    "unknown": "no known type",
}


def format_passport(passport: InputPassport) -> str:
    """Return the report, in lines of 110 characters."""
    return "\n".join(_lay_out(name, text) for name, text in passport_paragraphs(passport))


def passport_paragraphs(passport: InputPassport) -> list[tuple[str, str]]:
    """Return the report as (name, text); one without a name goes on with what the last name is about."""
    return [
        ("file", f"{passport.file} ({passport.format}): {passport.num_cells:,} cells x {passport.num_genes:,} genes"),
        *(("counts" if not at else "", _describe_evidence(one)) for at, one in enumerate(passport.evidence)),
        ("", f"all values read: 0 to {_number(passport.largest_count)}"),
        *_gene_paragraphs(passport),
        *_cell_paragraphs(passport),
        ("organism", f"{passport.organism.name}: {passport.organism.evidence}"),
        *(("note", note) for note in passport.notes),
        *_verdict_paragraphs(passport),
    ]


def _describe_evidence(one: CountEvidence) -> str:
    verdict = "raw counts" if one.is_counts else f"not raw counts: {one.problem}"
    if not one.num_values:
        return f"{one.source}: {verdict}"
    text = (
        f"{one.source}: {verdict} ({one.num_values:,} values looked at, {_percent(one.share_integers)} whole numbers, "
        f"{one.smallest:g} to {one.largest:g}"
    )
    if one.num_cells_sampled:
        least, median, most = one.cell_sums
        text += (
            f"; sums of {one.num_cells_sampled:,} cells {_number(least)} to {_number(most)}, median {_number(median)}"
        )
    return text + ")"


def _gene_paragraphs(passport: InputPassport) -> Iterator[tuple[str, str]]:
    ids, mapping = passport.gene_ids, passport.gene_mapping
    yield (
        "genes",
        f"{passport.gene_source}: {_ID_TYPES[ids.type]} (Ensembl ids {_percent(ids.share_ensembl)}, known symbols "
        f"{_percent(ids.share_symbols)}, others {_percent(ids.share_others)})",
    )
    yield (
        "",
        f"{mapping['num_mapped']:,} of {mapping['num_names']:,} names are in the vocabulary {passport.vocabulary}, "
        f"{_percent(passport.gene_coverage)} of the counts are on them; they are {mapping['num_genes_found']:,} of its "
        f"{mapping['num_vocabulary_genes']:,} genes",
    )
    for number, what, examples in (
        (mapping["num_by_alias"], "known by an alias or earlier symbol", mapping["aliases"]),
        (mapping["num_summed_genes"], "named more than once, counts summed", mapping["summed"]),
        (mapping["num_ambiguous"], "ambiguous, left out", mapping["ambiguous"]),
    ):
        if number:
            yield "", f"{number:,} {what}: {_list(examples, number)}"
    if passport.unmatched:
        largest = [f"{gene.name} ({_number(gene.counts)})" for gene in passport.unmatched]
        yield "", f"{len(largest):,} not matched, most counts first: {_list(largest, len(largest))}"


def _cell_paragraphs(passport: InputPassport) -> Iterator[tuple[str, str]]:
    yield "cells", f"genes a cell: {_describe_distribution(passport.genes_per_cell)}"
    yield "", f"counts a cell: {_describe_distribution(passport.counts_per_cell)}"
    if passport.mitochondrial_share is not None:
        yield "", f"{_percent(passport.mitochondrial_share)} of the counts are on mitochondrial genes"
    yield (
        "",
        f"{passport.num_empty_cells:,} without counts on known genes ({passport.num_without_counts:,} without any), "
        f"{passport.num_cells_below_minimum:,} with fewer than {passport.min_genes:,} genes",
    )
    if passport.num_repeated_cells:
        yield "", f"{passport.num_repeated_cells:,} have the name of an earlier cell"


def _verdict_paragraphs(passport: InputPassport) -> Iterator[tuple[str, str]]:
    refusals = passport.refusals
    yield "verdict", f"REFUSED, {len(refusals)} to mend" if refusals else "accepted"
    for problem in passport.problems:
        if problem in refusals:
            yield problem.code, problem.message
            yield "  fix", problem.remedy
        else:
            yield "allowed", f"{problem.code}: {problem.message}"


def _describe_distribution(of: Distribution) -> str:
    least, q05, q25, median, q75, q95, most = map(_number, of)
    return f"{least} to {most}, median {median} (5% {q05}, 25% {q25}, 75% {q75}, 95% {q95})"


def _list(names: list[str], total: int) -> str:
    shown = names[:NAMES_SHOWN]
    return "; ".join(shown) + (f"; and {total - len(shown):,} more" if total > len(shown) else "")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:,.4g}"


def _percent(share: float) -> str:
    """Give one decimal; 100.0% is said of the whole only."""
    return f"{min(share, 0.999) if share < 1 else 1:.1%}"


def _lay_out(name: str, text: str) -> str:
    return fill(
        text, WIDTH, initial_indent=f"{name:<15}", subsequent_indent=" " * 15, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
