"""One class explained: values of its cells, and what checks say of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from screformer.annotation.attributions import Sampling
from screformer.annotation.explained_cells import CellsToExplain, Classifier, SomeCells
from screformer.annotation.explained_score import ClassScore, ScoreKind
from screformer.annotation.explanation_checks import (
    EXPLANATION,
    RANDOM,
    REGRESSION,
    completeness,
    deletion_and_insertion,
    marker_overlap,
    random_order,
    read_marker_genes,
    regression_weights,
    stability,
)
from screformer.annotation.explanation_run import Checks, Explainer, explain_cells
from screformer.annotation.explanation_tables import gene_table
from screformer.tokenization.gene_vocabulary import GeneVocabulary
from screformer.train.collator import GeneSpace
from screformer.train.result_files import finite

DEFAULT_SAMPLING, DEFAULT_CHECKS = Sampling(), Checks()
Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ExplainOptions:
    """How an explanation is made.

    Attributes
    ----------
    classes
        What to explain: labels, labels above them, or ``NAME=LABEL|LABEL``.
    sampling
        How values are estimated.
    score
        ``"logit"`` or ``"log_odds"`` of the class.
    num_cells, num_background
        The most that are drawn, of each class and beside it (the paper: 1,000 and 500).
    gene_space
        Instead of the checkpoint's.
    seed
        Of what is drawn.
    batch_size
        Points that are worked on together; None: as `Explainer`.
    checks
        How many cells each check takes.
    genes
        Whose places are reported, by any name.
    markers, marker_types
        File of marker genes, and cell types in it: of all classes, or ``CLASS=TYPE|TYPE`` of one.
    """

    classes: Sequence[str]
    sampling: Sampling = DEFAULT_SAMPLING
    score: ScoreKind = "logit"
    num_cells: int = 1000
    num_background: int = 500
    gene_space: GeneSpace | None = None
    seed: int = 0
    batch_size: int | None = None
    checks: Checks = DEFAULT_CHECKS
    genes: Sequence[str] = ()
    markers: str | Path | None = None
    marker_types: Sequence[str] = ()


class ClassExplanation(NamedTuple):
    """What was found of a class.

    Attributes
    ----------
    score
        What was explained.
    cells
        Of which cells.
    values
        (cells, num_genes).
    table
        Its genes, see `gene_table`.
    checks
        Name -> what was found; JSON.
    """

    score: ClassScore
    cells: SomeCells
    values: Values
    table: pd.DataFrame
    checks: dict[str, Any]  # Any: JSON


class ClassExplainer:
    """Explains one class after another; all values lie in files.

    Attributes
    ----------
    is_resumed
        Whether an earlier run had begun.
    """

    def __init__(
        self,
        trained: Classifier,
        explainer: Explainer,
        chosen: CellsToExplain,
        options: ExplainOptions,
        folder: Path,
        progress: bool,
    ) -> None:
        self.explainer, self.chosen, self.options = explainer, chosen, options
        self.folder, self.progress, self.is_resumed = folder, progress, False
        self.config = trained.model.config
        self.vocabulary = trained.tokenizer.gene_vocabulary
        self.facts = {"model": trained.describe(), "gene_space": explainer.gene_space}

    def explain(self, number: int, score: ClassScore, own: SomeCells) -> ClassExplanation:
        """Return the values of the cells of a class, and what checks say of them; `number` is its place."""
        options, checks = self.options, self.options.checks
        values = self._values(f"{number}", self.explainer, score, own.bins, options.sampling)
        order = np.random.default_rng([options.seed, number]).permutation(len(values))
        again = order[: checks.stability]
        other = self.explainer._replace(background=self.chosen.other_background.bins)
        sampling = options.sampling._replace(seed=options.sampling.seed + 1)
        second = self._values(f"{number}-again", other, score, own.bins[again], sampling)
        some = order[: checks.completeness]
        weights = regression_weights(self.chosen.background, score.labels(self.config))
        found = {
            "completeness": completeness(
                self.explainer, score, own.bins[some], values[some], options.sampling, numbers=some.tolist()
            ),
            "stability": stability(values[again], second),
            "curves": self._curves(score, own, values, order[: checks.curves], weights),
            "markers": self._markers(score.name, values, own),
        }
        table = gene_table(values, own.bins, self.vocabulary, self.explainer.background, weights)
        return ClassExplanation(score, own, values, table, found)

    def _values(
        self, name: str, explainer: Explainer, score: ClassScore, bins: npt.NDArray[np.uint8], sampling: Sampling
    ) -> Values:
        folder = self.folder / name
        numbers = explain_cells(
            explainer, score, bins, sampling, folder=folder, facts=self.facts, progress=self.progress
        )
        self.is_resumed |= numbers.was_begun
        return np.concatenate([values for _, values in numbers.read()])

    def _curves(
        self,
        score: ClassScore,
        own: SomeCells,
        values: Values,
        rows: npt.NDArray[np.int64],
        weights: npt.NDArray[np.float64] | None,
    ) -> dict[str, Any]:
        bins = own.bins[rows]
        orders: dict[str, npt.NDArray[np.floating]] = {EXPLANATION: values[rows]}
        orders[RANDOM] = random_order(len(bins), len(self.vocabulary), self.options.seed)
        if weights is not None:
            orders[REGRESSION] = weights * bins
        described: dict[str, Any] = finite(
            deletion_and_insertion(self.explainer, score, bins, orders).describe(self.options.seed)
        )
        return described

    def _markers(self, name: str, values: Values, own: SomeCells) -> dict[str, Any] | None:
        is_marker = read_class_markers(self.options, name, self.vocabulary)
        if is_marker is None or self.options.markers is None:
            return None
        found = marker_overlap(
            np.abs(values).mean(axis=0, dtype=np.float64), is_marker, np.asarray(own.bins.any(axis=0))
        )
        return {"file": Path(self.options.markers).name, **found}


def read_class_markers(options: ExplainOptions, name: str, vocabulary: GeneVocabulary) -> npt.NDArray[np.bool_] | None:
    """Return which genes are markers of a class, (num_genes,); None where no cell type of the file is said to be it."""
    if options.markers is None:
        return None
    parts = [text.partition("=") for text in options.marker_types]
    types = [one for of_class, is_of_one, named in parts for one in named.split("|") if is_of_one and of_class == name]
    types += [of_all for of_all, is_of_one, _ in parts if not is_of_one]
    if parts and not types:
        return None
    positions = vocabulary.map_names(read_marker_genes(options.markers, cell_types=types)).positions
    is_marker = np.zeros(len(vocabulary), dtype=bool)
    is_marker[positions[positions >= 0]] = True
    return is_marker
