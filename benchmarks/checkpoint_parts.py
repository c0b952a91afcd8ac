"""The parts of making a base checkpoint: pretraining, fine-tuning beside its twin, ablations, costs, scBERT."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from screformer.benchmarks.ablation_costs import COST_LIMITS, COSTS, measure_costs
from screformer.benchmarks.ablations import Settings, run_ablations
from screformer.benchmarks.checkpoint_parcel import Parcel
from screformer.benchmarks.comparison import SPLIT_SEED, provenance, run_systems
from screformer.benchmarks.fine_tuning_runs import (
    LOGISTIC_REGRESSION,
    REGRESSION,
    Run,
    System,
    Width,
    chosen_device,
    do_runs,
)
from screformer.benchmarks.fine_tuning_tasks import Task
from screformer.benchmarks.labelled_data import LabelledData, read_labelled_data
from screformer.benchmarks.pretraining import pretrain_by
from screformer.benchmarks.pretraining_report import summarize_pretraining
from screformer.benchmarks.protocol import Kind, make_folds
from screformer.benchmarks.system_scbert import ScBert
from screformer.modeling_screformer import ScReformerForMaskedLM
from screformer.train.result_files import hash_weights, read_json, write_json
from screformer.train.training_run import METRICS_FILE, TrainingResult

logger = logging.getLogger("screformer.benchmarks.checkpoint_parts")
Json = dict[str, Any]
PARTS = ("pretraining", "fine_tuning", "ablations", "costs", "scbert")
PILOT_STEPS = (3, 15)
NUM_EVALUATIONS = 10
RELEASE, CHECKPOINT = "release", "checkpoint"
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
    precision
        Arguments of both of them.
    ablations
        Of all ablations.
    """

    gene_space: str
    pretraining: str
    paper: str
    precision: str
    ablations: Settings


