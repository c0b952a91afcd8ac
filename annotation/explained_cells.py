"""Which cells of a file are explained for which class, and which are their background."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from screformer.annotation.calibration import LabelReader
from screformer.annotation.cell_numbers import NumbersInMemory
from screformer.annotation.cell_source import CellSource
from screformer.annotation.explained_score import Bins, ClassScore
from screformer.annotation.trained_model import TrainedModel
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.count_matrix import open_count_matrix
from screformer.tokenization.passport_problems import check_allowed
from screformer.train.collator import GeneSpace
from screformer.train.inference import BatchInference

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)
Int64Array = npt.NDArray[np.int64]
Classifier = TrainedModel[ScReformerForCellClassification]


class CellFile(NamedTuple):
    """Where cells are, and how they are read; see `annotate_file`.

    Attributes
    ----------
    cells
        File, folder, address or AnnData.
    label_column
        Column of `obs` with their types; None: what the model names them. A background may lack it.
    layer, gene_column, allowed, progress
        As there.
    """

    cells: str | Path | AnnData
    label_column: str | None = None
    layer: str | None = None
    gene_column: str | None = None
    allowed: tuple[str, ...] = ()
    progress: bool = True

    @property
    def name(self) -> str:
        """What messages call it."""
        return Path(self.cells).name if isinstance(self.cells, str | Path) else "AnnData"


class SomeCells(NamedTuple):
    """Cells of a file with counts on known genes.

    Attributes
    ----------
    names
        In `obs`.
    rows
        In the file.
    labels
        Their types, by the file or by the model.
    bins
        (cells, num_genes).
    """

    names: list[str]
    rows: Int64Array
    labels: npt.NDArray[np.str_]
    bins: Bins


class CellsToExplain(NamedTuple):
    """What an explanation is made of.

    Attributes
    ----------
    of_class
        Cells of each class, in the order of the scores.
    background, other_background
        Cells that they are compared with, drawn twice.
    inputs
        Passports of the files.
    num_in_background
        How many of the explained cells are, bin for bin, in the background too.
    """

    of_class: list[SomeCells]
    background: SomeCells
    other_background: SomeCells
    inputs: list[dict[str, Any]]  # Any: JSON
    num_in_background: int


def choose_cells(
    file: CellFile,
    background: CellFile | None,
    trained: Classifier,
    scores: Sequence[ClassScore],
    *,
    num_cells: int,
    num_background: int,
    gene_space: GeneSpace,
    seed: int,
) -> CellsToExplain:
    """Draw the cells of each class, and the background.

    Parameters
    ----------
    file
        Has the cells to explain.
    background
        Has the others; None: the same file, without those that are explained where it has enough.
    trained
        The classifier, which names cells where there is no label column.
    scores
        The classes.
    num_cells
        Of each class, at most.
    num_background
        Of the background, at most.
    gene_space
        In which the model names cells.
    seed
        Of both draws.

    Raises
    ------
    ValueError
        A number is below 1, no cell is of one of the classes, or as `annotate_file`.
    """
    for name, number in (("num_cells", num_cells), ("num_background", num_background)):
        if number < 1:
            raise ValueError(f"{name} got {number}; at least 1 is needed")
    generator = np.random.default_rng(seed)
    with _OpenCells(file, trained, gene_space) as cells:
        drawn = [_draw(generator, cells.of(score), num_cells) for score in scores]
        of_class = [cells.take(rows) for rows in drawn]
        inputs = [cells.source.describe_input()]
        if background is None:
            others = np.setdiff1d(np.arange(cells.source.num_cells), np.concatenate(drawn))
            if len(others) < num_background:
                logger.warning(
                    "%s has %d cells that are not explained, fewer than num_background=%d: the background is drawn "
                    "from all of them",
                    file.name,
                    len(others),
                    num_background,
                )
                others = np.arange(cells.source.num_cells)
            first, second = (cells.take(_draw(generator, others, num_background)) for _ in range(2))
    if background is not None:
        with _OpenCells(background, trained, gene_space, may_lack_labels=True) as cells:
            every = np.arange(cells.source.num_cells)
            first, second = (cells.take(_draw(generator, every, num_background)) for _ in range(2))
            inputs.append(cells.source.describe_input())
    there = {row.tobytes() for row in first.bins}
    num_shared = len({row.tobytes() for own in of_class for row in own.bins} & there)
    if num_shared and background is not None:
        logger.warning("%d of the cells to explain are in the background %s too", num_shared, background.name)
    return CellsToExplain(of_class, first, second, inputs, num_shared)


def _draw(generator: np.random.Generator, rows: Int64Array, number: int) -> Int64Array:
    chosen = rows if len(rows) <= number else generator.choice(rows, number, replace=False)
    return np.sort(chosen).astype(np.int64)


class _OpenCells:
    """A file of cells and what each of them is."""

    def __init__(
        self, file: CellFile, trained: Classifier, gene_space: GeneSpace, *, may_lack_labels: bool = False
    ) -> None:
        self._file, self._trained, self._gene_space = file, trained, gene_space
        self._label_column, self._may_lack_labels = file.label_column, may_lack_labels

    def __enter__(self) -> _OpenCells:
        file, tokenizer = self._file, self._trained.tokenizer
        self._matrix = open_count_matrix(
            file.cells,
            layer=file.layer,
            gene_column=file.gene_column,
            vocabulary=tokenizer.gene_vocabulary,
            allow=check_allowed(file.allowed),
        )
        try:
            self.source = CellSource(self._matrix, tokenizer, allow=file.allowed, progress=file.progress)
            self._labels: npt.NDArray[np.str_] | None = None
            if self._may_lack_labels and self._label_column not in (None, *self._matrix.obs_columns):
                logger.warning(
                    "%s, the background, has no column %r: the model names its cells", file.name, self._label_column
                )
                self._label_column = None
        except BaseException:
            self._matrix.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._matrix.close()

    def _read_labels(self, rows: Int64Array | None = None) -> npt.NDArray[np.str_]:
        """Return the label of each cell of the file; of others than `rows` "" where the model has to name them."""
        if self._label_column is not None:
            column = self._matrix.obs_column(self._label_column)
            return np.array([label or "" for label in column], dtype=np.str_)
        inference = BatchInference(self._trained.model, "logits", gene_space=self._gene_space)
        numbers = NumbersInMemory(self.source.num_cells, inference.width, self.source.cells_per_block(inference))
        wanted = np.isin(np.arange(self.source.num_cells), np.arange(self.source.num_cells) if rows is None else rows)
        self.source.measure(inference, numbers, task="name cells", wanted=wanted)
        logits = np.concatenate([values for _, values in numbers.read()])
        is_measured = ~np.isnan(logits[:, 0])
        reader = LabelReader(self._trained.model.config)
        found = reader.classes(reader(logits[is_measured]))
        labels = np.full(len(logits), "", dtype=object)
        labels[is_measured] = np.array(reader.class_names, dtype=object)[found]
        return labels.astype(np.str_)

    def of(self, score: ClassScore) -> Int64Array:
        """Return the rows of a class."""
        if self._labels is None:
            self._labels = self._read_labels()
        rows = np.flatnonzero(np.isin(self._labels, score.labels(self._trained.model.config)))
        if not len(rows):
            by = "the model names none so" if self._label_column is None else f"column {self._label_column!r}"
            raise ValueError(
                f"class {score.name!r}: {self._file.name} has no cell of it ({by}); there are "
                f"{', '.join(sorted(set(self._labels.tolist()) - {''})[:20])}"
            )
        return rows

    def take(self, rows: Int64Array) -> SomeCells:
        """Return those of the rows that have counts on known genes."""
        bins = self.source.bins_of(rows, task="read cells")
        has_genes = bins.any(axis=1)
        if not has_genes.all():
            logger.warning("%d of %d drawn cells have no counts on known genes", (~has_genes).sum(), len(rows))
        if not has_genes.any():
            raise ValueError(f"{self._file.name}: none of the {len(rows)} drawn cells has counts on known genes")
        kept = rows[has_genes]
        names = self._matrix.read_cell_ids()
        labels = self._read_labels(kept) if self._labels is None else self._labels
        return SomeCells([names[row] for row in kept], kept, labels[kept], bins[has_genes])
