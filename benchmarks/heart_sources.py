"""The heart data of the paper (Li et al. 2025, sections 2.1 and 3.5) as recipes: where they are, and what they hold.

Nothing is downloaded. What is known of each source, from where, and what could not be checked is in
``heart_sources.json``. Labels become the first tier of uHAF's heart, which is the paper's task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from screformer.annotation.label_tree import LabelTree

SOURCES_FILE = "heart_sources.json"
ORGAN = "Heart"


class HeartSource(NamedTuple):
    """A data set as its portal gives it.

    Attributes
    ----------
    name
        Short, for file names.
    title, reference, page
        For the reader.
    download, files
        Addresses and names of the files that are expected.
    label_column, donor_column
        Columns of `obs`.
    labels
        Label of the source -> type of the first tier.
    left_out
        Labels of the source that are no types, such as doublets.
    only
        Column of `obs` -> values whose cells are taken, where a file has that column.
    facts
        What is known of the source: ``says``, ``from`` and the date ``seen``.
    not_verified
        What is taken on trust.
    """

    name: str
    title: str
    reference: str
    page: str
    download: tuple[str, ...]
    files: tuple[str, ...]
    label_column: str
    donor_column: str
    labels: Mapping[str, str]
    left_out: tuple[str, ...]
    only: Mapping[str, tuple[str, ...]]
    facts: tuple[Mapping[str, str], ...]
    not_verified: tuple[str, ...]

    @classmethod
    def from_json(cls, name: str, content: Mapping[str, Any]) -> HeartSource:  # Any: JSON
        """Return it of its entry in the JSON file; with ``follows_tree`` every label of the tree is mapped, too.

        Raises
        ------
        ValueError
            A label is mapped to something that is no type of the first tier.
        """
        tree = LabelTree.uhaf(ORGAN)
        types = first_tier(tree)
        wrong = {label: type_ for label, type_ in content["labels"].items() if type_ not in types}
        if wrong:
            raise ValueError(f"{name} maps {wrong}; types of the first tier of uHAF's heart are {', '.join(types)}")
        of_tree = {label: tree.at_level(label, 1) for label in tree.labels} if content.get("follows_tree") else {}
        return cls(
            name=name,
            title=content["title"],
            reference=content["reference"],
            page=content["page"],
            download=tuple(content["download"]),
            files=tuple(content["files"]),
            label_column=content["label_column"],
            donor_column=content["donor_column"],
            labels={**of_tree, **content["labels"]},
            left_out=tuple(content["left_out"]),
            only={column: tuple(values) for column, values in content.get("only", {}).items()},
            facts=tuple(content["facts"]),
            not_verified=tuple(content["not_verified"]),
        )


def first_tier(tree: LabelTree | None = None) -> tuple[str, ...]:
    """Return the types of the first level, in the order of the tree; uHAF's heart by default.

    Examples
    --------
    >>> first_tier()[:3], len(first_tier())
    (('Adipocyte', 'Cardiomyocyte cell', 'Endothelial cell'), 12)
    """
    chosen = LabelTree.uhaf(ORGAN) if tree is None else tree
    return tuple(label for label, parent in chosen.parents.items() if parent is None)


@cache
def heart_sources() -> Mapping[str, HeartSource]:
    """Return name -> source."""
    text = files("screformer.benchmarks").joinpath(SOURCES_FILE).read_text(encoding="utf-8")
    return {name: HeartSource.from_json(name, content) for name, content in json.loads(text).items()}


def heart_source(name: str) -> HeartSource:
    """Return a source by name.

    Raises
    ------
    ValueError
        There is no such source.
    """
    known = heart_sources()
    if name not in known:
        raise ValueError(f"source got {name!r}; there are {', '.join(known)}")
    return known[name]


def format_source(source: HeartSource) -> str:
    """Return a recipe for the reader: what to download, what is expected in it, what is known from where."""
    lines = [f"{source.name}: {source.title}", f"  {source.reference}", f"  {source.page}", "  Download:"]
    lines += [f"    {address}" for address in source.download]
    lines += ["  Files:", *(f"    {name}" for name in source.files)]
    lines += [f"  Labels in {source.label_column!r}, donors in {source.donor_column!r}:"]
    lines += [f"    {label} -> {type_}" for label, type_ in source.labels.items()]
    lines += [f"    {label} -> (left out)" for label in source.left_out]
    lines += ["  Known:", *(f"    {fact['says']} ({fact['from']}, {fact['seen']})" for fact in source.facts)]
    lines += ["  Not verified:", *(f"    {doubt}" for doubt in source.not_verified)]
    return "\n".join(lines)