RECIPES = {
    "base": Recipe(
        "full",
        "pretrain-paper",
        "finetune-paper --class_weights balanced --early_stopping_patience 0",
        "--bf16 True --full_determinism False",
        Settings("base", "full", 0, 1e-4, 3, 5),
    ),
    "tiny": Recipe(
        "expressed",
        "pretrain-tiny --gene_start random",
        "--class_weights balanced --gene_dropout 0.75 --learning_rate 1e-3 --max_steps 100",
        "",
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
        """Return a part's result, of an earlier run if that was asked for the same.

        Raises
        ------
        ValueError
            The pretraining that is there was asked for otherwise, or there is none to fine-tune.
        """
        path, asked = self.result_of(part), self._asked(part)
        there = read_json(path) if path.exists() else None
        is_whole = there is not None and there["asked"] == asked and not there.get("left_out")
        if there is not None and (is_whole or part not in self.options.parts):
            logger.info("%s: done before", part)
            return dict(there)
        if there is not None and part == "pretraining":
            differing = {name: (there["asked"][name], value) for name, value in asked.items()}
            told = ", ".join(f"{name} {old!r}, now {new!r}" for name, (old, new) in differing.items() if old != new)
            raise ValueError(f"work: {self.work} has a checkpoint that was made with {told}; choose another folder")
        if part == "fine_tuning" and not (self.release / "config.json").exists():
            raise ValueError(
                f"parts: there is no checkpoint in {self.work} to fine-tune; add pretraining to the parts, or give the "
                "output of an earlier run (--earlier)"
            )
        doers: dict[str, Callable[[], Json]] = {
            "pretraining": self._pretrain,
            "fine_tuning": self._fine_tune,
            "ablations": self._ablate,
            "costs": self._measure_costs,
            "scbert": self._run_scbert,
        }
        logger.info("%s", part)
        made = {key: provenance(part, use_cpu=self.options.use_cpu)[key] for key in ("date", "device", "versions")}
        write_json(path, {"asked": asked, "made": made, **doers[part]()})
        found: Json = read_json(path)
        return found

    def _asked(self, part: str) -> Json:
        """Return what a part's result depends on."""
        if part == "pretraining":
            return {
                "preset": self.preset,
                "gene_space": self.gene_space,
                "recipe": f"{self.recipe.pretraining} {self.recipe.precision}".strip(),
                "minutes": self.options.minutes,
            }
        if part == "ablations":  # which take a GPU wherever there is one
            names, settings = list(self.options.ablations), list(self.recipe.ablations)
            return {"names": names, "settings": settings, "device": chosen_device(use_cpu=False)}
        asked: Json = {"device": chosen_device(use_cpu=self.options.use_cpu)}
        if part == "fine_tuning":
            asked |= {
                "seeds": self.options.seeds,
                "gene_space": self.gene_space,
                "arguments": {name: system.arguments for name, system in self._systems().items()},
                "weights_sha256": hash_weights(self.release) if self.release.exists() else None,
            }
        return asked

    def _systems(self) -> dict[str, System]:
        """Return what fine-tuning compares."""
        paper = f"{self.recipe.paper} {self.recipe.precision}".strip()
        return {
            REGRESSION: LOGISTIC_REGRESSION,
            "pretrained": System("finetune-small, from the checkpoint", "finetune-small", CHECKPOINT),
            "scratch": System("finetune-small, from nothing", "finetune-small"),
            "paper_pretrained": System("Paper's classifier, from the checkpoint", paper, CHECKPOINT),
            "paper_scratch": System("Paper's classifier, from nothing", paper),
        }

    def _pretrain(self) -> Json:
        steps, seconds = self._plan_steps()
        every = max(1, round(60 / seconds))
        given = (
            f"--disable_tqdm False --save_strategy steps --save_steps {every} --save_total_limit 1 "
            f"--eval_strategy steps --eval_steps {max(1, steps // NUM_EVALUATIONS)}"
        )
        trained = self._run_pretraining("pretrained", given, steps)
        round_weights(trained.output_dir, self.release)
        # One step at a rate of 0: what the released weights, which are rounded, make of the held-out cells.
        again = self._run_pretraining("rescored", "--learning_rate 0 --eval_strategy no", 1, checkpoint=self.release)
        scores = {name: value for name, value in again.metrics.items() if name.startswith("held_out_")}
        write_json(self.release / METRICS_FILE, {**trained.metrics, **scores})
        return {
            "seconds_a_step_before": seconds,
            "metrics": {**trained.metrics, **scores},
            "held_out_loss_before_rounding": trained.metrics["held_out_loss"],
            "history": read_json(trained.output_dir / "log_history.json"),
        }

    def _plan_steps(self) -> tuple[int, float]:
        """Return how many steps the minutes hold, by two short runs, and the seconds of one; kept for a run resumed.

        Raises
        ------
        ValueError
            A pretraining that was begun otherwise is there.
        """
        path = self.work / "plan.json"
        asked = {**self._asked("pretraining"), "use_cpu": self.options.use_cpu}
        there = read_json(path) if path.exists() else None
        before = asked if there is None else there.get("asked", asked)
        if before != asked and (self.work / "pretrained").exists():
            raise ValueError(
                f"work: {self.work} has a pretraining that was begun with {before}, not {asked}; choose "
                "another folder, or ask for the same"
            )
        if there is None or before != asked:
            took = [
                self._run_pretraining(
                    f"pilot{steps}", "--save_strategy no --eval_strategy no --overwrite True", steps
                ).metrics["training_seconds"]
                for steps in PILOT_STEPS
            ]
            seconds = max((took[1] - took[0]) / (PILOT_STEPS[1] - PILOT_STEPS[0]), took[1] / PILOT_STEPS[1] / 10)
            steps = max(1, int(60 * self.options.minutes / seconds))
            write_json(path, {"steps": steps, "seconds_a_step": seconds, "asked": asked})
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
            *self.recipe.precision.split(),
            *("--gene_space", self.gene_space, "--max_steps", str(max_steps), "--use_cpu", str(self.options.use_cpu)),
            *["--load_best_model_at_end", "False", "--early_stopping_patience", "0", "--disable_tqdm", "True"],
            *more.split(),
        ]
        return pretrain_by(given)

    def _fine_tune(self) -> Json:
        width = Width(self.preset, self.gene_space, self.options.use_cpu)
        systems = self._systems()
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
        workers = 1 if chosen_device(use_cpu=self.options.use_cpu) == "cuda" else None
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
        if chosen_device(use_cpu=self.options.use_cpu) == "cuda":
            all_of_it = torch.cuda.get_device_properties(0).total_memory / 1e9
            limits = replace(COST_LIMITS, device="cuda", memory_limit=all_of_it)
        return {"steps": measure_costs(list(COSTS), limits=limits)}

    def _run_scbert(self) -> Json:
        """Train scBERT on every gene, or its toy where there is no GPU, on the first fold of each set."""
        has_gpu = chosen_device(use_cpu=self.options.use_cpu) == "cuda"
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


def round_weights(trained: Path, release: Path) -> None:
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
