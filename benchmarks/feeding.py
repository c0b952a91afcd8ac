"""How fast batches of cells are read: ours beside `datasets`, shuffled and in order, with the collator.

One process, no workers, pretraining's masks. Contestants read in turn, round after round, each for a few seconds from
the page cache, so that they are compared within one run. Beside it: reading alone, without the collator; how well
batches are mixed (see `shuffle_quality`), padding, and what the order of 15 million cells costs.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, RandomSampler

from screformer.benchmarks.contest import judge
from screformer.benchmarks.feeding_figures import format_feeding, plot_feeding
from screformer.benchmarks.many_cells import make_many_cells
from screformer.benchmarks.measuring import Row, describe_device
from screformer.benchmarks.shuffle_quality import measure_shufflings, sorted_origins
from screformer.benchmarks.speed_figures import write_text
from screformer.configuration_screformer import ScReformerConfig
from screformer.tokenization.corpus import Corpus, build_corpus, open_corpus
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer
from screformer.train.cell_dataset import CellDataset, stream_cells
from screformer.train.collator import CellCollator
from screformer.train.result_files import software_versions, write_json
from screformer.train.sampler import BLOCK_SIZE, BUFFER_SIZE, CellBatchSampler, Shuffling

logger = logging.getLogger(__name__)

NAME = "feeding_cpu"
QUESTION = "How fast are batches of cells read, and how well are they mixed?"
Place = Literal["expressed", "full", "reading alone"]
PLACES: tuple[Place, ...] = ("expressed", "full", "reading alone")
BATCH_SIZE = 64
TARGETS = {"expressed": 10_000, "full": 4_000}
LEAST_MIXED = 0.99  # of a full shuffle's entropy of labels
BLOCK_SIZES = (1, 4, 16, 64, 256, 1024)
BUFFER_SIZES = (1024, 4096, 16_384, 65_536)
QUALITY_CELLS = 1_000_000
MANY_CELLS = 15_000_000
OURS = "ours"
CONTESTANTS = {
    OURS: "CellDataset, block-shuffled",
    "ours_grouped": "CellDataset, block-shuffled, batches of similar length",
    "ours_full_shuffle": "CellDataset, full shuffle",
    "ours_in_order": "CellDataset, in order",
    "ours_stream": "stream_cells, shuffled in a buffer of 1,024",
    "datasets_random": "datasets, full shuffle",
    "datasets_in_order": "datasets, in order",
}

Batches = Iterator[Any]  # a dict of tensors; or, reading alone, rows


class Limits(NamedTuple):
    """How long each contestant reads in a round, and how many rounds there are."""

    seconds: float = 2.0
    repeats: int = 5


class Rate(NamedTuple):
    """Cells a second of wall time, and of the processor's: equal on an idle machine."""

    wall: float
    processor: float


def benchmark_feeding(
    output: str | Path,
    *,
    corpus: str | Path | None = None,
    num_cells: int = 50_000,
    batch_size: int = BATCH_SIZE,
    quality_cells: int = QUALITY_CELLS,
    many_cells: int = MANY_CELLS,
    limits: Limits = Limits(),  # noqa: B008 - does not change
    command: str = "benchmark_feeding",
) -> dict[str, Any]:
    """Measure, write ``feeding_cpu.json``, ``.md`` and ``.png``, and return the JSON.

    Parameters
    ----------
    output
        Folder for the results.
    corpus
        Folder of a corpus to read; without it one is made of `num_cells` thinned and mixed real cells, and deleted.
    num_cells
        Of the corpus that is made.
    batch_size
        Cells a batch.
    quality_cells, many_cells
        Cells whose mixing is measured, and for whose order time and memory are.
    limits
        How long and how often.
    command
        What to say in the results.

    Raises
    ------
    ValueError
        `batch_size` is below 1 or larger than the corpus, or `limits` are not positive.
    """
    if limits.seconds <= 0 or limits.repeats < 1:
        msg = f"limits must be positive, got {limits.seconds} s and {limits.repeats} repeats"
        raise ValueError(msg)
    with tempfile.TemporaryDirectory(prefix="feeding-") as folder:
        opened = _make_corpus(Path(folder), num_cells) if corpus is None else open_corpus(corpus)
        if not 1 <= batch_size <= len(opened):
            msg = f"batch_size must lie between 1 and the {len(opened)} cells of the corpus, got {batch_size}"
            raise ValueError(msg)
        results = _measure(opened, batch_size, quality_cells, many_cells, limits, command)
    stem = Path(output) / NAME
    write_json(stem.with_suffix(".json"), results)
    write_text(stem.with_suffix(".md"), format_feeding(results))
    plot_feeding(results, stem.with_suffix(".png"))
    return results


