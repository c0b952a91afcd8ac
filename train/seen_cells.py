"""What a checkpoint has seen: hashes of its cells, beside it, for `screformer inspect FILE --against CHECKPOINT`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from screformer.tokenization.cell_hashes import (
    SEEN_CELLS,
    SEEN_CELLS_FACTS,
    is_in,
    read_index,
    write_cell_hashes,
    write_seen_cells,
)
from screformer.tokenization.corpus import Corpus
from screformer.tokenization.corpus_files import checksum
from screformer.tokenization.gene_vocabulary import GeneVocabulary
from screformer.train.result_files import read_json, write_json

logger = logging.getLogger(__name__)

CALIBRATION_CELLS = "calibration_cells.npy"
SEEN_FILES = (SEEN_CELLS, SEEN_CELLS_FACTS, CALIBRATION_CELLS)


def record_seen_cells(folder: Path, corpus: Corpus, rows: npt.NDArray[np.int64], *, checkpoint: str | None) -> None:
    """Write the index of the cells that a run used, and of those that the checkpoint it began with had seen.

    Parameters
    ----------
    folder
        Of the new checkpoint.
    corpus, rows
        The cells that trained the model, chose its epoch or stopped it; cells kept for a test are not among them.
    checkpoint
        What the run began with, None for a new model. If it has no complete index, the new one is not complete either
        and says so.
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
            is_complete = bool(read_json(Path(checkpoint) / SEEN_CELLS_FACTS)["is_complete"])
        except FileNotFoundError:
            is_complete = False
            logger.warning("checkpoint %s does not say which cells it has seen; they are not recorded", checkpoint)
    write_seen_cells(folder, hashes, vocabulary, is_complete=is_complete)


def count_seen_cells(checkpoint: str | Path, corpus: Corpus, rows: npt.NDArray[np.int64]) -> dict[str, Any] | None:
    """Return how many cells of a corpus a checkpoint has seen; None if it does not say, or is no folder.

    Returns
    -------
    ``num_seen``, ``num_cells``, and ``is_complete``: False if what it began with did not say what that had seen.

    Raises
    ------
    ValueError
        The checkpoint's index is damaged, or of other genes than the corpus.
    """
    folder = Path(checkpoint)
    if corpus.manifest["version"] == 1 or not (folder / SEEN_CELLS_FACTS).is_file():
        return None
    is_seen = is_in(read_index(folder, corpus.tokenizer().gene_vocabulary), corpus.cell_hashes[rows])
    return {
        "num_seen": int(is_seen.sum()),
        "num_cells": len(rows),
        "is_complete": bool(read_json(folder / SEEN_CELLS_FACTS)["is_complete"]),
    }


def add_cells_seen_by(teacher: str, folder: Path, corpus: Corpus) -> None:
    """Add to the index in `folder` the cells that its teacher had seen: what it learned comes from them too.

    Parameters
    ----------
    teacher
        Checkpoint that was learned from. If it has no index, or not a complete one, the index says that it is neither.
    folder
        Of the new checkpoint, with what `record_seen_cells` has written.
    corpus
        Where the new checkpoint's cells are.
    """
    if not (folder / SEEN_CELLS_FACTS).exists():
        return
    vocabulary = corpus.tokenizer().gene_vocabulary
    is_complete = read_json(folder / SEEN_CELLS_FACTS)["is_complete"]
    hashes = [read_index(folder, vocabulary)]
    try:
        hashes.append(read_index(teacher, vocabulary))
        is_complete = is_complete and read_json(Path(teacher) / SEEN_CELLS_FACTS)["is_complete"]
    except FileNotFoundError:
        is_complete = False
        logger.warning("teacher %s does not say which cells it has seen; they are not recorded", teacher)
    write_seen_cells(folder, hashes, vocabulary, is_complete=is_complete)


def add_calibration_cells(folder: Path, hashes: npt.NDArray[np.uint64], vocabulary: GeneVocabulary) -> None:
    """Add the cells that calibrated a checkpoint to its index of seen cells, if it has one.

    They are in an index of their own too, by which a later calibration knows them from those of the training. What
    ``seen_cells.json`` says of that is under ``calibration``.
    """
    if not (folder / SEEN_CELLS_FACTS).exists():
        return
    is_complete = bool(read_json(folder / SEEN_CELLS_FACTS)["is_complete"])
    seen = read_index(folder, vocabulary)
    facts = write_cell_hashes(
        folder / CALIBRATION_CELLS, np.concatenate([read_calibration_cells(folder), hashes]), vocabulary
    )
    write_seen_cells(folder, [seen, hashes], vocabulary, is_complete=is_complete)
    kept = {name: facts[name] for name in ("file", "sha256", "num_cells")}
    write_json(folder / SEEN_CELLS_FACTS, {**read_json(folder / SEEN_CELLS_FACTS), "calibration": kept})


def read_calibration_cells(folder: Path) -> npt.NDArray[np.uint64]:
    """Return the ascending hashes of the cells that earlier calibrations of a checkpoint used, none if it has no index.

    Raises
    ------
    ValueError
        The index is damaged.
    """
    facts = read_json(folder / SEEN_CELLS_FACTS).get("calibration")
    path = folder / CALIBRATION_CELLS
    if facts is None or not path.exists():
        return np.zeros(0, dtype=np.uint64)
    if checksum(path) != facts["sha256"]:
        raise ValueError(f"folder: {path} is damaged, its checksum is not the recorded one; remove or copy it again")
    return np.load(path, allow_pickle=False).astype(np.uint64, copy=False)
