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
import shutil
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from screformer.benchmarks.ablation_costs import COST_LIMITS, COSTS, measure_costs
from screformer.benchmarks.ablations import Settings, run_ablations
from screformer.benchmarks.base_checkpoint_report import write_checkpoint_card, write_checkpoint_report
from screformer.benchmarks.checkpoint_parcel import MAX_BYTES, Parcel, open_parcel, prepare_parcel
from screformer.benchmarks.comparison import SPLIT_SEED, provenance, run_systems
from screformer.benchmarks.fine_tuning_runs import (
    LOGISTIC_REGRESSION,
    REGRESSION,
    Run,
    System,
    Width,
    do_runs,
    without_folders,
)
from screformer.benchmarks.fine_tuning_tasks import Task
from screformer.benchmarks.labelled_data import LabelledData, read_labelled_data
from screformer.benchmarks.pretraining import pretrain_by
from screformer.benchmarks.pretraining_report import summarize_pretraining
from screformer.benchmarks.protocol import Kind, make_folds
from screformer.benchmarks.system_scbert import ScBert
from screformer.modeling_screformer import ScReformerForMaskedLM
from screformer.train.result_files import read_json, write_json, written_aside
from screformer.train.training_run import METRICS_FILE, TrainingResult

logger = logging.getLogger("screformer.benchmarks.base_checkpoint")
Json = dict[str, Any]
PARTS = ("pretraining", "fine_tuning", "ablations", "costs", "scbert")
MAX_FILES, MAX_FILE_BYTES = 8, 16 * 2**20
PILOT_STEPS = (3, 15)
NUM_EVALUATIONS = 10
SECONDS_BETWEEN = 60
RESULTS, WEIGHTS, RUNS, RELEASE = "results.json", "checkpoint.zip", "runs.zip", "release"
CHECKPOINT = "checkpoint"
# Each pair differs in what it starts from alone.
TWINS = (("pretrained", "scratch"), ("paper_pretrained", "paper_scratch"))


class Recipe(NamedTuple):
    """How a preset is trained.

    Attributes
    ----------
    gene_space
        ``"full"`` or ``"expressed"``.
    pretraining, paper
        Arguments of `screformer pretrain`, and of `screformer finetune` for the paper's classifier.
    ablations
        Of all ablations.
    """

    gene_space: str
    pretraining: str
    paper: str
    ablations: Settings


RECIPES = {
    "base": Recipe(
        "full",
        "pretrain-paper --bf16 True --full_determinism False",
        "finetune-paper --class_weights balanced --bf16 True --full_determinism False --early_stopping_patience 0",
        Settings("base", "full", 0, 1e-4, 3, 5),
    ),
    "tiny": Recipe(
        "expressed",
        "pretrain-tiny --gene_start random",
        "--class_weights balanced --gene_dropout 0.75 --learning_rate 1e-3 --max_steps 100",
        Settings(),
    ),
}


class CheckpointOptions(NamedTuple):
    """What a run does.

    Attributes
    ----------
    minutes
        Of pretraining.
    parts
        Some of `PARTS`.
    seeds
        Of each fold and system of fine-tuning.
    use_cpu
        Even if there is a GPU.
    gene_space
        Instead of the recipe's.
    ablations
        Names, see `screformer benchmark ablations`; default all.
    """

    minutes: float = 10.0
    parts: Sequence[str] = PARTS
    seeds: int = 1
    use_cpu: bool = False
    gene_space: str | None = None
    ablations: Sequence[str] = ()


DEFAULTS = CheckpointOptions()


