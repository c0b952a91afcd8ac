"""How fast files of counts become a corpus, in how much memory, and what 15 million cells would take.

*Speed* is cells/s of one process with one thread, on made cells (see `many_cells`) whose file the system has in memory,
all contestants in turn on the same file within one run. What is compared is cells per second of processor time, which
other programs on the machine hardly change; wall time is beside it.

* reading: the blocks of CSR rows, read with h5py and dropped;
* ours: the same blocks read (gzip by libdeflate: `tokenization.gzip_chunks`), tokenized and written as an Arrow file;
* corpus: all that ``screformer corpus`` does with one process: inspecting the file, which reads it once more, cell
  hashes, filters, obs columns, checksums;
* two loops over cells in the manner of other packages (see `per_cell_loops`).

What reading costs depends on how the file is compressed: reading and ours are measured with gzip, lzf and none.

*Memory* is the highest resident set of a process that builds a corpus, everything counted, libraries included, at sizes
that grow tenfold. The largest corpus is then read once in shuffled order: there the resident set has the pages of files
that are mapped into memory, which the system drops when it needs room; what is the process's own is given beside it, as
it is at the end.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import datasets
import h5py
import numpy as np
import pyarrow as pa
import torch
from datasets.arrow_writer import ArrowWriter
from scipy.sparse import csr_matrix

from screformer.benchmarks.many_cells import CELLS_PER_BLOCK as MADE_AT_ONCE
from screformer.benchmarks.many_cells import Compression, make_many_cells
from screformer.benchmarks.measuring import Row, describe_device, status_bytes
from screformer.benchmarks.per_cell_loops import align_genes, dense_cells, rank_cells, save_ranks
from screformer.benchmarks.tokenizing_report import (
    ALIGNED,
    COMPRESSIONS,
    CORPUS,
    DENSE,
    OURS,
    RANKS,
    READING,
    TITLES,
    format_tokenizing,
    judge_tokenizing,
    plot_tokenizing,
    project,
    write_tokenizing,
)
from screformer.tokenization import (
    CountMatrix,
    GeneMapping,
    ScReformerTokenizer,
    build_corpus,
    open_corpus,
    open_count_matrix,
)
from screformer.tokenization.freed_memory import return_columns
from screformer.train.cell_dataset import CellDataset
from screformer.train.collator import CellCollator
from screformer.train.process_memory import return_large_blocks
from screformer.train.result_files import software_versions
from screformer.train.sampler import CellBatchSampler

NAME = "tokenizing_cpu"
CELLS, RATE_CELLS, LOOP_CELLS = 100_000, 20_000, 1_000
CELLS_PER_BLOCK = 1024
OBS_COLUMNS = ("cell_type", "donor")
BATCH_SIZE, MASKED_FRACTION = 64, 0.15

Make = Callable[..., Path]  # path, number of cells, compression -> path

logger = logging.getLogger(__name__)


class Call(NamedTuple):
    """Something that goes through the first cells of a file."""

    run: Callable[[], object]
    num_cells: int
    is_slow: bool = False  # runs once, without a call to warm up


def benchmark_tokenizing(
    output: str | Path,
    work: str | Path,
    *,
    source: str | Path | None = None,
    num_cells: int = CELLS,
    rate_cells: int = RATE_CELLS,
    loop_cells: int = LOOP_CELLS,
    repeats: int = 5,
    keep: bool = False,
    command: str = "benchmark_tokenizing",
) -> dict[str, Any]:
    """Measure, write ``tokenizing_cpu.json``, ``.md`` and ``.png`` into `output`, and return the JSON.

    The first two are written after every stage, so that an interrupted run leaves what it has.

    Parameters
    ----------
    output
        Folder for the results.
    work
        Folder for made files and corpora, of 10 KB a cell; it must not be there yet, and is deleted at the end.
    source
        h5ad file of real cells to make others from; the packaged pancreas when left out.
    num_cells
        Cells of the largest corpus; the others have a tenth and a hundredth.
    rate_cells, loop_cells
        Cells that speed is measured on; loops over cells take fewer.
    repeats
        Rounds of timed calls.
    keep
        Leave the made files.
    command
        What the result file says that it was made by.

    Raises
    ------
    FileExistsError
        `work` is there.
    ValueError
        A number is out of its range.
    """
    sizes = [num_cells // 100, num_cells // 10, num_cells]
    if sizes[0] < 1 or min(rate_cells, loop_cells, repeats) < 1:
        msg = f"cells: at least 100, the other numbers at least 1; got {(num_cells, rate_cells, loop_cells, repeats)}"
        raise ValueError(msg)
    work = Path(work)
    work.mkdir(parents=True)
    results: dict[str, Any] = {
        "question": "How fast do counts become a corpus, and in how much memory?",
        "command": command,
        "date": date.today().isoformat(),
        "device": {**describe_device("cpu"), "threads": 1},
        "versions": {**software_versions(), "h5py": h5py.__version__, "pyarrow": pa.__version__},
        "contestants": TITLES,
        "speed": [],
        "memory": [],
    }

    def save() -> None:
        results["targets"] = judge_tokenizing(results)
        results["many_cells"] = project(results)
        write_tokenizing(results, Path(output) / NAME)

    make = partial(_make_cells, source)
    try:
        for compression in COMPRESSIONS:
            results["speed"] += _measure_speed(make, work, compression, rate_cells, loop_cells, repeats)
            save()
        for size in sizes:
            logger.info("memory: %d cells", size)
            results["memory"].append(_measure_memory(make, work, size, is_last=size == sizes[-1]))
            save()
    finally:
        if not keep:
            shutil.rmtree(work)
    plot_tokenizing(results, Path(output) / f"{NAME}.png")
    return results


def _measure_speed(
    make: Make, work: Path, compression: Compression, rate_cells: int, loop_cells: int, repeats: int
) -> list[Row]:
    """Return the rates of the contestants on a file of this compression; the slow ones run with gzip only."""
    path = make(work / f"{compression}.h5ad", rate_cells, compression)
    tokenizer = ScReformerTokenizer()
    with open_count_matrix(path, vocabulary=tokenizer.gene_vocabulary) as matrix:
        mapping = matrix.map_genes(tokenizer.gene_vocabulary)
        calls = {
            READING: Call(lambda: read_blocks(path), rate_cells),
            OURS: Call(lambda: tokenize_blocks(matrix, mapping, tokenizer, work / "cells.arrow"), rate_cells),
        }
        if compression == "gzip":
            calls[CORPUS] = Call(lambda: _build_once(path, work / "corpus", tokenizer), rate_cells)
            calls |= _make_loops(matrix, mapping.positions, tokenizer, min(loop_cells, rate_cells), work / "ranks")
        rows = [{"compression": compression, **row} for row in _rates(calls, repeats)]
    for row in rows:
        row["file_bytes_per_cell"] = path.stat().st_size / rate_cells
    path.unlink()
    return rows


def _make_loops(
    matrix: CountMatrix, positions: np.ndarray, tokenizer: ScReformerTokenizer, num_cells: int, folder: Path
) -> dict[str, Call]:
    """Return the loops over the first cells of a file; `folder` is for what they write."""
    num_genes, highest_bin = tokenizer.num_genes, tokenizer.num_bins - 1
    medians = _medians(matrix, positions, num_genes)

    def blocks() -> Iterator[csr_matrix]:
        return matrix.blocks(CELLS_PER_BLOCK, stop=num_cells)

    def rank() -> None:
        save_ranks([cell for block in blocks() for cell in rank_cells(block, positions, medians)], folder)

    def lay_out() -> None:
        for block in blocks():
            for _ in dense_cells(block, positions, num_genes, highest_bin=highest_bin):
                pass

    def align() -> None:
        in_order = np.arange(num_genes)
        for block in blocks():
            for _ in dense_cells(
                align_genes(block, positions, num_genes), in_order, num_genes, highest_bin=highest_bin
            ):
                pass

    return {
        RANKS: Call(rank, num_cells),
        DENSE: Call(lay_out, num_cells),
        ALIGNED: Call(align, num_cells, is_slow=True),
    }


def _make_cells(source: str | Path | None, path: Path, num_cells: int, compression: Compression = "gzip") -> Path:
    at_once = min(num_cells, MADE_AT_ONCE)
    return make_many_cells(path, num_cells, source=source, compression=compression, cells_per_block=at_once)


def _rates(calls: Mapping[str, Call], repeats: int) -> list[Row]:
    """Call all in turn, one round to warm up, and return each one's cells/s by wall time and by processor time."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            if call.is_slow and number != 1:
                continue
            wall, processor = time.perf_counter(), time.process_time()
            call.run()
            if number:
                taken[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return [
        {
            "contestant": name,
            "num_cells": calls[name].num_cells,
            "seconds": [wall for wall, _ in times],
            "processor_seconds": [processor for _, processor in times],
            "cells_per_second": calls[name].num_cells / median(wall for wall, _ in times),
            "cells_per_processor_second": calls[name].num_cells / median(processor for _, processor in times),
        }
        for name, times in taken.items()
    ]


def read_blocks(path: Path) -> None:
    """Read all CSR blocks of an h5ad file and drop them."""
    with h5py.File(path) as file:
        matrix = file["X"]
        for first in range(0, len(matrix["indptr"]) - 1, CELLS_PER_BLOCK):
            indptr = matrix["indptr"][first : first + CELLS_PER_BLOCK + 1]
            entries = slice(indptr[0], indptr[-1])
            _, _ = matrix["data"][entries], matrix["indices"][entries]


def tokenize_blocks(matrix: CountMatrix, mapping: GeneMapping, tokenizer: ScReformerTokenizer, path: Path) -> None:
    """Read all blocks, tokenize them and write the tokens as one Arrow file."""
    lists = {"input_ids": datasets.List(datasets.Value("uint8")), "gene_ids": datasets.List(datasets.Value("uint16"))}
    features = datasets.Features(lists)
    with ArrowWriter(features=features, path=str(path)) as writer:
        for block in matrix.blocks(CELLS_PER_BLOCK):
            tokens = tokenizer.tokenize_counts(block, mapping)
            offsets = pa.array(tokens.indptr.astype(np.int32))
            values = {"input_ids": tokens.input_ids, "gene_ids": tokens.gene_ids}
            columns = {name: pa.ListArray.from_arrays(offsets, pa.array(array)) for name, array in values.items()}
            writer.write_table(pa.table(columns).cast(features.arrow_schema), CELLS_PER_BLOCK)
        writer.finalize()


def _build_once(path: Path, folder: Path, tokenizer: ScReformerTokenizer) -> None:
    build_corpus(path, folder, tokenizer=tokenizer, obs_columns=OBS_COLUMNS)
    shutil.rmtree(folder)


def _medians(matrix: CountMatrix, positions: np.ndarray, num_genes: int) -> np.ndarray:
    """Return a stand-in for each gene's median over cells: its mean where it is expressed, in the first block."""
    block = next(matrix.blocks(CELLS_PER_BLOCK))
    at = positions[block.indices]
    sums, times = (np.bincount(at[at >= 0], weights=weights[at >= 0], minlength=num_genes)
                   for weights in (block.data, np.ones(len(at))))  # fmt: skip
    return np.maximum(sums, 1) / np.maximum(times, 1)


def _measure_memory(make: Make, work: Path, num_cells: int, *, is_last: bool) -> Row:
    """Return what building a corpus of this size takes in a process of its own, and for the last what reading does."""
    path = make(work / f"{num_cells}.h5ad", num_cells)
    folder = work / f"{num_cells}-corpus"
    row = _in_new_process("--build", path, folder)
    row["file_bytes"] = path.stat().st_size
    if is_last:
        row["reading"] = _in_new_process("--read", folder)
    return row


def _in_new_process(*arguments: str | Path) -> Row:
    command = [sys.executable, "-m", "screformer.benchmarks.tokenizing", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise OSError(f"a process of the benchmark failed: {reason[0]}")
    return json.loads(done.stdout.splitlines()[-1])


def build_and_measure(path: Path, folder: Path) -> Row:
    """Build a corpus as the command line does, and return what it took of this process."""
    return_columns()
    start, processor_start = time.perf_counter(), time.process_time()
    corpus = build_corpus(path, folder, tokenizer=ScReformerTokenizer(), obs_columns=OBS_COLUMNS)
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
    return {
        "num_cells": len(corpus),
        "num_tokens": sum(shard["num_tokens"] for shard in corpus.manifest["shards"]),
        "dropped": corpus.manifest.get("totals", {}).get("dropped", {}),
        "corpus_bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "seconds": seconds,
        "cells_per_second": len(corpus) / seconds,
        "cells_per_processor_second": len(corpus) / processor_seconds,
        "peak_bytes": status_bytes("VmHWM"),
        "own_bytes": status_bytes("RssAnon"),
    }


def read_and_measure(folder: Path) -> Row:
    """Read every cell of a corpus once in shuffled batches as training does, and return what it took."""
    return_large_blocks()
    torch.set_num_threads(1)
    corpus = open_corpus(folder)
    tokenizer = corpus.tokenizer()
    cells = CellDataset(corpus)
    sampler = CellBatchSampler(len(cells), BATCH_SIZE, lengths_of=cells.lengths_of)
    collate = CellCollator(
        tokenizer.pad_token_id,
        tokenizer.mask_token_id,
        tokenizer.num_genes,
        gene_space="expressed",
        masked_fraction=MASKED_FRACTION,
    )
    times_seen = np.zeros(len(cells), np.uint8)
    num_tokens, start, processor_start = 0, time.perf_counter(), time.process_time()
    for positions in sampler:
        batch = collate(cells.__getitems__(positions))
        num_tokens += int(batch["attention_mask"].sum())
        times_seen[positions] += 1
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
    return {
        "num_cells": len(cells),
        "is_each_seen_once": bool((times_seen == 1).all()),
        "num_tokens": num_tokens,
        "seconds": seconds,
        "cells_per_second": len(cells) / seconds,
        "cells_per_processor_second": len(cells) / processor_seconds,
        "peak_bytes": status_bytes("VmHWM"),
        "own_bytes": status_bytes("RssAnon"),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        prog="python -m screformer.benchmarks.tokenizing",
        description="Measure how fast counts become a corpus, and in how much memory.",
        epilog="example: python -m screformer.benchmarks.tokenizing --cells 1000000 --work /scratch/tokenizing",
    )
    parser.add_argument("--output", default="benchmarks/results", help="Folder for the results (default: %(default)s).")
    parser.add_argument("--work", default="runs/tokenizing", help="New folder for made files (default: %(default)s).")
    parser.add_argument("--source", help="h5ad file of real cells (default: the packaged pancreas).")
    parser.add_argument("--cells", type=int, default=CELLS, help="Of the largest corpus (default: %(default)s).")
    parser.add_argument("--rate-cells", type=int, default=RATE_CELLS, help="To time (default: %(default)s).")
    parser.add_argument("--loop-cells", type=int, default=LOOP_CELLS, help="To time loops on (default: %(default)s).")
    parser.add_argument("--repeats", type=int, default=5, help="Timed rounds (default: %(default)s).")
    parser.add_argument("--keep", action="store_true", help="Leave the made files.")
    parser.add_argument("--build", nargs=2, metavar=("FILE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--read", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.build or options.read:
        measured = build_and_measure(*map(Path, options.build)) if options.build else read_and_measure(options.read)
        sys.stdout.write(json.dumps(measured) + "\n")
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    datasets.disable_progress_bars()
    try:
        results = benchmark_tokenizing(
            options.output,
            options.work,
            source=options.source,
            num_cells=options.cells,
            rate_cells=options.rate_cells,
            loop_cells=options.loop_cells,
            repeats=options.repeats,
            keep=options.keep,
            command=" ".join([parser.prog, *(sys.argv[1:] if argv is None else argv)]),
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write("\n" + format_tokenizing(results))


if __name__ == "__main__":
    main()
