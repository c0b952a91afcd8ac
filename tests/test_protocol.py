"""The comparison's rules: folds, split files, what is measured, and ours as one of the systems."""

import json

import numpy as np
import pytest
from small_corpus import TINY_MODEL, make_cells, make_tokenizer

from screformer.benchmarks.cell_type_systems import NamedCells, check_genes, need
from screformer.benchmarks.comparison_statistics import summarize_systems
from screformer.benchmarks.comparison_tables import systems_table
from screformer.benchmarks.labelled_data import join_labelled_data, read_labelled_data
from screformer.benchmarks.protocol import (
    few_labelled_cells,
    make_folds,
    read_predictions,
    read_split_file,
    run_system,
    score_named_cells,
    write_split_file,
)
from screformer.benchmarks.system_ours import ScReformerSystem


class Nearest:
    """Names a cell like the training type whose mean is nearest."""

    title = "nearest mean"
    is_inductive = True

    def __init__(self, power=1):
        self.power, self._fits = power, 0

    def fit(self, adata, labels, *, groups=None, seed=0):
        self._fits += 1
        self._genes, self.groups, self.names = list(adata.var_names), groups, list(adata.obs_names)
        self.classes = tuple(sorted(set(labels)))
        rows = np.log1p(adata.X.toarray())
        self._means = np.stack([rows[np.array(labels) == label].mean(axis=0) for label in self.classes])

    def predict(self, adata):
        check_genes(self._genes, adata)
        distances = np.stack(
            [np.linalg.norm(np.log1p(adata.X.toarray()) - mean, axis=1) for mean in self._means], axis=1
        )
        labels = [self.classes[place] for place in distances.argmin(axis=1)]
        return NamedCells(labels, -distances.astype(np.float32), self.classes)


@pytest.fixture
def data(tmp_path):
    make_cells(120, types=["alpha", "beta", "duct"]).write_h5ad(tmp_path / "cells.h5ad")
    return read_labelled_data(tmp_path / "cells.h5ad", group_column="donor")


def test_cells_are_known_by_their_counts_too(data, tmp_path):
    (fold,) = make_folds(data, "random")
    first = run_system(Nearest(), "nearest", data, fold, seed=0, work=tmp_path)
    others = data._replace(adata=data.adata.copy())
    others.adata.X.data[0] += 1
    assert (
        run_system(Nearest(), "nearest", others, fold, seed=0, work=tmp_path)["cells_sha256"] != first["cells_sha256"]
    )
    again = data._replace(adata=data.adata.copy())
    again.adata.X = again.adata.X.astype(np.int32)
    found = run_system(Nearest(), "nearest", again, fold, seed=0, work=tmp_path / "again")
    assert found["cells_sha256"] == first["cells_sha256"]  # of the counts, whatever their type


def test_where_memory_cannot_be_measured_all_else_is(data, tmp_path, monkeypatch):
    monkeypatch.setattr("screformer.benchmarks.protocol.can_measure_memory", lambda: False)
    (fold,) = make_folds(data, "random")
    record = run_system(Nearest(), "nearest", data, fold, seed=0, work=tmp_path)
    assert record["peak_bytes"] is None
    assert record["accuracy"] > 0.9
    assert "| - |" in systems_table({"systems": {"nearest": summarize_systems([record])["nearest"] | POOLED}})


POOLED = {"label_names": ["alpha"], "confusion_matrix": [[3]]}


def test_a_rejected_cell_is_wrong_and_no_class():
    truth = ["a"] * 10 + ["b"] * 10
    rejected = score_named_cells(NamedCells(["", *truth[1:]], None, ()), truth)
    misnamed = score_named_cells(NamedCells(["b", *truth[1:]], None, ()), truth)
    assert rejected["accuracy"] == misnamed["accuracy"] == 0.95
    assert rejected["rejected"] == 0.05
    assert misnamed["macro_f1"] < rejected["macro_f1"] == pytest.approx((2 * 9 / 19 + 1) / 2)


def test_rare_and_excluded_and_unmapped_labels_are_left_out(tmp_path):
    adata = make_cells(60, types=["alpha", "beta", "duct"])
    adata.obs.loc[adata.obs_names[:3], "cell_type"] = "rare"
    adata.write_h5ad(tmp_path / "cells.h5ad")
    found = read_labelled_data(tmp_path / "cells.h5ad", exclude_labels=["duct"])
    assert set(found.labels.tolist()) == {"alpha", "beta"}
    assert found.groups is None
    np.testing.assert_array_equal(found.adata.X.toarray(), adata[found.adata.obs_names].X.toarray())
    mapped = read_labelled_data(
        tmp_path / "cells.h5ad", label_map={"alpha": "islet", "beta": "islet", "duct": "exocrine"}
    )
    assert sorted(set(mapped.labels.tolist())) == ["exocrine", "islet"]
    with pytest.raises(ValueError, match="at least two with 50 cells are needed"):
        read_labelled_data(tmp_path / "cells.h5ad", min_cells=50)


