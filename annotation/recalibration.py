"""Calibrating a checkpoint on labelled cells that it was not trained on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from screformer.annotation.calibration import LabelReader
from screformer.annotation.calibration_fit import calibrate
from screformer.annotation.cell_numbers import NumbersInMemory
from screformer.annotation.cell_source import CellSource
from screformer.annotation.trained_model import load_classifier
from screformer.tokenization.cell_hashes import hash_file, is_in, read_index
from screformer.tokenization.count_matrix import CountMatrix, open_count_matrix
from screformer.tokenization.gene_vocabulary import GeneVocabulary
from screformer.tokenization.passport_problems import check_allowed
from screformer.train.batch_size import BatchSize
from screformer.train.calibration_record import write_calibration
from screformer.train.inference import BatchInference
from screformer.train.labelled_cells import SPLITS_FILE
from screformer.train.result_files import read_json, write_json
from screformer.train.seen_cells import add_calibration_cells, read_calibration_cells

logger = logging.getLogger(__name__)


def calibrate_checkpoint(
    cells: str | Path,
    checkpoint: str | Path,
    *,
    label_column: str = "cell_type",
    group_column: str | None = None,
    layer: str | None = None,
    gene_column: str | None = None,
    allow: Sequence[str] = (),
    batch_size: BatchSize = 32,
    progress: bool = True,
    device: str | None = None,
) -> dict[str, Any]:  # Any: JSON
    """Fit a checkpoint's calibration to labelled cells, put it into its configuration, and return the record of it.

    Cells that the checkpoint has seen in training are left out, and so are those whose label it does not know; the log
    says how many. Into the folder go ``calibration.json`` (see `annotation.calibration_fit.calibrate`) and
    ``calibration.png``. Cells of donors, or of a laboratory, that training did not have say more of new ones. The index
    of seen cells has those that were used from then on; they may calibrate again, but no longer test.

    Parameters
    ----------
    cells
        Raw counts in any format of `open_count_matrix`.
    checkpoint
        Folder of a fine-tuned classifier.
    label_column
        Column of `obs` with the labels: classes, or any label of the checkpoint's tree.
    group_column
        Column of `obs` with donors or data sets: the error rates then hold in each that has at least a hundred cells.
    layer, gene_column, allow, batch_size, progress, device
        As for `annotate_file`.

    Raises
    ------
    OSError
        `cells` or the checkpoint is not there.
    ValueError
        There is no such column, no cell is left, the checkpoint is no folder, or as for `annotate_file`. The folder is
        unchanged then.
    """
    folder, allowed = Path(checkpoint), check_allowed(allow)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"checkpoint: {folder} is no folder with a checkpoint; copy one from the Hub to a folder first"
        )
    trained = load_classifier(folder, device=device)
    reader = LabelReader(trained.model.config)
    tokenizer = trained.tokenizer
    with open_count_matrix(
        cells, layer=layer, gene_column=gene_column, vocabulary=tokenizer.gene_vocabulary, allow=allowed
    ) as matrix:
        labels = np.array([label or "" for label in matrix.obs_column(label_column)], dtype=np.str_)
        groups = None if group_column is None else np.array([one or "" for one in matrix.obs_column(group_column)])
        is_known = np.isin(labels, reader.tree.labels)
        hashes = hash_file(matrix, tokenizer.gene_vocabulary)
        is_new = is_known & ~_is_trained_on(hashes, tokenizer.gene_vocabulary, folder)
        _say_what_is_left_out(labels, is_known, is_new)
        if not is_new.any():
            raise ValueError(
                f"label_column={label_column!r}: no cell of {matrix.name} is of use. The labels that the checkpoint "
                f"knows are {', '.join(reader.tree.labels)}, and it must not have been trained on the cells"
            )
        source = CellSource(matrix, tokenizer, allow=allowed, progress=progress)
        inference = BatchInference(trained.model, "logits", batch_size=batch_size)
        numbers = NumbersInMemory(source.num_cells, inference.width, source.cells_per_block(inference))
        source.measure(inference, numbers, task="calibrate", wanted=is_new)
        logits = np.concatenate([values for _, values in numbers.read()])
        is_new &= ~np.isnan(logits[:, 0])
        _warn_of_test_cells(matrix, is_new, folder)
        record = calibrate(
            trained.model.config,
            logits[is_new],
            labels[is_new].tolist(),
            fitted_to=f"cells of {matrix.name}",
            groups=None if groups is None else groups[is_new],
        )
    add_calibration_cells(folder, hashes[is_new], tokenizer.gene_vocabulary)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "calibration": trained.model.config.calibration})
    write_calibration(folder, record)
    return record


def _is_trained_on(hashes: npt.NDArray[np.uint64], vocabulary: GeneVocabulary, folder: Path) -> npt.NDArray[np.bool_]:
    """Return of each cell whether the checkpoint has seen it, other than in an earlier calibration."""
    try:
        index = read_index(folder, vocabulary)
    except FileNotFoundError:
        logger.warning(
            "%s does not say which cells it has seen; take care that these are none of them, and that none of these "
            "tests it",
            folder,
        )
        return np.zeros(len(hashes), dtype=bool)
    return is_in(index, hashes) & ~is_in(read_calibration_cells(folder), hashes)


def _warn_of_test_cells(matrix: CountMatrix, is_used: npt.NDArray[np.bool_], folder: Path) -> None:
    """Log how many cells have the names of some that fine-tuning kept for the test."""
    if not (folder / SPLITS_FILE).exists():
        return
    # Of cells of several files the split has file/name.
    names = {name.rpartition("/")[2] for name in read_json(folder / SPLITS_FILE)["test"]}
    num_tests = sum(name in names for name, used in zip(matrix.cell_ids, is_used.tolist(), strict=True) if used)
    if num_tests:
        logger.warning(
            "%d cells have the names of cells in the test part of %s: what they calibrate they can no longer test",
            num_tests,
            folder / SPLITS_FILE,
        )


def _say_what_is_left_out(
    labels: npt.NDArray[np.str_], is_known: npt.NDArray[np.bool_], is_new: npt.NDArray[np.bool_]
) -> None:
    unknown = sorted(set(labels[~is_known].tolist()) - {""})
    if not is_known.all():
        logger.warning("%d cells have no label, or one that the model does not know: %s", (~is_known).sum(), unknown)
    num_seen = int((is_known & ~is_new).sum())
    if num_seen:
        logger.warning("%d cells were seen in training and are left out", num_seen)
