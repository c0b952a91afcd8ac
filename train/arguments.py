"""What a training run can be told, with the paper's defaults: flags, or one YAML file."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from screformer.train.sampler import BLOCK_SIZE, BUFFER_SIZE, Shuffling

GeneSpace = Literal["full", "expressed"]
Preset = Literal["tiny", "base", "large"]

# Shown by --help; every other field of TrainingArguments is accepted too, and shown by --help_all.
COMMON_TRAINING_ARGUMENTS = {
    "output_dir",
    "overwrite",
    "keep_checkpoints",
    "resume_from_checkpoint",
    "num_train_epochs",
    "max_steps",
    "batch_size",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "weight_decay",
    "lr_scheduler_type",
    "warmup_steps",
    "early_stopping_patience",
    "metric_for_best_model",
    "seed",
    "bf16",
    "use_cpu",
    "dataloader_num_workers",
    "logging_steps",
    "save_total_limit",
    "full_determinism",
    "report_to",
}
REMOVED_ARGUMENTS = {
    "warmup_ratio": "warmup_steps (a number below 1 is a ratio)",
    "evaluation_strategy": "eval_strategy",
    "overwrite_output_dir": "overwrite",
    "no_cuda": "use_cpu",
    "group_by_length": "train_sampling_strategy",
    "gradient_checkpointing": "activation_checkpointing",
}


@dataclass
class ModelArguments:
    """The model to start from: a checkpoint, or a new one."""

    _argument_group_name = "model"

    checkpoint: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a checkpoint to start from; without it a new model is made."},
    )
    preset: Preset | None = field(
        default=None,
        metadata={"help": "Size of a new model: tiny (a laptop), base (the paper's shape), large. Default: base."},
    )
    gene_space: GeneSpace | None = field(
        default=None,
        metadata={
            "help": "full: every gene, the paper's way; expressed: only genes with counts. Default: the config's."
        },
    )
    config_overrides: list[str] = field(
        default_factory=list,
        metadata={"help": "Fields of a new model's config, for example: hidden_size=64 num_hidden_layers=2."},
    )
    gene2vec: str | None = field(
        default=None,
        metadata={"help": "Gene vectors that a new model's gene embeddings start from; see `screformer gene2vec`."},
    )

    def __post_init__(self) -> None:
        """Raise ValueError where settings contradict each other."""
        if self.checkpoint is not None and self.gene2vec is not None:
            raise ValueError(
                f"gene2vec={self.gene2vec!r} is where a new model's gene embeddings start, but "
                f"checkpoint={self.checkpoint!r} brings its own; leave out one or the other"
            )
        if self.checkpoint is not None and (self.preset is not None or self.config_overrides):
            raise ValueError(
                f"checkpoint={self.checkpoint!r} fixes the shape of the model, but preset={self.preset!r} and "
                f"config_overrides={self.config_overrides} were given too; leave out one or the other"
            )

    def config_values(self) -> dict[str, Any]:
        """Return the overrides as field -> value.

        Raises
        ------
        ValueError
            An override is not ``name=value``.
        """
        values = {}
        for item in self.config_overrides:
            name, is_pair, text = item.partition("=")
            if not is_pair:
                raise ValueError(f"config_overrides must be name=value pairs, got {item!r}; for example num_hashes=2")
            values[name.strip()] = yaml.safe_load(text)
        if self.gene_space is not None:
            values["gene_space"] = self.gene_space
        return values


@dataclass
class PretrainingDataArguments:
    """The cells of pretraining and how they are masked (paper, sections 2.6 and 2.7)."""

    _argument_group_name = "cells"

    corpus: str = field(metadata={"help": "Corpus folder, as `screformer corpus` makes it."})
    held_out_fraction: float = field(
        default=0.1,
        metadata={
            "help": "Share of the cells whose loss decides when to stop, never trained on; a corpus's own split wins."
        },
    )
    masked_fraction: float = field(default=0.15, metadata={"help": "Share of a cell's expressed genes to predict."})
    replace_probability: float = field(
        default=0.9, metadata={"help": "Share of these that the model sees as [MASK]; the others keep their bin."}
    )
    gene_dropout: float = field(
        default=0.0,
        metadata={"help": "Expected share of a training cell's expressed genes to remove; saves as much time."},
    )
    group_column: str | None = field(
        default=None, metadata={"help": "Column that exclude_groups names groups of, for example donor."}
    )
    exclude_groups: list[str] = field(
        default_factory=list,
        metadata={"help": "Groups to leave out, for example the donors that a fine-tuned model will be tested on."},
    )

    def __post_init__(self) -> None:
        """Raise ValueError where settings contradict each other."""
        if (self.group_column is None) != (not self.exclude_groups):
            raise ValueError(
                f"group_column={self.group_column!r} and exclude_groups={self.exclude_groups} go together: for example "
                "--group_column donor --exclude_groups human4"
            )


@dataclass
class FineTuningDataArguments:
    """The labelled cells of fine-tuning and how they are split (paper, section 2.5)."""

    _argument_group_name = "cells"

    corpus: str = field(metadata={"help": "Corpus folder, as `screformer corpus` makes it."})
    label_column: str = field(default="cell_type", metadata={"help": "Column of the corpus that holds the labels."})
    exclude_labels: list[str] = field(
        default_factory=list,
        metadata={"help": "Labels to leave out, for example: unknown doublet. Empty ones always are."},
    )
    group_column: str | None = field(
        default=None, metadata={"help": "Split by this column, for example donor. Without it: at random, stratified."}
    )
    test_groups: list[str] = field(default_factory=list, metadata={"help": "Groups that make up the test set."})
    validation_groups: list[str] = field(
        default_factory=list, metadata={"help": "Groups that make up the validation set. Default: a stratified slice."}
    )
    validation_fraction: float = field(
        default=0.2,
        metadata={"help": "Share for validation: of all cells, or of those outside the test groups."},
    )
    test_fraction: float = field(
        default=0.2, metadata={"help": "Share of all cells for testing, without group_column."}
    )
    gene_dropout: float = field(
        default=0.0, metadata={"help": "Augmentation: expected share of a training cell's expressed genes to remove."}
    )

    def __post_init__(self) -> None:
        """Raise ValueError where settings contradict each other."""
        if self.group_column is None and (self.test_groups or self.validation_groups):
            raise ValueError(
                f"test_groups={self.test_groups} and validation_groups={self.validation_groups} need group_column, "
                "the column that names each cell's group, for example donor"
            )
        if self.group_column is not None and not self.test_groups:
            raise ValueError(
                f"group_column={self.group_column!r} needs test_groups, the groups to test on, for example "
                "--test_groups human4"
            )


_OUTPUT_HELP = {"help": "Folder for the checkpoint and the results; an interrupted run in it is resumed."}


def _help_of(name: str) -> Mapping[str, Any]:  # Any: as dataclasses has it
    """Return the help text of a field of TrainingArguments whose default changes."""
    return TrainingArguments.__dataclass_fields__[name].metadata


@dataclass
class ScReformerTrainingArguments(TrainingArguments):
    """What pretraining and fine-tuning share: AdamW, linear schedule, 10% warm-up, seed 2022 (paper, section 2.9)."""

    _argument_group_name = "training"

    learning_rate: float = field(default=1e-4, metadata=_help_of("learning_rate"))
    warmup_steps: float = field(default=0.1, metadata=_help_of("warmup_steps"))
    eval_strategy: IntervalStrategy | str = field(default="epoch", metadata=_help_of("eval_strategy"))
    save_strategy: SaveStrategy | str = field(default="epoch", metadata=_help_of("save_strategy"))
    save_total_limit: int | None = field(default=1, metadata=_help_of("save_total_limit"))
    load_best_model_at_end: bool = field(default=True, metadata=_help_of("load_best_model_at_end"))
    logging_steps: float = field(default=0.01, metadata=_help_of("logging_steps"))
    # HfArgumentParser reads this union only in this order.
    report_to: None | str | list[str] = field(default="none", metadata=_help_of("report_to"))  # noqa: RUF036
    # The collator needs every column; the default would drop gene_ids and labels.
    remove_unused_columns: bool | None = field(default=False, metadata=_help_of("remove_unused_columns"))
    # Every parameter is used in every step; looking for unused ones only costs time.
    ddp_find_unused_parameters: bool | None = field(default=False, metadata=_help_of("ddp_find_unused_parameters"))
    # Else the patience would start anew with every interruption.
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata=_help_of("restore_callback_states_from_checkpoint")
    )
    seed: int = field(default=2022, metadata=_help_of("seed"))
    shuffle_block_size: int = field(
        default=BLOCK_SIZE,
        metadata={"help": "Consecutive cells that are read together, from a random place; 1 is a full shuffle."},
    )
    shuffle_buffer_size: int = field(
        default=BUFFER_SIZE, metadata={"help": "Cells, in such blocks, that are shuffled among each other."}
    )
    early_stopping_patience: int = field(
        default=5, metadata={"help": "Evaluations without improvement after which training stops; 0: never stop early."}
    )
    batch_size: Literal["auto"] | None = field(
        default=None,
        metadata={
            "help": "auto: the largest batches that fit into free memory and divide the cells of an optimizer step "
            "(per_device_train_batch_size x gradient_accumulation_steps), whose number stays. Default: as given there."
        },
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Start over: delete the checkpoints and results of an earlier run in output_dir."},
    )
    keep_checkpoints: bool = field(
        default=False,
        metadata={"help": "Keep the checkpoint-* folders (with optimizer state) after the run has finished."},
    )

    def __post_init__(self) -> None:
        """Pin memory only where there is a GPU to copy it to; raise ValueError for a size that cannot be."""
        super().__post_init__()
        self.shuffling  # noqa: B018 - checks its sizes
        if self.batch_size not in (None, "auto"):
            raise ValueError(
                f"batch_size got {self.batch_size!r}; 'auto' is allowed. A number of cells is "
                "per_device_train_batch_size"
            )
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False

    @property
    def shuffling(self) -> Shuffling:
        """How training cells are shuffled."""
        seed = self.seed if self.data_seed is None else self.data_seed
        return Shuffling(self.shuffle_block_size, self.shuffle_buffer_size, seed)


@dataclass
class PretrainingArguments(ScReformerTrainingArguments):
    """Defaults of pretraining: up to 50 epochs, stop after 5 without a better held-out loss (paper, section 2.7).

    The paper names no learning rate for pretraining; that of fine-tuning is taken.
    """

    output_dir: str | None = field(default="pretrained", metadata=_OUTPUT_HELP)
    num_train_epochs: float = field(default=50.0, metadata=_help_of("num_train_epochs"))
    per_device_train_batch_size: int = field(default=64, metadata=_help_of("per_device_train_batch_size"))
    per_device_eval_batch_size: int = field(default=64, metadata=_help_of("per_device_eval_batch_size"))
    metric_for_best_model: str | None = field(default="eval_loss", metadata=_help_of("metric_for_best_model"))
    # Predictions of all held-out genes do not fit into memory; they are counted batch by batch.
    batch_eval_metrics: bool = field(default=True, metadata=_help_of("batch_eval_metrics"))


@dataclass
class FineTuningArguments(ScReformerTrainingArguments):
    """Defaults of fine-tuning: batch 6 x 60 steps, 3 epochs, stop after 1 without better validation accuracy (2.9)."""

    output_dir: str | None = field(default="finetuned", metadata=_OUTPUT_HELP)
    num_train_epochs: float = field(default=3.0, metadata=_help_of("num_train_epochs"))
    per_device_train_batch_size: int = field(default=6, metadata=_help_of("per_device_train_batch_size"))
    per_device_eval_batch_size: int = field(default=32, metadata=_help_of("per_device_eval_batch_size"))
    gradient_accumulation_steps: int = field(default=60, metadata=_help_of("gradient_accumulation_steps"))
    metric_for_best_model: str | None = field(default="eval_accuracy", metadata=_help_of("metric_for_best_model"))
    early_stopping_patience: int = field(
        default=1, metadata={"help": "Evaluations without improvement after which training stops; 0: never stop early."}
    )


def parse_arguments(
    argument_types: Sequence[type],
    argv: Sequence[str] | None = None,
    *,
    program: str,
    description: str,
    example: str,
) -> tuple[Any, ...]:  # Any: one instance of each of argument_types
    """Return one filled dataclass of each type, from flags and at most one YAML file.

    A first argument that ends in ``.yaml`` or ``.yml`` is a file of ``name: value`` lines; flags after it win. Wrong or
    unknown names end the program with a message, as argparse does.

    Parameters
    ----------
    argument_types
        Dataclasses as `HfArgumentParser` takes them.
    argv
        Arguments without the program's name; default ``sys.argv[1:]``.
    program, description, example
        What ``--help`` shows.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(
        list(argument_types),
        prog=program,
        usage=f"{program} [CONFIG.yaml] [options]",
        description=description,
        epilog=f"examples:\n{example}\n\nA YAML file has the same names, one `name: value` a line.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--help_all", "--help-all", action="store_true", help="Show every training argument, and exit.")
    if "--help_all" not in arguments and "--help-all" not in arguments:
        _hide_rare_training_arguments(parser)
    else:
        arguments = ["--help"]
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        arguments = [*_flags_of_yaml(parser, Path(arguments[0])), *arguments[1:]]
    _, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(_explain_unknown(unknown, parser))
    try:
        filled = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except ValueError as error:
        parser.error(str(error))
    return tuple(filled[: len(argument_types)])


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the examples line by line."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if (
            action.default is None
            or action.default == []
            or action.nargs == 0
            or action.option_strings[0].startswith("--no_")
        ):
            return action.help
        return super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # One spelling an option; the other, with hyphens, is accepted too.
        if not action.option_strings or action.nargs == 0:
            return ", ".join(action.option_strings)
        if action.choices is not None:
            return f"{action.option_strings[0]} {'|'.join(map(str, action.choices))}"
        return f"{action.option_strings[0]} {self._format_args(action, action.dest.upper())}"


