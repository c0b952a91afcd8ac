"""From a classifier and cells to the columns that name them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from screformer.annotation.added_elements import AddedElements, EarlierElements, FloatArray
from screformer.annotation.annotated_copy import dated
from screformer.annotation.calibration import UNKNOWN, LabelReader
from screformer.annotation.cell_numbers import CellNumbers
from screformer.annotation.cell_ontology import ontology_ids
from screformer.annotation.cell_source import CellSource
from screformer.annotation.classifier_measure import ClassifierMeasure
from screformer.annotation.cluster_vote import cluster_vote_columns
from screformer.annotation.trained_model import TrainedModel
from screformer.annotation.unknown_types import UnknownTypeDetector
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.count_matrix import CountMatrix
from screformer.train.batch_size import BatchSize
from screformer.train.collator import GeneSpace

NO_LABEL = -1
MAJORITY = 0.5  # of a cluster's votes
Int64Array = npt.NDArray[np.int64]


class AnnotationOptions(NamedTuple):
    """Options of `annotate_file` that a result depends on, and the batch size."""

    batch_size: BatchSize = 32
    gene_space: GeneSpace | None = None
    max_error: float | None = None
    cluster_column: str | None = None
    embeddings: bool = False
    unknown_below: float | None = None


class NewNames(NamedTuple):
    """What is added: columns of `obs`, those of levels in pairs, and matrices of `obsm`; None or () for what is not."""

    cell_type: str
    probability: str
    abstained: str
    probabilities: str
    best_guess: str | None = None
    unknown_p: str | None = None
    ontology_term_id: str | None = None
    embedding: str | None = None
    levels: tuple[tuple[str, str], ...] = ()
    cluster_vote: tuple[str, ...] = ()

    @property
    def obs(self) -> list[str]:
        """The columns of `obs`."""
        first = [self.cell_type, self.probability, self.abstained]
        some = [name for name in (self.best_guess, self.unknown_p, self.ontology_term_id) if name]
        return [*first, *some, *(name for pair in self.levels for name in pair), *self.cluster_vote]

    @property
    def obsm(self) -> list[str]:
        """The matrices of `obsm`."""
        return [self.probabilities, *([self.embedding] if self.embedding else [])]


def earlier_elements(key: str) -> EarlierElements:
    """Return what an annotation of this key, with whatever model and options, may have left: all of `NewNames`."""
    ends = (
        r"cell_type|probability|abstained|best_guess|unknown_p|ontology_term_id|level_\d+(_probability)?|"
        r"cluster_vote(_share)?"
    )
    return EarlierElements(re.compile(rf"{re.escape(key)}_({ends})"), f"X_{key}", key, f"{key}_embedding")


class FoundCells(NamedTuple):
    """What was found of the cells: labels as indices in the tree's, NO_LABEL where there is none.

    Attributes
    ----------
    answers, best_guesses
        (cells,).
    depth
        (cells,): level of the answer, 0 for none.
    probabilities
        (cells,): of the answer, or of the likeliest first label.
    level_labels, level_probabilities
        (cells, levels): labels where the answer ends its end, probabilities of the likeliest path.
    is_empty
        (cells,): no counts on known genes.
    unknown_p
        (cells,): how many known cells look as strange; NaN where nobody asked.
    """

    answers: Int64Array
    best_guesses: Int64Array
    depth: Int64Array
    probabilities: FloatArray
    level_labels: Int64Array
    level_probabilities: FloatArray
    is_empty: npt.NDArray[np.bool_]
    unknown_p: FloatArray

    @property
    def num_empty(self) -> int:
        """Cells without counts on known genes."""
        return int(self.is_empty.sum())

    @property
    def num_abstained(self) -> int:
        """Cells with counts that are called unknown."""
        return int(((self.answers == NO_LABEL) & ~self.is_empty).sum())

    @property
    def mean_probability(self) -> float:
        """Of the answers; NaN if there are none."""
        is_answered = self.answers != NO_LABEL
        return float(self.probabilities[is_answered].mean()) if is_answered.any() else float("nan")


def _check_unknown_below(unknown_below: float, detector: UnknownTypeDetector | None, name: str) -> None:
    if not 0 < unknown_below < 1:
        raise ValueError(
            f"unknown_below got {unknown_below:g}; it must be a share between 0 and 1, such as 0.01: that of known "
            "cells that may be called unknown"
        )
    if detector is None:
        raise ValueError(
            f"unknown_below={unknown_below:g}: {name} has no detector of unknown types. Fine-tune it again: "
            "screformer finetune fits one"
        )


class CellAnnotator:
    """A classifier with the options of an annotation.

    Parameters
    ----------
    trained
        The classifier.
    options
        Of the annotation.
    key
        What new names begin with.

    Attributes
    ----------
    measure
        Gives logits, how strange a cell looks if the checkpoint can tell, and embeddings if they were asked for.
    reader
        Reads the logits.
    names
        Of what is added.

    Raises
    ------
    ValueError
        An option is out of its range, the classifier is not calibrated and `max_error` needs it, or it has no detector
        and `unknown_below` needs one.
    """

    def __init__(
        self, trained: TrainedModel[ScReformerForCellClassification], options: AnnotationOptions, *, key: str
    ) -> None:
        self.trained, self.options, self.key = trained, options, key
        self.reader = LabelReader(trained.model.config, max_error=options.max_error)
        detector = trained.detector
        if options.unknown_below is not None:
            _check_unknown_below(options.unknown_below, detector, trained.name)
        self.measure = ClassifierMeasure(
            trained.model,
            batch_size=options.batch_size,
            gene_space=options.gene_space,
            embeddings=options.embeddings,
            detector=detector,
        )
        num_levels = self.reader.tree.num_levels if self.reader.has_levels else 0
        self._term_ids = ontology_ids(self.reader.tree.labels)
        self.names = NewNames(
            f"{key}_cell_type",
            f"{key}_probability",
            f"{key}_abstained",
            f"{key}_probabilities",
            None if options.max_error is None and options.unknown_below is None else f"{key}_best_guess",
            None if detector is None else f"{key}_unknown_p",
            f"{key}_ontology_term_id" if any(self._term_ids) else None,
            f"X_{key}" if options.embeddings else None,
            tuple((f"{key}_level_{level}", f"{key}_level_{level}_probability") for level in range(1, 1 + num_levels)),
            () if options.cluster_column is None else (f"{key}_cluster_vote", f"{key}_cluster_vote_share"),
        )

    def check_clusters(self, matrix: CountMatrix) -> None:
        """Raise ValueError unless the cells have the column of clusters, if one was named."""
        column = self.options.cluster_column
        if column is not None and column not in matrix.obs_columns:
            raise ValueError(
                f"cluster_column={column!r} is not in {matrix.name}, which has {matrix.obs_columns}. Cluster the cells "
                "first, for example with scanpy.tl.leiden"
            )

    def facts(self) -> dict[str, Any]:  # Any: JSON
        """Return what the measured numbers depend on, besides the cells."""
        return {
            "model": self.trained.describe(),
            "gene_space": self.measure.gene_space,
            "parts": {name: [part.start, part.stop] for name, part in self.measure.parts.items()},
        }

    def read(self, numbers: CellNumbers) -> FoundCells:
        """Return the answers to all cells."""
        shape = numbers.num_cells, self.reader.tree.num_levels
        found = FoundCells(
            answers=np.full(shape[0], NO_LABEL),
            best_guesses=np.full(shape[0], NO_LABEL),
            depth=np.zeros(shape[0], dtype=np.int64),
            probabilities=np.full(shape[0], np.nan, dtype=np.float32),
            level_labels=np.full(shape, NO_LABEL),
            level_probabilities=np.full(shape, np.nan, dtype=np.float32),
            is_empty=np.zeros(shape[0], dtype=bool),
            unknown_p=np.full(shape[0], np.nan, dtype=np.float32),
        )
        parts = self.measure.parts
        for cells, values in numbers.read():
            given = self.reader(values[:, parts["logits"]])
            is_empty = np.isnan(values[:, 0])
            if "unknown_p" in parts:
                found.unknown_p[cells] = values[:, parts["unknown_p"]][:, 0]
            if self.options.unknown_below is not None:
                given.depth[found.unknown_p[cells] < self.options.unknown_below] = 0
            answers = given.answers()
            levels = np.arange(1, shape[1] + 1)
            found.is_empty[cells] = is_empty
            found.answers[cells] = answers
            found.best_guesses[cells] = np.where(is_empty, NO_LABEL, given.level_labels[:, -1])
            found.depth[cells] = given.depth
            places = np.maximum(given.depth - 1, 0)[:, None]
            found.probabilities[cells] = np.take_along_axis(given.level_probabilities, places, axis=1)[:, 0]
            found.level_labels[cells] = np.where(levels <= given.depth[:, None], given.level_labels, answers[:, None])
            found.level_probabilities[cells] = given.level_probabilities
        return found

    def elements(
        self, found: FoundCells, numbers: CellNumbers, matrix: CountMatrix, source: CellSource, *, replace: bool
    ) -> AddedElements:
        """Return what is added to the cells; with `replace` all that an earlier annotation left goes."""
        names = self.names
        obs: dict[str, pd.Categorical | npt.NDArray[Any]] = {
            names.cell_type: self._categories(found.answers, found.is_empty),
            names.probability: found.probabilities,
            names.abstained: found.answers == NO_LABEL,
        }
        if names.best_guess is not None:
            obs[names.best_guess] = self._categories(found.best_guesses, found.is_empty)
        for level, (label_name, probability_name) in enumerate(names.levels):
            obs[label_name] = self._categories(found.level_labels[:, level], found.is_empty)
            obs[probability_name] = found.level_probabilities[:, level]
        if names.unknown_p is not None:
            obs[names.unknown_p] = found.unknown_p
        if names.ontology_term_id is not None:
            obs[names.ontology_term_id] = self._terms(found.answers)
        if self.options.cluster_column is not None:
            obs |= cluster_vote_columns(
                self._categories(found.answers, found.answers == NO_LABEL),
                matrix.obs_column(self.options.cluster_column),
                key=self.key,
                tree=self.reader.tree,
                min_share=MAJORITY,
            )
        obsm = {names.probabilities: [f"probability_{name}" for name in self.reader.class_names]}
        if names.embedding is not None:
            part = self.measure.parts["embeddings"]
            obsm[names.embedding] = [f"embedding_{number}" for number in range(part.stop - part.start)]

        def blocks() -> Iterator[tuple[slice, Mapping[str, FloatArray]]]:
            for cells, values in numbers.read():
                given = {names.probabilities: self.reader(values[:, self.measure.parts["logits"]]).probabilities}
                if names.embedding is not None:
                    given[names.embedding] = values[:, self.measure.parts["embeddings"]]
                yield cells, given

        earlier = earlier_elements(self.key) if replace else None
        return AddedElements(obs, obsm, {self.key: self._record(found, source)}, blocks, earlier)

    def _record(self, found: FoundCells, source: CellSource) -> dict[str, Any]:  # Any: JSON
        return dated(
            {
                "labels": self.reader.class_names,
                "model": self.trained.describe(),
                "gene_space": self.measure.gene_space,
                "is_calibrated": self.reader.calibration is not None,
                "max_error": self.options.max_error,
                "threshold": None if self.options.max_error is None else self.reader.threshold,
                "unknown_below": self.options.unknown_below,
                "input": source.describe_input(),
                "num_empty_cells": found.num_empty,
                "num_abstained": found.num_abstained,
            }
        )

    def _categories(self, labels: Int64Array, is_empty: npt.NDArray[np.bool_]) -> pd.Categorical:
        """Return labels by name, "unknown" for cells with counts and without a label.

        Types that no cell has are left out: they would be empty groups to whoever goes on with the file.
        """
        categories = list(self.reader.tree.labels)
        if UNKNOWN not in categories:
            categories.append(UNKNOWN)
        codes = np.where((labels == NO_LABEL) & ~is_empty, categories.index(UNKNOWN), labels)
        return pd.Categorical.from_codes(codes, categories=categories).remove_unused_categories()

    def _terms(self, labels: Int64Array) -> pd.Categorical:
        """Return the Cell Ontology's ids of labels, missing where there is none for certain."""
        terms = np.array([*(term or None for term in self._term_ids), None], dtype=object)
        return pd.Categorical(terms[labels])

    def count_labels(self, found: FoundCells) -> dict[str, int]:
        """Return label -> cells, the most frequent first, without those of no cell."""
        answers = found.answers[found.answers != NO_LABEL]
        pairs = zip(self.reader.tree.labels, np.bincount(answers, minlength=len(self.reader.tree.labels)), strict=True)
        return {label: int(count) for label, count in sorted(pairs, key=lambda pair: -pair[1]) if count}
