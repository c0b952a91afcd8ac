"""What hash rounds are worth to the task: masked genes predicted after equal pretrainings.

The error against exact attention (see `hashing`) says how near LSH attention comes to another function; this says how
well a model learns with it. Each setting gets the same cells, seeds, steps and learning rate, those of the quickstart;
scores are of cells held out at random from the donors that train. The fourth donor takes no part.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from screformer.benchmarks.measuring import Row, describe_device
from screformer.benchmarks.speed_figures import format_table, write_text
from screformer.tokenization.corpus import build_corpus
from screformer.tokenization.example_cells import example_cells_path
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer
from screformer.train.arguments import ModelArguments, PretrainingArguments, PretrainingDataArguments
from screformer.train.figures import COLORS, save_figure
from screformer.train.pretrain import pretrain
from screformer.train.result_files import software_versions, write_json

NAME = "rounds"
LEFT_OUT_DONOR = "human4"
SEEDS = (2022, 2023, 2024)
SCORES = ("held_out_masked_accuracy", "held_out_loss")


@dataclass(frozen=True)
class Setting:
    """One kind of attention."""

    title: str
    overrides: tuple[str, ...]


SETTINGS = {
    **{
        f"sign_{rounds}": Setting(f"sign hashing, {rounds} round{'s' * (rounds > 1)}", (f"num_hashes={rounds}",))
        for rounds in (1, 2, 4, 8)
    },
    "cross_polytope_4": Setting("cross-polytope hashing, 4 rounds", ("num_hashes=4", "hashing=cross_polytope")),
    "exact": Setting("exact attention", ("attention=exact",)),
}


def compare_rounds(
    work: str | Path,
    output: str | Path,
    *,
    settings: Sequence[str] = tuple(SETTINGS),
    seeds: Sequence[int] = SEEDS,
    max_steps: int = -1,
    command: str = "compare_rounds",
) -> dict[str, Any]:
    """Pretrain each setting with each seed in `work`, write ``rounds.json``, ``.md`` and ``.png``, return the JSON.

    Parameters
    ----------
    work
        Folder for the runs; finished ones are kept and not repeated, stopped ones go on.
    output
        Folder for the results.
    settings
        Names of `SETTINGS`.
    seeds
        One pretraining each.
    max_steps
        End each pretraining after so many steps; -1 for the quickstart's one epoch.
    command
        What the result file says that it was made by.

    Raises
    ------
    ValueError
        A setting is unknown.
    """
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown or not settings or not seeds:
        raise ValueError(f"settings must be of {', '.join(SETTINGS)}, and seeds given; got {unknown or list(settings)}")
    folder = Path(work)
    corpus = build_corpus(
        example_cells_path(), folder / "corpus", tokenizer=ScReformerTokenizer(), obs_columns=["cell_type", "donor"]
    )
    runs: list[Row] = []
    for seed in seeds:
        for name in settings:
            result = pretrain(*_pretraining(corpus.folder, folder / f"{name}_{seed}", SETTINGS[name], seed, max_steps))
            kept = (*SCORES, "held_out_majority_bin_accuracy", "training_seconds")
            runs.append({"setting": name, "seed": seed, **{key: result.metrics[key] for key in kept}})
            results = _describe(runs, command)
            write_json(Path(output) / f"{NAME}.json", results)
    write_text(Path(output) / f"{NAME}.md", format_rounds(results))
    plot_rounds(results, Path(output) / f"{NAME}.png")
    return results


def _pretraining(
    corpus: Path, folder: Path, setting: Setting, seed: int, max_steps: int
) -> tuple[ModelArguments, PretrainingDataArguments, PretrainingArguments]:
    return (
        ModelArguments(preset="tiny", gene_space="expressed", config_overrides=list(setting.overrides)),
        PretrainingDataArguments(
            corpus=str(corpus), group_column="donor", exclude_groups=[LEFT_OUT_DONOR], gene_dropout=0.5
        ),
        PretrainingArguments(
            output_dir=str(folder),
            num_train_epochs=1,
            max_steps=max_steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=32,
            learning_rate=3e-3,
            seed=seed,
            train_sampling_strategy="group_by_length",
        ),
    )


def _describe(runs: list[Row], command: str) -> dict[str, Any]:
    summary: dict[str, Row] = {}
    for name in dict.fromkeys(run["setting"] for run in runs):
        own = [run for run in runs if run["setting"] == name]
        summary[name] = {"title": SETTINGS[name].title, "num_seeds": len(own)}
        for key in (*SCORES, "training_seconds"):
            values = [run[key] for run in own]
            summary[name][key] = round(mean(values), 4)
            summary[name][f"{key}_spread"] = round(stdev(values), 4) if len(values) > 1 else None
    return {
        "question": "What are hash rounds worth to the task?",
        "command": command,
        "date": date.today().isoformat(),
        "device": describe_device("cpu"),
        "versions": software_versions(),
        "majority_bin_accuracy": round(mean(run["held_out_majority_bin_accuracy"] for run in runs), 4),
        "settings": summary,
        "runs": runs,
    }


def format_rounds(results: dict[str, Any]) -> str:
    """Return the results as text: a row a setting, mean and spread over seeds."""

    def number(row: Row, key: str, digits: int) -> str:
        spread = row[f"{key}_spread"]
        return f"{row[key]:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")

    lines = [
        [
            row["title"],
            str(row["num_seeds"]),
            number(row, "held_out_masked_accuracy", 4),
            number(row, "held_out_loss", 4),
            number(row, "training_seconds", 0),
        ]
        for row in results["settings"].values()
    ]
    device, torch_version = results["device"], results["versions"]["torch"]
    made = f"{results['date']}, {device['name']}, {device['threads']} threads, torch {torch_version}."
    meaning = (
        "Masked genes of cells held out, after one epoch of pretraining as in the quickstart; ± is the standard "
        "deviation over seeds. Always answering the commonest bin is right in "
        f"{results['majority_bin_accuracy']:.4f}. Seconds are of whole trainings one after another, not a comparison "
        "of speed."
    )
    table = format_table(["Attention", "Seeds", "Masked accuracy", "Loss", "Seconds"], lines)
    return "\n\n".join([f"# {results['question']}", f"{made} Made by `{results['command']}`.", meaning, table]) + "\n"


def plot_rounds(results: dict[str, Any], path: Path) -> None:
    """Draw each seed's held-out loss by setting."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(results["settings"])
    for run in results["runs"]:
        axes.plot(run["held_out_loss"], names.index(run["setting"]), "o", color=COLORS[0], alpha=0.7)
    for place, name in enumerate(names):
        axes.plot(results["settings"][name]["held_out_loss"], place, "|", color="black", markersize=16)
    axes.set_yticks(range(len(names)), [results["settings"][name]["title"] for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("Loss of masked genes, cells held out (a dot a seed, a bar the mean)")
    save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        prog="python -m screformer.benchmarks.rounds",
        description="Pretrain with each kind of attention and compare what is learned. About a minute a run.",
        epilog="example: python -m screformer.benchmarks.rounds --settings sign_1 sign_4 exact --seeds 2022",
    )
    parser.add_argument("--work", default="runs/rounds", help="Folder for the runs (default: %(default)s).")
    parser.add_argument("--output", default="benchmarks/results", help="Folder for the results (default: %(default)s).")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), help="Kinds of attention: %(default)s.")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="One pretraining each.")
    parser.add_argument("--max-steps", type=int, default=-1, help="End each pretraining after so many steps.")
    given = sys.argv[1:] if argv is None else list(argv)
    options = parser.parse_args(given)
    try:
        results = compare_rounds(
            options.work,
            options.output,
            settings=options.settings,
            seeds=options.seeds,
            max_steps=options.max_steps,
            command=" ".join([parser.prog, *given]),
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write("\n" + format_rounds(results))


if __name__ == "__main__":
    main()