def _measure(
    corpus: Corpus, batch_size: int, quality_cells: int, many_cells: int, limits: Limits, command: str
) -> dict[str, Any]:
    load_before = os.getloadavg()[0]
    cells = CellDataset(corpus)
    lengths = cells.lengths
    logger.info("%d cells of %.0f expressed genes", len(cells), lengths.mean())
    measurements = measure_speed(corpus, batch_size, limits)
    logger.info("mixing")
    label_counts = _count_labels(corpus)
    origins = sorted_origins(label_counts, quality_cells)
    quality = measure_shufflings(origins, BLOCK_SIZES, BUFFER_SIZES, batch_size=batch_size)
    grouped = measure_shufflings(
        origins,
        [BLOCK_SIZE],
        [BUFFER_SIZE],
        batch_size=batch_size,
        lengths_of=lambda rows: lengths[rows % len(lengths)],
    )
    padding = {name: measure_padding(cells, batch_size, is_grouped=name == "grouped") for name in ("plain", "grouped")}
    return {
        "question": QUESTION,
        "command": command,
        "date": date.today().isoformat(),
        "device": describe_device("cpu"),
        "load": {"at_start": load_before, "at_end": os.getloadavg()[0]},
        "versions": software_versions(),
        "contestants": CONTESTANTS,
        "corpus": {
            "num_cells": len(cells),
            "expressed_genes": float(lengths.mean()),
            "num_genes": corpus.tokenizer().num_genes,
            "num_files": len(corpus.manifest["shards"]),
            "bytes": sum((corpus.folder / shard["file"]).stat().st_size for shard in corpus.manifest["shards"]),
        },
        "batch_size": batch_size,
        "defaults": {"block_size": BLOCK_SIZE, "buffer_size": BUFFER_SIZE},
        "limits": limits._asdict(),
        "targets": judge_feeding(measurements, quality),
        "measurements": measurements,
        "ratios": compute_ratios(measurements),
        "quality": {"num_cells": quality_cells, "rows": quality, "grouped": grouped},
        "padding": padding,
        "order": measure_order(many_cells, batch_size),
    }


def measure_speed(corpus: Corpus, batch_size: int, limits: Limits) -> list[Row]:
    """Return the cells a second of every contestant in both gene spaces: each round's, and their median."""
    rows: list[Row] = []
    for place in PLACES:
        readers = make_readers(corpus, batch_size, _make_collator(corpus, place))
        rates: dict[str, list[Rate]] = {name: [] for name in readers}
        for read in readers.values():  # to warm up, and to bring the files into the page cache
            _read_for(read, 0.2 * limits.seconds)
        for number in range(limits.repeats):
            logger.info("%s, round %d of %d", place, number + 1, limits.repeats)
            for name, read in readers.items():
                rates[name].append(_read_for(read, limits.seconds))
        for name, found in rates.items():
            walls, processors = (list(values) for values in zip(*found, strict=True))
            row = {"place": place, "contestant": name, "cells_per_second": walls, "median": median(walls)}
            rows.append(row | {"median_per_processor_second": median(processors)})
    return rows


def _make_collator(corpus: Corpus, place: Place) -> Callable[[Any], Any]:  # Any: rows, and what becomes of them
    if place == "reading alone":
        return lambda rows: rows
    tokenizer = corpus.tokenizer()
    config = ScReformerConfig(num_genes=tokenizer.num_genes, num_bins=tokenizer.num_bins)
    return CellCollator.from_config(config, gene_space=place, masked_fraction=0.15)


def make_readers(
    corpus: Corpus, batch_size: int, collator: Callable[[Any], Any]
) -> dict[str, Callable[[], Batches]]:  # Any: as above
    """Return for each contestant a function that begins an epoch and gives its batches."""
    cells = CellDataset(corpus)
    rows = corpus.dataset.select_columns(["input_ids", "gene_ids"]).with_format("numpy")
    stream = stream_cells(cells).shuffle(seed=0, buffer_size=1024)

    def ours(block_size: int, buffer_size: int, *, is_grouped: bool = False) -> Callable[[], Batches]:
        lengths_of = cells.lengths_of if is_grouped else None
        sampler = CellBatchSampler(len(cells), batch_size, Shuffling(block_size, buffer_size), lengths_of=lengths_of)

        def begin() -> Batches:
            sampler.set_epoch(sampler.epoch + 1)
            return iter(DataLoader(cells, batch_sampler=sampler, collate_fn=collator))

        return begin

    def plain(data: Any, **options: Any) -> Callable[[], Batches]:  # Any: a data set; options of DataLoader
        return lambda: iter(DataLoader(data, batch_size=batch_size, collate_fn=collator, **options))

    return {
        OURS: ours(BLOCK_SIZE, BUFFER_SIZE),
        "ours_grouped": ours(BLOCK_SIZE, BUFFER_SIZE, is_grouped=True),
        "ours_full_shuffle": ours(1, BUFFER_SIZE),
        "ours_in_order": plain(cells),
        "ours_stream": plain(stream),
        "datasets_random": plain(rows, sampler=RandomSampler(rows, generator=torch.Generator().manual_seed(0))),
        "datasets_in_order": plain(rows),
    }


def _read_for(read: Callable[[], Batches], seconds: float) -> Rate:
    """Read for at least so many seconds, beginnings of epochs included."""
    num_cells, start, processor_start = 0, time.perf_counter(), time.process_time()
    while (spent := time.perf_counter() - start) < seconds:
        for batch in read():
            num_cells += len(batch["input_ids"]) if isinstance(batch, dict) else len(batch)
            if (spent := time.perf_counter() - start) >= seconds:
                break
    return Rate(num_cells / spent, num_cells / (time.process_time() - processor_start))


