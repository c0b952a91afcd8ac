"""A teacher's logits, computed once for every cell that takes part and kept in Arrow files: epochs cost the student."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from tqdm.auto import tqdm

from screformer.configuration_screformer import ScReformerConfig
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.corpus import Corpus
from screformer.train.batch_size import longest_cell
from screformer.train.cell_dataset import CellDataset
from screformer.train.collator import GeneSpace
from screformer.train.corpus_columns import describe_corpus
from screformer.train.inference import BatchInference
from screformer.train.result_files import hash_weights, written_aside
from screformer.train.starting_model import check_tokenizer

logger = logging.getLogger(__name__)

Int64Array = npt.NDArray[np.int64]
Facts = dict[str, Any]  # Any: JSON

# What an interruption costs at most; a large corpus gets larger parts, so that they stay below a thousand.
CELLS_PER_PART, MOST_PARTS = 1024, 1000
FACTS_KEY = b"screformer_teacher"


def load_teacher(teacher: str, corpus: Corpus) -> ScReformerForCellClassification:
    """Return a fine-tuned classifier that reads the corpus's cells, in eval mode.

    Raises
    ------
    ValueError
        It has no trained classifier of several labels, or another tokenizer than the corpus.
    """
    config = ScReformerConfig.from_pretrained(teacher)
    check_tokenizer(config, corpus.tokenizer(), checkpoint=teacher)
    kind = (config.architectures or ["none"])[0]
    if kind != ScReformerForCellClassification.__name__ or config.num_labels < 2:
        raise ValueError(
            f"teacher={teacher!r} is a {kind} with {config.num_labels} labels; a classifier of at least two cell types "
            f"is needed. Fine-tune it first: screformer finetune --checkpoint {teacher}"
        )
    model = ScReformerForCellClassification.from_pretrained(teacher)
    return model.eval().requires_grad_(False)


def describe_teacher(model: ScReformerForCellClassification, teacher: str, gene_space: GeneSpace | None) -> Facts:
    """Return what decides the teacher's logits, for the record: its weights, its tokenizer and how it reads a cell."""
    return {
        "name": teacher,
        "weights_sha256": hash_weights(teacher) or _hash_tensors(model),
        "tokenizer_fingerprint": model.config.tokenizer_fingerprint,
        "gene_space": gene_space or model.config.gene_space,
        "num_parameters": model.num_parameters(),
    }


class TeacherLogits:
    """The logits of some cells of a corpus, on disk; mapped into memory when they are first asked for.

    Parameters
    ----------
    folder
        Where `fill` writes and `of` reads.
    corpus, rows
        The cells, as row numbers in the corpus.
    teacher
        From `describe_teacher`. Files of another teacher, corpus or choice of cells are not used, but written anew.
    """

    def __init__(self, folder: str | Path, corpus: Corpus, rows: Int64Array, teacher: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.rows = np.unique(rows)
        self.cells_per_part = max(CELLS_PER_PART, -(-len(self.rows) // MOST_PARTS))
        self._corpus = corpus
        cells = hashlib.sha256(json.dumps(describe_corpus(corpus), sort_keys=True).encode())
        cells.update(self.rows.astype("<i8").tobytes())
        # Not its name: the same teacher may have moved.
        self._facts = {**{key: value for key, value in teacher.items() if key != "name"}, "cells": cells.hexdigest()}
        self._parts: dict[int, npt.NDArray[np.float32]] = {}

    @property
    def num_parts(self) -> int:
        """How many files there are when all is done."""
        return -(-len(self.rows) // self.cells_per_part)

    def fill(
        self,
        model: ScReformerForCellClassification,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        progress: bool = True,
    ) -> int:
        """Compute the parts that are not there, of several processes every `world_size`-th, and return how many.

        Parameters
        ----------
        model
            The teacher, on the device to run on; it runs in eval mode and without gradients.
        batch_size
            Cells a forward pass.
        rank, world_size
            Of this process.
        progress
            Whether to show a progress bar.
        """
        lacking = [number for number in range(rank, self.num_parts, world_size) if not self._is_done(number)]
        cells = CellDataset(self._corpus, self.rows)
        inference = BatchInference(model, "logits", batch_size=batch_size, gene_space=self._facts["gene_space"])
        total = sum(len(self._rows_of_part(number)) for number in lacking)
        if total:
            logger.info("the teacher reads %d cells of at most %d genes", total, longest_cell(cells))
        with tqdm(total=total, unit="cell", desc="teacher", disable=not progress or not total) as bar:
            for number in lacking:
                rows = self._rows_of_part(number)
                self._write(number, inference(CellDataset(self._corpus, rows), advance=bar.update))
        return len(lacking)

    def of(self, rows: Int64Array) -> npt.NDArray[np.float32]:
        """Return the logits (cells, labels) of row numbers of the corpus, all of which must be among `self.rows`."""
        places = np.searchsorted(self.rows, rows)
        assert np.array_equal(self.rows[np.minimum(places, len(self.rows) - 1)], rows)
        found = (divmod(place, self.cells_per_part) for place in places.tolist())
        return np.stack([self._part(number)[place] for number, place in found])

    def __getstate__(self) -> dict[str, Any]:  # Any: attributes
        # A loader's worker maps the files again by itself.
        return {**self.__dict__, "_parts": {}}

    def _rows_of_part(self, number: int) -> Int64Array:
        return self.rows[number * self.cells_per_part : (number + 1) * self.cells_per_part]

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.arrow"

    def _is_done(self, number: int) -> bool:
        if not self._path(number).exists():
            return False
        try:
            with pa.ipc.open_file(pa.memory_map(str(self._path(number)))) as reader:
                found = json.loads((reader.schema.metadata or {}).get(FACTS_KEY, b"{}"))
        except (pa.ArrowInvalid, ValueError):
            return False
        return found == self._facts

    def _write(self, number: int, logits: npt.NDArray[np.float32]) -> None:
        values = pa.FixedSizeListArray.from_arrays(pa.array(logits.ravel()), logits.shape[1])
        columns = {"row": pa.array(self._rows_of_part(number)), "logits": values}
        schema = pa.schema(
            [(name, column.type) for name, column in columns.items()], {FACTS_KEY: json.dumps(self._facts)}
        )
        with written_aside(self._path(number)) as aside, pa.ipc.new_file(str(aside), schema) as writer:
            writer.write_batch(pa.record_batch(list(columns.values()), schema=schema))

    def _part(self, number: int) -> npt.NDArray[np.float32]:
        if number not in self._parts:
            if not self._is_done(number):
                raise ValueError(
                    f"{self._path(number)} is missing, or not this teacher's; call fill(teacher) before of(rows)"
                )
            with pa.ipc.open_file(pa.memory_map(str(self._path(number)))) as reader:
                column = reader.get_batch(0).column("logits")
            self._parts[number] = column.values.to_numpy().reshape(len(column), -1)
        return self._parts[number]


def _hash_tensors(model: ScReformerForCellClassification) -> str:
    """Return the sha256 of the weights as they were loaded, for a teacher that is not one local file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
