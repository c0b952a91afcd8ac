"""Which genes interact: our own Gene2vec on the task of Gene2vec's paper, beside simpler knowledge of the genes.

Vectors are trained on the co-expression of a corpus's cells and never see a labelled pair. A small network then learns
from the training pairs which genes interact, and is judged on pairs of genes that it has not met
(`pair_classifier.py`). Everything is measured on the same pairs: those of genes that have a vector of ours.

Beside them: random vectors, and ours dealt to other genes, which say what the network makes of nothing; how often and
how high each gene is expressed in each group of cells, because genes that interact in databases are also well studied
and well expressed; the principal components of the same cells, which know co-expression without skip-gram.

Settings are chosen by the validation pairs of the first seed. The published figure is of other vectors and all pairs:
it says where the task's scale ends, and is no rival in the same contest.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score
from sklearn.utils.extmath import randomized_svd

from screformer.benchmarks.gene_interaction_figures import format_gene_interactions, plot_gene_interactions
from screformer.benchmarks.measuring import Row, describe_device
from screformer.benchmarks.pair_classifier import (
    SPLITS,
    LabelledPairs,
    PairScores,
    classify_pairs,
    read_labelled_pairs,
)
from screformer.benchmarks.speed_figures import write_text
from screformer.tokenization.corpus import Corpus, open_corpus
from screformer.tokenization.gene2vec import read_gene_vectors
from screformer.tokenization.gene_pairs import (
    CellGroup,
    GeneMoments,
    GenePairs,
    PairRules,
    cell_groups,
    find_gene_pairs,
    measure_genes,
    read_bins,
)
from screformer.tokenization.own_gene2vec import gene2vec_of_pairs
from screformer.train.result_files import software_versions, write_json

NAME = "gene_interactions"
OWN, FREQUENCY, BOTH = "own Gene2vec", "expression frequency", "own Gene2vec and frequency"
COMPONENTS, RANDOM, DEALT = "principal components", "random vectors", "own Gene2vec of other genes"
PUBLISHED = {"auc": 0.720, "source": "Du et al. 2019, Gene2vec of 984 data sets, all pairs of the test split"}
NOTE = "Settings and network were chosen by the validation pairs, but test areas were seen while the code was written."
NUM_COMPONENTS, MAX_COMPONENT_CELLS = 25, 5000
SEEDS = (2022, 2023, 2024)

Features = npt.NDArray[np.float32]
logger = logging.getLogger(__name__)


def benchmark_gene_interactions(
    output: str | Path,
    *,
    pairs: str | Path,
    corpus: str | Path,
    group_column: str | None = None,
    neighbors: Sequence[int] = (50, 100),
    dimensions: Sequence[int] = (200,),
    num_epochs: int = 2,
    seeds: Sequence[int] = SEEDS,
    released: Mapping[str, str | Path] | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Train and judge, write ``gene_interactions.json``, ``.md`` and ``.png`` into `output`, return the JSON.

    Parameters
    ----------
    output
        Folder for the results.
    pairs
        Labelled pairs: see `read_labelled_pairs`.
    corpus
        Folder of the corpus to train on.
    group_column
        See `find_gene_pairs`.
    neighbors, dimensions
        Settings to choose from: `num_neighbors` of `PairRules`, and the length of a vector.
    num_epochs
        Of the skip-gram.
    seeds
        Each trains vectors and a classifier of its own.
    released
        Name -> file of other vectors, judged on the same pairs; genes that they lack get a vector of zeros.
    command
        How this was called, for the result file.

    Raises
    ------
    FileNotFoundError
        A file is not there.
    ValueError
        A list is empty, a number is out of its range, or a file is not what it should be.
    """
    for name, values in (("neighbors", neighbors), ("dimensions", dimensions), ("seeds", seeds)):
        if not values or min(values) < 1:
            msg = f"{name}: one or more positive numbers are needed, got {list(values)}"
            raise ValueError(msg)
    cells = open_corpus(corpus)
    vocabulary = cells.tokenizer().gene_vocabulary
    labelled = read_labelled_pairs(pairs, vocabulary)
    others = {name: read_gene_vectors(path).align(vocabulary).vectors for name, path in (released or {}).items()}
    found = find_gene_pairs(cells, PairRules(num_neighbors=max(neighbors)), group_column=group_column, seed=seeds[0])
    has_vector = np.zeros(len(vocabulary), dtype=bool)
    has_vector[found.genes.ravel()] = True
    used = {split: labelled[split].among(has_vector) for split in SPLITS}
    settings = [(count, length) for count in neighbors for length in dimensions]
    trained = {one: _train_vectors(cells, found, *one, num_epochs, seeds[0]) for one in settings}
    areas = [classify_pairs(trained[one], used, seed=seeds[0]).valid for one in settings]
    chosen = settings[int(np.argmax(areas))]
    frequencies, components = _of_cells(cells, group_column, has_vector)
    scores: dict[str, list[PairScores]] = {}
    for seed in seeds:
        own = trained[chosen] if seed == seeds[0] else _train_vectors(cells, found, *chosen, num_epochs, seed)
        generator = np.random.default_rng(seed)
        contestants = {
            OWN: own,
            BOTH: np.concatenate([own, frequencies], axis=1),
            COMPONENTS: components,
            FREQUENCY: frequencies,
            RANDOM: generator.normal(size=own.shape).astype(np.float32),
            DEALT: _deal(own, has_vector, generator),
            **{name: np.nan_to_num(vectors) for name, vectors in others.items()},
        }
        for name, features in contestants.items():
            scores.setdefault(name, []).append(classify_pairs(features, used, seed=seed))
            logger.info("seed %d, %s: %s", seed, name, scores[name][-1])
    results = {
        "question": "Which genes interact, by what their vectors know?",
        "command": command,
        "date": date.today().isoformat(),
        "device": describe_device("cpu"),
        "versions": software_versions(),
        "cells": found.describe(),
        "num_bins": cells.tokenizer().num_bins,
        "pairs": {split: _describe_pairs(labelled[split], used[split]) for split in SPLITS},
        "selection": [
            {"num_neighbors": count, "num_dimensions": length, "valid": round(area, 4)}
            for (count, length), area in zip(settings, areas, strict=True)
        ],
        "chosen": {"num_neighbors": chosen[0], "num_dimensions": chosen[1], "num_epochs": num_epochs},
        "cosine_alone": _cosine_area(trained[chosen], used["test"]),
        "seeds": list(seeds),
        "contestants": [_summarise(name, some) for name, some in scores.items()],
        "published": PUBLISHED,
        "note": NOTE,
    }
    write_json(Path(output) / f"{NAME}.json", results)
    write_text(Path(output) / f"{NAME}.md", format_gene_interactions(results))
    plot_gene_interactions(results, Path(output) / f"{NAME}.png")
    return results


