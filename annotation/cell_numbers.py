"""Numbers of cells in blocks, in memory or in a folder, from which a run that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from screformer.train.result_files import read_json, write_json, written_aside

logger = logging.getLogger(__name__)
FACTS_FILE, FOLDER_SUFFIX = "run.json", ".partial"

FloatArray = npt.NDArray[np.float32]


class CellNumbers(ABC):
    """A row of numbers for each cell, written and read in blocks of cells.

    Parameters
    ----------
    num_cells, width
        Shape of the whole.
    cells_per_block
        Cells a block, but for the last.
    """

    def __init__(self, num_cells: int, width: int, cells_per_block: int) -> None:
        self.num_cells, self.width, self.cells_per_block = num_cells, width, cells_per_block

    @property
    def num_blocks(self) -> int:
        """How many blocks there will be."""
        return -(-self.num_cells // self.cells_per_block)

    def rows(self, number: int) -> slice:
        """Return the cells of a block."""
        first = number * self.cells_per_block
        return slice(first, min(first + self.cells_per_block, self.num_cells))

    @abstractmethod
    def done(self) -> set[int]:
        """Return the numbers of the blocks that are there."""

    @abstractmethod
    def write(self, number: int, values: FloatArray) -> None:
        """Keep the numbers of a block, (cells of the block, width)."""

    @abstractmethod
    def block(self, number: int) -> FloatArray:
        """Return the numbers of a block."""

    def read(self) -> Iterator[tuple[slice, FloatArray]]:
        """Yield (cells, their numbers) of all blocks in order."""
        for number in range(self.num_blocks):
            yield self.rows(number), self.block(number)


class NumbersInMemory(CellNumbers):
    """For cells that are in memory themselves."""

    def __init__(self, num_cells: int, width: int, cells_per_block: int) -> None:
        super().__init__(num_cells, width, cells_per_block)
        self._blocks: dict[int, FloatArray] = {}

    def done(self) -> set[int]:
        """Return the numbers of the blocks that are there."""
        return set(self._blocks)

    def write(self, number: int, values: FloatArray) -> None:
        """Keep the numbers of a block."""
        self._blocks[number] = values

    def block(self, number: int) -> FloatArray:
        """Return the numbers of a block."""
        return self._blocks[number]


class NumbersInFiles(CellNumbers):
    """In one file a block; what an earlier run computed from the same facts is kept.

    Parameters
    ----------
    folder
        Where the blocks lie; made if it is not there, emptied if it is of other facts.
    facts
        What the numbers depend on.
    num_cells, width, cells_per_block
        As for `CellNumbers`; no more than a block is lost when a run is killed.
    is_main
        Whether this process may make and empty the folder. Others must wait until that has been done.

    Attributes
    ----------
    was_begun
        Whether some blocks were there already.

    Raises
    ------
    ValueError
        The folder holds something else.
    """

    def __init__(
        self,
        folder: Path,
        facts: Mapping[str, Any],  # Any: JSON
        *,
        num_cells: int,
        width: int,
        cells_per_block: int,
        is_main: bool = True,
    ) -> None:
        super().__init__(num_cells, width, cells_per_block)
        self.folder = folder
        shape = {"num_cells": num_cells, "width": width, "cells_per_block": cells_per_block}
        text = json.dumps({**facts, **shape}, sort_keys=True, default=str)
        self._key = hashlib.sha256(text.encode()).hexdigest()
        if is_main:
            self._begin()
        self.was_begun = bool(self.done())

    def _begin(self) -> None:
        if self.folder.exists() and not (self.folder / FACTS_FILE).exists() and any(self.folder.iterdir()):
            raise ValueError(
                f"output: the folder {self.folder}, where results are kept until all are there, holds something else; "
                "move it away or choose another name"
            )
        known = read_json(self.folder / FACTS_FILE)["key"] if (self.folder / FACTS_FILE).exists() else None
        if known == self._key:
            logger.info("%s: %d of %d blocks are there already", self.folder, len(self.done()), self.num_blocks)
            return
        if known is not None:
            logger.info("%s is of other cells, another model or other options: starting anew", self.folder)
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            write_json(self.folder / FACTS_FILE, {"key": self._key})
        except BaseException:
            self.remove()
            raise

    def done(self) -> set[int]:
        """Return the numbers of the blocks that are there."""
        return {number for number in range(self.num_blocks) if self._path(number).exists()}

    def write(self, number: int, values: FloatArray) -> None:
        """Write the numbers of a block, whole or not at all."""
        with written_aside(self._path(number)) as aside, aside.open("wb") as file:
            np.save(file, values, allow_pickle=False)

    def block(self, number: int) -> FloatArray:
        """Return the numbers of a block."""
        numbers: FloatArray = np.load(self._path(number), allow_pickle=False)
        return numbers

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.npy"

    @contextmanager
    def kept_until_written(self) -> Iterator[None]:
        """Remove the blocks when the result is written, or when it never can be: a ValueError would come again.

        They stay after anything else, such as an interrupt or a full disk, so that the same command goes on.
        """
        try:
            yield
        except BaseException as error:
            if isinstance(error, ValueError) or not self.done():
                self.remove()
            raise
        self.remove()
