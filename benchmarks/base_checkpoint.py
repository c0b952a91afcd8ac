"""A base checkpoint made and tested by one command, on a GPU machine without a network: `prepare`, `run`, `card`.

`prepare` packs what travels into one zip file. `run` pretrains for so many minutes on the parcel's cells, releases the
weights in bfloat16, and fine-tunes the released weights and new models of the same settings on sets of cells that
pretraining has not seen, beside logistic regression; ablations at this width, costs of steps, and scBERT follow.
Nothing is done twice, and after each part a few small files say everything: they can be brought back, looked at, and
given to a later run that goes on. `card` writes the model card from them.
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from screformer.benchmarks.base_checkpoint_report import write_checkpoint_card, write_checkpoint_report
from screformer.benchmarks.checkpoint_parcel import MAX_BYTES, open_parcel, prepare_parcel
from screformer.benchmarks.checkpoint_parts import (
    DEFAULTS,
    PARTS,
    RECIPES,
    RELEASE,
    CheckpointMaking,
    CheckpointOptions,
)
from screformer.benchmarks.comparison import provenance
from screformer.benchmarks.fine_tuning_runs import without_folders
from screformer.train.result_files import write_json, written_aside

logger = logging.getLogger("screformer.benchmarks.base_checkpoint")
Json = dict[str, Any]
MAX_FILES, MAX_FILE_BYTES = 8, 16 * 2**20
SECONDS_BETWEEN = 60
RESULTS, WEIGHTS, RUNS = "results.json", "checkpoint.zip", "runs.zip"


def make_base_checkpoint(
    parcel: str | Path,
    output: str | Path,
    *,
    work: str | Path,
    options: CheckpointOptions = DEFAULTS,
    earlier: str | Path | None = None,
    command: str = "make_base_checkpoint",
) -> Json:
    """Do the parts; after each, write into `output` what says everything, and return it at the end.

    Records of runs are written there every minute too, so that a run that is cut short loses the run in hand.

    `output` then has ``results.json``, ``checkpoint.zip`` (weights in bfloat16, with tokenizer and code), ``runs.zip``
    (the record of every run), ``report.md`` and ``curves.png``.

    Parameters
    ----------
    parcel
        Zip file of `prepare_parcel`.
    output
        Folder of at most eight files of 16 MiB.
    work
        Folder for everything else; what is in it is not done twice.
    options
        What to do. Parts that are not named are taken as they are, if they are there.
    earlier
        An `output` of an earlier run, whose work may be lost: its parts and runs are not done again.
    command
        What the result says that it was made by.

    Raises
    ------
    ValueError
        A part or the parcel is none, `work` has a checkpoint that was made otherwise, there is none to fine-tune, or a
        file is too large to be brought back.
    OSError
        A file is not there.
    """
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown or options.minutes <= 0 or options.seeds < 1:
        raise ValueError(
            f"parts got {list(options.parts)}, minutes {options.minutes}, seeds {options.seeds}; allowed are some of "
            f"{', '.join(PARTS)}, more than 0, and at least 1"
        )
    place, target = Path(work), Path(output)
    place.mkdir(parents=True, exist_ok=True)
    if earlier is not None:
        _unpack_earlier(Path(earlier), place)
    making = CheckpointMaking(open_parcel(parcel, place), place, options)
    results: Json = {
        "question": f"What is a {making.preset} checkpoint worth?",
        **provenance(command, use_cpu=options.use_cpu),
        "parcel": making.parcel.facts,
        "options": {**options._asdict(), "parts": list(options.parts), "ablations": list(options.ablations)},
        "parts": {},
    }
    for part in PARTS:
        if part in options.parts or making.result_of(part).exists():
            with _every_minute(partial(_bring_runs_back, making, target)):
                results["parts"][part] = making.do(part)
            _bring_back(results, making, target)
    return results


@contextmanager
def _every_minute(call: Callable[[], object]) -> Iterator[None]:
    """Call something every minute meanwhile: what is there when a run is cut short is not lost."""
    ended = threading.Event()

    def keep_calling() -> None:
        while not ended.wait(SECONDS_BETWEEN):
            try:
                call()
            except OSError as error:  # a full disk, or a file that was renamed meanwhile: again in a minute
                logger.warning("records were not brought back: %s", error)

    thread = threading.Thread(target=keep_calling, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _unpack_earlier(earlier: Path, work: Path) -> None:
    """Lay out what an earlier run has brought back.

    Raises
    ------
    FileNotFoundError
        The folder has nothing of one.
    ValueError
        A file of it is damaged.
    """
    found = {earlier / name: place for name, place in ((WEIGHTS, work / RELEASE), (RUNS, work))}
    if not any(path.exists() for path in found):
        raise FileNotFoundError(f"earlier: {earlier} has neither {WEIGHTS} nor {RUNS}; give the --output of a run")
    for path, place in found.items():
        if path.exists():
            try:
                with zipfile.ZipFile(path) as file:
                    file.extractall(place)
            except (zipfile.BadZipFile, zlib.error) as error:
                raise ValueError(f"earlier: {path} is damaged ({error}); bring it back again") from error


def _bring_back(results: Json, making: CheckpointMaking, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / RESULTS, results)
    if making.release.exists():
        _zip(target / WEIGHTS, making.release, making.release.rglob("*"))
    _bring_runs_back(making, target)
    write_checkpoint_report(results, target)
    files = list(target.iterdir())
    large = {path.name: path.stat().st_size for path in files if path.stat().st_size > MAX_FILE_BYTES}
    if large or len(files) > MAX_FILES:
        raise ValueError(
            f"output: {len(files)} files, of which too large: {large or 'none'}; at most {MAX_FILES} of "
            f"{MAX_FILE_BYTES / 2**20:.0f} MiB can be brought back. Everything is in {making.work}"
        )


def _bring_runs_back(making: CheckpointMaking, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    folders = ("results", "runs", "ablation_runs", "scbert_runs")
    records = [path for name in folders for path in (making.work / name).rglob("[!.]*.json")]  # no half-written ones
    kept = [path for record in records for path in (record, record.with_suffix(".npz"))]
    _zip(target / RUNS, making.work, [*kept, making.work / "plan.json"])


def _zip(path: Path, root: Path, files: Any) -> None:
    with written_aside(path) as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as file:
        for each in sorted(files):
            if each.is_file():
                file.write(each, each.relative_to(root).as_posix())


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    given = _make_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("screformer.benchmarks").setLevel(logging.INFO)
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = " ".join(["screformer benchmark checkpoint", *without_folders(arguments)])
    try:
        said = given.do(given, command)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(said + "\n")


def _prepare(given: argparse.Namespace, command: str) -> str:
    del command
    facts = prepare_parcel(
        given.cells,
        given.tests,
        given.output,
        preset=given.preset,
        work=given.work,
        data_sources=given.data_sources,
        max_bytes=int(given.max_mib * 2**20),
    )
    tested = sum(task["num_cells"] for task in facts["tasks"])
    return (
        f"{given.output}: {facts['num_bytes'] / 2**20:.1f} MiB, {facts['num_pretraining_cells']:,} cells that "
        f"pretrain, {facts['num_held_out_cells']:,} held out, {tested:,} that test"
    )


def _run(given: argparse.Namespace, command: str) -> str:
    options = CheckpointOptions(
        given.minutes, given.parts, given.seeds, given.use_cpu, given.gene_space, given.ablations
    )
    make_base_checkpoint(
        given.parcel, given.output, work=given.work, options=options, earlier=given.earlier, command=command
    )
    return Path(given.output, "report.md").read_text(encoding="utf-8")


def _card(given: argparse.Namespace, command: str) -> str:
    del command
    path = write_checkpoint_card(given.results, given.output, name=given.name, checkpoint=given.checkpoint)
    if given.checkpoint is None:
        return f"{path}"
    return f"{path}\n{given.checkpoint} can be shared: screformer publish {given.checkpoint} --to ORGANISATION/NAME"


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="screformer benchmark checkpoint",
        description="Make a base checkpoint and test it: pack what travels, run on a GPU machine, write the card.",
        epilog="example: screformer benchmark checkpoint prepare --cells gut.h5ad lines.h5ad --test "
        "pancreas.h5ad:cell_type:donor pbmc.h5ad -o parcel.zip; screformer benchmark checkpoint run --parcel "
        "parcel.zip -o brought_back; screformer benchmark checkpoint card --results brought_back",
    )
    commands = parser.add_subparsers(required=True, metavar="prepare | run | card")
    one = commands.add_parser("prepare", help="Pack cells, gene vectors and test sets into a zip file.")
    one.add_argument("--cells", nargs="+", required=True, help="Files of raw counts that pretrain.")
    one.add_argument(
        "--test", nargs="+", required=True, dest="tests", help="FILE[:LABELS[:DONORS]] of labelled cells that test."
    )
    one.add_argument("--preset", default="base", choices=list(RECIPES), help="(default: %(default)s)")
    one.add_argument("--data-sources", help="JSON: file name -> citation, origin, licence, for the card.")
    one.add_argument("--output", "-o", default="parcel.zip", help="Zip file (default: %(default)s).")
    one.add_argument("--work", default="runs/parcel", help="Folder for what goes into it (default: %(default)s).")
    one.add_argument("--max-mib", type=float, default=MAX_BYTES / 2**20, help="Its most (default: %(default)s).")
    one.set_defaults(do=_prepare)
    one = commands.add_parser("run", help="Pretrain, release, fine-tune, compare.")
    one.add_argument("--parcel", required=True, help="Zip file of prepare.")
    one.add_argument("--minutes", type=float, default=DEFAULTS.minutes, help="Of pretraining (default: %(default)s).")
    one.add_argument("--parts", nargs="+", default=list(PARTS), help=f"Some of {', '.join(PARTS)} (default: all).")
    one.add_argument("--seeds", type=int, default=DEFAULTS.seeds, help="Of fine-tuning (default: %(default)s).")
    one.add_argument("--gene-space", choices=["full", "expressed"], help="Instead of the preset's.")
    one.add_argument("--ablations", nargs="+", default=[], help="Names (default: all).")
    one.add_argument("--use-cpu", action="store_true", help="Even if there is a GPU.")
    one.add_argument("--earlier", help="Output of an earlier run that goes on here.")
    one.add_argument("--output", "-o", default="brought_back", help="Folder for the results (default: %(default)s).")
    one.add_argument("--work", default="runs/checkpoint", help="Folder for the rest (default: %(default)s).")
    one.set_defaults(do=_run)
    one = commands.add_parser("card", help="Write the model card from the results.")
    one.add_argument("--results", required=True, help="Output of run.")
    one.add_argument("--name", help="Of the model (default: screformer-PRESET).")
    one.add_argument("--output", "-o", default="model_cards", help="Folder (default: %(default)s).")
    one.add_argument("--checkpoint", help="Folder to unpack the checkpoint into, ready for `screformer publish`.")
    one.set_defaults(do=_card)
    return parser


if __name__ == "__main__":
    main()