def expression_features(moments: Sequence[GeneMoments]) -> Features:
    """How often and how high genes are expressed, (num_genes, 2 * groups): log share of the cells, and mean bin."""
    columns = []
    for one in moments:
        columns += [np.log((one.num_expressing + 0.5) / (one.num_cells + 1)), one.means]
    return np.stack(columns, axis=1).astype(np.float32)


def component_features(corpus: Corpus, groups: Sequence[CellGroup], moments: Sequence[GeneMoments]) -> Features:
    """Principal components of standardised genes, (num_genes, 25 * groups), each group by itself.

    A component's length is in proportion to its standard deviation. A gene that a group lacks is 0 there.
    """
    parts = []
    for group, one in zip(groups, moments, strict=True):
        scores = np.zeros((len(one.means), len(group.rows)), np.float32)
        for first, block in read_bins(corpus, group.rows):
            scores[block.genes, first + block.rows] = block.bins
        scores -= one.means[:, None].astype(np.float32)
        # A gene in one cell of a thousand would otherwise have components of its own.
        scores /= np.maximum(one.standard_deviations, 0.05)[:, None].astype(np.float32)
        left, values, _ = randomized_svd(scores, min(NUM_COMPONENTS, len(group.rows)), n_iter=2, random_state=0)
        parts.append((left * values / np.sqrt(len(group.rows))).astype(np.float32))
    return np.concatenate(parts, axis=1)


