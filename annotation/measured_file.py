"""Cells of a file, measured block by block by all processes of a run, and what the first of them writes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from screformer.annotation.added_elements import AddedElements, check_names_free, check_output, write_elements
from screformer.annotation.cell_numbers import FOLDER_SUFFIX, CellNumbers, NumbersInFiles
from screformer.annotation.cell_source import CellMeasure, CellSource
from screformer.annotation.processes import Processes
from screformer.tokenization.count_matrix import CountMatrix, open_count_matrix
from screformer.tokenization.passport_problems import check_allowed
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer


class FileToMeasure(NamedTuple):
    """A file of cells, where the result goes, and how both are treated; see `annotate_file`."""

    cells: str | Path
    output: Path
    layer: str | None = None
    gene_column: str | None = None
    allowed: tuple[str, ...] = ()
    key: str = "screformer"
    overwrite: bool = False
    progress: bool = True

    @classmethod
    def check(
        cls, cells: str | Path, output: str | Path, *, allow: Sequence[str], overwrite: bool, **options: Any
    ) -> FileToMeasure:  # Any: fields
        """Return it, as far as it can be checked without opening the file; raises as `check_output`."""
        target = check_output(cells, output, overwrite=overwrite)
        return cls(cells, target, allowed=tuple(check_allowed(allow)), overwrite=overwrite, **options)


class NewElements(NamedTuple):
    """Names of what will be added: of `obs`, `obsm` and `uns`."""

    obs: Sequence[str]
    obsm: Sequence[str]
    uns: Sequence[str]


class MeasuredFile(NamedTuple):
    """The file, its cells and their numbers; the file is open."""

    matrix: CountMatrix
    source: CellSource
    numbers: CellNumbers


def measure_and_write(
    file: FileToMeasure,
    tokenizer: ScReformerTokenizer,
    measure: CellMeasure,
    new: NewElements,
    *,
    task: str,
    facts: dict[str, Any],  # Any: JSON
    elements: Callable[[MeasuredFile], AddedElements],
    processes: Processes,
    check: Callable[[CountMatrix], object] = lambda _: None,
) -> MeasuredFile:
    """Measure all cells, write them with what `elements` makes of the numbers, and return the file, closed.

    Numbers are kept in a folder beside the output until it is written, see `NumbersInFiles`.

    Parameters
    ----------
    file
        What to read and write.
    tokenizer
        Of the model; one that keeps empty cells.
    measure
        Gives the numbers.
    new
        Names of what will be added.
    task
        Name on the progress bar.
    facts
        What the numbers depend on, besides the cells.
    elements
        Called in each process, when all numbers are there; the first one writes what it gives.
    processes
        Share the cells.
    check
        Looks at the opened file before anything is computed.

    Raises
    ------
    OSError, ValueError
        As `annotate_file`.
    """
    with open_count_matrix(
        file.cells,
        layer=file.layer,
        gene_column=file.gene_column,
        vocabulary=tokenizer.gene_vocabulary,
        allow=file.allowed,
    ) as matrix:
        check_names_free(matrix, file.output, file.key, **new._asdict(), overwrite=file.overwrite)
        check(matrix)
        source = CellSource(matrix, tokenizer, allow=file.allowed, progress=file.progress and processes.is_main)
        numbers = NumbersInFiles(
            file.output.with_name(file.output.name + FOLDER_SUFFIX),
            {"task": task, **facts, "input": source.describe_input(), "state": source.state},
            num_cells=source.num_cells,
            width=measure.width,
            cells_per_block=source.cells_per_block(measure),
            is_main=processes.is_main,
        )
        processes.wait()
        measured = MeasuredFile(matrix, source, numbers)
        with numbers.kept_until_written() if processes.is_main else nullcontext():
            source.measure(measure, numbers, task=task, processes=processes)
            processes.wait()
            added = elements(measured)
            if processes.is_main:
                write_elements(matrix, file.output, added)
        processes.wait()
    return measured