@pytest.mark.parametrize(("kind", "number"), [("random", 1), ("five_fold", 5), ("leave_one_group_out", 4)])
def test_folds_come_back_from_their_file(kind, number, data, tmp_path):
    folds = make_folds(data, kind, seed=7)
    assert len(folds) == number
    for fold in folds:
        assert sorted(np.concatenate(fold.cells).tolist()) == list(range(120))
    write_split_file(tmp_path / "split.json", data, folds, kind=kind, seed=7)
    again = read_split_file(tmp_path / "split.json", data)
    for fold, other in zip(folds, again, strict=True):
        assert fold.name == other.name
        for part, same in zip(fold.cells, other.cells, strict=True):
            np.testing.assert_array_equal(part, same)
    stored = json.loads((tmp_path / "split.json").read_text())
    assert (stored["kind"], stored["seed"]) == (kind, 7)
    fewer = data._replace(adata=data.adata[:100].copy(), labels=data.labels[:100], groups=data.groups[:100])
    with pytest.raises(ValueError, match=r"split.json is of other cells than cells: of 'cells'"):
        read_split_file(tmp_path / "split.json", fewer)


def test_folds_that_cannot_be_are_refused(data):
    with pytest.raises(ValueError, match="kind got 'some'; it must be one of random, five_fold, leave_one_group_out"):
        make_folds(data, "some")
    with pytest.raises(ValueError, match="needs group_column"):
        make_folds(data._replace(groups=None), "leave_one_group_out")


def test_few_labelled_cells_grow_and_leave_the_test_cells(data):
    fold = make_folds(data, "leave_one_group_out")[0]
    few, more = (few_labelled_cells(data, fold, number) for number in (2, 5))
    assert few.name == f"{fold.name}-2_per_label"
    for kept, number in ((few, 2), (more, 5)):
        labels, numbers = np.unique(data.labels[kept.cells.train], return_counts=True)
        assert dict(zip(labels.tolist(), numbers.tolist(), strict=True)) == dict.fromkeys(
            ["alpha", "beta", "duct"], number
        )
        assert not len(kept.cells.validation)
        np.testing.assert_array_equal(kept.cells.test, fold.cells.test)
        assert not set(kept.cells.train.tolist()) & set(fold.cells.test.tolist())
    assert set(few.cells.train.tolist()) < set(more.cells.train.tolist())
    with pytest.raises(ValueError, match="num_cells got 0; it must be at least 1"):
        few_labelled_cells(data, fold, 0)


def test_data_sets_are_joined_by_genes_and_labels_that_they_share(tmp_path, monkeypatch):
    first, second = make_cells(60, types=["alpha", "beta", "duct"]), make_cells(60, seed=1, types=["A", "B", "other"])
    first.write_h5ad(tmp_path / "first.h5ad")
    second[:, second.var_names[:0:-1]].copy().write_h5ad(tmp_path / "second.h5ad")  # other order, one gene less
    parts = [
        read_labelled_data(tmp_path / "first.h5ad"),
        read_labelled_data(tmp_path / "second.h5ad", label_map={"A": "alpha", "B": "beta", "other": "other"}),
    ]
    with pytest.raises(ValueError, match="first and second share 39 gene names; at least 100"):
        join_labelled_data(parts)
    monkeypatch.setattr("screformer.benchmarks.labelled_data.MIN_SHARED_GENES", 10)
    joined = join_labelled_data(parts)
    assert joined.name == "first+second"
    assert sorted(set(joined.labels.tolist())) == ["alpha", "beta"]
    assert joined.adata.var_names.tolist() == first.var_names[1:].tolist()
    for part in parts:
        rows = np.flatnonzero(joined.groups == part.name)
        own = part.adata[np.isin(part.labels, ["alpha", "beta"])][:, joined.adata.var_names]
        np.testing.assert_array_equal(joined.adata.X[rows].toarray(), own.X.toarray())
    for fold in make_folds(joined, "leave_one_group_out"):
        assert set(joined.groups[fold.cells.test].tolist()) == {fold.name}
        assert fold.name not in joined.groups[fold.cells.train]
    with pytest.raises(ValueError, match=r"got the data sets \['first', 'first'\]"):
        join_labelled_data([parts[0], parts[0]])
    with pytest.raises(ValueError, match=r"share the labels \['alpha'\]; at least two"):
        join_labelled_data(
            [parts[0], parts[1]._replace(labels=np.where(parts[1].labels == "beta", "b", parts[1].labels))]
        )