def _train_vectors(
    cells: Corpus, found: GenePairs, num_neighbors: int, num_dimensions: int, num_epochs: int, seed: int
) -> Features:
    """Vectors in vocabulary order; NaN for genes that no pair has."""
    vectors = gene2vec_of_pairs(
        cells,
        found.nearest(num_neighbors),
        PairRules(num_neighbors=num_neighbors),
        num_dimensions=num_dimensions,
        num_epochs=num_epochs,
        seed=seed,
    )
    return vectors.align(cells.tokenizer().gene_vocabulary).vectors


def _of_cells(cells: Corpus, group_column: str | None, has_vector: npt.NDArray[np.bool_]) -> tuple[Features, Features]:
    """Features of expression, and principal components, of the same cells."""
    groups = cell_groups(cells, group_column=group_column, max_cells=MAX_COMPONENT_CELLS)
    moments = [measure_genes(cells, group, len(has_vector)) for group in groups]
    return expression_features(moments), component_features(cells, groups, moments)


def _deal(vectors: Features, has_vector: npt.NDArray[np.bool_], generator: np.random.Generator) -> Features:
    """Give every vector to another gene at random."""
    dealt, genes = vectors.copy(), np.flatnonzero(has_vector)
    dealt[genes] = vectors[generator.permutation(genes)]
    return dealt


def _cosine_area(vectors: Features, pairs: LabelledPairs) -> float:
    """Area of the vectors' cosine alone, with nothing learned from labelled pairs."""
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = (directions[pairs.genes[:, 0]] * directions[pairs.genes[:, 1]]).sum(axis=1)
    return round(float(roc_auc_score(pairs.labels, cosines)), 4)


def _describe_pairs(read: LabelledPairs, used: LabelledPairs) -> dict[str, float]:
    return {
        "num_read": read.num_read,
        "num_used": len(used.genes),
        "share_positive_read": round(read.share_positive_read, 4),
        "share_positive_used": round(float(used.labels.mean()), 4),
    }


def _summarise(name: str, scores: Sequence[PairScores]) -> Row:
    row: Row = {"contestant": name, "scores": [score._asdict() for score in scores]}
    for key in ("valid", "test"):
        values = [getattr(score, key) for score in scores]
        row[key] = round(mean(values), 4)
        row[f"{key}_spread"] = round(stdev(values), 4) if len(values) > 1 else None
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        prog="python -m screformer.benchmarks.gene_interactions",
        description="Judge gene vectors by which genes interact: our own, simpler knowledge, and given files.",
        epilog="example: python -m screformer.benchmarks.gene_interactions --pairs pairs.tsv.gz --corpus corpus",
    )
    parser.add_argument("--pairs", required=True, help="Table: gene_a, gene_b, label (0 or 1), split.")
    parser.add_argument("--corpus", required=True, help="Corpus folder to train our own vectors on.")
    parser.add_argument("--group_column", help="Column kept in the corpus to correlate apart. Default: the file.")
    parser.add_argument("--neighbors", type=int, nargs="+", default=[50, 100], help="To choose from: %(default)s.")
    parser.add_argument("--dimensions", type=int, nargs="+", default=[200], help="To choose from: %(default)s.")
    parser.add_argument("--epochs", type=int, default=2, help="Of the skip-gram (default: %(default)s).")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="Default: %(default)s.")
    parser.add_argument("--vectors", nargs="+", default=[], metavar="NAME=FILE", help="Other vectors to judge.")
    parser.add_argument("--output", default="benchmarks/results", help="Folder for the results (default: %(default)s).")
    given = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(given)
    wrong = [one for one in options.vectors if "=" not in one]
    if wrong:
        parser.error(f"--vectors: NAME=FILE is needed, got {wrong}")
    try:
        results = benchmark_gene_interactions(
            options.output,
            pairs=options.pairs,
            corpus=options.corpus,
            group_column=options.group_column,
            neighbors=options.neighbors,
            dimensions=options.dimensions,
            num_epochs=options.epochs,
            seeds=options.seeds,
            released=dict(one.split("=", 1) for one in options.vectors),
            command=" ".join([parser.prog, *given]),
        )
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write("\n" + format_gene_interactions(results))


if __name__ == "__main__":
    main()
