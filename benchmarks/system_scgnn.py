"""scGNN (Wang et al. 2021, Nat Commun 12:1882): autoencoders and a graph of cells, and logistic regression on top.

Written from the paper. Ported: log(counts + 1) of the 2,000 most variable genes, without normalisation by depth; a
feature autoencoder of 512-128-512; a graph of each cell's 10 nearest neighbours by its code, without edges longer than
the mean of the cell's distances by one standard deviation; a graph autoencoder (two convolutions, 32 and 16), whose
embedding is clustered with as many k-means clusters as Louvain finds communities; an autoencoder a cluster, whose
reconstruction is what the feature autoencoder reads in the next iteration.

It behaves as the paper has it, and not as the program does by default, in two places:

- The graph's embedding is made and gives the clusters. The program leaves it out unless asked, and clusters the codes.
- Each cluster's autoencoder learns from the cells of that cluster alone. In the program a mistake in the loader lets
  each of them learn from all cells.

Left out: the left-truncated mixture model of genes (LTMG) and the regularisers of the loss by it, by the graph and by
clusters; the last autoencoder, which imputes; the stop once clusters stay the same (there are two iterations); and
hundreds of epochs over all cells at once (here tens, in batches of 64). The graph autoencoder tells edges from as many
random pairs, where the original tells them from all pairs.

It is inductive, which the original is not: all is fitted on training cells; a test cell passes through the same
autoencoders, joins the cluster whose centre is nearest, and in the graph has edges to its nearest training cells
alone, which do not see it. Cell types come from a logistic regression on codes and graph embedding, centred and scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from screformer.benchmarks.cell_type_systems import NamedCells, need
from screformer.benchmarks.system_scpred import most_variable_genes
from screformer.benchmarks.systems_features import Int64Array, query_features, training_cells
from screformer.benchmarks.systems_simple import named_by_scores

if TYPE_CHECKING:
    from anndata import AnnData

FloatArray = npt.NDArray[np.float32]
Embedding = Literal["codes", "graph", "both"]

NUM_GENES = 2_000
HIDDEN_SIZE, CODE_SIZE = 512, 128
NUM_NEIGHBORS = 10
GRAPH_HIDDEN_SIZE, GRAPH_SIZE = 32, 16
LEARNING_RATE, GRAPH_LEARNING_RATE = 1e-3, 1e-2
BATCH_SIZE = 64
FIRST_EPOCHS, LATER_EPOCHS, CLUSTER_EPOCHS, GRAPH_EPOCHS = 30, 10, 10, 200
NUM_ITERATIONS = 2
MIN_COMMUNITY = 10  # cells; smaller ones are not counted as clusters
PREDICT_BATCH = 1024


class ScGnn:
    """scGNN as a `CellTypeSystem`, inductive; see the module for what is ported.

    Parameters
    ----------
    num_iterations
        How often clusters are found and cells are reconstructed by them.
    embedding
        What the logistic regression sees: codes of the last feature autoencoder, the graph's embedding, or both.

    Raises
    ------
    ValueError
        `num_iterations` is below 0, or `embedding` is none of these.
    """

    title = "scGNN (own port, inductive)"
    is_inductive = True

    def __init__(self, *, num_iterations: int = NUM_ITERATIONS, embedding: Embedding = "both") -> None:
        if num_iterations < 0:
            raise ValueError(f"num_iterations must be at least 0, got {num_iterations}")
        if embedding not in get_args(Embedding):
            raise ValueError(f"embedding must be one of {', '.join(get_args(Embedding))}, got {embedding!r}")
        self.num_iterations = num_iterations
        self.embedding = embedding
        self._genes: list[str] | None = None
        self._columns: Int64Array | None = None
        self._stages: list[Stage] = []
        self._classifier: Pipeline | None = None
        self._classes: tuple[str, ...] = ()

    def fit(self, adata: AnnData, labels: Sequence[str], *, groups: Sequence[str] | None = None, seed: int = 0) -> None:
        """Fit autoencoders and graphs, then the regression; see `CellTypeSystem.fit`. `groups` have no effect."""
        need("networkx")
        cells = training_cells(adata, labels)
        columns = most_variable_genes(adata.X, NUM_GENES)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            stages, codes, places = fit_stages(_expression(adata, columns), self.num_iterations, seed=seed)
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2_000))
        classifier.fit(self._choose(codes, places), cells.class_ids)
        self._columns, self._stages, self._classifier = columns, stages, classifier
        self._genes, self._classes = cells.genes, cells.classes

    def predict(self, adata: AnnData) -> NamedCells:
        """Name cells; scores are probabilities. See `CellTypeSystem.predict`."""
        query_features(adata, self._genes)  # for its checks: scGNN does not normalise
        assert self._columns is not None
        assert self._classifier is not None
        scores = []
        for first in range(0, adata.n_obs, PREDICT_BATCH):
            expression = _expression(adata[first : first + PREDICT_BATCH], self._columns)
            codes, places = embed_new_cells(expression, self._stages)
            scores.append(self._classifier.predict_proba(self._choose(codes, places)))
        return named_by_scores(np.concatenate(scores), self._classes)

    def _choose(self, codes: Tensor, places: Tensor) -> FloatArray:
        chosen = {"codes": codes, "graph": places, "both": torch.cat([codes, places], dim=1)}[self.embedding]
        return chosen.numpy()


class Autoencoder(nn.Module):
    """Layers of 512, 128, 512 and as many as genes, all with ReLU.

    Parameters
    ----------
    num_genes
        Of a cell.
    """

    def __init__(self, num_genes: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(num_genes, HIDDEN_SIZE), nn.ReLU(), nn.Linear(HIDDEN_SIZE, CODE_SIZE), nn.ReLU()
        )
        self.decoder = nn.Sequential(
            nn.Linear(CODE_SIZE, HIDDEN_SIZE), nn.ReLU(), nn.Linear(HIDDEN_SIZE, num_genes), nn.ReLU()
        )

    def forward(self, expression: Tensor) -> Tensor:
        """Return the reconstruction of (cells, genes)."""
        reconstructed: Tensor = self.decoder(self.encoder(expression))
        return reconstructed


class CellGraph:
    """Training cells with their neighbours, and the convolutions over them.

    Attributes
    ----------
    codes
        (cells, 128).
    adjacency
        (cells, cells), 1 where two cells are neighbours, symmetric, without loops.

    Parameters
    ----------
    codes
        Of the training cells.
    """

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes
        # Uncentred, all cells look alike to a random pair, and the convolutions learn to say nothing of any.
        self._means, self._deviations = codes.mean(dim=0), codes.std(dim=0).clamp(min=1e-6)
        self._search = NearestNeighbors(n_neighbors=min(NUM_NEIGHBORS, len(codes) - 1)).fit(codes.numpy())
        directed = pruned_edges(*self._search.kneighbors(), num_targets=len(codes))
        self.adjacency = directed.maximum(directed.T).tocsr()
        self._degrees = 1 + self.adjacency.sum(axis=1)  # a cell is its own neighbour too
        self._first = nn.Linear(CODE_SIZE, GRAPH_HIDDEN_SIZE, bias=False)
        self._second = nn.Linear(GRAPH_HIDDEN_SIZE, GRAPH_SIZE, bias=False)

    def fit(self) -> Tensor:
        """Train the graph autoencoder and return the embedding of the training cells (cells, 16)."""
        between = _normalised(self.adjacency, self._degrees, self._degrees)
        itself = torch.from_numpy(1 / self._degrees).float()[:, None]
        edges = torch.from_numpy(np.stack(self.adjacency.nonzero()).astype(np.int64))
        optimizer = torch.optim.Adam([*self._first.parameters(), *self._second.parameters()], lr=GRAPH_LEARNING_RATE)
        for _ in range(GRAPH_EPOCHS):
            hidden = self._convolve(self._first(self._scale(self.codes)), between, itself).relu()
            places = self._convolve(self._second(hidden), between, itself)
            pairs = torch.cat([edges, torch.randint(len(self.codes), edges.shape)], dim=1)
            is_edge = (torch.arange(pairs.shape[1]) < edges.shape[1]).float()
            logits = (places[pairs[0]] * places[pairs[1]]).sum(dim=1)
            loss = nn.functional.binary_cross_entropy_with_logits(logits, is_edge)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.inference_mode():
            hidden = self._convolve(self._first(self._scale(self.codes)), between, itself).relu()
            self._hidden_of_train = self._second(hidden)
            return self._convolve(self._hidden_of_train, between, itself)

    @torch.inference_mode()
    def embed_new(self, codes: Tensor) -> Tensor:
        """Return the embedding of new cells (cells, 16), each with edges to training cells alone."""
        edges = pruned_edges(*self._search.kneighbors(codes.numpy()), num_targets=len(self.codes))
        degrees = 1 + edges.sum(axis=1)
        between = _normalised(edges, degrees, self._degrees)
        itself = torch.from_numpy(1 / degrees).float()[:, None]
        hidden = (between @ self._first(self._scale(self.codes)) + itself * self._first(self._scale(codes))).relu()
        return between @ self._hidden_of_train + itself * self._second(hidden)

    def _scale(self, codes: Tensor) -> Tensor:
        return (codes - self._means) / self._deviations

    @staticmethod
    def _convolve(states: Tensor, between: Tensor, itself: Tensor) -> Tensor:
        return between @ states + itself * states


class Clusters(NamedTuple):
    """Clusters of cells by their place in the graph, each with an autoencoder.

    Attributes
    ----------
    k_means
        Fitted to the graph's embedding.
    autoencoders
        One a cluster.
    """

    k_means: KMeans
    autoencoders: list[Autoencoder]

    @torch.inference_mode()
    def reconstruct(self, expression: Tensor, places: Tensor) -> Tensor:
        """Return each cell (cells, genes) as the autoencoder of its cluster reconstructs it."""
        cluster = torch.from_numpy(self.k_means.predict(places.numpy()).astype(np.int64))
        reconstructed = torch.empty_like(expression)
        for number, autoencoder in enumerate(self.autoencoders):
            reconstructed[cluster == number] = autoencoder(expression[cluster == number])
        return reconstructed


class Stage(NamedTuple):
    """What is fitted in one iteration.

    Attributes
    ----------
    autoencoder
        Of all cells.
    graph
        Of the codes.
    clusters
        That lead to the next iteration; None in the last one.
    """

    autoencoder: Autoencoder
    graph: CellGraph
    clusters: Clusters | None


def fit_stages(expression: Tensor, num_iterations: int, *, seed: int) -> tuple[list[Stage], Tensor, Tensor]:
    """Return the stages, and the last codes and graph embedding of the training cells.

    Parameters
    ----------
    expression
        (cells, genes), log(counts + 1).
    num_iterations
        There is one stage more.
    seed
        Of clusters; all else draws from the generator of torch.
    """
    stages: list[Stage] = []
    autoencoder = Autoencoder(expression.shape[1])
    while True:
        _train(autoencoder, expression, LATER_EPOCHS if stages else FIRST_EPOCHS)
        with torch.inference_mode():
            codes = autoencoder.encoder(expression)
        graph = CellGraph(codes.clone())
        places = graph.fit()
        is_last = len(stages) == num_iterations
        clusters = None if is_last else fit_clusters(expression, places, graph.adjacency, autoencoder, seed=seed)
        stages.append(Stage(autoencoder, graph, clusters))
        if clusters is None:
            return stages, codes, places
        expression = clusters.reconstruct(expression, places).clone()
        autoencoder = deepcopy(autoencoder)


def fit_clusters(
    expression: Tensor, places: Tensor, adjacency: sparse.csr_array, autoencoder: Autoencoder, *, seed: int
) -> Clusters:
    """Return as many k-means clusters as Louvain finds communities, each with an autoencoder of its own cells.

    Parameters
    ----------
    expression, places
        (cells, genes) and (cells, 16).
    adjacency
        Of the cells.
    autoencoder
        Where those of the clusters start from.
    seed
        Of Louvain and k-means.
    """
    import networkx  # type: ignore[import-untyped]  # comes with torch; slow to import

    communities = networkx.community.louvain_communities(networkx.from_scipy_sparse_array(adjacency), seed=seed)
    num_clusters = max(1, sum(len(members) >= MIN_COMMUNITY for members in communities))
    k_means = KMeans(num_clusters, n_init=10, random_state=seed).fit(places.numpy())
    autoencoders = []
    for number in range(num_clusters):
        own = deepcopy(autoencoder)
        _train(own, expression[torch.from_numpy(k_means.labels_ == number)], CLUSTER_EPOCHS)
        autoencoders.append(own)
    return Clusters(k_means, autoencoders)


@torch.inference_mode()
def embed_new_cells(expression: Tensor, stages: Sequence[Stage]) -> tuple[Tensor, Tensor]:
    """Return the last codes (cells, 128) and graph embedding (cells, 16) of new cells (cells, genes)."""
    for stage in stages:
        codes = stage.autoencoder.encoder(expression)
        places = stage.graph.embed_new(codes)
        if stage.clusters is not None:
            expression = stage.clusters.reconstruct(expression, places)
    return codes, places


def pruned_edges(distances: npt.NDArray[np.floating], neighbors: Int64Array, *, num_targets: int) -> sparse.csr_array:
    """Return (cells, targets), 1 for neighbours no further than the cell's mean distance plus a standard deviation.

    Parameters
    ----------
    distances, neighbors
        (cells, neighbours) of each cell.
    num_targets
        How many cells can be neighbours.
    """
    is_near = distances <= distances.mean(axis=1, keepdims=True) + distances.std(axis=1, keepdims=True)
    cells = np.broadcast_to(np.arange(len(distances))[:, None], distances.shape)
    ones = np.ones(int(is_near.sum()))
    return sparse.csr_array((ones, (cells[is_near], neighbors[is_near])), shape=(len(distances), num_targets))


def _normalised(edges: sparse.csr_array, degrees: FloatArray, target_degrees: FloatArray) -> Tensor:
    """Return edges divided by the root of the degrees at both ends, as a sparse tensor."""
    scaled = sparse.coo_array(sparse.diags_array(degrees**-0.5) @ edges @ sparse.diags_array(target_degrees**-0.5))
    at = torch.from_numpy(np.stack(scaled.coords).astype(np.int64))
    weights = torch.from_numpy(scaled.data).float()
    # To say nothing of the check warns.
    return torch.sparse_coo_tensor(at, weights, scaled.shape, check_invariants=True).coalesce()


def _train(autoencoder: Autoencoder, expression: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=LEARNING_RATE)
    for _ in range(epochs):
        for rows in torch.randperm(len(expression)).split(BATCH_SIZE):
            loss = nn.functional.mse_loss(autoencoder(expression[rows]), expression[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _expression(adata: AnnData, columns: Int64Array) -> Tensor:
    return torch.from_numpy(np.log1p(sparse.csr_array(adata.X)[:, columns].toarray().astype(np.float32)))
