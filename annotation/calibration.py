"""Probabilities that mean what they say, and answers no oftener wrong than asked for: how a calibrated model is read.

A temperature a level of the label tree divides the logits (Guo et al. 2017) where the level below a label is chosen, so
that a label's probability stays at least that of any label below it. A threshold on the probability then says how deep
in the tree a cell is answered (selective classification, Geifman and El-Yaniv 2017). `calibration_fit` finds both.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from screformer.annotation.label_tree import LabelTree, label_names_of, predict_levels

if TYPE_CHECKING:
    from screformer.configuration_screformer import ScReformerConfig

FloatArray = npt.NDArray[np.floating[Any]]
Int64Array = npt.NDArray[np.int64]

UNKNOWN = "unknown"
# In a configuration's `calibration`: the labels that it was fitted for.
CLASSES = "classes"

logger = logging.getLogger(__name__)


class Calibration(NamedTuple):
    """What was fitted to validation cells; kept in the configuration's `calibration`.

    Attributes
    ----------
    temperatures
        One a level of the label tree.
    error_rates, thresholds
        Of answers with at least a threshold's probability no more than such a share was wrong; error rates ascend,
        thresholds do not.
    """

    temperatures: tuple[float, ...]
    error_rates: tuple[float, ...]
    thresholds: tuple[float, ...]

    @classmethod
    def from_config(cls, config: ScReformerConfig) -> Calibration | None:
        """Return that of a checkpoint, None if it has none, or one of other classes, of what it was fine-tuned from."""
        kept: dict[str, list[Any]] | None = config.calibration
        if kept is None:
            return None
        classes = label_names_of(config)
        if kept.get(CLASSES, classes) != classes:
            logger.warning(
                "the checkpoint's calibration is of other classes (%d) than its own (%d), and is not used; "
                "screformer calibrate makes one", len(kept[CLASSES]), len(classes),
            )  # fmt: skip
            return None
        return cls(*(tuple(kept[name]) for name in cls._fields))

    def to_config(self) -> dict[str, list[float] | list[str]]:
        """Return it as the configuration keeps it."""
        return {name: list(values) for name, values in self._asdict().items()}

    def threshold(self, max_error: float) -> float:
        """Return the lowest probability of an answer, so that at most `max_error` of the answers are wrong.

        Raises
        ------
        ValueError
            It is no share, or lower than what the validation cells can vouch for.
        """
        check_max_error(max_error)
        place = int(np.searchsorted(self.error_rates, max_error, side="right")) - 1
        if place < 0:
            least = f"{self.error_rates[0]:.3g}" if self.error_rates else "1"
            raise ValueError(
                f"max_error={max_error:g}: the validation cells of this checkpoint can vouch for {least} at the least. "
                "Accept more errors, or calibrate on more cells (screformer calibrate)"
            )
        return self.thresholds[place]


def check_max_error(max_error: float) -> None:
    """Raise ValueError unless it is a share between 0 and 1, both excluded."""
    if not 0 < max_error < 1:
        raise ValueError(f"max_error got {max_error:g}; it must be a share between 0 and 1, such as 0.05 for 5%")


class CellAnswers(NamedTuple):
    """What is said of cells, one row each; NaN and level 0 where the logits are NaN.

    Attributes
    ----------
    probabilities
        (cells, classes), calibrated where the checkpoint is.
    level_labels, level_probabilities
        (cells, levels): the likeliest path from the top down, as indices in the tree's `labels`; its end repeats.
    depth
        (cells,): the level of the answer, 0 for "unknown".
    """

    probabilities: npt.NDArray[np.float32]
    level_labels: Int64Array
    level_probabilities: npt.NDArray[np.float32]
    depth: Int64Array

    def answers(self) -> Int64Array:
        """Return each cell's answer, an index in the tree's `labels`, -1 for "unknown"."""
        chosen = np.take_along_axis(self.level_labels, np.maximum(self.depth - 1, 0)[:, None], axis=1)[:, 0]
        return np.where(self.depth > 0, chosen, -1)


class LabelReader:
    """Reads a classifier's logits: calibrated probabilities, a path of labels, and how deep a cell is answered.

    Parameters
    ----------
    config
        Of the classifier: labels, tree, calibration.
    max_error
        Share of the answers that may be wrong; None answers every cell with the end of its path.
    is_calibrated
        Whether to use the checkpoint's temperatures, where it has some.

    Attributes
    ----------
    tree
        The label tree; of a classifier without one, all labels side by side.
    class_names
        Of the logits' columns.
    threshold
        The lowest probability of an answer.
    calibration
        The checkpoint's, None if it has none.

    Raises
    ------
    ValueError
        `max_error` is no share, or the checkpoint is not calibrated, or not on enough cells.
    """

    def __init__(self, config: ScReformerConfig, *, max_error: float | None = None, is_calibrated: bool = True) -> None:
        self.class_names = label_names_of(config)
        self.has_levels = bool(config.label_parents)
        self.tree = LabelTree(config.label_parents or dict.fromkeys(self.class_names))
        self.calibration = Calibration.from_config(config)
        self.threshold = 0.0
        if max_error is not None:
            check_max_error(max_error)
            if self.calibration is None:
                raise ValueError(
                    f"max_error={max_error:g}: the checkpoint is not calibrated, so that how often it errs is not "
                    "known. Calibrate it on labelled cells that it was not trained on: screformer calibrate"
                )
            self.threshold = self.calibration.threshold(max_error)
        ones = (1.0,) * self.tree.num_levels
        self._temperatures = self.calibration.temperatures if self.calibration and is_calibrated else ones

    def __call__(self, logits: FloatArray) -> CellAnswers:
        """Return what is said of cells with these logits, (cells, classes)."""
        probabilities = class_probabilities(self.tree, self.class_names, logits, self._temperatures)
        levels = predict_levels(self.tree, self.class_names, probabilities)
        lengths = self._path_lengths[levels.labels[:, -1]]
        # A path's probabilities never grow on its way down, so that those above the threshold are its beginning.
        depth = np.minimum((levels.probabilities >= self.threshold).sum(axis=1), lengths)
        return CellAnswers(
            probabilities.astype(np.float32), levels.labels, levels.probabilities.astype(np.float32), depth
        )

    def classes(self, answers: CellAnswers) -> Int64Array:
        """Return the class that each cell is called where every cell is answered, (cells,): the end of its path.

        That may be another than the likeliest class: a path takes the likeliest label at each level.
        """
        if not self.has_levels:
            return answers.probabilities.argmax(axis=1)
        place = {name: index for index, name in enumerate(self.class_names)}
        class_of = np.array([place.get(label, -1) for label in self.tree.labels])
        return class_of[answers.level_labels[:, -1]]

    @cached_property
    def _path_lengths(self) -> Int64Array:
        return np.array([len(self.tree.path(label)) for label in self.tree.labels], dtype=np.int64)


def class_probabilities(
    tree: LabelTree, class_names: Sequence[str], logits: FloatArray, temperatures: Sequence[float]
) -> npt.NDArray[np.float64]:
    """Return probabilities of the classes, (cells, classes): at each level the logits over its temperature.

    A label's share of its parent is the softmax over the parent's leaves, logits divided by the temperature of the
    label's level; a leaf's probability is the product on its path. Equal temperatures give one softmax over all leaves.

    Parameters
    ----------
    tree
        Whose leaves the classes are.
    class_names
        Of the columns of `logits`, in any order.
    logits
        (cells, classes).
    temperatures
        One a level.

    Raises
    ------
    ValueError
        There are not as many temperatures as levels.
    """
    if len(temperatures) != tree.num_levels:
        raise ValueError(f"temperatures: one for each of {tree.num_levels} levels is needed, got {len(temperatures)}")
    shares = np.ones(logits.shape)
    for choice in choices(tree, class_names):
        scaled = logits[:, choice.columns].astype(np.float64) / temperatures[choice.level - 1]
        weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        by_child = weights @ choice.is_of_child
        shares[:, choice.columns] *= (by_child / by_child.sum(axis=1, keepdims=True)) @ choice.is_of_child.T
    return shares


class Choice(NamedTuple):
    """A label with several children, or the top: columns of its leaves, and which child (of a level) each is of."""

    level: int
    children: list[str]
    columns: Int64Array
    is_of_child: npt.NDArray[np.float64]


def choices(tree: LabelTree, class_names: Sequence[str]) -> Iterator[Choice]:
    """Yield what is chosen below each label that has several children, and below the top."""
    column_of = {name: column for column, name in enumerate(class_names)}
    below: dict[str | None, list[str]] = {}
    for label in tree.labels:
        below.setdefault(tree.parents[label], []).append(label)
    for children in below.values():
        if len(children) < 2:
            continue
        leaves = [leaf for leaf in tree.leaves if any(child in tree.path(leaf) for child in children)]
        is_of_child = np.array([[child in tree.path(leaf) for child in children] for leaf in leaves], dtype=np.float64)
        columns = np.array([column_of[leaf] for leaf in leaves])
        yield Choice(len(tree.path(children[0])), children, columns, is_of_child)
