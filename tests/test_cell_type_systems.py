import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from screformer.benchmarks import systems_simple
from screformer.benchmarks.known_systems import SYSTEMS as KNOWN_SYSTEMS
from screformer.benchmarks.system_celltypist import CellTypist
from screformer.benchmarks.system_mlp import Mlp
from screformer.benchmarks.system_scpred import most_variable_genes
from screformer.benchmarks.systems_features import held_out_scores, training_cells
from screformer.benchmarks.systems_simple import fit_neighbors

# Ports of published methods have tests of their own; so has scANVI, which learns for longer.
PORTS = ("scpred", "sccatch", "sccatch_cellmatch", "seurat", "scgnn", "scbert", "scanvi")
SYSTEMS = {name: make for name, make in KNOWN_SYSTEMS.items() if name not in PORTS}

TYPES = ["alpha", "beta", "delta"]
SHARES = [0.5, 0.3, 0.2]
LEARNING = [name for name in SYSTEMS if name != "majority_class"]
SEARCHING = ["logistic_regression", "linear_svc", "knn"]  # by held-out groups
NEEDED_PACKAGES = {"singler": ("singler", "compressed_lists"), "xgboost": ("xgboost",)}


@pytest.fixture(autouse=True)
def _skip_without_packages(request):
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    for package in NEEDED_PACKAGES.get(name, ()):
        pytest.importorskip(package)


def make_cells(num_cells, seed, types=TYPES, num_genes=80):
    """Return raw counts and labels: every type has eight genes at five times the background of 2."""
    generator = np.random.default_rng(seed)
    kinds = np.arange(num_cells) % len(types)
    if len(types) == len(SHARES):
        kinds = np.searchsorted(np.cumsum(SHARES), (np.arange(num_cells) % 10 + 0.5) / 10)
    rates = np.full((num_cells, num_genes), 2.0)
    for kind in range(len(types)):
        rates[kinds == kind, 8 * kind : 8 * kind + 8] = 10.0
    var = pd.DataFrame(index=[f"gene{number}" for number in range(num_genes)])
    obs = pd.DataFrame(index=[f"cell{number}" for number in range(num_cells)])
    counts = sparse.csr_matrix(generator.poisson(rates).astype(np.float32))
    return anndata.AnnData(counts, obs=obs, var=var), [types[kind] for kind in kinds]


def share_right(named, labels):
    return np.mean([label == right for label, right in zip(named.labels, labels, strict=True)])


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("types", [TYPES, TYPES[:2]])
def test_learns_types_that_differ_in_a_few_genes(name, types):
    (train, train_labels), (test, test_labels) = make_cells(180, 0, types), make_cells(90, 1, types)
    system = SYSTEMS[name]()
    system.fit(train, train_labels, seed=1)
    named = system.predict(test)
    assert share_right(named, test_labels) > 0.85  # the majority is at most half
    assert named.classes == tuple(sorted(types))
    assert named.scores.shape == (90, len(types))
    assert named.labels == [named.classes[index] for index in named.scores.argmax(axis=1)]


def test_majority_class_is_the_most_frequent_label():
    train, labels = make_cells(100, 0)
    system = SYSTEMS["majority_class"]()
    system.fit(train, labels)
    named = system.predict(train[:3])
    assert named.labels == ["alpha"] * 3
    np.testing.assert_allclose(named.scores, [SHARES] * 3, rtol=1e-6)


@pytest.mark.parametrize("name", SYSTEMS)
def test_same_seed_same_answer_and_global_generators_stay(name):
    (train, labels), (test, _) = make_cells(120, 0), make_cells(30, 1)
    first, second = SYSTEMS[name](), SYSTEMS[name]()
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    first.fit(train, labels, seed=3)
    scores = first.predict(test).scores
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)
    torch.rand(3)
    second.fit(train, labels, seed=3)
    np.testing.assert_array_equal(second.predict(test).scores, scores)


@pytest.mark.parametrize("name", SYSTEMS)
def test_order_of_test_cells_and_their_company_do_not_matter(name):
    (train, labels), (test, _) = make_cells(120, 0), make_cells(30, 1)
    system = SYSTEMS[name]()
    system.fit(train, labels)
    named, order = system.predict(test), np.random.default_rng(0).permutation(30)[:20]
    moved = system.predict(test[order])
    assert moved.labels == [named.labels[row] for row in order]
    np.testing.assert_allclose(moved.scores, named.scores[order], rtol=1e-4, atol=1e-5)  # float32 sums in other blocks


@pytest.mark.parametrize("name", SYSTEMS)
def test_other_genes_and_predict_before_fit_are_refused(name):
    train, labels = make_cells(60, 0)
    system = SYSTEMS[name]()
    with pytest.raises(ValueError, match="comes before predict"):
        system.predict(train)
    system.fit(train, labels)
    with pytest.raises(ValueError, match="not the 80 of fit"):
        system.predict(train[:, ::-1])
    with pytest.raises(ValueError, match="one entry a cell: 60 cells, got 59"):
        system.fit(train, labels[1:])


