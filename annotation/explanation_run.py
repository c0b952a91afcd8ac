"""Values of all cells of a class, with a price before and a bar while it runs; a run that is killed goes on."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from screformer.annotation.attributions import SHAP_METHODS, Sampling, attribute
from screformer.annotation.cell_numbers import NumbersInFiles
from screformer.annotation.explained_score import Bins, ClassScore, ExplainedCell
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.train.collator import GeneSpace
from screformer.train.process_memory import forget_peak, peak_process_memory

logger = logging.getLogger(__name__)
CELLS_PER_BLOCK = 16
NUM_PILOT_CELLS, NUM_PILOT_PASSES = 6, 16
TOKENS_AT_ONCE = 16_384
MAX_ACTIVATION_BYTES = 1e9
Item = TypeVar("Item")
Result = TypeVar("Result")
FloatArray = npt.NDArray[np.float32]


class Explainer(NamedTuple):
    """A classifier and the cells that others are compared with.

    Attributes
    ----------
    model
        In eval mode, on the device to run on.
    background
        (cells, num_genes).
    gene_space
        ``"full"`` or ``"expressed"``.
    batch_size
        Points that are worked on together; None: as many as have a handful of thousands of tokens, which is fastest.
    num_workers
        Cells that are worked on beside each other, by a thread each.
    """

    model: ScReformerForCellClassification
    background: Bins
    gene_space: GeneSpace
    batch_size: int | None = None
    num_workers: int = 1

    def cell(self, score: ClassScore, bins: Bins) -> ExplainedCell:
        """Return a cell's score as a function."""
        size = self.batch_size or max(1, TOKENS_AT_ONCE // max(1, int(self.num_tokens(bins[None])[0])))
        return ExplainedCell(self.model, score, bins, gene_space=self.gene_space, batch_size=size)

    def map(self, call: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Yield what a call gives for each item, in their order, several at work at a time.

        The work of one cell is made of many small operations, which several threads of PyTorch make little faster.
        """
        if self.num_workers == 1:
            yield from map(call, items)
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        pool = ThreadPoolExecutor(self.num_workers)
        try:
            yield from pool.map(call, items)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)

    def num_tokens(self, bins: Bins) -> npt.NDArray[np.int64]:
        """Return how many tokens each cell (cells, num_genes) has."""
        whole = np.full(len(bins), bins.shape[1])
        return whole if self.gene_space == "full" else np.count_nonzero(bins, axis=1)

    def values(self, score: ClassScore, bins: Bins, sampling: Sampling, *, number: int) -> FloatArray:
        """Return the values of one cell laid out by gene, (num_genes,); 0 for genes that are none of its tokens."""
        cell = self.cell(score, bins)
        values = np.zeros(len(bins), dtype=np.float32)
        values[cell.positions] = attribute(cell, self.background, sampling, number=number)
        return values


def workers_of(model: ScReformerForCellClassification, sampling: Sampling) -> int:
    """Return how many cells are best worked on beside each other: a core each on a CPU, one on a GPU and by `shap`."""
    is_alone = model.device.type != "cpu" or sampling.method in SHAP_METHODS  # which draws from a global generator
    return 1 if is_alone else torch.get_num_threads()


@contextmanager
def activations_kept(explainer: Explainer, num_tokens: int) -> Iterator[None]:
    """Meanwhile keep the activations of reversible layers where they are small, which saves computing them again."""
    config = explainer.model.config
    width = 16 * config.hidden_size + 4 * config.intermediate_size  # values a token and layer, roughly
    tokens = explainer.num_workers * max(num_tokens, min(TOKENS_AT_ONCE, num_tokens * (explainer.batch_size or 1)))
    before = config.reversible
    config.reversible = before and 4 * width * config.num_hidden_layers * tokens > MAX_ACTIVATION_BYTES
    try:
        yield
    finally:
        config.reversible = before


class Checks(NamedTuple):
    """How many cells of each class are looked at again.

    Attributes
    ----------
    completeness
        To see whether values add up; each takes a forward pass a background cell.
    stability
        Explained twice.
    curves
        Whose genes are taken away and put back.
    """

    completeness: int = 20
    stability: int = 100
    curves: int = 50


class Price(NamedTuple):
    """What a run will take, measured on a few cells.

    Attributes
    ----------
    seconds
        Of all values and checks.
    peak_bytes
        The most memory of the process.
    """

    seconds: float
    peak_bytes: int

    def __str__(self) -> str:
        minutes, seconds = divmod(round(self.seconds), 60)
        return f"about {minutes} min {seconds:02d} s, up to {self.peak_bytes / 1e9:.1f} GB"


def estimate(
    explainer: Explainer,
    bins_of: Mapping[ClassScore, Bins],
    sampling: Sampling,
    checks: Checks,
    *,
    passes_of_curves: int = 0,
) -> Price:
    """Return what values and checks of all these cells will take, from a few of the longest and the shortest.

    A cell's time is taken as a straight line over its tokens.

    Parameters
    ----------
    explainer, sampling, checks
        How.
    bins_of
        Score of a class -> its cells (cells, num_genes).
    passes_of_curves
        Forward passes of a cell whose genes are taken away and put back.
    """
    score = max(bins_of, key=lambda each: int(explainer.num_tokens(bins_of[each]).max()))
    order = np.argsort(explainer.num_tokens(bins_of[score]))
    pilots = bins_of[score][order[np.linspace(len(order) - 1, 0, min(NUM_PILOT_CELLS, len(order))).astype(int)]]
    explainer.values(score, pilots[0], sampling, number=0)  # the first call is slower
    forget_peak()
    sizes = explainer.num_tokens(pilots)
    few = explainer.background[:NUM_PILOT_PASSES]

    def explain(cell: Bins) -> object:
        return explainer.values(score, cell, sampling, number=0)

    def look_at(cell: Bins) -> object:
        own = explainer.cell(score, cell)
        return own.at_bins(few[:, own.positions])

    of_values = _line(sizes, [_seconds(explainer, explain, cell) for cell in pilots])
    of_passes = _line(sizes, [_seconds(explainer, look_at, cell) / (len(few) + 1) for cell in pilots])
    seconds = 0.0
    for bins in bins_of.values():
        lengths = explainer.num_tokens(bins)
        mean, number = float(lengths.mean()), len(bins)
        seconds += float(of_values(lengths).sum()) + min(checks.stability, number) * float(of_values(mean))
        num_passes = min(checks.completeness, number) * len(explainer.background)
        if sampling.method == "expected_gradients" and sampling.max_sum_error is not None:  # once more, as drawn
            seconds += min(checks.completeness, number) * float(of_values(mean))
        num_passes += min(checks.curves, number) * passes_of_curves
        seconds += num_passes * float(of_passes(mean))
    return Price(seconds, peak_process_memory())


def _seconds(explainer: Explainer, call: Callable[[Bins], object], cell: Bins) -> float:
    """Return the seconds a cell where as many as usual are worked on."""
    begin = time.perf_counter()
    list(explainer.map(call, [cell] * explainer.num_workers))
    return (time.perf_counter() - begin) / explainer.num_workers


def _line(sizes: npt.NDArray[np.int64], times: Sequence[float]) -> Callable[[Any], npt.NDArray[np.float64]]:
    """Return a function of the number of tokens, never below what is in proportion to the shortest time."""
    if sizes.max() == sizes.min():
        return lambda lengths: float(np.mean(times)) * np.ones(np.shape(lengths))
    slope, start = np.polyfit(sizes, times, 1)
    return lambda lengths: np.maximum(
        start + slope * np.asarray(lengths), min(times) * np.asarray(lengths) / sizes.max()
    )


def explain_cells(
    explainer: Explainer,
    score: ClassScore,
    bins: Bins,
    sampling: Sampling,
    *,
    folder: Path,
    facts: Mapping[str, Any],  # Any: JSON
    progress: bool = True,
) -> NumbersInFiles:
    """Return the values of all cells, (cells, num_genes) in blocks in `folder`; those that are there are not repeated.

    Parameters
    ----------
    explainer, sampling
        How.
    score
        Of the class.
    bins
        (cells, num_genes): what to explain.
    folder
        Where the values lie.
    facts
        What they depend on besides.
    progress
        Whether to show a bar.
    """
    digest = hashlib.sha256(bins.tobytes() + explainer.background.tobytes()).hexdigest()
    numbers = NumbersInFiles(
        folder,
        {**facts, "score": score._asdict(), "sampling": sampling._asdict(), "cells_sha256": digest},
        num_cells=len(bins),
        width=bins.shape[1],
        cells_per_block=CELLS_PER_BLOCK,
    )
    done = numbers.done()
    found = sum(numbers.rows(number).stop - numbers.rows(number).start for number in done)
    with tqdm(total=len(bins), initial=found, desc=score.name, unit="cell", disable=not progress) as bar:
        for number in range(numbers.num_blocks):
            if number in done:
                continue
            rows = numbers.rows(number)
            values = []
            for found_of_cell in explainer.map(
                lambda row: explainer.values(score, bins[row], sampling, number=row), range(rows.start, rows.stop)
            ):
                values.append(found_of_cell)
                bar.update()
            if not np.isfinite(values).all():
                raise ValueError(
                    f"model: values of cells {rows.start} to {rows.stop - 1} of class {score.name!r} are NaN or "
                    "infinite. Its weights are damaged or its training diverged; use another checkpoint"
                )
            numbers.write(number, np.stack(values))
    return numbers