class CheckpointMaking:
    """The parts of a run, one after the other, in a folder.

    Parameters
    ----------
    parcel
        What it is made of.
    work
        Folder for everything.
    options
        What to do.
    """

    def __init__(self, parcel: Parcel, work: Path, options: CheckpointOptions) -> None:
        self.parcel, self.work, self.options = parcel, work, options
        self.preset = parcel.facts["preset"]
        self.recipe = RECIPES[self.preset]
        self.gene_space = options.gene_space or self.recipe.gene_space
        self.release = work / RELEASE

    def result_of(self, part: str) -> Path:
        """Return where a part's result is kept."""
        return self.work / "results" / f"{part}.json"

    def do(self, part: str) -> Json:
        """Return a part's result, of an earlier run if there is one."""
        path = self.result_of(part)
        if path.exists() and (part != "pretraining" or (self.release / "config.json").exists()):
            logger.info("%s: done before", part)
        else:
            doers: dict[str, Callable[[], Json]] = {
                "pretraining": self._pretrain,
                "fine_tuning": self._fine_tune,
                "ablations": self._ablate,
                "costs": self._measure_costs,
                "scbert": self._run_scbert,
            }
            logger.info("%s", part)
            write_json(path, doers[part]())
        found: Json = read_json(path)
        return found

    def _pretrain(self) -> Json:
        steps, seconds = self._plan_steps()
        every = max(1, round(60 / seconds))
        given = (
            f"--disable_tqdm False --save_strategy steps --save_steps {every} --save_total_limit 1 "
            f"--eval_strategy steps --eval_steps {max(1, steps // NUM_EVALUATIONS)}"
        )
        trained = self._run_pretraining("pretrained", given, steps)
        _release(trained.output_dir, self.release)
        # One step at a rate of 0: what the released weights, which are rounded, make of the held-out cells.
        again = self._run_pretraining("rescored", "--learning_rate 0 --eval_strategy no", 1, checkpoint=self.release)
        scores = {name: value for name, value in again.metrics.items() if name.startswith("held_out_")}
        write_json(self.release / METRICS_FILE, {**trained.metrics, **scores})
        return {
            "recipe": self.recipe.pretraining,
            "gene_space": self.gene_space,
            "minutes_asked": self.options.minutes,
            "seconds_a_step_before": seconds,
            "metrics": {**trained.metrics, **scores},
            "held_out_loss_before_rounding": trained.metrics["held_out_loss"],
            "history": read_json(trained.output_dir / "log_history.json"),
        }

    def _plan_steps(self) -> tuple[int, float]:
        """Return how many steps the minutes hold, by two short runs, and the seconds of one; kept for a run resumed."""
        path = self.work / "plan.json"
        if not path.exists():
            took = [
                self._run_pretraining(
                    f"pilot{steps}", "--save_strategy no --eval_strategy no --overwrite True", steps
                ).metrics["training_seconds"]
                for steps in PILOT_STEPS
            ]
            seconds = max((took[1] - took[0]) / (PILOT_STEPS[1] - PILOT_STEPS[0]), took[1] / PILOT_STEPS[1] / 10)
            write_json(path, {"steps": max(1, int(60 * self.options.minutes / seconds)), "seconds_a_step": seconds})
        plan = read_json(path)
        logger.info("pretraining: %d steps of %.2f s", plan["steps"], plan["seconds_a_step"])
        return plan["steps"], plan["seconds_a_step"]

    def _run_pretraining(
        self, folder: str, more: str, max_steps: int, *, checkpoint: Path | None = None
    ) -> TrainingResult:
        start = ["--checkpoint", str(checkpoint), "--per_device_eval_batch_size", "32"]
        if checkpoint is None:
            start = [*self.recipe.pretraining.split(), "--preset", self.preset]
            start += ["--gene2vec", str(self.parcel.gene_vectors)]
        given = [
            *start,
            *("--corpus", str(self.parcel.corpus), "--output_dir", str(self.work / folder)),
            *("--gene_space", self.gene_space, "--max_steps", str(max_steps), "--use_cpu", str(self.options.use_cpu)),
            *["--load_best_model_at_end", "False", "--early_stopping_patience", "0", "--disable_tqdm", "True"],
            *more.split(),
        ]
        return pretrain_by(given)

    def _fine_tune(self) -> Json:
        width = Width(self.preset, self.gene_space, self.options.use_cpu)
        systems = {
            REGRESSION: LOGISTIC_REGRESSION,
            "pretrained": System("finetune-small, from the checkpoint", "finetune-small", CHECKPOINT),
            "scratch": System("finetune-small, from nothing", "finetune-small"),
            "paper_pretrained": System("Paper's classifier, from the checkpoint", self.recipe.paper, CHECKPOINT),
            "paper_scratch": System("Paper's classifier, from nothing", self.recipe.paper),
        }
        compared = [*TWINS, *((name, REGRESSION) for name in systems if name != REGRESSION)]
        titles = {name: system.title for name, system in systems.items()}
        runs = {
            task.name: [
                self._run_of(task, groups, name, system, seed, width)
                for name, system in systems.items()
                for seed in range(1 if name == REGRESSION else self.options.seeds)
                for groups in task.folds()
            ]
            for task in self.parcel.tasks
        }
        workers = None if self.options.use_cpu or not torch.cuda.is_available() else 1
        every = do_runs([run for own in runs.values() for run in own], workers, logger)
        return {
            "arguments": {name: system.arguments for name, system in systems.items()},
            "titles": titles,
            "twins": [list(pair) for pair in TWINS],
            "tasks": {
                task: summarize_pretraining([run for run in every if run["task"] == task], titles, compared)
                for task in runs
            },
        }

    def _run_of(self, task: Task, groups: tuple[str, ...], name: str, system: System, seed: int, width: Width) -> Run:
        checkpoint = None if system.pretraining is None else str(self.release)
        return Run(task, groups, name, system, seed, str(self.work), checkpoint, width=width)

    def _labelled(self, task: Task) -> tuple[LabelledData, Kind]:
        column = None if task.group_column == "fold" else task.group_column
        data = read_labelled_data(
            task.cells, label_column=task.label_column, group_column=column, exclude_labels=task.rare_labels
        )
        return data, "five_fold" if column is None else "leave_one_group_out"

    def _ablate(self) -> Json:
        data, kind = self._labelled(self.parcel.tasks[0])
        return run_ablations(
            data,
            kind=kind,
            settings=self.recipe.ablations,
            names=self.options.ablations,
            output=self.work / "ablations",
            work=self.work / "ablation_runs",
        )

    def _measure_costs(self) -> Json:
        limits = COST_LIMITS
        if torch.cuda.is_available() and not self.options.use_cpu:
            all_of_it = torch.cuda.get_device_properties(0).total_memory / 1e9
            limits = replace(COST_LIMITS, device="cuda", memory_limit=all_of_it)
        return {"steps": measure_costs(list(COSTS), limits=limits)}

    def _run_scbert(self) -> Json:
        """Train scBERT on every gene, or its toy where there is no GPU, on the first fold of each set."""
        has_gpu = torch.cuda.is_available() and not self.options.use_cpu
        make = (lambda: ScBert.as_in_paper(epochs=5)) if has_gpu else ScBert
        runs: list[Json] = []
        for task in self.parcel.tasks:
            data, kind = self._labelled(task)
            folds = make_folds(data, kind, seed=SPLIT_SEED)[:1]
            own, left_out = run_systems(data, {"scbert": make}, folds, seeds=1, work=self.work / "scbert_runs")
            runs += own
            if left_out:
                return {"left_out": left_out, "runs": []}
        return {"left_out": {}, "runs": runs}


