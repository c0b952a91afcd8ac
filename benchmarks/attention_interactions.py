"""Which genes interact, by how much they attend to each other: a model's attention on Gene2vec's labelled pairs.

Nothing is learned from the pairs: each score ranks the pairs of the test split, and its area under the ROC curve says
how far pairs that interact come first. Beside attention stand what needs no model: the correlation of the genes' bins
in the same cells, and how often the genes are expressed, because genes that interact in databases are also well studied
and well expressed. The control is an untrained model of the same shape: what its attention knows comes from the cells
and the hashing alone. `gene_interactions.py` asks the same of gene vectors, with a classifier that learns from pairs.

Intervals are of pairs drawn anew. Pairs share genes, so that they are not independent: the intervals are too narrow
rather than too wide, and a tie is a tie.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix

from screformer.annotation.cell_source import CELLS_PER_BLOCK, CellSource
from screformer.annotation.interaction_sums import NO_TYPE, Int64Array, InteractionSums
from screformer.annotation.trained_model import TrainedModel, load_encoder
from screformer.benchmarks.attention_interaction_figures import (
    format_attention_interactions,
    plot_attention_interactions,
)
from screformer.benchmarks.attention_pair_scores import (
    COEXPRESSION,
    FREQUENCY,
    UNTRAINED,
    PairSums,
    Scores,
    correlations_of_pairs,
    judge_scores,
    scores_of_attention,
    sums_of_pairs,
)
from screformer.benchmarks.comparison import provenance
from screformer.benchmarks.fine_tuning_runs import without_folders
from screformer.benchmarks.pair_classifier import LabelledPairs, read_labelled_pairs
from screformer.benchmarks.speed_figures import write_text
from screformer.modeling_screformer import ScReformerModel
from screformer.tokenization.count_matrix import open_count_matrix
from screformer.tokenization.example_cells import example_cells_path
from screformer.train.batch_size import BatchSize, read_batch_size
from screformer.train.collator import GeneSpace
from screformer.train.result_files import write_json

NAME = "attention_interactions"
MIN_CELLS, MIN_SHARE = 5, 0.02
SEED = 2022


def benchmark_attention_interactions(
    output: str | Path,
    *,
    model: str | Path | TrainedModel[ScReformerModel],
    pairs: str | Path,
    cells: str | Path | None = None,
    max_cells: int = 500,
    max_genes: int = 4000,
    attention_layers: Sequence[int] | None = None,
    gene_space: GeneSpace | None = None,
    batch_size: BatchSize = 8,
    command: str = "benchmark_attention_interactions",
) -> dict[str, Any]:  # Any: JSON
    """Score the pairs, write ``attention_interactions.json``, ``.md`` and ``.png`` into `output`, return the JSON.

    Parameters
    ----------
    output
        Folder for the results.
    model
        Checkpoint whose attention is judged.
    pairs
        Labelled pairs: see `read_labelled_pairs`; those of the test split are used whose genes enough cells express.
    cells
        Raw counts in any format of `open_count_matrix`; default the packaged pancreas.
    max_cells
        Cells, drawn at random.
    max_genes
        The most genes, those that the most cells express; memory grows with their square (see `InteractionSums`).
    attention_layers, gene_space, batch_size
        As for `find_gene_interactions`.
    command
        How this was called, for the result file.

    Raises
    ------
    OSError
        A file is not there.
    ValueError
        A number is out of its range, a file is not what it should be, or no pairs of both labels are left.
    """
    for name, number, least in (("max_cells", max_cells, MIN_CELLS), ("max_genes", max_genes, 2)):
        if number < least:
            raise ValueError(f"{name} got {number}; at least {least} are needed")
    trained = load_encoder(model)
    labelled = read_labelled_pairs(pairs, trained.tokenizer.gene_vocabulary)["test"]
    path = example_cells_path() if cells is None else cells
    with open_count_matrix(path, vocabulary=trained.tokenizer.gene_vocabulary) as matrix:
        source = CellSource(matrix, trained.tokenizer)
        types = np.full(source.num_cells, NO_TYPE, dtype=np.int64)
        types[np.random.default_rng(SEED).permutation(source.num_cells)[:max_cells]] = 0
        bins = read_cell_bins(source, types, len(trained.tokenizer.gene_vocabulary))
        genes = choose_genes(bins, labelled, max_genes)
        used = labelled.among(np.isin(np.arange(bins.shape[1]), genes))
        _check_pairs(used, labelled)
        options: dict[str, Any] = {"layers": attention_layers, "gene_space": gene_space, "batch_size": batch_size}
        found = {}
        for name, encoder in (("", trained.model), (UNTRAINED, untrained_twin(trained.model))):
            sums = InteractionSums(encoder, genes, 1, **options)
            sums.add_all(source, types)
            found[name] = sums_of_pairs(sums, np.searchsorted(genes, used.genes))
        source_name = Path(matrix.name).name
    results = {
        "question": "Which genes interact, by how much they attend to each other?",
        **provenance(command),
        "model": {**trained.describe(), "name": Path(trained.name).name},
        "cells": {"file": source_name, "num_cells": bins.shape[0], "seed": SEED},
        "attention_layers": sums.layers,
        "gene_space": sums.gene_space,
        "pairs": {
            "num_read": labelled.num_read,
            "num_used": len(used.genes),
            "num_genes": len(np.unique(used.genes)),
            "share_positive": float(used.labels.mean()),
        },
        **judge_scores(_score_pairs(bins, used, found), used.labels),
    }
    write_json(Path(output) / f"{NAME}.json", results)
    write_text(Path(output) / f"{NAME}.md", format_attention_interactions(results))
    plot_attention_interactions(results, Path(output) / f"{NAME}.png")
    return results


def untrained_twin(model: ScReformerModel) -> ScReformerModel:
    """Return a model of the same shape with fresh weights, on the same device."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return ScReformerModel(model.config).to(model.device).eval()


