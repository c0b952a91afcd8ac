"""Expressed genes alone beside every gene: the same weights, the same cells; speed, labels and embeddings."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from screformer.annotation.calibration import LabelReader
from screformer.annotation.trained_model import TrainedModel, load_classifier
from screformer.benchmarks.fine_tuning_runs import without_folders
from screformer.benchmarks.measuring import describe_device
from screformer.model_cards.markdown import table
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.count_matrix import open_count_matrix
from screformer.tokenization.example_cells import example_cells_path
from screformer.train.collator import GeneSpace
from screformer.train.figures import plot_bars
from screformer.train.inference import BatchInference, OutputName
from screformer.train.result_files import software_versions, write_json

logger = logging.getLogger("screformer.benchmarks.gene_spaces")
SPACES: tuple[GeneSpace, ...] = ("expressed", "full")
WANTED_RATIO = 6.0
BATCHES_IN_TURN = 4  # cells of similar length share a batch, as in every other use
FloatArray = npt.NDArray[np.float32]


def compare_gene_spaces(
    model: str | Path | TrainedModel[ScReformerForCellClassification],
    cells: str | Path,
    *,
    num_cells: int = 48,
    batch_size: int = 8,
    seed: int = 2022,
) -> dict[str, Any]:  # Any: JSON
    """Run a classifier on some cells in both gene spaces, a few batches in turn, and return what differs.

    Returns ``num_cells``; ``genes_per_cell``, mean of the expressed; ``cells_per_second`` of each space and their
    ``ratio``; ``label_agreement``, share of cells with the same type; ``largest_probability_difference``;
    ``embedding_cosine``, median cosine between the two vectors of a cell; and ``embedding_drift``, median length of
    their difference over that of the vector with every gene.

    Parameters
    ----------
    model
        Fine-tuned checkpoint.
    cells
        Raw counts in any format of `open_count_matrix`.
    num_cells
        Drawn at random.
    batch_size
        Cells a forward pass.
    seed
        Of the draw.

    Raises
    ------
    ValueError
        `num_cells` is below `batch_size`, or as `open_count_matrix`.
    """
    if num_cells < batch_size:
        raise ValueError(f"num_cells got {num_cells}; at least a batch, {batch_size}, is needed")
    trained = load_classifier(model)
    rows = _draw_cells(trained, cells, num_cells, seed)
    outputs: list[OutputName] = ["logits", "cell_embedding"]
    inferences = {
        space: BatchInference(trained.model, outputs, batch_size=batch_size, gene_space=space) for space in SPACES
    }
    seconds = dict.fromkeys(SPACES, 0.0)
    found: dict[GeneSpace, list[FloatArray]] = {space: [] for space in SPACES}
    for space in SPACES:  # what only the first batch does is nobody's time
        inferences[space](rows[:batch_size])
    at_once = BATCHES_IN_TURN * batch_size
    for first in range(0, len(rows), at_once):
        for space in SPACES:
            begin = time.perf_counter()
            found[space].append(inferences[space](rows[first : first + at_once]))
            seconds[space] += time.perf_counter() - begin
    values = {space: np.concatenate(found[space]) for space in SPACES}
    speeds = {space: len(rows) / seconds[space] for space in SPACES}
    return {
        "num_cells": len(rows),
        "genes_per_cell": float(np.mean([len(row["gene_ids"]) for row in rows])),
        "cells_per_second": {space: round(speed, 2) for space, speed in speeds.items()},
        "ratio": round(speeds["expressed"] / speeds["full"], 2),
        **_differences(trained, values),
    }


def _draw_cells(
    trained: TrainedModel[ScReformerForCellClassification], cells: str | Path, num_cells: int, seed: int
) -> list[dict[str, npt.NDArray[Any]]]:
    tokenizer = trained.tokenizer
    with open_count_matrix(cells, vocabulary=tokenizer.gene_vocabulary) as matrix:
        mapping = matrix.map_genes(tokenizer.gene_vocabulary)
        chosen = np.random.default_rng(seed).permutation(matrix.num_cells)[: 2 * num_cells]
        rows: list[dict[str, npt.NDArray[Any]]] = []
        for cell in np.sort(chosen).tolist():
            (block,) = matrix.blocks(1, start=cell, stop=cell + 1)
            tokens = tokenizer.tokenize_counts(block, mapping, first_row=cell)
            if len(tokens.gene_ids):
                rows.append({"input_ids": tokens.input_ids, "gene_ids": tokens.gene_ids})
    return rows[:num_cells]


def _differences(
    trained: TrainedModel[ScReformerForCellClassification], values: Mapping[GeneSpace, FloatArray]
) -> dict[str, float]:
    reader = LabelReader(trained.model.config)
    num_classes = len(reader.class_names)
    expressed, full = (reader(values[space][:, :num_classes]) for space in SPACES)
    vectors = [values[space][:, num_classes:].astype(np.float64) for space in SPACES]
    lengths = [np.linalg.norm(each, axis=1) for each in vectors]
    cosines = (vectors[0] * vectors[1]).sum(axis=1) / np.maximum(lengths[0] * lengths[1], 1e-12)
    drift = np.linalg.norm(vectors[0] - vectors[1], axis=1) / np.maximum(lengths[1], 1e-12)
    return {
        "label_agreement": float((expressed.answers() == full.answers()).mean()),
        "largest_probability_difference": float(np.abs(expressed.probabilities - full.probabilities).max()),
        "embedding_cosine": float(np.median(cosines)),
        "embedding_drift": float(np.median(drift)),
    }


def describe_gene_spaces(found: dict[str, Any]) -> str:
    """Return what was found as a sentence."""
    speeds = found["cells_per_second"]
    return (
        f"Expressed genes alone: {found['ratio']:.1f} times the cells a second of every gene "
        f"({speeds['expressed']:.1f} and {speeds['full']:.1f}); {found['label_agreement']:.1%} of "
        f"{found['num_cells']} cells get the same label, embeddings drift by {found['embedding_drift']:.1%} "
        f"(cosine {found['embedding_cosine']:.4f})"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, compare, and write JSON, table and figure."""
    parser = argparse.ArgumentParser(
        prog="screformer benchmark gene-spaces",
        description="Expressed genes alone beside every gene, with the same weights: speed, labels, embeddings.",
        epilog="example: screformer benchmark gene-spaces --model quickstart/checkpoint --num-cells 96",
    )
    parser.add_argument("--model", required=True, help="Fine-tuned checkpoint.")
    parser.add_argument("--cells", help="Raw counts (default: the packaged pancreas).")
    parser.add_argument("--num-cells", type=int, default=48, help="Cells, drawn at random (default: %(default)s).")
    parser.add_argument("--batch-size", type=int, default=8, help="Cells a forward pass (default: %(default)s).")
    parser.add_argument("--output", default="benchmarks/results", help="Folder for the results (default: %(default)s).")
    given = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(given)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logger.setLevel(logging.INFO)
    try:
        found = compare_gene_spaces(
            options.model,
            options.cells or example_cells_path(),
            num_cells=options.num_cells,
            batch_size=options.batch_size,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    command = " ".join(["screformer benchmark gene-spaces", *without_folders(given)])
    write_gene_spaces(found, Path(options.output), command=command)
    logger.info("%s", describe_gene_spaces(found))


def write_gene_spaces(found: dict[str, Any], folder: Path, *, command: str) -> None:
    """Write ``gene_spaces.json``, ``.md`` and ``.png``."""
    results = {
        "question": "What do expressed genes alone cost and save, with the same weights?",
        "date": date.today().isoformat(),
        "command": command,
        "device": describe_device("cpu"),
        "versions": software_versions(),
        **found,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "gene_spaces.json", results)
    numbers = {
        "cells": found["num_cells"],
        "expressed genes a cell, mean": f"{found['genes_per_cell']:.0f}",
        "cells a second, expressed genes": f"{found['cells_per_second']['expressed']:.1f}",
        "cells a second, every gene": f"{found['cells_per_second']['full']:.1f}",
        "ratio": f"{found['ratio']:.1f} (wanted {WANTED_RATIO:.0f})",
        "cells with the same label": f"{found['label_agreement']:.1%}",
        "largest difference of a probability": f"{found['largest_probability_difference']:.4f}",
        "embedding: cosine, median": f"{found['embedding_cosine']:.5f}",
        "embedding: drift, median": f"{found['embedding_drift']:.2%}",
    }
    text = [
        "# Expressed genes alone beside every gene",
        "",
        f"{results['question']} {results['date']}, `{command}`, {results['device']['threads']} threads, screformer "
        f"{results['versions']['screformer']}, torch {results['versions']['torch']}. Batches of both in turn.",
        "",
        table(["", ""], [[name, str(value)] for name, value in numbers.items()]),
    ]
    (folder / "gene_spaces.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    plot_bars({"cells a second": found["cells_per_second"]}, folder / "gene_spaces.png", title="The same weights")


if __name__ == "__main__":
    main()
