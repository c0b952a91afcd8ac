"""Systems that are others' packages: what the shared contract does not say of them, and what is said without them."""

import logging
import random

import numpy as np
import pytest
import torch
from test_cell_type_systems import TYPES, make_cells, share_right

from screformer.benchmarks import cell_type_systems
from screformer.benchmarks.known_systems import SYSTEMS
from screformer.benchmarks.system_scanvi import TALKING_LOGGERS, ScAnvi, batch_size_for
from screformer.benchmarks.system_singler import SingleR

SHORT = {"num_epochs": 20, "num_label_epochs": 20}


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("singler", "singler", "singler"),
        ("singler", "compressed_lists", "compressed_lists"),
        ("scanvi", "scvi", "scvi-tools"),
    ],
)
def test_a_missing_package_is_named_with_the_remedy(name, module, package, monkeypatch):
    monkeypatch.setattr(cell_type_systems, "find_spec", lambda asked: None if asked == module else asked)
    with pytest.raises(ImportError, match=f"{package} is not installed: pip install {package}"):
        SYSTEMS[name]().fit(*make_cells(20, 0))


def test_auc_markers_need_one_more_package(monkeypatch):
    monkeypatch.setattr(cell_type_systems, "find_spec", lambda asked: None if asked == "scranpy" else asked)
    with pytest.raises(ImportError, match="scranpy is not installed: pip install scranpy"):
        SingleR(marker_method="auc").fit(*make_cells(20, 0))


def test_singler_refuses_a_marker_method_that_is_not_there():
    with pytest.raises(ValueError, match="marker_method got 'wilcox'; it must be one of auc, classic"):
        SingleR(marker_method="wilcox")


@pytest.mark.parametrize("method", ["auc", "classic"])
def test_singler_learns_by_each_marker_method_even_where_a_label_has_one_cell(method):
    for package in ("singler", "compressed_lists", "scranpy"):
        pytest.importorskip(package)
    (train, labels), (test, test_labels) = make_cells(90, 0), make_cells(60, 1)
    system = SingleR(marker_method=method)
    system.fit(train, ["rare", *labels[1:]])
    named = system.predict(test)
    assert share_right(named, test_labels) > 0.75
    assert np.isfinite(named.scores).all()


def test_singler_scores_are_correlations_with_the_cells_of_a_label():
    for package in ("singler", "compressed_lists", "scranpy"):
        pytest.importorskip(package)
    train, labels = make_cells(60, 0)
    system = SingleR()
    system.fit(train, labels)
    scores = system.predict(train).scores
    assert np.abs(scores).max() <= 1
    of_own = scores[np.arange(60), [TYPES.index(label) for label in labels]]
    assert (of_own > np.median(scores, axis=1)).all()


def test_scanvi_refuses_no_epochs():
    with pytest.raises(ValueError, match="num_epochs got 0; it must be at least 1"):
        ScAnvi(num_epochs=0)
    with pytest.raises(ValueError, match="num_label_epochs got -1; it must be at least 1"):
        ScAnvi(num_label_epochs=-1)


@pytest.mark.parametrize("sizes", [[65, 64], [100, 28, 1], [129, 29], [300, 100, 57], [1, 1]])
def test_no_batch_has_one_cell(sizes):
    size = batch_size_for(sizes)
    assert 128 <= size < 140
    assert sum(sizes) % size != 1
    assert sum(min(number, 100) for number in sizes) % size != 1


def test_batches_are_of_128_cells_where_nothing_is_against_it():
    assert batch_size_for([100, 80]) == 128


def test_scanvi_learns_repeats_itself_and_leaves_nothing_behind(tmp_path, monkeypatch, capfd):
    pytest.importorskip("scvi")
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    (train, labels), (test, test_labels) = make_cells(129, 0), make_cells(40, 1)  # 129: the last batch would be of one
    states = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()  # noqa: NPY002
    levels = [logging.getLogger(name).level for name in TALKING_LOGGERS]
    first = ScAnvi(**SHORT)
    first.fit(train, labels, seed=3)
    named = first.predict(test)
    np.testing.assert_array_equal(np.random.get_state()[1], states[0])  # noqa: NPY002
    assert random.getstate() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert levels == [logging.getLogger(name).level for name in TALKING_LOGGERS]
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")

    assert share_right(named, test_labels) > 0.85
    assert named.classes == tuple(TYPES)
    np.testing.assert_allclose(named.scores.sum(axis=1), 1, rtol=1e-5)
    assert named.labels == [named.classes[index] for index in named.scores.argmax(axis=1)]

    order = np.random.default_rng(0).permutation(40)[:25]
    moved = first.predict(test[order])
    assert moved.labels == [named.labels[row] for row in order]
    np.testing.assert_allclose(moved.scores, named.scores[order], rtol=1e-4, atol=1e-5)  # float32 sums in other blocks

    torch.rand(3)
    second = ScAnvi(**SHORT)
    second.fit(train, labels, seed=3)
    np.testing.assert_array_equal(second.predict(test).scores, named.scores)


def test_scanvi_names_a_label_that_it_uses_itself_and_refuses_other_genes():
    pytest.importorskip("scvi")
    (train, labels), (test, test_labels) = make_cells(60, 0, ["none", "beta"]), make_cells(20, 1, ["none", "beta"])
    system = ScAnvi(**SHORT)
    with pytest.raises(ValueError, match="comes before predict"):
        system.predict(train)
    with pytest.raises(ValueError, match="one entry a cell: 60 cells, got 59"):
        system.fit(train, labels[1:])
    with pytest.raises(ValueError, match="at least 2 labels"):
        system.fit(train, ["beta"] * 60)
    system.fit(train, labels)
    named = system.predict(test)
    assert named.classes == ("beta", "none")
    assert share_right(named, test_labels) > 0.85
    with pytest.raises(ValueError, match="not the 80 of fit"):
        system.predict(train[:, ::-1])
