"""Cell types as a tree: from a table of labels and parents, or uHAF's for an organ (Li et al. 2025, section 2.1).

The paper names cells at four levels; a label above the fourth repeats below itself. A model that gives probabilities of
the leaves gives every level: a label's probability is the sum of those of its leaves, so that no label is ever less
likely than one below it.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from screformer.configuration_screformer import ScReformerConfig

UHAF_FILE = "uhaf_2.2.0.csv.gz"
LABEL_NAMES, PARENT_NAMES, ORGAN_NAME = ("label", "child", "cell_type"), ("parent", "father"), "organ"

FloatArray = npt.NDArray[np.floating[Any]]
Int64Array = npt.NDArray[np.int64]


def label_names_of(config: ScReformerConfig) -> list[str]:
    """Return a classifier's labels in id order."""
    return [config.id2label[index] for index in range(config.num_labels)]


class LabelTree:
    """Labels, each with at most one parent; the top has no label.

    Parameters
    ----------
    parents
        Label -> parent, None or "" for labels of the first level. Every parent is a label too.

    Raises
    ------
    ValueError
        There is no label, a parent is no label, or a label is above itself.

    Examples
    --------
    >>> tree = LabelTree({"lymphoid": None, "T cell": "lymphoid", "B cell": "lymphoid", "fat cell": None})
    >>> tree.path("T cell"), tree.at_level("fat cell", 2)
    (('lymphoid', 'T cell'), 'fat cell')
    """

    def __init__(self, parents: Mapping[str, str | None]) -> None:
        self.parents = {label: parent or None for label, parent in parents.items()}
        if not self.parents or "" in self.parents:
            raise ValueError("a label tree needs labels, and each of them a name")
        unknown = sorted({parent for parent in self.parents.values() if parent and parent not in self.parents})
        if unknown:
            raise ValueError(f"the tree has parents that are no labels: {unknown}; give each of them a row of its own")
        self._paths = {label: self._find_path(label) for label in self.parents}
        order = sorted(self._paths.values(), key=lambda path: [self._place[label] for label in path])
        self.labels: tuple[str, ...] = tuple(path[-1] for path in order)  # every label before what is below it

    @cached_property
    def _place(self) -> dict[str, int]:
        return {label: place for place, label in enumerate(self.parents)}

    def _find_path(self, label: str) -> tuple[str, ...]:
        path: list[str] = []
        at: str | None = label
        while at is not None:
            if at in path:
                raise ValueError(f"the label {at!r} is above itself: {' > '.join([*path, at][::-1])}")
            path.append(at)
            at = self.parents[at]
        return tuple(reversed(path))

    @classmethod
    def read(cls, path: str | Path, *, organ: str | None = None) -> LabelTree:
        """Return the tree of a CSV with a header: a column label (or child, cell_type) and one parent (or father).

        Parameters
        ----------
        path
            May end in .gz. An empty parent is the top; where none is empty, the one parent that is no label itself.
        organ
            For a table with a column organ: whose rows to take.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ValueError
            A column is missing, a label has two parents, or the organ is not there or not given.
        """
        data = Path(path).read_bytes()
        text = (gzip.decompress(data) if Path(path).suffix == ".gz" else data).decode("utf-8-sig")
        return cls._from_table(text, name=str(path), organ=organ)

    @classmethod
    def uhaf(cls, organ: str) -> LabelTree:
        """Return uHAF 2.2.0's tree for one of 50 organs, such as ``"Heart"``; ValueError for another name."""
        data = files("screformer.annotation").joinpath(UHAF_FILE).read_bytes()
        return cls._from_table(gzip.decompress(data).decode("utf-8"), name="uHAF 2.2.0", organ=organ)

    @classmethod
    def _from_table(cls, text: str, *, name: str, organ: str | None) -> LabelTree:
        reader = csv.DictReader(io.StringIO(text))
        columns = reader.fieldnames or []
        label_column, parent_column = (
            next((column for column in columns if column.strip().lower() in names), None)
            for names in (LABEL_NAMES, PARENT_NAMES)
        )
        if label_column is None or parent_column is None:
            raise ValueError(
                f"{name} has the columns {list(columns)}; a header with label (or {', '.join(LABEL_NAMES[1:])}) and "
                f"parent (or {', '.join(PARENT_NAMES[1:])}) is needed"
            )
        rows = list(reader)
        if ORGAN_NAME in columns:
            organs = sorted({row[ORGAN_NAME] for row in rows})
            chosen = next((each for each in organs if organ is not None and each.lower() == organ.lower()), None)
            if chosen is None:
                raise ValueError(f"organ got {organ!r}; {name} has {', '.join(organs)}")
            rows = [row for row in rows if row[ORGAN_NAME] == chosen]
        elif organ is not None:
            raise ValueError(f"organ got {organ!r}, but {name} has no column organ; leave it out")
        parents: dict[str, str | None] = {}
        for row in rows:
            label, parent = (row[label_column] or "").strip(), (row[parent_column] or "").strip()
            if parents.get(label, parent) != parent:
                raise ValueError(f"{name} gives {label!r} two parents, {parents[label]!r} and {parent!r}; keep one")
            parents[label] = parent
        tops = {parent for parent in parents.values() if parent and parent not in parents}
        if len(tops) == 1 and all(parents.values()):
            parents = {label: None if parent in tops else parent for label, parent in parents.items()}
        return cls(parents)

    @cached_property
    def leaves(self) -> tuple[str, ...]:
        """Labels with nothing below them, in the order of `labels`."""
        inner = set(self.parents.values())
        return tuple(label for label in self.labels if label not in inner)

    @cached_property
    def num_levels(self) -> int:
        """Labels on the longest way down."""
        return max(map(len, self._paths.values()))

    def path(self, label: str) -> tuple[str, ...]:
        """Return the labels from the first level down to `label`.

        Raises
        ------
        ValueError
            There is no such label.
        """
        if label not in self._paths:
            raise ValueError(f"the label {label!r} is not in the tree, which has {', '.join(self.labels)}")
        return self._paths[label]

    def at_level(self, label: str, level: int) -> str:
        """Return the label that `label` counts as at a level, 1 at the top; a shorter path repeats its end.

        Raises
        ------
        ValueError
            There is no such label, or `level` is below 1.
        """
        if level < 1:
            raise ValueError(f"level got {level}; the first is 1")
        path = self.path(label)
        return path[min(level, len(path)) - 1]

    def is_within(self, label: str, other: str) -> bool:
        """Whether `label` is `other` or a subtype of it."""
        self.path(other)
        return other in self.path(label)

    def restrict(self, labels: Iterable[str]) -> LabelTree:
        """Return the tree of these labels and what is above them."""
        kept = {above for label in labels for above in self.path(label)}
        return LabelTree({label: parent for label, parent in self.parents.items() if label in kept})

    @cached_property
    def membership(self) -> npt.NDArray[np.bool_]:
        """(labels, leaves): whether a leaf is the label or below it."""
        return np.array([[label in self._paths[leaf] for leaf in self.leaves] for label in self.labels], dtype=bool)

    def label_probabilities(self, leaf_probabilities: FloatArray) -> FloatArray:
        """Return the probability of every label, (cells, labels): the sum of its leaves'.

        Parameters
        ----------
        leaf_probabilities
            (cells, leaves), in the order of `leaves`.

        Raises
        ------
        ValueError
            For another number of columns.
        """
        if leaf_probabilities.ndim != 2 or leaf_probabilities.shape[1] != len(self.leaves):
            raise ValueError(
                f"leaf_probabilities has shape {leaf_probabilities.shape}; it must be (cells, {len(self.leaves)})"
            )
        sums = leaf_probabilities @ self.membership.T.astype(leaf_probabilities.dtype)
        # In floating point a sum of some may exceed the sum of more by a rounding; level by level that is mended.
        for column, label in enumerate(self.labels):
            parent = self.parents[label]
            if parent is not None:
                sums[:, column] = np.minimum(sums[:, column], sums[:, self.labels.index(parent)])
        return sums

    def predict_levels(self, label_probabilities: FloatArray) -> Int64Array:
        """Return the predicted label of each cell at each level, (cells, levels): indices in `labels`.

        From the top down: at each level the likeliest of what is below the label before, so that the labels of a cell
        form a path; where it ends, its end repeats.

        Parameters
        ----------
        label_probabilities
            (cells, labels), as `label_probabilities` returns them.
        """
        below = self._children()
        predicted = np.empty((len(label_probabilities), self.num_levels), dtype=np.int64)
        before = np.full(len(label_probabilities), -1)
        for level in range(self.num_levels):
            now = before.copy()
            for parent in np.unique(before):
                children, cells = below.get(int(parent)), np.flatnonzero(before == parent)
                if children is not None:
                    now[cells] = children[label_probabilities[np.ix_(cells, children)].argmax(axis=1)]
            predicted[:, level] = before = now
        return predicted

    def _children(self) -> dict[int, Int64Array]:
        """Return index of a label (-1: the top) -> indices of the labels right below it."""
        place = {label: index for index, label in enumerate(self.labels)}
        below: dict[int, list[int]] = {}
        for label in self.labels:
            parent = self.parents[label]
            below.setdefault(-1 if parent is None else place[parent], []).append(place[label])
        return {parent: np.array(children) for parent, children in below.items()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LabelTree) and self.parents == other.parents

    def __hash__(self) -> int:
        return hash(frozenset(self.parents.items()))

    def __repr__(self) -> str:
        return f"LabelTree({len(self.labels)} labels, {len(self.leaves)} leaves, {self.num_levels} levels)"


