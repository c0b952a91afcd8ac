import anndata
import numpy as np
import pytest
import torch
from scipy import sparse
from torch import nn

from screformer.benchmarks import system_mlp
from screformer.benchmarks.system_mlp import Mlp


def made_up_cells(num_cells: int, seed: int, num_genes: int = 40) -> tuple[anndata.AnnData, list[str]]:
    """Cells of three types, each with five genes of its own."""
    generator = np.random.default_rng(seed)
    kinds = np.arange(num_cells) % 3
    rates = np.full((num_cells, num_genes), 2.0)
    for kind in range(3):
        rates[kinds == kind, 5 * kind : 5 * kind + 5] = 10
    adata = anndata.AnnData(sparse.csr_matrix(generator.poisson(rates).astype(np.float32)))
    return adata, [f"type{kind}" for kind in kinds]


@pytest.fixture
def parts(monkeypatch):
    """What fit() trains on and holds out, instead of training."""
    seen = []

    def take(features, class_ids, train, held_out, seed):
        seen.append((features, class_ids, train, held_out))
        return nn.Identity()

    monkeypatch.setattr(system_mlp, "_train", take)
    return seen


def test_layers_are_those_of_the_paper():
    adata, labels = made_up_cells(30, 0)
    system = Mlp()
    system.fit(adata, labels)
    linear = [(layer.in_features, layer.out_features) for layer in system._network if isinstance(layer, nn.Linear)]
    assert linear == [(40, 512), (512, 128), (128, 3)]
    assert [layer.p for layer in system._network if isinstance(layer, nn.Dropout)] == [0.3, 0.3]
    assert not system._network.training


def test_a_tenth_of_each_label_is_held_out_and_a_single_cell_is_trained_on(parts):
    adata, labels = made_up_cells(121, 0)
    labels[:60], labels[60:111], labels[111:120], labels[120] = ["a"] * 60, ["b"] * 51, ["c"] * 9, "rare"
    Mlp().fit(adata, labels)
    _, _, train, held_out = parts[0]
    assert np.unique(np.array(labels)[held_out], return_counts=True)[1].tolist() == [6, 5, 1]
    assert sorted([*train, *held_out]) == list(range(121))
    assert 120 in train


def test_few_cells_are_all_trained_on(parts):
    Mlp().fit(*made_up_cells(59, 0))
    _, _, train, held_out = parts[0]
    assert len(train) == 59
    assert len(held_out) == 0


def test_genes_of_no_training_cell_have_no_part():
    (train, labels), (test, _) = made_up_cells(90, 0), made_up_cells(30, 1)
    train.X = sparse.csr_matrix(train.X.toarray() * (np.arange(40) < 38))
    moved = test.copy()  # counts of one such gene to the other, which leaves the sums as they are
    moved.X = sparse.csr_matrix(test.X.toarray()[:, [*range(38), 39, 38]])
    system = Mlp()
    system.fit(train, labels)
    np.testing.assert_array_equal(system.predict(moved).scores, system.predict(test).scores)


def test_noise_is_not_learned_by_heart():
    adata, labels = made_up_cells(120, 0)
    shuffled = np.random.default_rng(0).permutation(labels).tolist()
    system = Mlp()
    system.fit(adata, shuffled)
    # Fifty epochs give each training cell its label; the best epoch on held-out cells is one of the first.
    right = np.mean(np.array(system.predict(adata).labels) == shuffled)
    assert right < 0.8


def test_threads_and_generators_stay_as_they_were():
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    Mlp().fit(*made_up_cells(60, 0))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads
