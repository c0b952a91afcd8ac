"""What is measured of each cell for an annotation: logits, and if wanted its vector and how strange it looks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from screformer.annotation.unknown_types import UnknownTypeDetector
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.train.batch_size import BatchSize
from screformer.train.collator import GeneSpace
from screformer.train.inference import BatchInference

FloatArray = npt.NDArray[np.float32]
Rows = Sequence[Mapping[str, Any]]  # Any: tokens


class ClassifierMeasure:
    """Gives a row of numbers for each cell, in the parts `logits`, `embeddings` and `unknown_p`.

    Parameters
    ----------
    model
        The classifier, on the device to run on.
    batch_size, gene_space
        As for `BatchInference`.
    embeddings
        Whether to give the encoder's vectors.
    detector
        Of unknown types; None: not asked.

    Attributes
    ----------
    width
        Numbers a cell.
    gene_space
        The one that is used.
    parts
        Name of a part -> its columns.
    """

    def __init__(
        self,
        model: ScReformerForCellClassification,
        *,
        batch_size: BatchSize = 32,
        gene_space: GeneSpace | None = None,
        embeddings: bool = False,
        detector: UnknownTypeDetector | None = None,
    ) -> None:
        names: list[Any] = ["logits", "cell_embedding"] if embeddings else ["logits"]
        self._inference = BatchInference(model, names, batch_size=batch_size, gene_space=gene_space)
        self._detector = detector
        self.gene_space = self._inference.gene_space
        num_classes, width = model.config.num_labels, self._inference.width
        self.parts = {"logits": slice(0, num_classes)}
        if embeddings:
            self.parts["embeddings"] = slice(num_classes, width)
        if detector is not None:
            self.parts["unknown_p"] = slice(width, width + 1)
        self.width = width + (detector is not None)

    def choose_batch_size(self, longest: int) -> int:
        """Return how many cells, of at most `longest` expressed genes, are measured together."""
        return self._inference.choose_batch_size(longest)

    def __call__(self, rows: Rows, *, advance: Callable[[int], object] | None = None) -> FloatArray:
        """Return (cells, width)."""
        values = self._inference(rows, advance=advance)
        if self._detector is None:
            return values
        return np.column_stack([values, self._detector.score(rows)])