class LevelPredictions(NamedTuple):
    """Of cells, and each level of a tree: indices of the labels in its `labels`, and their probabilities."""

    labels: Int64Array
    probabilities: FloatArray


def predict_levels(tree: LabelTree, class_names: Sequence[str], probabilities: FloatArray) -> LevelPredictions:
    """Return labels and probabilities at each level, both (cells, levels), of a classifier of the tree's leaves.

    Parameters
    ----------
    tree
        Whose leaves the classes are.
    class_names
        Of the columns of `probabilities`, in any order.
    probabilities
        (cells, classes). Rows of NaN keep NaN; their labels mean nothing.

    Raises
    ------
    ValueError
        The classes are not the leaves.
    """
    if sorted(class_names) != sorted(tree.leaves):
        raise ValueError(f"class_names are {sorted(class_names)}; they must be the tree's leaves {sorted(tree.leaves)}")
    order = [list(class_names).index(leaf) for leaf in tree.leaves]
    of_labels = tree.label_probabilities(probabilities[:, order])
    labels = tree.predict_levels(of_labels)
    return LevelPredictions(labels, np.take_along_axis(of_labels, labels, axis=1))


def unknown_labels(tree: LabelTree, labels: Sequence[str]) -> list[str]:
    """Return the labels that the tree does not have, each once, sorted."""
    return sorted(set(labels) - set(tree.labels))