def test_a_system_sees_the_training_cells_alone_and_is_not_run_twice(data, tmp_path):
    fold = make_folds(data, "leave_one_group_out")[1]
    system = Nearest()
    record = run_system(system, "nearest", data, fold, seed=3, work=tmp_path / "runs")
    assert set(system.groups) == {"human1", "human3", "human4"}
    assert len(system.names) == record["num_cells"]["train"] == 90
    assert record["accuracy"] == 1
    assert record["macro_auc"] == 1
    assert record["peak_bytes"] >= 0
    assert record["fit_seconds"] >= 0
    assert record["settings"] == {"power": 1}
    assert record["is_inductive"]
    said = read_predictions(record, tmp_path / "runs")
    assert said.cells == data.adata.obs_names[fold.cells.test].tolist()
    assert said.truth == said.named.labels == data.labels[fold.cells.test].tolist()
    assert said.named.scores.shape == (30, 3)
    again = run_system(system, "nearest", data, fold, seed=3, work=tmp_path / "runs")
    assert system._fits == 1
    assert again == json.loads((tmp_path / "runs" / "cells-human2-nearest-3.json").read_text())
    # Another setting, or other cells under the same names of files, are another run.
    assert run_system(Nearest(2), "nearest", data, fold, seed=3, work=tmp_path / "runs")["settings"] == {"power": 2}
    fewer = fold._replace(cells=fold.cells._replace(train=fold.cells.train[1:]))
    record = run_system(Nearest(2), "nearest", data, fewer, seed=3, work=tmp_path / "runs")
    assert record["num_cells"]["train"] == 89


def test_cells_without_a_label_and_wrong_ones_are_errors():
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]], dtype=np.float32)
    found = score_named_cells(NamedCells(["a", "", "b", "a"], scores, ("a", "b")), ["a", "a", "b", "c"])
    assert found["accuracy"] == 0.5
    assert found["rejected"] == 0.25
    assert found["f1"] == {"a": 0.5, "b": 1.0, "c": 0.0}
    assert found["label_names"] == ["(none)", "a", "b", "c"]
    assert np.sum(found["confusion_matrix"]) == 4
    assert found["macro_auc"] == 1.0
    # Confidence .9 right, 0 wrong (no label), .7 right, .6 wrong, each in a bin of its own.
    assert found["expected_calibration_error"] == pytest.approx((0.1 + 0 + 0.3 + 0.6) / 4)
    assert score_named_cells(NamedCells(["a", "b"], 2 * scores[:2], ("a", "b")), ["a", "b"])["macro_auc"] is not None
    assert (
        score_named_cells(NamedCells(["a", "b"], 2 * scores[:2], ("a", "b")), ["a", "b"])["expected_calibration_error"]
        is None
    )
    assert score_named_cells(NamedCells(["a", "b"], None, ()), ["a", "b"])["macro_auc"] is None
    with pytest.raises(ValueError, match="truth has 2 labels for 1 cells"):
        score_named_cells(NamedCells(["a"], None, ()), ["a", "b"])


def test_a_missing_package_is_named_with_the_remedy():
    need("numpy")
    with pytest.raises(ImportError, match="no-such-package is not installed: pip install no-such-package"):
        need("no-such-package", "no_such_package")


def test_ours_is_a_system_too(data, tmp_path):
    shape = " ".join(value.replace(" ", "") for value in [*TINY_MODEL, "gene_space=expressed"])
    system = ScReformerSystem(
        "finetune-small --use_cpu", model=f"--config_overrides {shape}", tokenizer=make_tokenizer()
    )
    with pytest.raises(ValueError, match="fit\\(\\) comes before predict"):
        system.predict(data.adata)
    record = run_system(system, "ours", data, make_folds(data, "random")[0], seed=0, work=tmp_path)
    assert record["accuracy"] > 0.9
    assert record["macro_auc"] > 0.95
    with pytest.raises(ValueError, match="genes that are not the 40 of fit"):
        system.predict(data.adata[:, :39].copy())
