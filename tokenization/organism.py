"""Which species a list of gene names is of, with the evidence for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Organism = Literal["human", "mouse", "other", "mixed", "unknown"]

# As 10x writes genes of a mixed reference: GRCh38_TP53, mm10___Trp53.
_GENOME = re.compile(r"(?:(GRCh3[78]|hg19|hg38)|(GRCm3[89]|mm9|mm10|mm39))_+(?=.)", re.IGNORECASE)
_ENSEMBL = re.compile(r"(ENS[A-Z]*)G\d{6,}(\.\d+)?(_PAR_Y)?", re.IGNORECASE)
_OTHER_ID = re.compile(r"(FBgn)\d{7}|(WBGene)\d{8}|(AT)[1-5CM]G\d{5}", re.IGNORECASE)
_HUMAN_SYMBOL = re.compile(r"[A-Z][A-Z0-9]*(orf\d+)?[A-Z0-9._-]*")
_MOUSE_SYMBOL = re.compile(r"[A-Z][A-Z0-9]?[a-z]+[a-z0-9]*([.-][A-Za-z0-9]+)*|mt-[A-Z][A-Za-z0-9]+|\d+[A-Z]\d+Rik")
_SPECIES_OF_ID = {
    "ENS": "human",
    "ENSMUS": "mouse",
    "ENSRNO": "rat",
    "ENSDAR": "zebrafish",
    "ENSMMU": "macaque",
    "ENSMFA": "crab-eating macaque",
    "ENSPTR": "chimpanzee",
    "ENSSSC": "pig",
    "ENSGAL": "chicken",
    "FBGN": "fly",
    "WBGENE": "worm",
    "AT": "thale cress",
}
# A second species with less than this share of what tells is ambient RNA, a transgene, or chance.
LEAST_SECOND_SHARE = 0.05
# Upper-case symbols are written for many species: they are human's only if the vocabulary knows some of their counts.
LEAST_KNOWN_SHARE = 0.1
# Fewer telling names than this share of the list say nothing.
LEAST_TELLING_SHARE = 0.2


class OrganismGuess(NamedTuple):
    """The species that gene names seem to be of.

    Attributes
    ----------
    name
        "human", "mouse" (or rat: their symbols are written alike), "other", "mixed", or "unknown".
    evidence
        What was seen, in words.
    share_human, share_mouse, share_other
        Of the counts on names that tell a species (of these names themselves, where counts are not known), 0 to 1.
    """

    name: Organism
    evidence: str
    share_human: float
    share_mouse: float
    share_other: float


class _Sign(NamedTuple):
    species: str
    kind: str


def guess_organism(
    names: Sequence[str], *, gene_counts: npt.NDArray[np.float64] | None = None, known_share: float | None = None
) -> OrganismGuess:
    """Guess the species of a file by prefixes of genomes, prefixes of Ensembl ids, and the case of symbols.

    Parameters
    ----------
    names
        One a gene.
    gene_counts
        Sum of the counts of each gene: then a name weighs as much as the counts on it, and genes of a mixed reference
        that have none do not matter.
    known_share
        Share (0 to 1) of the counts on genes of a human vocabulary, if that is what the names are compared to.
    """
    signs = [_read_sign(name) for name in names]
    is_weighed = gene_counts is not None and gene_counts.sum() > 0
    weights = np.asarray(gene_counts if is_weighed else np.ones(len(names)), dtype=np.float64)
    by_sign: dict[_Sign, float] = {}
    for sign, weight in zip(signs, weights.tolist(), strict=True):
        if sign is not None:
            by_sign[sign] = by_sign.get(sign, 0.0) + weight
    telling, total = sum(by_sign.values()), float(weights.sum())
    if telling == 0 or telling < LEAST_TELLING_SHARE * total:
        return OrganismGuess("unknown", "few of the names have the form of a known species' ids or symbols", 0, 0, 0)
    human, mouse = (sum(weight for sign, weight in by_sign.items() if sign.species == one) for one in _OURS)
    shares = (human / telling, mouse / telling, (telling - human - mouse) / telling)
    seen = sorted(by_sign.items(), key=lambda item: -item[1])
    what = "counts" if is_weighed else "names"
    kinds = ", ".join(f"{weight / telling:.1%} {sign.kind}" for sign, weight in seen[:3] if weight)
    evidence = f"by {what}: {kinds}"
    only_case = seen[0][0].kind == _UPPER_CASE
    if only_case and known_share is not None and known_share < LEAST_KNOWN_SHARE:
        return OrganismGuess(
            "unknown", f"{evidence}; but {known_share:.1%} of the counts are on known human genes", *shares
        )
    return OrganismGuess(_name_of(shares), evidence, *shares)


def organism_of_ids(ensembl_ids: Sequence[str]) -> Organism:
    """Return the species of a vocabulary's ids; "unknown" if they have no Ensembl form."""
    matches = [_ENSEMBL.fullmatch(name) for name in ensembl_ids]
    species = {_SPECIES_OF_ID.get(match.group(1).upper(), "other") for match in matches if match}
    if len(species) != 1:
        return "mixed" if species else "unknown"
    (one,) = species
    return "human" if one == "human" else "mouse" if one == "mouse" else "other"


_OURS = ("human", "mouse")
_UPPER_CASE = "upper-case symbols (human)"


def _name_of(shares: tuple[float, float, float]) -> Organism:
    if sorted(shares)[1] >= LEAST_SECOND_SHARE:
        return "mixed"
    names: tuple[Organism, ...] = ("human", "mouse", "other")
    return names[shares.index(max(shares))]


def _read_sign(name: str) -> _Sign | None:
    """Species and form of one name; None where it tells nothing."""
    name = name.strip()
    genome = _GENOME.match(name)
    if genome:
        species = "human" if genome.group(1) else "mouse"
        return _Sign(species, f"names beginning with {genome.group(0)} ({species})")
    ensembl = _ENSEMBL.fullmatch(name)
    if ensembl:
        prefix = ensembl.group(1).upper()
        species = _SPECIES_OF_ID.get(prefix, "another species")
        return _Sign(species, f"ids {prefix}G ({species})")
    other = _OTHER_ID.fullmatch(name)
    if other:
        prefix = next(group for group in other.groups() if group)
        species = _SPECIES_OF_ID[prefix.upper()]
        return _Sign(species, f"ids {prefix} ({species})")
    if _HUMAN_SYMBOL.fullmatch(name):
        return _Sign("human", _UPPER_CASE)
    if _MOUSE_SYMBOL.fullmatch(name):
        return _Sign("mouse", "symbols like Trp53 (mouse or rat)")
    return None
