"""A large file annotated in one command: memory, speed, the order of its cells, and what a kill costs.

Cells are made of real ones (`many_cells`). The command is killed once after a few blocks and called again; a process of
its own each time, so that memory is what a user sees.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import h5py
from anndata import read_h5ad
from anndata.io import read_elem

from screformer.annotation.annotate import annotate, annotate_file
from screformer.annotation.cell_numbers import FOLDER_SUFFIX
from screformer.annotation.cell_source import CELLS_PER_BLOCK
from screformer.annotation.trained_model import load_classifier
from screformer.benchmarks.fine_tuning_runs import without_folders
from screformer.benchmarks.many_cells import make_many_cells
from screformer.benchmarks.measuring import describe_device, status_bytes
from screformer.model_cards.markdown import table
from screformer.train.figures import plot_bars
from screformer.train.result_files import read_json, software_versions, write_json

logger = logging.getLogger("screformer.benchmarks.annotating")
GIGABYTE = 1e9
WANTED_GIGABYTES = 2.0
BLOCKS_BEFORE_KILL = 3
CHECKED_CELLS = 64  # at the beginning, in the middle and at the end


def measure_annotating(
    model: str | Path,
    work: str | Path,
    *,
    num_cells: int = 100_000,
    source: str | Path | None = None,
    batch_size: int = 32,
) -> dict[str, Any]:  # Any: JSON
    """Annotate a made file, killed once on the way, and return what was seen.

    Returns ``num_cells``; ``model_gigabytes``, resident once model and libraries are loaded; ``peak_gigabytes`` of the
    whole run and ``beside_model_gigabytes``, their difference; ``cells_per_second``; ``blocks_before_kill`` and
    ``blocks_kept``; ``is_order_kept``: cells and their columns are as in the file; ``num_checked`` and
    ``are_labels_the_same``: of cells annotated by themselves.

    Parameters
    ----------
    model
        Fine-tuned checkpoint.
    work
        Folder for the made file, which is made once, and the annotated one.
    num_cells
        Cells of the file; more than four blocks.
    source
        h5ad that cells are made from; the packaged pancreas when left out.
    batch_size
        Cells a forward pass.

    Raises
    ------
    ValueError
        There are too few cells to kill the run on the way.
    """
    if num_cells <= (BLOCKS_BEFORE_KILL + 1) * CELLS_PER_BLOCK:
        least = (BLOCKS_BEFORE_KILL + 1) * CELLS_PER_BLOCK
        raise ValueError(f"num_cells got {num_cells}; more than {least} are needed, to kill the run on the way")
    folder = Path(work)
    folder.mkdir(parents=True, exist_ok=True)
    cells, output = folder / f"{num_cells}-cells.h5ad", folder / "annotated.h5ad"
    if not cells.exists():
        make_many_cells(cells, num_cells, source=source)
    output.unlink(missing_ok=True)
    before_kill, kept = _annotate_and_kill(model, cells, output, batch_size)
    logger.info("killed after %d blocks, %d are kept", before_kill, kept)
    report = folder / "child.json"
    subprocess.run(_command(model, cells, output, batch_size, report), check=True)
    child = read_json(report)
    return {
        "num_cells": num_cells,
        "model_gigabytes": child["model_bytes"] / GIGABYTE,
        "peak_gigabytes": child["peak_bytes"] / GIGABYTE,
        "beside_model_gigabytes": (child["peak_bytes"] - child["model_bytes"]) / GIGABYTE,
        "cells_per_second": (num_cells - kept * CELLS_PER_BLOCK) / child["seconds"],
        "blocks_before_kill": before_kill,
        "blocks_kept": kept,
        "gene_space": child["gene_space"],
        **_check(model, cells, output),
    }


def _command(model: str | Path, cells: Path, output: Path, batch_size: int, report: Path) -> list[str]:
    given = ["--model", str(model), "--cells", str(cells), "--annotated", str(output), "--child", str(report)]
    return [sys.executable, "-m", "screformer.benchmarks.annotating", *given, "--batch-size", str(batch_size)]


def _annotate_and_kill(model: str | Path, cells: Path, output: Path, batch_size: int) -> tuple[int, int]:
    """Start, kill at once when a number of blocks are there; return how many were begun and how many are kept."""
    partial = output.with_name(output.name + FOLDER_SUFFIX)
    with subprocess.Popen(_command(model, cells, output, batch_size, output.with_suffix(".killed.json"))) as process:
        while process.poll() is None and len(list(partial.glob("*.npy"))) < BLOCKS_BEFORE_KILL:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    kept = len([path for path in partial.glob("*.npy") if not path.name.startswith(".")])
    return BLOCKS_BEFORE_KILL, kept


def _check(model: str | Path, cells: Path, output: Path) -> dict[str, Any]:
    """Return whether cells are in order, and labels those of the cells alone."""
    with h5py.File(cells, "r") as before, h5py.File(output, "r") as after:
        asked, written = (read_elem(file["obs"]) for file in (before, after))
    num_cells = len(written)
    starts = [0, num_cells // 2, num_cells - CHECKED_CELLS]
    trained = load_classifier(model)
    same = []
    for start in starts:
        backed = read_h5ad(cells, backed="r")
        alone = backed[start : start + CHECKED_CELLS].to_memory()
        backed.file.close()
        annotate(alone, trained, progress=False)
        own = alone.obs["screformer_cell_type"].astype(str).to_numpy()
        same.append((own == written["screformer_cell_type"].iloc[start : start + CHECKED_CELLS].astype(str)).all())
    return {
        "is_order_kept": written.index.equals(asked.index) and written[asked.columns.tolist()].equals(asked),
        "num_checked": len(starts) * CHECKED_CELLS,
        "are_labels_the_same": bool(all(same)),
    }


def _be_the_child(options: argparse.Namespace) -> None:
    trained = load_classifier(options.model)
    model_bytes = status_bytes("VmRSS")
    begin = time.monotonic()
    annotate_file(options.cells, trained, options.annotated, batch_size=options.batch_size)
    write_json(
        options.child,
        {
            "model_bytes": model_bytes,
            "peak_bytes": status_bytes("VmHWM"),
            "seconds": time.monotonic() - begin,
            "gene_space": trained.model.config.gene_space,
        },
    )


def write_annotating(found: dict[str, Any], folder: Path, *, command: str) -> None:
    """Write ``annotating.json``, ``.md`` and ``.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "question": "What does a large file cost to annotate, and a kill on the way?",
        "date": date.today().isoformat(),
        "command": command,
        "device": describe_device("cpu"),
        "versions": software_versions(),
        **found,
    }
    write_json(folder / "annotating.json", results)
    yes = {True: "yes", False: "NO"}
    rows = {
        "cells": f"{found['num_cells']:,}",
        "resident with the model loaded, GB": f"{found['model_gigabytes']:.2f}",
        "peak of the whole run, GB": f"{found['peak_gigabytes']:.2f}",
        "beside the model, GB": f"{found['beside_model_gigabytes']:.2f} (wanted under {WANTED_GIGABYTES:.0f})",
        "cells a second": f"{found['cells_per_second']:.0f} ({found['gene_space']} genes)",
        "killed when blocks were there": f"{found['blocks_before_kill']}; kept {found['blocks_kept']}",
        "names and types of cells in the file's order": yes[found["is_order_kept"]],
        "labels those of the cells alone": f"{yes[found['are_labels_the_same']]} ({found['num_checked']} cells)",
    }
    text = [
        "# A large file annotated",
        "",
        f"{results['question']} {results['date']}, `{command}`, {results['device']['threads']} threads, screformer "
        f"{results['versions']['screformer']}, torch {results['versions']['torch']}.",
        "",
        table(["", ""], list(rows.items())),
    ]
    (folder / "annotating.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    bars = {"model and libraries": found["model_gigabytes"], "beside them": found["beside_model_gigabytes"]}
    plot_bars({"resident memory, GB": bars}, folder / "annotating.png", title=f"{found['num_cells']:,} cells annotated")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, measure, and write JSON, table and figure."""
    parser = argparse.ArgumentParser(
        prog="screformer benchmark annotating",
        description="A large file annotated: memory, speed, order, and what a kill costs.",
        epilog="example: screformer benchmark annotating --model quickstart/checkpoint; half an hour",
    )
    parser.add_argument("--model", required=True, help="Fine-tuned checkpoint.")
    parser.add_argument("--num-cells", type=int, default=100_000, help="Cells of the file (default: %(default)s).")
    parser.add_argument("--source", help="h5ad that cells are made from (default: the packaged pancreas).")
    parser.add_argument("--batch-size", type=int, default=32, help="Cells a forward pass (default: %(default)s).")
    parser.add_argument("--work", default="runs/annotating", help="Folder for the files (default: %(default)s).")
    parser.add_argument("--output", default="benchmarks/results", help="Folder for the results (default: %(default)s).")
    for own in ("--cells", "--annotated", "--child"):
        parser.add_argument(own, help=argparse.SUPPRESS)
    given = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(given)
    if options.child:
        _be_the_child(options)
        return
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logger.setLevel(logging.INFO)
    try:
        found = measure_annotating(
            options.model,
            options.work,
            num_cells=options.num_cells,
            source=options.source,
            batch_size=options.batch_size,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    command = " ".join(["screformer benchmark annotating", *without_folders(given)])
    write_annotating(found, Path(options.output), command=command)
    logger.info("%s", json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