@pytest.mark.parametrize("name", LEARNING)
def test_one_label_and_groups_of_another_length_are_refused(name):
    train, labels = make_cells(60, 0)
    with pytest.raises(ValueError, match="at least 2 labels"):
        SYSTEMS[name]().fit(train, ["alpha"] * 60)
    if name in SEARCHING:
        with pytest.raises(ValueError, match="one entry a"):
            SYSTEMS[name]().fit(train, labels, groups=["donor"] * 59)


def test_neighbors_choose_genes_and_scale_on_held_out_training_cells(monkeypatch):
    monkeypatch.setattr(systems_simple, "NUMS_OF_GENES", (None, 24))
    train, labels = make_cells(120, 0, num_genes=400)
    counts = train.X.toarray()
    counts[:, 24:] *= np.random.default_rng(2).integers(1, 40, size=376)  # loud genes of no type
    loud = anndata.AnnData(sparse.csr_matrix(counts), var=train.var)
    seen = []

    def spy(class_ids, folds, predict, *, num_settings):
        scores = held_out_scores(class_ids, folds, predict, num_settings=num_settings)
        seen.append((folds, scores))
        return scores

    monkeypatch.setattr(systems_simple, "held_out_scores", spy)
    system = SYSTEMS["knn"]()
    assert (system.num_genes, system.is_standardised) == (None, None)
    system.fit(loud, labels, groups=np.repeat(["a", "b", "c", "d"], 30).tolist())
    folds, scores = seen[0]
    assert len(set(folds[:30].tolist())) == 1  # a donor is held out whole
    settings = [(number, scaled) for number in (None, 24) for scaled in (False, True)]
    assert (system.num_genes, system.is_standardised) == settings[int(scores.argmax())]
    assert scores.max() > scores.min()


@pytest.mark.parametrize("is_standardised", [False, True])
def test_neighbors_are_those_of_a_slow_way(is_standardised):
    (train, labels), (test, _) = make_cells(90, 0), make_cells(12, 1)
    cells, others = training_cells(train, labels), training_cells(test, ["a", "b"] * 6).features.toarray()
    dense = cells.features.toarray()
    genes = most_variable_genes(train.X, 40)
    factors = 1 / dense[:, genes].std(axis=0) if is_standardised else np.ones(40)
    ours, theirs = dense[:, genes] * factors, others[:, genes] * factors
    ours, theirs = np.minimum(ours, 10), np.minimum(theirs, 10)
    axes = np.linalg.svd(ours - ours.mean(axis=0))[2][:39]  # one below the number of genes
    distances = np.linalg.norm(((theirs[:, None] - ours[None]) @ axes.T), axis=2)
    nearest = cells.class_ids[np.argsort(distances, axis=1)[:, :15]]
    shares = np.stack([(nearest == label).mean(axis=1) for label in range(3)], axis=1)
    model = fit_neighbors(train.X, cells.features, cells.class_ids, 40, is_standardised, seed=0)
    np.testing.assert_allclose(model.shares(sparse.csr_array(others)), shares)


def test_held_out_scores_are_of_predictions_by_the_rest():
    class_ids, folds = np.array([0, 1, 1, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 1])
    asked = []

    def predict(train, test):
        asked.append((train.tolist(), test.tolist()))
        return [class_ids[test], np.full(test.sum(), -1)]

    np.testing.assert_array_equal(held_out_scores(class_ids, folds, predict, num_settings=2), [1, 0])
    assert all(np.logical_xor(train, test).all() for train, test in asked)
    # A fold that leaves one class to learn from says that class, without asking.
    asked.clear()
    scores = held_out_scores(np.array([0, 0, 1]), np.array([0, 0, 1]), predict, num_settings=1)
    assert not asked
    assert scores.tolist() == [0]


def test_celltypist_keeps_the_genes_with_the_largest_weights():
    train, labels = make_cells(120, 0)
    system = CellTypist(num_top_genes=8)
    system.fit(train, labels)
    assert 8 <= len(system._columns) <= 24
    assert len(set(system._columns.tolist()) - set(range(24))) <= 4  # nearly all are genes of the three types
    with pytest.raises(ValueError, match="num_top_genes got 0"):
        CellTypist(num_top_genes=0)


def test_mlp_trains_on_few_cells_without_holding_any_out():
    (train, labels), (test, test_labels) = make_cells(12, 0), make_cells(60, 1)
    system = Mlp()
    system.fit(train, labels)
    assert share_right(system.predict(test), test_labels) > 0.7


def test_a_missing_package_is_named_before_anything_is_done(monkeypatch):
    monkeypatch.setattr("screformer.benchmarks.cell_type_systems.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="xgboost-cpu is not installed: pip install xgboost-cpu"):
        SYSTEMS["xgboost"]().fit(*make_cells(12, 0))
