"""The Cell Ontology: terms by id, name or synonym, their ids for a list of labels, and label trees of some of them.

The packaged table is release 2026-03-26 (Diehl et al. 2016, https://doi.org/10.1186/s13326-016-0088-7; CC BY 4.0).
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from screformer.annotation.cell_names import is_abbreviation, is_letter, singular, spelling, without_cell
from screformer.annotation.label_tree import LabelTree

logger = logging.getLogger(__name__)
CELL_ONTOLOGY_FILE = "cell_ontology_2026-03-26.tsv.gz"
ID_PATTERN = re.compile(r"(?:.*/)?CL[:_](\d{7})", re.IGNORECASE)
OBSOLETE = "obsolete "
MAX_SUGGESTIONS = 3


class CellTerm(NamedTuple):
    """A cell type of the Cell Ontology.

    Attributes
    ----------
    id
        Such as "CL:0000084".
    name
        Such as "T cell".
    synonyms
        Those that the ontology calls exact.
    parents
        Ids of the terms right above.
    is_broad
        Whether it is one of the broad types that CELLxGENE groups cells by.
    """

    id: str
    name: str
    synonyms: tuple[str, ...]
    parents: tuple[str, ...]
    is_broad: bool


class _Ontology(NamedTuple):
    """Id -> term, old id -> id, and names of replaced terms -> id."""

    terms: Mapping[str, CellTerm]
    replaced: Mapping[str, str]
    old_names: Mapping[str, str]


@cache
def _ontology() -> _Ontology:
    data = files("screformer.annotation").joinpath(CELL_ONTOLOGY_FILE).read_bytes()
    text = io.StringIO(gzip.decompress(data).decode("utf-8"))
    terms, replaced, old_names = {}, {}, {}
    for row in csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE):
        if row["replaced_by"]:
            replaced[row["id"]] = row["replaced_by"]
            if row["name"].casefold().startswith(OBSOLETE):
                old_names[row["name"][len(OBSOLETE) :]] = row["replaced_by"]
            continue
        synonyms, parents = (tuple(filter(None, row[column].split("|"))) for column in ("synonyms", "parents"))
        terms[row["id"]] = CellTerm(row["id"], row["name"], synonyms, parents, row["is_broad"] == "1")
    return _Ontology(terms, replaced, old_names)


@cache
def find_term(name: str) -> CellTerm | None:
    """Return the term that `name` certainly means, None where that is not certain.

    It is an id (of a replaced term: the term that replaces it), a term's name, or an exact synonym. Case, accents and
    punctuation do not count; + and - after a marker are "positive" and "negative". Where that finds nothing, plurals
    are made singular, and then "cell" may be missing at the end, or be there. What could be several terms is none, but
    a name goes before a synonym. Two kinds of synonyms are not taken, because cells of other organs, genes and clusters
    are called so too: one letter with or without "cell" ("beta", "D cell"), and abbreviations ("EPC", "DC1").

    Examples
    --------
    >>> find_term("T cells").id, find_term("cl_0000084").name, find_term("Mast").name, find_term("beta")
    ('CL:0000084', 'T cell', 'mast cell', None)
    """
    ontology = _ontology()
    matched = ID_PATTERN.fullmatch(name.strip())
    if matched:
        term_id = f"CL:{matched[1]}"
        return ontology.terms.get(ontology.replaced.get(term_id, term_id))
    keys, index = _keys(name), _index()
    for level, key in enumerate(keys):
        kinds = index[level][:1] if is_letter(keys[-2]) else index[level]
        for ids_of in kinds:
            found = ids_of.get(key, ()) if key else ()
            if found:
                return ontology.terms[next(iter(found))] if len(found) == 1 else None
    return None


def _keys(name: str) -> tuple[str, str, str, str]:
    """Return what a name is compared by, the strictest first."""
    words = spelling(name)
    one = singular(words)
    return name.strip(), words, one, without_cell(one)


@cache
def _index() -> list[tuple[dict[str, set[str]], ...]]:
    """Return for each of `_keys` key -> ids: of names, of synonyms, of names of replaced terms."""
    ontology = _ontology()
    kinds = (
        [(term.name, term.id) for term in ontology.terms.values()],
        [(each, term.id) for term in ontology.terms.values() for each in term.synonyms if not is_abbreviation(each)],
        list(ontology.old_names.items()),
    )
    index: list[tuple[dict[str, set[str]], ...]] = [tuple(defaultdict(set) for _ in kinds) for _ in range(4)]
    for number, kind in enumerate(kinds):
        for name, term_id in kind:
            for level, key in enumerate(_keys(name)):
                index[level][number][key].add(term_id)
    return index


def ontology_ids(labels: Iterable[str]) -> list[str]:
    """Return the id of each label's term, "" where `find_term` is not certain.

    Examples
    --------
    >>> ontology_ids(["T cell", "beta", "CL:0000236"])
    ['CL:0000084', '', 'CL:0000236']
    """
    found = [find_term(label) for label in labels]
    return [term.id if term else "" for term in found]


@cache
def steps_above(term_id: str) -> Mapping[str, int]:
    """Return id -> steps of every term above one, along the shortest way.

    Raises
    ------
    KeyError
        There is no such term.
    """
    terms = _ontology().terms
    steps: dict[str, int] = {}
    level, distance = set(terms[term_id].parents), 1
    while level:
        steps.update(dict.fromkeys(level, distance))
        level = {parent for at in level for parent in terms[at].parents} - set(steps)
        distance += 1
    return steps


def broad_types() -> list[str]:
    """Return the ids of the broad types that CELLxGENE groups cells by, without those that are states or functions."""
    return [term.id for term in _ontology().terms.values() if term.is_broad]


def cell_ontology_tree(labels: Iterable[str], above: Iterable[str] | None = None) -> LabelTree:
    """Return the tree of labels that are terms of the Cell Ontology, and of broader terms above them.

    In the ontology a term may have several parents, here it has one: of the chosen terms above it, those between which
    and it no other chosen term lies, the one with the fewest steps; of several, the most specific, which is the
    one with the most terms above it; of several, the one with the smallest id. What was decided is logged.

    Parameters
    ----------
    labels
        Ids, or names and synonyms as `find_term` takes them; the tree has them as they are written here.
    above
        Further terms, which are in the tree where they are above a label, by their name (by their id if all labels are
        ids). None for `broad_types`.

    Raises
    ------
    ValueError
        There are no labels, some are not in the Cell Ontology, or two are the same term.
    """
    given = sorted(set(labels))
    label_of = {term.id: label for label, term in zip(given, _find_all(given, "labels"), strict=True)}
    if len(label_of) < len(given):
        spellings = [label for label in given if label not in label_of.values()]
        same = {label: label_of[term.id] for label in spellings if (term := find_term(label))}
        raise ValueError(f"labels of the same Cell Ontology term need one name: {same}")
    are_ids = all(ID_PATTERN.fullmatch(label) for label in given)
    above = broad_types() if above is None else sorted(set(above))
    reached = {term_id for label_id in label_of for term_id in steps_above(label_id)}
    for term in _find_all(above, "terms"):
        if term.id in reached:
            label_of.setdefault(term.id, term.id if are_ids else term.name)
    candidates = {term_id: _parents_among(term_id, label_of) for term_id in label_of}
    parents = {label_of[term_id]: label_of[ids[0]] if ids else None for term_id, ids in candidates.items()}
    tree = LabelTree(parents).restrict(given)
    for term_id, ids in candidates.items():
        if len(ids) > 1 and label_of[term_id] in tree.labels:
            others = ", ".join(label_of[other] for other in ids[1:])
            logger.info("%s is below %s, not below %s", label_of[term_id], label_of[ids[0]], others)
    return tree


def _parents_among(term_id: str, chosen: Iterable[str]) -> list[str]:
    """Return those of the chosen terms that may be a term's parent, the one to take first."""
    steps = steps_above(term_id)
    above = [other for other in chosen if other in steps]
    nearest = [other for other in above if not any(other in steps_above(between) for between in above)]
    return sorted(nearest, key=lambda other: (steps[other], -len(steps_above(other)), other))


