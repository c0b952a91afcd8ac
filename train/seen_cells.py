"""What a checkpoint has seen: hashes of its cells, beside it, for `screformer inspect FILE --against CHECKPOINT`."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt

from screformer.tokenization.cell_hashes import SEEN_CELLS, SEEN_CELLS_FACTS, read_index, write_seen_cells
from screformer.tokenization.corpus import Corpus

logger = logging.getLogger(__name__)

SEEN_FILES = (SEEN_CELLS, SEEN_CELLS_FACTS)


def record_seen_cells(folder: Path, corpus: Corpus, rows: npt.NDArray[np.int64], *, checkpoint: str | None) -> None:
    """Write the index of the cells that a run used, and of those that the checkpoint it began with had seen.

    Parameters
    ----------
    folder
        Of the new checkpoint.
    corpus, rows
        The cells that trained the model, chose its epoch or stopped it; cells kept for a test are not among them.
    checkpoint
        What the run began with, None for a new model. If it has no index, the new one says that it is not complete.
    """
    if corpus.manifest["version"] == 1:
        logger.warning("%s was made by an older release: what was seen cannot be recorded", corpus.folder)
        return
    vocabulary = corpus.tokenizer().gene_vocabulary
    hashes = [corpus.cell_hashes[rows]]
    is_complete = True
    if checkpoint is not None:
        try:
            hashes.append(read_index(checkpoint, vocabulary))
        except FileNotFoundError:
            is_complete = False
            logger.warning("checkpoint %s does not say which cells it has seen; they are not recorded", checkpoint)
    write_seen_cells(folder, hashes, vocabulary, is_complete=is_complete)
