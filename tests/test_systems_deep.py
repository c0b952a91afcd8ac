"""Ports of methods that learn deep: scGNN and scBERT."""

from functools import cache

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse

from screformer.benchmarks import system_scgnn
from screformer.benchmarks.known_systems import SYSTEMS
from screformer.benchmarks.system_scbert import ScBert, ScBertNetwork, expression_bins
from screformer.benchmarks.system_scgnn import CellGraph, ScGnn, pruned_edges
from screformer.benchmarks.systems_features import training_cells

LABELS = ["alpha", "beta", "delta"]
NAMES = ("scgnn", "scbert")


def made_up_cells(seed: int, num_cells: int = 90) -> tuple[anndata.AnnData, list[str]]:
    """Cells of three types, each with five genes of its own among 39; most counts are of the last one."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(LABELS, num_cells // 3)
    rates = np.ones((num_cells, 40))
    for index, label in enumerate(LABELS):
        rates[np.ix_(labels == label, np.arange(index * 5, index * 5 + 5))] = 9
    rates[:, -1] = 5_000  # else a count in 10,000 would be in the highest of scBERT's bins
    adata = anndata.AnnData(sparse.csr_matrix(generator.poisson(rates).astype(np.float32)))
    adata.var_names = [f"G{gene}" for gene in range(40)]
    adata.obs_names = [f"C{cell}" for cell in range(num_cells)]
    return adata, labels.tolist()


def make(name):
    if name == "scgnn":
        return ScGnn(num_iterations=1)
    pytest.importorskip("performer_pytorch")
    return ScBert(dim=16, depth=1, heads=2, num_genes=32, epochs=8)


@cache
def fitted(name):
    """Return a system fitted to 90 cells, and whether the global generators stayed as they were."""
    system = make(name)
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    system.fit(*made_up_cells(3), seed=5)
    system.predict(made_up_cells(4)[0])
    is_same = np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    return system, is_same and torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize("name", NAMES)
def test_names_new_cells_of_types_with_their_own_genes_and_leaves_global_generators_alone(name):
    system, generators_stayed = fitted(name)
    adata, labels = made_up_cells(4)
    named = system.predict(adata)
    assert np.mean(np.array(named.labels) == labels) > 0.9
    assert named.classes == tuple(LABELS)
    np.testing.assert_allclose(named.scores.sum(axis=1), 1, rtol=1e-5)
    assert named.labels == [named.classes[index] for index in named.scores.argmax(axis=1)]
    assert generators_stayed


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_answer_whatever_the_global_generator(name):
    adata, _ = made_up_cells(4)
    again = make(name)
    torch.rand(3)
    again.fit(*made_up_cells(3), seed=5)
    np.testing.assert_array_equal(again.predict(adata).scores, fitted(name)[0].predict(adata).scores)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_test_cells_and_their_company_do_not_matter(name):
    system, (adata, _) = fitted(name)[0], made_up_cells(4)
    named, order = system.predict(adata), np.random.default_rng(0).permutation(90)[:20]
    moved = system.predict(adata[order])
    assert system.is_inductive
    assert moved.labels == [named.labels[row] for row in order]
    np.testing.assert_allclose(moved.scores, named.scores[order], rtol=1e-3, atol=1e-5)  # float32 sums in other blocks


@pytest.mark.parametrize("name", NAMES)
def test_other_genes_one_label_and_predict_before_fit_are_refused(name):
    adata, labels = made_up_cells(3)
    with pytest.raises(ValueError, match="comes before predict"):
        make(name).predict(adata)
    with pytest.raises(ValueError, match="one entry a cell"):
        make(name).fit(adata, labels[1:])
    with pytest.raises(ValueError, match="at least 2 labels"):
        make(name).fit(adata, ["alpha"] * 90)
    with pytest.raises(ValueError, match="not the 40 of fit"):
        fitted(name)[0].predict(adata[:, ::-1])


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_named_with_the_remedy(name, monkeypatch):
    monkeypatch.setattr("screformer.benchmarks.cell_type_systems.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"not installed: pip install (networkx|performer-pytorch)"):
        SYSTEMS[name]().fit(*made_up_cells(3))


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="num_iterations must be at least 0, got -1"):
        ScGnn(num_iterations=-1)
    with pytest.raises(ValueError, match="one of codes, graph, both, got 'pca'"):
        ScGnn(embedding="pca")
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        ScBert(epochs=0)
    with pytest.raises(ValueError, match="learning_rate must be above 0"):
        ScBert(learning_rate=0)
    with pytest.raises(ValueError, match="dim=30 and heads=4"):
        ScBert(dim=30)


def test_edges_beyond_the_mean_by_a_standard_deviation_are_left_out():
    distances = np.array([[1.0, 1, 1, 5], [2, 2, 2, 2]])  # mean 2, deviation 1.7; and 2, 0
    edges = pruned_edges(distances, np.array([[1, 2, 3, 4], [0, 2, 3, 4]]), num_targets=5)
    np.testing.assert_array_equal(edges.toarray(), [[0, 1, 1, 1, 0], [1, 0, 1, 1, 1]])


def test_training_graph_is_symmetric_and_a_new_cell_has_the_embedding_of_a_dense_graph():
    generator = torch.Generator().manual_seed(0)
    codes, new = (torch.rand(count, 128, generator=generator) for count in (30, 4))
    with torch.random.fork_rng(devices=[]):
        graph = CellGraph(codes)
        places = graph.fit()
    assert places.shape == (30, 16)
    assert (graph.adjacency != graph.adjacency.T).nnz == 0
    assert not graph.adjacency.diagonal().any()
    first, second = graph._first.weight.detach().double(), graph._second.weight.detach().double()
    means, deviations = codes.mean(dim=0), codes.std(dim=0)
    for cell in range(4):  # the graph of all training cells and this one, which no training cell has an edge to
        distances = torch.cdist(new[cell : cell + 1], codes)[0].double()
        near = distances.argsort()[:10]
        near = near[distances[near] <= distances[near].mean() + distances[near].std(correction=0)]
        edges = torch.eye(31, dtype=torch.float64)
        edges[:30, :30] += torch.from_numpy(graph.adjacency.toarray())
        edges[30, near] = 1
        roots = edges.sum(dim=1) ** -0.5
        edges = roots[:, None] * edges * roots
        states = ((torch.cat([codes, new[cell : cell + 1]]) - means) / deviations).double()
        expected = edges @ (edges @ states @ first.T).relu() @ second.T
        np.testing.assert_allclose(graph.embed_new(new[cell : cell + 1])[0], expected[30], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(places, expected[:30], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("embedding", "width"), [("codes", 128), ("graph", 16), ("both", 144)])
def test_regression_sees_the_chosen_embedding(embedding, width):
    chosen = ScGnn(embedding=embedding)._choose(torch.zeros(3, 128), torch.zeros(3, 16))
    assert chosen.shape == (3, width)


def test_each_cluster_has_an_autoencoder_of_its_own_cells_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(system_scgnn, "_train", lambda network, expression, epochs: seen.append(expression))
    expression, places = torch.rand(40, 6), torch.rand(40, 16)
    places[20:] += 5
    adjacency = sparse.csr_array(np.kron(np.eye(2), np.ones((20, 20))) - np.eye(40))
    clusters = system_scgnn.fit_clusters(expression, places, adjacency, system_scgnn.Autoencoder(6), seed=0)
    assert len(clusters.autoencoders) == 2
    halves = sorted(seen, key=lambda cells: not torch.equal(cells, expression[:20]))
    assert torch.equal(halves[0], expression[:20])
    assert torch.equal(halves[1], expression[20:])


def test_bins_are_the_truncated_log2_of_cp10k_cut_at_five():
    counts = np.array([[1, 3, 7, 62, 0, 9927]], dtype=np.float32)  # 10,000 in all
    adata = anndata.AnnData(sparse.csr_matrix(np.repeat(counts, 2, axis=0)))
    features = training_cells(adata, ["a", "b"]).features
    np.testing.assert_array_equal(expression_bins(features, np.arange(6))[0], [1, 2, 3, 5, 0, 5])
    np.testing.assert_array_equal(expression_bins(features, np.array([1, 4]))[0], [2, 0])


def test_scbert_has_the_widths_of_the_paper_or_says_that_it_is_a_toy():
    toy, paper = ScBert(num_genes=2_000), ScBert.as_in_paper(epochs=2)
    assert toy.title == "scBERT (own port, toy: 32 x 2, 2,000 genes)"
    assert paper.title == "scBERT (own port, not pretrained: 200 x 6, all genes)"
    assert (paper.heads, paper.head_dim, paper.batch_size, paper.num_accumulated) == (10, 64, 3, 60)
    assert (paper.learning_rate, paper.epochs, ScBert.as_in_paper().epochs) == (1e-4, 2, 100)


def test_scbert_reads_all_genes_and_every_weight_gets_a_gradient():
    pytest.importorskip("performer_pytorch")
    with torch.random.fork_rng(devices=[]):
        network = ScBertNetwork(7, 3, dim=8, depth=2, heads=2, head_dim=4)
        logits = network(torch.tensor([[0, 1, 2, 3, 4, 5, 0], [1, 1, 1, 1, 1, 1, 1]], dtype=torch.uint8))
    assert logits.shape == (2, 3)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert network.gene_embedding.weight.grad.any(dim=1).all()


def test_summing_gradients_over_small_batches_is_a_large_batch():
    pytest.importorskip("performer_pytorch")
    adata, labels = made_up_cells(3, 30)
    scores = []
    for batch_size, num_accumulated in ((10, 1), (5, 2)):
        system = ScBert(
            dim=8, depth=1, heads=2, num_genes=None, epochs=1, batch_size=batch_size, num_accumulated=num_accumulated
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("screformer.benchmarks.system_scbert.DROPOUT", 0.0)
            system.fit(adata, labels)
        scores.append(system.predict(adata).scores)
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-3)
