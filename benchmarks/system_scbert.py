"""scBERT (Yang et al. 2022, Nat Mach Intell 4:852): a Performer that reads one token a gene.

Written from the paper, on the Performer of performer-pytorch. Ported: counts as CP10k, log2(x + 1), truncated to whole
numbers and cut at 5; a token a gene and one more of bin 0, each the sum of the embeddings of its gene and its bin; the
Performer encoder (FAVOR+); a convolution over the width that leaves one value a gene; layers of 512 and 128; AdamW with
gradients summed over small batches. It differs from the original so:

- It is trained from scratch, all of its weights. The original starts from weights that were pretrained on a million
  cells and trains the norm and the last two layers alone; those weights cannot be had from a package index.
- Gene embeddings are learnt, where the original has fixed Gene2vec vectors.
- An epoch reads each training cell once. The original draws cells at random, whichever row is asked for.
- There is no stop by a validation part, and no cell is left unassigned.
- The learning rate rises and falls once over the training, where the original restarts a cosine.

`ScBert()` is a toy of a width that a CPU can train; `ScBert.as_in_paper()` has the paper's width and all genes, and
needs a GPU.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from torch import Tensor, nn

from screformer.benchmarks.cell_type_systems import NamedCells, need
from screformer.benchmarks.system_scpred import most_variable_genes
from screformer.benchmarks.systems_features import Int64Array, query_features, training_cells
from screformer.benchmarks.systems_simple import named_by_scores

if TYPE_CHECKING:
    from anndata import AnnData

Bins = npt.NDArray[np.uint8]

MAX_BIN = 5
HEAD_SIZES = (512, 128)
DROPOUT = 0.1
WARM_UP = 0.1  # of the steps
MAX_GRADIENT = 1.0
GENE_SCALE = 0.1  # of new gene embeddings: at 1 they drown the bins
PREDICT_BATCH = 16


class ScBert:
    """scBERT as a `CellTypeSystem`, trained from scratch; on a GPU where there is one.

    Start of the gene embeddings, learning rate, batch and epochs were chosen on the pancreas, trained on two of its
    donors and tested on a third, and are the same for every data set.

    Attributes
    ----------
    title
        What tables call it, with the width and the genes.

    Parameters
    ----------
    dim, depth, heads
        Of the Performer.
    head_dim
        Width of an attention head; default: dim / heads.
    num_genes
        It reads only so many genes, the most variable ones of the training cells; None: all.
    epochs
        Each reads every training cell once.
    batch_size, num_accumulated
        Cells at a time, and over how many such batches gradients are summed before a step.
    learning_rate
        The highest of the training.
    kind
        Word of the title.

    Raises
    ------
    ValueError
        A number is below 1, the learning rate is not above 0, or `dim` is no multiple of `heads`.
    """

    is_inductive = True

    def __init__(
        self,
        *,
        dim: int = 32,
        depth: int = 2,
        heads: int = 4,
        head_dim: int | None = None,
        num_genes: int | None = 1_000,
        epochs: int = 8,
        batch_size: int = 8,
        num_accumulated: int = 4,
        learning_rate: float = 3e-3,
        kind: str = "toy",
    ) -> None:
        numbers = {
            "dim": dim,
            "depth": depth,
            "heads": heads,
            "head_dim": head_dim,
            "num_genes": num_genes,
            "epochs": epochs,
            "batch_size": batch_size,
            "num_accumulated": num_accumulated,
        }
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if not learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {learning_rate}")
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got dim={dim} and heads={heads}")
        self.dim, self.depth, self.heads, self.head_dim = dim, depth, heads, head_dim or dim // heads
        self.num_genes, self.epochs, self.learning_rate = num_genes, epochs, learning_rate
        self.batch_size, self.num_accumulated = batch_size, num_accumulated
        genes = "all genes" if num_genes is None else f"{num_genes:,} genes"
        self.title = f"scBERT (own port, {kind}: {dim} x {depth}, {genes})"
        self._genes: list[str] | None = None
        self._columns: Int64Array | None = None
        self._network: ScBertNetwork | None = None
        self._classes: tuple[str, ...] = ()

    @classmethod
    def as_in_paper(cls, *, epochs: int = 100) -> ScBert:
        """Return the paper's width on all genes, still not pretrained: for a GPU."""
        return cls(
            dim=200,
            depth=6,
            heads=10,
            head_dim=64,  # the library's default, which the original kept
            num_genes=None,
            epochs=epochs,
            batch_size=3,
            num_accumulated=60,
            learning_rate=1e-4,
            kind="not pretrained",
        )

    def fit(self, adata: AnnData, labels: Sequence[str], *, groups: Sequence[str] | None = None, seed: int = 0) -> None:
        """Train on all of the cells; see `CellTypeSystem.fit`. `groups` have no effect: nothing is searched."""
        need("performer-pytorch", "performer_pytorch")
        cells = training_cells(adata, labels)
        columns = np.arange(adata.n_vars) if self.num_genes is None else most_variable_genes(adata.X, self.num_genes)
        bins = expression_bins(cells.features, columns)
        # Weights, random features of the attention (redrawn in training), order of cells and dropout are drawn here.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            network = ScBertNetwork(
                bins.shape[1], len(cells.classes), self.dim, self.depth, self.heads, self.head_dim
            ).to("cuda" if torch.cuda.is_available() else "cpu")
            self._train(network, bins, cells.class_ids)
        self._network, self._columns = network.eval(), columns
        self._genes, self._classes = cells.genes, cells.classes

    def predict(self, adata: AnnData) -> NamedCells:
        """Name cells; scores are probabilities. See `CellTypeSystem.predict`."""
        features = query_features(adata, self._genes)
        assert self._network is not None
        assert self._columns is not None
        bins = expression_bins(features, self._columns)
        device = next(self._network.parameters()).device
        with torch.inference_mode():
            logits = [self._network(batch.to(device)).cpu() for batch in torch.from_numpy(bins).split(PREDICT_BATCH)]
        return named_by_scores(torch.cat(logits).softmax(dim=-1).numpy(), self._classes)

    def _train(self, network: ScBertNetwork, bins: Bins, class_ids: Int64Array) -> None:
        device = next(network.parameters()).device
        inputs, targets = torch.from_numpy(bins), torch.from_numpy(class_ids)
        cells_a_step = self.batch_size * self.num_accumulated
        optimizer = torch.optim.AdamW(network.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            self.learning_rate,
            epochs=self.epochs,
            steps_per_epoch=-(-len(inputs) // cells_a_step),
            pct_start=WARM_UP,
            cycle_momentum=False,
        )
        network.train()
        for _ in range(self.epochs):
            for step in torch.randperm(len(inputs)).split(cells_a_step):
                optimizer.zero_grad()
                for rows in step.split(self.batch_size):
                    logits = network(inputs[rows].to(device))
                    loss = nn.functional.cross_entropy(logits, targets[rows].to(device), reduction="sum")
                    (loss / len(step)).backward()
                nn.utils.clip_grad_norm_(network.parameters(), MAX_GRADIENT)
                optimizer.step()
                schedule.step()


def expression_bins(features: sparse.csr_array, columns: Int64Array) -> Bins:
    """Return the bin of each gene, (cells, genes): log2(CP10k + 1), truncated, at most 5.

    Parameters
    ----------
    features
        (cells, all genes), natural log1p CP10k.
    columns
        Genes to read.
    """
    chosen = sparse.csr_array(features[:, columns])
    # 1e-4: a count of exactly 2^n - 1 must not fall below n by rounding.
    chosen.data = np.minimum(np.floor(chosen.data / np.log(2) + 1e-4), MAX_BIN)
    return chosen.toarray().astype(np.uint8)


class ScBertNetwork(nn.Module):
    """Embeddings, Performer, convolution and the layers that name the cell.

    Parameters
    ----------
    num_genes, num_labels
        Of the input and the output.
    dim, depth, heads, head_dim
        As for `ScBert`.
    """

    def __init__(self, num_genes: int, num_labels: int, dim: int, depth: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.gene_embedding = nn.Embedding(num_genes + 1, dim)
        nn.init.normal_(self.gene_embedding.weight, std=GENE_SCALE)
        self.bin_embedding = nn.Embedding(MAX_BIN + 1, dim)
        self.encoder = _import_performer().Performer(dim, depth, heads, head_dim, qkv_bias=False, attn_out_bias=False)
        self.norm = nn.LayerNorm(dim)
        self.convolution = nn.Linear(dim, 1)  # a kernel of one gene by the whole width
        first, second = HEAD_SIZES
        self.head = nn.Sequential(
            nn.ReLU(),
            nn.Linear(num_genes + 1, first),
            nn.ReLU(),
            nn.Dropout(DROPOUT),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Dropout(DROPOUT),
            nn.Linear(second, num_labels),
        )

    def forward(self, bins: Tensor) -> Tensor:
        """Return logits (cells, labels) of bins (cells, genes)."""
        padded = nn.functional.pad(bins.long(), (0, 1))
        states = self.encoder(self.gene_embedding.weight + self.bin_embedding(padded))
        logits: Tensor = self.head(self.convolution(self.norm(states)).squeeze(-1))
        return logits


def _import_performer() -> Any:  # Any: the library has no types
    with warnings.catch_warnings():
        # performer-pytorch compares versions with distutils.
        warnings.filterwarnings("ignore", "distutils Version classes are deprecated", DeprecationWarning)
        return importlib.import_module("performer_pytorch")