def _hide_rare_training_arguments(parser: argparse.ArgumentParser) -> None:
    rare = {item.name for item in fields(TrainingArguments)} - COMMON_TRAINING_ARGUMENTS
    for action in parser._actions:
        if action.dest in rare:
            action.help = argparse.SUPPRESS


def _flags_of_yaml(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    """Return the file's settings as flags, so that their types are checked like those of flags."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"cannot read {path}: {error}")
    if not isinstance(settings, dict):
        parser.error(f"{path} must hold `name: value` lines, got {type(settings).__name__}")
    flags: list[str] = []
    for name, value in settings.items():
        if value is None or value == []:
            continue
        flags.append(f"--{name}")
        if name == "config_overrides" and isinstance(value, dict):
            value = [f"{key}={json.dumps(item)}" for key, item in value.items()]
        if isinstance(value, dict):
            value = json.dumps(value)
        flags.extend(map(str, value) if isinstance(value, list) else [str(value)])
    return flags


def _explain_unknown(unknown: Sequence[str], parser: argparse.ArgumentParser) -> str:
    known = sorted({option[2:] for action in parser._actions for option in action.option_strings if option[:2] == "--"})
    messages = []
    # The values of an unknown flag are unknown too, and not worth a message.
    flags = [argument for argument in unknown if argument.startswith("--")]
    for argument in flags or unknown:
        name = argument.lstrip("-").partition("=")[0].replace("-", "_")
        if not argument.startswith("--"):
            messages.append(f"{argument!r} belongs to no argument")
        elif name in REMOVED_ARGUMENTS:
            messages.append(f"--{name} is now --{REMOVED_ARGUMENTS[name]}")
        else:
            near = difflib.get_close_matches(name, known, n=1)
            messages.append(f"--{name} is unknown" + (f"; did you mean --{near[0]}?" if near else ""))
    return "; ".join(messages)