def _find_all(names: Sequence[str], argument: str) -> list[CellTerm]:
    """Return a term for each name; ValueError, with the nearest names, where one is not certain."""
    found = {name: find_term(name) for name in names}
    unknown = [name for name, term in found.items() if term is None]
    if unknown:
        suggested = "; ".join(f"{name!r} ({', '.join(suggest_names(name)) or 'nothing near'})" for name in unknown)
        raise ValueError(
            f"{argument} that are not in the Cell Ontology, or not certainly, with the nearest names: {suggested}. "
            "Name the cells by a term's name or id (https://www.ebi.ac.uk/ols4/ontologies/cl), leave them out with "
            "exclude_labels, or give a CSV of labels and parents"
        )
    return [term for term in found.values() if term is not None]


def suggest_names(name: str) -> list[str]:
    """Return names of terms that `name` may mean, the nearest first, at most three."""
    words = singular(spelling(name))
    names: dict[str, str] = {}  # as compared -> the term's name
    for term in _ontology().terms.values():
        for each in (term.name, *term.synonyms):
            names.setdefault(singular(spelling(each)), term.name)
    holding = [key for key in names if words and set(words.split()) <= set(key.split())]
    near = difflib.get_close_matches(words, holding, n=MAX_SUGGESTIONS, cutoff=0.0)
    near += difflib.get_close_matches(words, list(names), n=MAX_SUGGESTIONS)
    return list(dict.fromkeys(names[key] for key in near))[:MAX_SUGGESTIONS]
