"""The command line of a training run: flags, and before them the name of a recipe or of a YAML file."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from screformer.train.recipes import Task, find_recipe, list_recipes

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
    "label_smoothing_factor",
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


def parse_arguments(
    argument_types: Sequence[type],
    argv: Sequence[str] | None = None,
    *,
    program: str,
    description: str,
    example: str,
    recipes: Task | None = None,
) -> tuple[Any, ...]:  # Any: one instance of each of argument_types
    """Return one filled dataclass of each type, from flags and at most one YAML file.

    A first argument that ends in ``.yaml`` or ``.yml`` is a file of ``name: value`` lines, one that names a recipe is
    the recipe's file; flags after it win. Wrong or unknown names end the program with a message, as argparse does.

    Parameters
    ----------
    argument_types
        Dataclasses as `HfArgumentParser` takes them.
    argv
        Arguments without the program's name; default ``sys.argv[1:]``.
    program, description, example
        What ``--help`` shows.
    recipes
        The task whose recipes may be named, and are shown by ``--help``; default: none.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(
        list(argument_types),
        prog=program,
        usage=f"{program} [{'' if recipes is None else 'RECIPE | '}CONFIG.yaml] [options]",
        description=description,
        epilog=_epilog(example, recipes),
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
    elif arguments and recipes is not None and not arguments[0].startswith("-"):
        try:
            path = find_recipe(arguments[0], recipes)
        except ValueError as error:
            parser.error(str(error))
        arguments = [*_flags_of_yaml(parser, path), *arguments[1:]]
    _, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(_explain_unknown(unknown, parser))
    try:
        filled = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except ValueError as error:
        parser.error(str(error))
    return tuple(filled[: len(argument_types)])


def _epilog(example: str, recipes: Task | None) -> str:
    """Return what stands below the options: examples, and the recipes with a line each."""
    text = f"examples:\n{example}\n\nA YAML file has the same names, one `name: value` a line."
    if recipes is None:
        return text
    lines = [f"  {name:<16} {title}" for name, title in list_recipes(recipes).items()]
    return "\n".join([text, "", "recipes, files of this kind that come with the package:", *lines])


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
