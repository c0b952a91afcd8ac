"""What the making of a checkpoint has found, as a page and a figure; and the checkpoint's card."""

from __future__ import annotations

import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from screformer.benchmarks.ablation_costs import costs_rows
from screformer.benchmarks.pretraining_report import HELD_OUT_SCORES
from screformer.model_cards.card_inputs import DataSource
from screformer.model_cards.downstream_section import DOWNSTREAM, downstream_paragraphs
from screformer.model_cards.markdown import table
from screformer.model_cards.masked_genes import masked_gene_sentence
from screformer.model_cards.model_card import write_model_card
from screformer.train.figures import COLORS, LINE_STYLES, new_figure, save_figure
from screformer.train.result_files import read_json, write_json, written_aside

Json = Mapping[str, Any]
REPORT, CURVES = "report.md", "curves.png"
NOT_RECORDED = "not recorded"


def write_checkpoint_report(results: Json, folder: Path) -> None:
    """Write ``report.md`` and, once there was a pretraining, ``curves.png``."""
    parts = results["parts"]
    if "pretraining" in parts:
        plot_pretraining_curves(parts["pretraining"]["history"], folder / CURVES)
    with written_aside(folder / REPORT) as aside:
        aside.write_text(format_checkpoint_report(results), encoding="utf-8")


def format_checkpoint_report(results: Json) -> str:
    """Return the parts that are done as Markdown."""
    parts, device, parcel = results["parts"], results["device"], results["parcel"]
    paragraphs = [
        f"# {results['question']}",
        f"{results['date']}, `{results['command']}`, {device['name']}, torch {results['versions']['torch']}, "
        f"transformers {results['versions']['transformers']}.",
        f"{parcel['num_pretraining_cells']:,} cells pretrained it, {parcel['num_held_out_cells']:,} were held out; of "
        "the data sets that test, none of their cells.",
        table(("Pretrained on", "Cells"), [[one["name"], f"{one['num_cells']:,}"] for one in parcel["sources"]]),
    ]
    writers = {
        "pretraining": _pretraining,
        "fine_tuning": _fine_tuning,
        "ablations": _ablations,
        "costs": _costs,
        "scbert": _scbert,
    }
    for part, write in writers.items():
        if part in parts:
            paragraphs += [*write(parts[part]), *_made(parts[part].get("made"))]
    return "\n\n".join(paragraphs) + "\n"


def _made(made: Json | None) -> list[str]:
    """Return when and on what a part was made, which may be another machine than the last part's."""
    if made is None:
        return []
    device = made["device"]
    return [
        f"Made on {made['date']}, {device['name']}, {device['threads']} threads, torch {made['versions']['torch']}."
    ]


def _pretraining(part: Json) -> list[str]:
    metrics, asked = part["metrics"], part["asked"]
    sentence = masked_gene_sentence(metrics)
    rows = [[title, f"{metrics[f'held_out_{score}']:.3f}"] for score, title in HELD_OUT_SCORES.items()]
    return [
        "## Pretraining",
        f"`{asked['recipe']}`, {asked['gene_space']} gene space: {metrics['steps']:,} steps, {metrics['epochs']:.1f} "
        f"epochs, {metrics['training_seconds'] / 60:.1f} minutes, of {asked['minutes']:g} that were asked for.",
        *([sentence] if sentence else []),
        table(("Held-out cells, weights rounded to bfloat16", "Value"), rows),
        f"Before rounding the loss was {part['held_out_loss_before_rounding']:.4f}.",
        f"![Loss by step]({CURVES})",
    ]


def _fine_tuning(part: Json) -> list[str]:
    told = [[part["titles"][name], f"`{text}`"] for name, text in part["arguments"].items() if text is not None]
    return ["## Fine-tuning", *downstream_paragraphs(part), table(("System", "Settings"), told)]


def _ablations(part: Json) -> list[str]:
    return ["## Ablations", *part["notes"], table(part["columns"], part["rows"])]


def _costs(part: Json) -> list[str]:
    return ["## Cost of a step", table(*costs_rows(part["steps"]))]


def _scbert(part: Json) -> list[str]:
    if part["left_out"]:
        return ["## scBERT", f"Left out: {'; '.join(part['left_out'].values())}"]
    rows = [
        [
            run["data"],
            run["fold"],
            run["title"],
            f"{run['accuracy']:.3f}",
            f"{run['macro_f1']:.3f}",
            f"{run['fit_seconds']:.0f}",
        ]
        for run in part["runs"]
    ]
    return ["## scBERT", table(("Data", "Fold", "System", "Accuracy", "Macro-F1", "Fit s"), rows)]


def plot_pretraining_curves(history: list[Json], path: Path) -> None:
    """Draw the loss of training and of held-out cells by step."""
    figure, axes = new_figure(6.4, 3.6)
    for number, (name, title) in enumerate([("loss", "Training"), ("eval_loss", "Held-out cells")]):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), LINE_STYLES[number], color=COLORS[number], label=title)
    axes.set_xlabel("Step")
    axes.set_ylabel("Loss of masked genes")
    axes.legend()
    save_figure(figure, path)


def write_checkpoint_card(
    results: str | Path, output: str | Path, *, name: str | None = None, checkpoint: str | Path | None = None
) -> Path:
    """Write the model card of a checkpoint that was brought back as ``NAME.md``; return its path.

    Parameters
    ----------
    results
        Output folder of `make_base_checkpoint`.
    output
        Folder for the card.
    name
        Of the model; default ``screformer-PRESET``.
    checkpoint
        Folder to unpack the checkpoint into, with the card and what it was written from: `stage_checkpoint` publishes
        it.

    Raises
    ------
    OSError
        The folder lacks a file, or `checkpoint` is there.
    ValueError
        `name` is no name of a file.
    """
    folder = Path(results)
    found = read_json(folder / "results.json")
    title = name or f"screformer-{found['parcel']['preset']}"
    if not re.fullmatch(r"[\w.-]+", title):
        raise ValueError(f"name got {title!r}; letters, digits, '.', '_' and '-' are allowed")
    sources = [
        DataSource(one["name"], *(one.get(key, NOT_RECORDED) for key in ("citation", "origin", "licence")))
        for one in found["parcel"]["sources"]
    ]
    if checkpoint is not None and Path(checkpoint).exists():
        raise FileExistsError(f"checkpoint: {checkpoint} is there; choose another folder, or delete it")
    with tempfile.TemporaryDirectory() as place:
        unpacked = Path(place, title)
        with zipfile.ZipFile(folder / "checkpoint.zip") as file:
            file.extractall(unpacked)
        if "fine_tuning" in found["parts"]:
            write_json(unpacked / f"{DOWNSTREAM}.json", downstream_record(found["parts"]["fine_tuning"]))
        card = write_model_card(unpacked, model_name=title, data_sources=sources)
        path = Path(output, f"{title}.md")
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            aside.write_bytes(card.read_bytes())
        if checkpoint is not None:
            partial = Path(f"{checkpoint}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(unpacked, partial)
            partial.rename(checkpoint)
    return path


def downstream_record(part: Json) -> dict[str, Any]:
    """Return what a checkpoint keeps of its fine-tuning: scores and differences, without every run."""
    kept = ("scores", "differences")
    tasks = {name: {key: task[key] for key in kept} for name, task in part["tasks"].items()}
    return {"titles": part["titles"], "twins": part["twins"], "tasks": tasks}