def _release(trained: Path, release: Path) -> None:
    """Copy a checkpoint, its parameters rounded to bfloat16; buffers, by which genes are hashed, stay as they are."""
    aside = release.with_name(f"{release.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(trained, aside, ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
    parameters = {name for name, _ in ScReformerForMaskedLM.from_pretrained(trained).named_parameters()}
    for path in aside.glob("model*.safetensors"):
        values = load_file(path)
        rounded = {name: one.bfloat16() if name in parameters else one for name, one in values.items()}
        save_file(rounded, path, metadata={"format": "pt"})
    for path in aside.glob("*.json"):  # where the files lay says nothing to others
        path.write_text(path.read_text(encoding="utf-8").replace(f"{trained.parent}/", ""), encoding="utf-8")
    shutil.rmtree(release, ignore_errors=True)
    aside.rename(release)


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
        What to do.
    earlier
        An `output` of an earlier run, whose work may be lost: its parts and runs are not done again.
    command
        What the result says that it was made by.

    Raises
    ------
    ValueError
        A part or the parcel is none, or a file is too large to be brought back.
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
        "question": f"What is a {making.preset} checkpoint worth that was pretrained for {options.minutes:g} minutes?",
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
            call()

    thread = threading.Thread(target=keep_calling, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _unpack_earlier(earlier: Path, work: Path) -> None:
    for name, place in ((WEIGHTS, work / RELEASE), (RUNS, work)):
        path = earlier / name
        if path.exists():
            with zipfile.ZipFile(path) as file:
                file.extractall(place)


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
    records = [path for name in folders for path in (making.work / name).rglob("*.json")]
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
    return f"{write_checkpoint_card(given.results, given.output, name=given.name)}"


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
    one.set_defaults(do=_card)
    return parser


if __name__ == "__main__":
    main()