def read_cell_bins(source: CellSource, types: Int64Array, num_genes: int) -> csr_matrix:
    """Return the bins of the cells that have a type and counts on known genes, (cells, num_genes)."""
    genes, bins, lengths = [], [], [0]
    for start in range(0, source.num_cells, CELLS_PER_BLOCK):
        cells = slice(start, min(start + CELLS_PER_BLOCK, source.num_cells))
        for row in source.read(cells, wanted=types[cells] != NO_TYPE)[1]:
            genes.append(row["gene_ids"].astype(np.int32))
            bins.append(row["input_ids"].astype(np.float32))
            lengths.append(len(row["gene_ids"]))
    if not genes:
        raise ValueError("cells: none of those drawn has counts on known genes; give another file")
    return csr_matrix((np.concatenate(bins), np.concatenate(genes), np.cumsum(lengths)), (len(genes), num_genes))


def choose_genes(bins: csr_matrix, labelled: LabelledPairs, max_genes: int) -> Int64Array:
    """Return the genes of the pairs that at least 5 cells and 2% of them express, the most frequent, rising."""
    num_expressing = bins.getnnz(axis=0)
    genes = np.unique(labelled.genes)
    genes = genes[num_expressing[genes] >= max(MIN_CELLS, MIN_SHARE * bins.shape[0])]
    return np.sort(genes[np.argsort(-num_expressing[genes], kind="stable")[:max_genes]])


def _score_pairs(bins: csr_matrix, used: LabelledPairs, found: Mapping[str, PairSums]) -> dict[str, Scores]:
    """Return every score of the pairs; `found` has the sums of the model, and of the untrained one."""
    rates = (bins.getnnz(axis=0) / bins.shape[0])[used.genes]
    scores = {FREQUENCY: rates.prod(axis=1), COEXPRESSION: correlations_of_pairs(bins, used.genes)}
    for prefix, sums in found.items():
        scores |= {f"{prefix}{name}": values for name, values in scores_of_attention(sums, rates).items()}
    return scores


def _check_pairs(used: LabelledPairs, labelled: LabelledPairs) -> None:
    if len(set(used.labels.tolist())) < 2:
        raise ValueError(
            f"pairs: of {len(labelled.genes)} test pairs between known genes {len(used.genes)} are of genes that at "
            f"least {MIN_CELLS} cells and {MIN_SHARE:.0%} of them express, and pairs of both labels are needed; raise "
            "max_cells or max_genes, or give other cells"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        prog="screformer benchmark attention-interactions",
        description="Judge a model's attention between genes by labelled pairs, beside what needs no model.",
        epilog="example: screformer benchmark attention-interactions --model quickstart/checkpoint --pairs pairs.tsv",
    )
    parser.add_argument("--model", required=True, help="Checkpoint.")
    parser.add_argument("--pairs", required=True, help="Table: gene_a, gene_b, label (0 or 1), split.")
    parser.add_argument("--cells", help="Raw counts (default: the packaged pancreas).")
    parser.add_argument("--max-cells", type=int, default=500, help="Cells, drawn at random (default: %(default)s).")
    parser.add_argument("--max-genes", type=int, default=4000, help="The most genes (default: %(default)s).")
    parser.add_argument("--attention-layers", type=int, nargs="+", help="Layers, from 0 (default: all).")
    parser.add_argument("--gene-space", choices=("full", "expressed"), help="Instead of the checkpoint's own.")
    parser.add_argument("--batch-size", default="8", help="Cells a forward pass, or auto (default: %(default)s).")
    parser.add_argument("--output", default="benchmarks/results", help="Folder for the results (default: %(default)s).")
    given = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(given)
    try:
        results = benchmark_attention_interactions(
            options.output,
            model=options.model,
            pairs=options.pairs,
            cells=options.cells,
            max_cells=options.max_cells,
            max_genes=options.max_genes,
            attention_layers=options.attention_layers,
            gene_space=options.gene_space,
            batch_size=read_batch_size(options.batch_size),
            command=" ".join([parser.prog, *without_folders(given)]),
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write("\n" + format_attention_interactions(results))


if __name__ == "__main__":
    main()