def compute_ratios(measurements: Sequence[Row]) -> list[Row]:
    """Return how many times faster than each other contestant ours is, by processor time."""
    key = "median_per_processor_second"
    ours = {row["place"]: row[key] for row in measurements if row["contestant"] == OURS}
    return [
        {"place": row["place"], "contestant": row["contestant"], "times_faster": ours[row["place"]] / row[key]}
        for row in measurements
        if row["contestant"] != OURS
    ]


def judge_feeding(measurements: Sequence[Row], quality: Sequence[Row]) -> list[Row]:
    """Return the targets, and whether they are met; by processor time too, which other load disturbs less."""
    ours = {row["place"]: row for row in measurements if row["contestant"] == OURS}
    targets = []
    for place, least in TARGETS.items():
        for key, unit in (("median", "second"), ("median_per_processor_second", "second of processor time")):
            measured = ours[place][key] if place in ours else None
            targets.append(judge(f"{place} space: cells a {unit}, shuffled, one process", measured, at_least=least))
    chosen = [row for row in quality if (row["block_size"], row["buffer_size"]) == (BLOCK_SIZE, BUFFER_SIZE)]
    share = chosen[0]["label_share"] if chosen else None
    name = f"entropy of labels a batch, of a full shuffle's (blocks of {BLOCK_SIZE}, buffer {BUFFER_SIZE:,})"
    return [*targets, judge(name, share, at_least=LEAST_MIXED)]


def measure_padding(cells: CellDataset, batch_size: int, *, is_grouped: bool) -> float:
    """Return the share of an epoch's tokens that are padding in the expressed space."""
    sampler = CellBatchSampler(len(cells), batch_size, lengths_of=cells.lengths_of if is_grouped else None)
    lengths = cells.lengths
    of_batches = [lengths[batch] for batch in sampler]
    num_tokens = sum(int(own.max()) * len(own) for own in of_batches)
    return 1 - sum(int(own.sum()) for own in of_batches) / num_tokens


def measure_order(num_cells: int, batch_size: int) -> Row:
    """Return what the order of many cells costs: bytes held, and seconds to begin, to go on half way, to skip there."""
    half = {"epoch": 0, "start": num_cells // batch_size // 2}
    sampler = CellBatchSampler(num_cells, batch_size)
    start = time.perf_counter()
    batches = iter(sampler)
    next(batches)
    began = time.perf_counter()
    for _ in range(half["start"] - 1):
        next(batches)
    skipped = time.perf_counter()
    sampler.load_state_dict(half)
    next(iter(sampler))
    resumed = time.perf_counter()
    tracemalloc.start()
    batches = iter(sampler)
    next(batches)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "num_cells": num_cells,
        "seconds_to_first_batch": began - start,
        "seconds_to_skip_half": skipped - began,
        "seconds_to_resume_at_half": resumed - skipped,
        "bytes_held": held,
        "bytes_at_peak": peak,
        "bytes_of_chosen_rows": 4 * num_cells,
    }


def _count_labels(corpus: Corpus) -> list[int]:
    """Return how often each label occurs; ten labels of one size where the corpus has no cell types."""
    if "cell_type" not in corpus.dataset.column_names:
        return [1] * 10
    _, counts = np.unique([str(label) for label in corpus.dataset["cell_type"]], return_counts=True)
    return counts.tolist()


def _make_corpus(folder: Path, num_cells: int) -> Corpus:
    logger.info("making a corpus of %d cells", num_cells)
    path = make_many_cells(folder / "cells.h5ad", num_cells, compression="none", dtype="uint16", progress=False)
    return build_corpus(path, folder / "corpus", tokenizer=ScReformerTokenizer(), obs_columns=["cell_type"])


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        prog="python -m screformer.benchmarks.feeding",
        description="Measure how fast batches of cells are read, and how well they are mixed.",
        epilog="example: python -m screformer.benchmarks.feeding --corpus corpus --output runs",
    )
    parser.add_argument("--output", default="benchmarks/results", help="Folder for the results (default: %(default)s).")
    parser.add_argument("--corpus", help="Corpus folder (default: one is made of real cells, thinned and mixed).")
    parser.add_argument("--num-cells", type=int, default=50_000, help="Of the corpus to make (default: %(default)s).")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="Cells a batch (default: %(default)s).")
    parser.add_argument("--seconds", type=float, default=2.0, help="Of each contestant a round (default: %(default)s).")
    parser.add_argument("--repeats", type=int, default=5, help="Rounds (default: %(default)s).")
    given = sys.argv[1:] if argv is None else list(argv)
    options = parser.parse_args(given)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        results = benchmark_feeding(
            options.output,
            corpus=options.corpus,
            num_cells=options.num_cells,
            batch_size=options.batch_size,
            limits=Limits(options.seconds, options.repeats),
            command=" ".join([parser.prog, *given]),
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write("\n" + format_feeding(results))


if __name__ == "__main__":
    main()
