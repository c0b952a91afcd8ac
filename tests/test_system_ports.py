import json

import anndata
import numpy as np
import pytest
from scipy import sparse
from scipy.stats import false_discovery_control, mannwhitneyu

from screformer.benchmarks import system_sccatch, system_scpred
from screformer.benchmarks.comparison import run_systems
from screformer.benchmarks.labelled_data import LabelledData, read_labelled_data
from screformer.benchmarks.marker_tables import (
    MARKER_TYPES,
    Marker,
    MarkersMissingError,
    MarkerTable,
    read_marker_types,
    read_markers,
)
from screformer.benchmarks.protocol import make_folds
from screformer.benchmarks.system_sccatch import (
    CLUSTERINGS,
    Clustering,
    ScCatch,
    ScCatchOfTable,
    cluster_cells,
    cluster_markers,
    exceeds,
    name_clusters,
    type_scores,
)
from screformer.benchmarks.system_scpred import (
    MAX_P_VALUES,
    ScPred,
    choose_max_p_value,
    fit_platt,
    informative_components,
    most_variable_genes,
    sigma_of_distances,
)
from screformer.benchmarks.systems_features import training_cells
from screformer.tokenization.example_cells import example_cells_path

LABELS = ["alpha", "beta", "delta"]


def made_up_cells(seed: int = 3) -> tuple[anndata.AnnData, list[str]]:
    """90 cells of three types, each with five genes of its own among 40."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(LABELS, 30)
    rates = np.ones((90, 40))
    for index, label in enumerate(LABELS):
        rates[np.ix_(labels == label, np.arange(index * 5, index * 5 + 5))] = 9
    adata = anndata.AnnData(sparse.csr_matrix(generator.poisson(rates).astype(np.float32)))
    adata.var_names = [f"G{gene}" for gene in range(40)]
    return adata, labels.tolist()


def test_scpred_names_new_cells_of_types_with_their_own_genes():
    system = ScPred(max_p_value=0.05)  # of 40 genes nearly all components are noise
    system.fit(*made_up_cells(3))
    adata, labels = made_up_cells(4)
    named = system.predict(adata)
    assert np.mean(np.array(named.labels) == labels) > 0.95
    assert named.classes == tuple(LABELS)
    assert named.scores.shape == (90, 3)
    assert ((named.scores >= 0) & (named.scores <= 1)).all()


def test_scpred_searches_how_informative_components_must_be_unless_it_is_told():
    adata, labels = made_up_cells()
    groups = np.tile(["a", "b", "c"], 30).tolist()
    searched = ScPred()
    searched.fit(adata, labels, groups=groups, seed=5)
    # With 40 noisy genes, those that are informative name held-out cells better.
    assert searched.max_p_value == 0.05
    assert searched.max_p_value in MAX_P_VALUES
    told = ScPred(max_p_value=0.05)
    told.fit(adata, labels, seed=5)
    np.testing.assert_array_equal(told.predict(adata).scores, searched.predict(adata).scores)
    with pytest.raises(ValueError, match="groups must have one entry a cell: 90 cells, got 89"):
        searched.fit(adata, labels, groups=groups[1:])


def test_scpred_search_holds_whole_donors_out_and_takes_the_better_threshold(monkeypatch):
    adata, labels = made_up_cells()
    cells, groups = training_cells(adata, labels), np.tile(["a", "b", "c"], 30)
    asked = []
    results = [[0.5, 0.6], [0.6, 0.6]]

    def scores(class_ids, folds, predict, *, num_settings):
        asked.append([set(groups[folds == fold]) for fold in np.unique(folds)])
        first = predict(folds != 0, folds == 0)
        assert len(first) == num_settings == len(MAX_P_VALUES)
        assert all(len(row) == (folds == 0).sum() for row in first)
        return np.array(results[len(asked) - 1])

    monkeypatch.setattr(system_scpred, "held_out_scores", scores)
    chosen = [choose_max_p_value(adata.X.tocsr(), cells, groups.tolist(), seed=0) for _ in results]
    assert chosen == [0.05, 1.0]
    assert asked == [[{"a"}, {"b"}, {"c"}]] * 2


def test_scpred_search_bears_labels_of_two_cells():
    adata, labels = made_up_cells()
    rare = ["rare", "rare", *labels[2:]]
    system = ScPred()
    system.fit(adata, rare)
    assert system.predict(adata).classes == (*LABELS, "rare")
    few = [0, 1, 30, 31]
    ScPred().fit(adata[few], np.array(labels)[few].tolist())


def test_scpred_is_inductive_repeatable_and_leaves_global_generators_alone():
    adata, labels = made_up_cells()
    state = np.random.get_state()  # noqa: NPY002
    first, second = ScPred(max_p_value=1), ScPred(max_p_value=1)
    first.fit(adata, labels, seed=5)
    second.fit(adata, labels, seed=5)
    scores = first.predict(adata).scores
    np.testing.assert_array_equal(scores, second.predict(adata).scores)
    np.testing.assert_allclose(first.predict(adata[:7]).scores, scores[:7], rtol=1e-5)
    np.testing.assert_equal(np.random.get_state(), state)  # noqa: NPY002


def test_scpred_rejects_only_if_asked_and_says_how_many():
    adata, labels = made_up_cells()
    systems = ScPred(max_p_value=1), ScPred(max_p_value=1, is_rejecting=True)
    mixed = adata.copy()
    mixed.X = sparse.csr_matrix(np.ones(adata.shape, dtype=np.float32))
    for system in systems:
        system.fit(adata, labels)
        assert system.rejection_rate is None
    plain, rejecting = (system.predict(mixed) for system in systems)
    rejected = plain.scores.max(axis=1) <= 0.55
    assert "" not in plain.labels
    assert [label == "" for label in rejecting.labels] == rejected.tolist()
    assert systems[0].rejection_rate == systems[1].rejection_rate == rejected.mean()


def test_scpred_refuses_other_genes_too_few_cells_and_predict_before_fit():
    adata, labels = made_up_cells()
    system = ScPred(max_p_value=1)
    with pytest.raises(ValueError, match="fit\\(\\) comes before"):
        system.predict(adata)
    with pytest.raises(ValueError, match="one entry a cell"):
        system.fit(adata, labels[1:])
    with pytest.raises(ValueError, match="at least 2 labels"):
        system.fit(adata, ["alpha"] * 90)
    with pytest.raises(ValueError, match="leave them out"):
        system.fit(adata, ["rare", *labels[1:]])
    system.fit(adata, labels)
    with pytest.raises(ValueError, match="subset it"):
        system.predict(adata[:, ::-1])
    with pytest.raises(ValueError, match="max_p_value"):
        ScPred(max_p_value=0)


def test_components_are_those_of_wilcoxon_with_benjamini_hochberg():
    generator = np.random.default_rng(0)
    components, is_label = generator.normal(size=(60, 12)), np.arange(60) < 20
    components[is_label, :3] += 1
    p_values = [mannwhitneyu(c[is_label], c[~is_label], method="asymptotic").pvalue for c in components.T]
    order = np.argsort(p_values)
    adjusted = np.empty(12)
    for rank, column in enumerate(order):  # by hand: the lowest p * tests / rank from here on
        adjusted[column] = min(1, *(p_values[order[k]] * 12 / (k + 1) for k in range(rank, 12)), 1)
    np.testing.assert_allclose(adjusted, false_discovery_control(p_values))
    kept = informative_components(components, is_label, 0.05)
    np.testing.assert_array_equal(kept, np.flatnonzero(adjusted <= 0.05))
    assert len(informative_components(components, is_label, 1.0)) == 12
    assert informative_components(components, is_label, 1e-30).tolist() == [order[0]]


def test_sigma_is_the_middle_of_the_inverse_quantiles_of_distances_apart():
    # Of 1 to 11 the quantiles 0.1 and 0.9 are 2 and 10; the zeros do not count.
    distances = np.array([0.0, 0, 0, *range(1, 12)])
    assert sigma_of_distances(distances, num_features=4) == pytest.approx((1 / 2 + 1 / 10) / 2)
    assert sigma_of_distances(np.zeros(3), num_features=4) == 0.25


def test_platt_gives_the_shares_of_two_values():
    values, is_label = np.repeat([-1.0, 1.0], 10), np.arange(20) >= 10
    slope, intercept = fit_platt(values, is_label)
    # 10 cells a side: targets 11/12 and 1/12, which a sigmoid of two values meets exactly.
    assert 1 / (1 + np.exp(-slope - intercept)) == pytest.approx(11 / 12, abs=1e-3)
    assert intercept == pytest.approx(0, abs=1e-3)


def test_variable_genes_are_those_that_vary_more_than_their_mean_explains():
    generator = np.random.default_rng(1)
    rates = np.tile(np.geomspace(0.3, 30, 200), (150, 1))
    uneven = [60, 100, 140, 180]
    rates[:75, uneven] *= 3  # the others are Poisson, whatever their mean
    counts = sparse.csr_array(generator.poisson(rates).astype(np.float64))
    assert most_variable_genes(counts, 4).tolist() == uneven
    with pytest.raises(ValueError, match="no gene that varies"):
        most_variable_genes(sparse.csr_array(np.ones((5, 4))), 2)


@pytest.fixture
def table(tmp_path):
    rows = [f"Human,Gut,Normal,T{i},G{i * 5 + k},{k}" for i in range(3) for k in range(5)]
    rows += [f"Human,Lung,Normal,T{2 - i},G{i * 5 + k},{k}" for i in range(3) for k in range(5)]
    path = tmp_path / "markers.csv"
    path.write_text("\n".join(["species,tissue,cancer,celltype,gene,pmid", *rows]))
    types = {
        "other": {"tissues": ["Lung"], "types": {"T0": "delta", "T1": "no label here"}},
        "ours": {"tissues": ["Gut"], "types": {f"T{i}": label for i, label in enumerate(LABELS[:2])}},
    }
    (tmp_path / "types.json").write_text(json.dumps(types))
    return MarkerTable(path, types=tmp_path / "types.json")


@pytest.mark.parametrize("is_of_table", [False, True])
def test_sccatch_names_new_cells_by_training_markers_or_by_a_table(table, is_of_table):
    adata, labels = made_up_cells(4)
    state = np.random.get_state()  # noqa: NPY002
    system = ScCatchOfTable(table) if is_of_table else ScCatch()
    with pytest.raises(ValueError, match="fit\\(\\) comes before"):
        system.predict(adata)
    with pytest.raises(ValueError, match="groups must have one entry a cell"):
        system.fit(adata, labels, groups=["a"])
    system.fit(*made_up_cells(3))
    named = system.predict(adata)
    known = [label if label != "delta" or not is_of_table else "" for label in labels]
    assert np.mean(np.array(named.labels) == known) > 0.9
    assert named.scores is None
    assert system.predict(adata).labels == named.labels
    assert (system.method, system.clusters_per_label, system.others) in CLUSTERINGS
    with pytest.raises(ValueError, match="subset it"):
        system.predict(adata[:, ::-1])
    np.testing.assert_equal(np.random.get_state(), state)  # noqa: NPY002


def test_sccatch_clustering_is_the_best_on_held_out_training_cells(monkeypatch):
    adata, labels = made_up_cells()
    groups = np.tile(["a", "b", "c"], 30)
    folds_seen = []

    def scores(class_ids, folds, predict, *, num_settings):
        folds_seen.append([set(groups[folds == fold]) for fold in np.unique(folds)])
        found = predict(folds != 0, folds == 0)
        assert len(found) == num_settings == len(CLUSTERINGS)
        assert np.mean(found[0] == class_ids[folds == 0]) > 0.6  # by chance a third
        return np.array([0.1, 0, 0, 0.3, 0.2, 0, 0.3, 0])

    monkeypatch.setattr(system_sccatch, "held_out_scores", scores)
    system = ScCatch()
    system.fit(adata, labels, groups=groups.tolist())
    assert (system.method, system.clusters_per_label, system.others) == (
        "k_means",
        2,
        "together",
    )  # the fewest of equals
    assert folds_seen == [[{"a"}, {"b"}, {"c"}]]


def test_two_clusters_of_a_type_are_named_only_against_the_others_together():
    adata, labels = made_up_cells()
    features = training_cells(adata, labels).features
    clusters = np.repeat([0, 1, 2, 3], [15, 15, 30, 30])  # alpha in two
    markers = [Marker(LABELS[i], f"G{i * 5 + k}", "1") for i in range(3) for k in range(5)]
    each, together = (
        name_clusters(features, adata.var_names.tolist(), clusters, markers, others=others)
        for others in ("each", "together")
    )
    assert each[2:] == ["beta", "delta"]
    assert "alpha" not in each
    assert together == ["alpha", "alpha", "beta", "delta"]


@pytest.mark.parametrize(("method", "max_ward_cells"), [("ward", 20_000), ("ward", 0), ("k_means", 20_000)])
def test_there_are_no_more_clusters_than_cells_that_differ(monkeypatch, method, max_ward_cells):
    monkeypatch.setattr(system_sccatch, "MAX_WARD_CELLS", max_ward_cells)
    places = np.array([[0.0, 0], [0, 0], [5, 5], [5, 5], [9, 0]])
    clusters = cluster_cells(places, Clustering(method, 2, "each"), 2, seed=0)
    assert clusters[0] == clusters[1]
    assert clusters[2] == clusters[3]
    assert sorted(set(clusters.tolist())) == [0, 1, 2]
    assert cluster_cells(places[:1], Clustering(method, 2, "each"), 2, seed=0).tolist() == [0]


def test_without_a_table_or_types_of_its_labels_sccatch_is_left_out(table, tmp_path):
    adata, labels = made_up_cells()
    with pytest.raises(MarkersMissingError, match="no marker table is named: --marker-table FILE"):
        ScCatchOfTable().fit(adata, labels)
    with pytest.raises(MarkersMissingError, match=r"no type of types.json stands for one of the labels \['x', 'y'\]"):
        ScCatchOfTable(table).fit(adata[:4], ["x", "x", "y", "y"])
    data = LabelledData("cells", adata, np.array(labels), None)
    runs, left_out = run_systems(
        data, {"sccatch_cellmatch": ScCatchOfTable}, make_folds(data, "random"), seeds=1, work=tmp_path
    )
    assert runs == []
    assert "columns of CellMatch" in left_out["sccatch_cellmatch"]


def test_a_table_has_the_types_of_the_labels_and_tissues_that_are_named(table):
    assert table.types_of(LABELS).name == "ours"
    assert table.types_of(["delta", "gamma"]).tissues == ("Lung",)
    named = MarkerTable.parse(f"{table.path}:Skin,Lung", table.types)
    assert named == (str(table.path), ("Skin", "Lung"), table.types)
    assert named.types_of(LABELS).tissues == ("Skin", "Lung")
    assert MarkerTable.parse("a.csv") == ("a.csv", (), MARKER_TYPES)


def test_marker_types_of_another_form_are_refused(tmp_path):
    path = tmp_path / "types.json"
    for text in ("{}", "[]", '{"pancreas": {"Beta Cell": "beta"}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"types\.json must be"):
            read_marker_types(path)


def test_packaged_marker_types_stand_for_labels_of_the_packaged_cells():
    pancreas = read_marker_types(MARKER_TYPES)[0]
    labels = set(read_labelled_data(example_cells_path()).labels.tolist())
    assert set(pancreas.label_of_type.values()) == labels


def test_sccatch_refuses_tables_without_columns_or_rows(tmp_path):
    path = tmp_path / "markers.csv"
    path.write_text("gene,celltype\nA,B\n")
    with pytest.raises(ValueError, match="give a csv file with"):
        read_markers(path)
    path.write_text("species,tissue,cancer,celltype,gene,pmid\nHuman,Gut,Normal,T,A,1\n")
    assert read_markers(path) == [Marker("T", "A", "1")]
    with pytest.raises(ValueError, match="name others"):
        read_markers(path, tissues=["Heart"])


def test_type_score_counts_rows_and_papers():
    markers = [Marker("a", "X", "1"), Marker("a", "Y", "1"), Marker("a", "X", "2"), Marker("b", "Z", "1")]
    assert type_scores(markers, {"X", "Y"}) == {"a": pytest.approx((3 / 4 * 2 / 3) ** 0.5)}


@pytest.mark.parametrize("others", ["each", "together"])
def test_cluster_markers_are_those_of_a_slow_loop(others):
    adata, labels = made_up_cells()
    features, ids = sparse.csr_array(np.log1p(adata.X.toarray())), np.unique(labels, return_inverse=True)[1]
    dense = features.toarray()
    for cluster, found in enumerate(cluster_markers(features, ids, others=others)):
        ours, expected = dense[ids == cluster], []
        for gene in range(40):
            rest = [dense[ids == other, gene] for other in range(3) if other != cluster]
            rest = [np.concatenate(rest)] if others == "together" else rest
            if (ours[:, gene] > 0).mean() >= 0.25 and all(
                ours[:, gene].mean() - r.mean() >= 0.25
                and mannwhitneyu(ours[:, gene], r, alternative="greater", method="asymptotic").pvalue < 0.05
                for r in rest
            ):
                expected.append(gene)
        assert sorted(found) == expected
    assert exceeds(dense[:30, :5], dense[30:, :5]).all()
