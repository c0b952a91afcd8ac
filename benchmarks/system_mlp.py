"""A multilayer perceptron, the simplest rival in Li et al. 2025: two hidden layers with dropout on every gene."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from torch import Tensor, nn

from screformer.benchmarks.cell_type_systems import NamedCells, check_genes
from screformer.benchmarks.systems_features import query_features, training_cells
from screformer.benchmarks.systems_simple import named_by_scores
from screformer.train.splits import split_cells

if TYPE_CHECKING:
    from anndata import AnnData

HIDDEN_SIZES = (512, 128)
DROPOUT = 0.3
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-2
BATCH_SIZE = 64
MAX_EPOCHS, PATIENCE = 50, 5
HELD_OUT = 0.1
MIN_HELD_OUT = 2  # cells a label on average


class Mlp:
    """ReLU layers of 512 and 128 with dropout 0.3, on log1p CP10k; AdamW, stopped by a tenth of the training cells.

    The paper gives no learning rate, batch size or stopping rule: these are the usual ones. Training ends after five
    epochs without a lower loss on the held-out tenth (of each label), and the best epoch is kept. With fewer than two
    held-out cells a label on average, none are held out and training takes its 50 epochs. Genes that no training cell
    has are left out: their weights would stay as they were drawn.
    """

    title = "MLP (512-128)"
    is_inductive = True

    def __init__(self) -> None:
        self._genes: list[str] | None = None

    def fit(self, adata: AnnData, labels: Sequence[str], *, groups: Sequence[str] | None = None, seed: int = 0) -> None:
        """Train on nine tenths of the cells; see `CellTypeSystem.fit`. `groups` have no effect."""
        cells = training_cells(adata, labels)
        rows = np.arange(len(cells.class_ids))
        train, held_out = rows, rows[:0]
        if len(rows) * HELD_OUT >= MIN_HELD_OUT * len(cells.classes):
            train, held_out, _ = split_cells(labels, fractions=(1 - HELD_OUT, HELD_OUT, 0), seed=seed)
        self._columns = np.unique(cells.features.indices)
        self._network = _train(cells.features[:, self._columns], cells.class_ids, train, held_out, seed)
        self._genes, self._classes = cells.genes, cells.classes

    def predict(self, adata: AnnData) -> NamedCells:
        """Name cells; scores are probabilities. See `CellTypeSystem.predict`."""
        check_genes(self._genes, adata)
        features = query_features(adata, self._genes)[:, self._columns]
        with torch.inference_mode():
            logits = [self._network(_dense(features[first : first + 512])) for first in range(0, adata.n_obs, 512)]
        return named_by_scores(torch.cat(logits).softmax(dim=-1).numpy(), self._classes)


def _train(
    features: sparse.csr_array,
    class_ids: npt.NDArray[np.int64],
    train: npt.NDArray[np.int64],
    held_out: npt.NDArray[np.int64],
    seed: int,
) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _new_network(features.shape[1], int(class_ids.max()) + 1)
        optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
        targets = torch.from_numpy(class_ids)
        best, best_loss, best_epoch = network, np.inf, 0
        for epoch in range(MAX_EPOCHS):
            network.train()
            for rows in torch.randperm(len(train)).split(BATCH_SIZE):
                chosen = train[rows.numpy()]
                loss = nn.functional.cross_entropy(network(_dense(features[chosen])), targets[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            network.eval()
            if not len(held_out):
                continue
            with torch.inference_mode():
                logits = network(_dense(features[held_out]))
                held_out_loss = float(nn.functional.cross_entropy(logits, targets[held_out]))
            if held_out_loss < best_loss:
                best, best_loss, best_epoch = deepcopy(network), held_out_loss, epoch
            elif epoch - best_epoch >= PATIENCE:
                break
    return best.eval()


def _new_network(num_genes: int, num_classes: int) -> nn.Module:
    sizes = (num_genes, *HIDDEN_SIZES)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(DROPOUT)]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes))


def _dense(features: sparse.csr_array) -> Tensor:
    return torch.from_numpy(features.toarray().astype(np.float32, copy=False))
