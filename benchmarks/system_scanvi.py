"""scANVI (Xu et al. 2021, Molecular Systems Biology 17:e9620), by scvi-tools: a variational autoencoder with labels.

scVI learns the counts of the training cells without labels, scANVI goes on with them. The query is named by the trained
model as it is, and never trained on, as the papers' workflows do: so the system is inductive. Donors are no batches
here, since those of the query are unseen.
"""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import torch
from scipy import sparse

from screformer.benchmarks.cell_type_systems import NamedCells, check_genes, need
from screformer.benchmarks.system_scpred import most_variable_genes
from screformer.benchmarks.systems_features import Int64Array, training_cells
from screformer.benchmarks.systems_simple import named_by_scores

if TYPE_CHECKING:
    from anndata import AnnData

NUM_GENES = 2_000
NUM_LAYERS, NUM_LATENT = 2, 30  # scvi-tools' tutorials on references; so is CELLS_PER_LABEL
CELLS_PER_LABEL = 100
BATCH_SIZE = 128
LABEL_COLUMN, NO_LABEL = "label", "none"
TALKING_LOGGERS = ("scvi", "lightning.pytorch", "lightning.fabric")


class ScAnvi:
    """scANVI as a `CellTypeSystem`: 2,000 variable genes, two layers, 30 latent dimensions.

    Parameters
    ----------
    num_epochs
        Of scVI, which sees no labels.
    num_label_epochs
        Of scANVI after it; in each at most 100 cells of a label are drawn.

    Raises
    ------
    ValueError
        A number is below 1.
    """

    title = "scANVI (query not trained on)"
    is_inductive = True

    def __init__(self, *, num_epochs: int = 200, num_label_epochs: int = 20) -> None:
        for name, value in (("num_epochs", num_epochs), ("num_label_epochs", num_label_epochs)):
            if value < 1:
                raise ValueError(f"{name} got {value}; it must be at least 1")
        self.num_epochs = num_epochs
        self.num_label_epochs = num_label_epochs
        self._genes: list[str] | None = None
        self._classes: tuple[str, ...] = ()
        self._columns: Int64Array = np.empty(0, dtype=np.int64)
        self._model: Any = None  # scvi-tools', which is not checked

    def fit(self, adata: AnnData, labels: Sequence[str], *, groups: Sequence[str] | None = None, seed: int = 0) -> None:
        """Train without, then with labels, on every cell; see `CellTypeSystem.fit`. There is nothing to search."""
        need("scvi-tools", "scvi")
        cells = training_cells(adata, labels)
        columns = most_variable_genes(adata.X, NUM_GENES)
        counts = _counts(adata, columns, [str(number) for number in cells.class_ids.tolist()])
        import scvi.model  # noqa: F401  # before it is made quiet: on import it says at which level it logs

        with _quiet(), _own_draws(seed):
            self._model = self._train(counts)
        self._columns, self._genes, self._classes = columns, cells.genes, cells.classes

    def _train(self, counts: AnnData) -> Any:  # Any: scvi-tools is not checked
        from scvi.model import SCANVI, SCVI

        shared = {
            "train_size": 1.0,  # nothing is stopped or chosen by held-out cells
            "batch_size": batch_size_for(counts.obs[LABEL_COLUMN].value_counts().tolist()),
            "enable_progress_bar": False,
            "log_every_n_steps": 1,  # Lightning warns where an epoch has fewer steps
            "shuffle_set_split": False,  # there is one set only
        }
        SCVI.setup_anndata(counts)
        unlabelled = SCVI(counts, n_layers=NUM_LAYERS, n_latent=NUM_LATENT)
        unlabelled.train(max_epochs=self.num_epochs, **shared)
        model = SCANVI.from_scvi_model(unlabelled, NO_LABEL, labels_key=LABEL_COLUMN)
        model.train(max_epochs=self.num_label_epochs, n_samples_per_label=CELLS_PER_LABEL, **shared)
        return model

    def predict(self, adata: AnnData) -> NamedCells:
        """Name cells; scores are probabilities. See `CellTypeSystem.predict`."""
        check_genes(self._genes, adata)
        counts = _counts(adata, self._columns, [NO_LABEL] * adata.n_obs)
        with _quiet(), _own_draws(0):  # it draws latent vectors, but names cells by their means
            probabilities = self._model.predict(counts, soft=True)
        columns = [str(number) for number in range(len(self._classes))]
        return named_by_scores(probabilities[columns].to_numpy(), self._classes)


def batch_size_for(cells_of_label: Sequence[int]) -> int:
    """Return 128, or the next size above that leaves no last batch of one cell, which has no variance to scale by.

    Parameters
    ----------
    cells_of_label
        How many training cells each label has. scANVI goes through all cells, and beside them through at most 100 of
        each label, in batches of one size.
    """
    passes = sum(cells_of_label), sum(min(number, CELLS_PER_LABEL) for number in cells_of_label)
    size = BATCH_SIZE
    while any(number % size == 1 for number in passes):
        size += 1
    return size


def _counts(adata: AnnData, columns: Int64Array, labels: Sequence[str]) -> AnnData:
    obs = pd.DataFrame({LABEL_COLUMN: labels}, index=pd.RangeIndex(adata.n_obs).astype(str))
    return anndata.AnnData(sparse.csr_matrix(adata.X, dtype=np.float32)[:, columns], obs=obs)


@contextmanager
def _own_draws(seed: int) -> Iterator[None]:
    """Fix what is drawn from the global generators, and leave them as they were."""
    of_numpy, of_python = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(of_numpy)  # noqa: NPY002
            random.setstate(of_python)


@contextmanager
def _quiet() -> Iterator[None]:
    """Let scvi-tools and Lightning, which are imported, log warnings alone, and warn of nothing that is known."""
    loggers = [logging.getLogger(name) for name in TALKING_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Lightning's way to walk through a batch, which PyTorch 2.13 has another for.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            # Where there are more cores than two; the cells are in memory, and workers would only copy them.
            warnings.filterwarnings("ignore", ".*does not have many workers", UserWarning)
            # Curves of few labels train on that few, and say so.
            warnings.filterwarnings("ignore", r"Category \d+ in .* has fewer than 3 cells", UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
