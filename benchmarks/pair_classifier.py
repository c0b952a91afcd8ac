"""A small network that says whether two genes interact, from what is known of each: the task of Gene2vec's paper.

Genes of the training, validation and test pairs are different ones, so that nothing about a pair can be learned by
heart: vectors without meaning give an area under the ROC curve of 0.5.
"""

from __future__ import annotations

import csv
import gzip
from itertools import count, islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from screformer.tokenization.gene_vocabulary import GeneVocabulary

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
COLUMNS = ("gene_a", "gene_b", "label", "split")
HIDDEN_SIZE, DROPOUT, BATCH_SIZE, WEIGHT_DECAY = 128, 0.5, 1024, 1e-4
LEARNING_RATES = (1e-3, 2e-4)
MAX_STEPS, STEPS_A_CHECK, PATIENCE = 800, 40, 6


class LabelledPairs(NamedTuple):
    """Pairs of one split.

    Attributes
    ----------
    genes
        int64 (num_pairs, 2): positions in the vocabulary.
    labels
        float32 (num_pairs,): 1 for pairs that interact, else 0.
    num_read, share_positive_read
        Pairs of the file, known genes or not, and the share that interact among them.
    """

    genes: npt.NDArray[np.int64]
    labels: npt.NDArray[np.float32]
    num_read: int
    share_positive_read: float

    def among(self, is_known: npt.NDArray[np.bool_]) -> LabelledPairs:
        """Return the pairs of which both genes are known, (num_genes,) bool."""
        kept = is_known[self.genes].all(axis=1)
        return self._replace(genes=self.genes[kept], labels=self.labels[kept])


class PairScores(NamedTuple):
    """Areas under the ROC curve, at the step and learning rate with the best on the validation pairs."""

    valid: float
    test: float
    step: int
    learning_rate: float


def read_labelled_pairs(path: str | Path, vocabulary: GeneVocabulary) -> dict[Split, LabelledPairs]:
    """Read a table with the columns gene_a, gene_b, label (0 or 1) and split, between tabs, compressed or not.

    Pairs with a gene that the vocabulary does not have are left out, and so are those whose gene is, under another
    name, in the pairs of a later split.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        A column is missing, a value is another, or a split has not both kinds of pairs.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"pairs: there is no file {path}"
        raise FileNotFoundError(msg)
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if not set(COLUMNS) <= set(reader.fieldnames or []):
            msg = f"pairs: {path.name} must have the columns {COLUMNS}, it has {reader.fieldnames}"
            raise ValueError(msg)
        rows = [tuple(row[name] for name in COLUMNS) for row in reader]
    names, labels, splits = [pair[:2] for pair in rows], [row[2] for row in rows], np.array([row[3] for row in rows])
    if not set(labels) <= {"0", "1"} or not set(splits.tolist()) <= set(SPLITS):
        found = sorted(set(labels))[:5], sorted(set(splits.tolist()))[:5]
        msg = f"pairs: labels 0 and 1 and splits {SPLITS} are allowed, {path.name} has {found[0]} and {found[1]}"
        raise ValueError(msg)
    positions = vocabulary.map_names([name for pair in names for name in pair]).positions.reshape(-1, 2)
    return _split_pairs(path, positions.astype(np.int64), np.array(labels, np.float32), splits)


def classify_pairs(
    features: npt.NDArray[np.float32], pairs: dict[Split, LabelledPairs], *, seed: int = 2022, device: str = "cpu"
) -> PairScores:
    """Train the network on the training pairs and return its areas under the ROC curve.

    It sees the sum, the product and the absolute difference of the two genes' features, so that the order of a pair
    does not matter. The validation pairs choose the learning rate and the step; the test pairs choose nothing.

    Parameters
    ----------
    features
        (num_genes, num_features), in vocabulary order. They are standardised by the genes of the training pairs.
    pairs
        Of each split; every gene in them needs finite features.
    seed
        Of weights, dropout and order.
    device
        Where to train.

    Raises
    ------
    ValueError
        A gene of a pair has no features.
    """
    used = np.unique(np.concatenate([pairs[split].genes.ravel() for split in SPLITS]))
    if not np.isfinite(features[used]).all():
        msg = "features: every gene of the pairs needs finite ones; leave the others out with LabelledPairs.among"
        raise ValueError(msg)
    of_training = features[np.unique(pairs["train"].genes)]
    scale = np.maximum(of_training.std(axis=0), 1e-6)
    table = torch.tensor(
        np.nan_to_num((features - of_training.mean(axis=0)) / scale), dtype=torch.float32, device=device
    )
    tensors = {
        split: (torch.tensor(pairs[split].genes, device=device), torch.tensor(pairs[split].labels, device=device))
        for split in SPLITS
    }
    with torch.random.fork_rng():
        found = []
        for learning_rate in LEARNING_RATES:
            torch.manual_seed(seed)
            found.append(_train(table, tensors, learning_rate))
    return max(found, key=lambda scores: scores.valid)


def _train(table: Tensor, tensors: dict[Split, tuple[Tensor, Tensor]], learning_rate: float) -> PairScores:
    network = nn.Sequential(
        nn.Linear(3 * table.shape[1], HIDDEN_SIZE), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(HIDDEN_SIZE, 1)
    ).to(table.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY)
    genes, labels = tensors["train"]
    best = PairScores(0.0, 0.0, 0, learning_rate)
    batches = (batch for _ in count() for batch in torch.randperm(len(genes)).split(BATCH_SIZE))
    for step, batch in enumerate(islice(batches, MAX_STEPS), start=1):
        network.train()
        logits = network(_pair_features(table, genes[batch]))[:, 0]
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % STEPS_A_CHECK:
            continue
        valid = _area(network, table, *tensors["valid"])
        if valid > best.valid:
            best = PairScores(valid, _area(network, table, *tensors["test"]), step, learning_rate)
        elif step >= best.step + PATIENCE * STEPS_A_CHECK:
            break
    return best


def _pair_features(table: Tensor, genes: Tensor) -> Tensor:
    first, second = table[genes[:, 0]], table[genes[:, 1]]
    return torch.cat([first + second, first * second, (first - second).abs()], dim=1)


@torch.no_grad()
def _area(network: nn.Module, table: Tensor, genes: Tensor, labels: Tensor) -> float:
    network.eval()
    logits = torch.cat([network(_pair_features(table, part))[:, 0] for part in genes.split(16 * BATCH_SIZE)])
    return float(roc_auc_score(labels.cpu().numpy(), logits.cpu().numpy()))


def _split_pairs(
    path: Path, genes: npt.NDArray[np.int64], labels: npt.NDArray[np.float32], splits: npt.NDArray[np.str_]
) -> dict[Split, LabelledPairs]:
    pairs: dict[Split, LabelledPairs] = {}
    is_known = (genes >= 0).all(axis=1)
    later: npt.NDArray[np.int64] = np.zeros(0, np.int64)
    for split in reversed(SPLITS):
        is_here = splits == split
        kept = is_here & is_known & ~np.isin(genes, later).any(axis=1)
        if len(set(labels[kept].tolist())) < 2:
            msg = f"pairs: the split {split!r} of {path.name} needs pairs of both labels between known genes"
            raise ValueError(msg)
        later = np.union1d(later, genes[is_here & is_known])
        pairs[split] = LabelledPairs(genes[kept], labels[kept], int(is_here.sum()), float(labels[is_here].mean()))
    return pairs
