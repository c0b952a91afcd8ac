"""The paper's heart data as their portals give them: made-up counts of real genes, laid out as in each file."""

import gzip
import json

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from typer.testing import CliRunner

from screformer.annotation.label_tree import LabelTree
from screformer.benchmarks.heart import (
    cells_of_source,
    check_heart_cells,
    compare_on_heart,
    format_check,
    read_heart_cells,
)
from screformer.benchmarks.heart_sources import HeartSource, first_tier, format_source, heart_source, heart_sources
from screformer.benchmarks.labelled_data import read_labelled_data, sample_by_label
from screformer.benchmarks.wang2020 import convert_wang2020, read_text_matrix
from screformer.cli import app
from screformer.tokenization.gene_vocabulary import GeneVocabulary

# Of each type of the first tier; in the test cells they are high in that type.
MARKERS = {
    "Adipocyte": ["ADIPOQ", "PLIN1", "GPAM"],
    "Cardiomyocyte cell": ["TNNT2", "MYH7", "TTN"],
    "Endothelial cell": ["VWF", "PECAM1", "CDH5"],
    "Fibroblast": ["DCN", "GSN", "PDGFRA"],
    "Lymphoid cell": ["CD3D", "IL7R", "CD2"],
    "Mesothelial cell": ["MSLN", "WT1", "BNC1"],
    "Myeloid cell": ["CD163", "CD14", "C1QA"],
    "Neuron": ["PLP1", "NRXN1", "NRXN3"],
    "Pericyte": ["RGS5", "ABCC9", "KCNJ8"],
    "Smooth muscle cell": ["MYH11", "ACTA2", "CNN1"],
}
CHEAP = ["majority_class", "logistic_regression"]


@pytest.fixture(scope="module")
def genes():
    """Return symbols and Ensembl ids: the markers, and others up to 150."""
    table = GeneVocabulary.human_v1().to_dict()
    ids = dict(zip(table["symbols"], table["ensembl_ids"], strict=True))
    markers = [symbol for symbols in MARKERS.values() for symbol in symbols]
    others = [symbol for symbol in list(ids)[:400] if symbol and symbol not in markers]
    chosen = [*markers, *others][:150]
    return pd.Series([ids[symbol] for symbol in chosen], index=chosen)


def counts_of(labels, source, genes, *, seed=0):
    """Return whole counts (cells, genes), the markers of each label's type high."""
    generator = np.random.default_rng(seed)
    rates = np.full((len(labels), len(genes)), 2.0)
    for row, label in enumerate(labels):
        rates[row, genes.index.isin(MARKERS.get(source.labels.get(label), []))] = 30
    return generator.poisson(rates).astype(np.int32)


def labels_of(source, number, *, labels=None):
    """Return `number` cells of each label of a source, one after the other in turn."""
    return list(labels or [*source.labels, *source.left_out]) * number


def write_h5ad(path, counts, obs, var):
    names = [f"cell{number}-1" for number in range(len(obs))]
    adata = anndata.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs.set_index(pd.Index(names)), var=var)
    adata.write_h5ad(path)
    return path


def litvinukova(folder, genes, number=15):
    source = heart_source("litvinukova2020")
    labels = labels_of(source, number)
    obs = pd.DataFrame(
        {
            "NRP": "No",
            "age_group": "60-65",
            "cell_source": "Sanger-Nuclei",
            "cell_type": pd.Categorical(labels),
            "donor": [f"D{number // len(source.labels) % 3 + 1}" for number in range(len(labels))],
            "gender": "Female",
            "region": "LV",
            "version": "V2",
            "cell_states": "nan",
        }
    )
    var = pd.DataFrame({"gene_ids-Harvard-Nuclei": genes, "feature_types-Harvard-Nuclei": "Gene Expression"})
    return write_h5ad(folder / "global_raw.h5ad", counts_of(labels, source, genes), obs, var)


def tucker(folder, genes):
    source = heart_source("tucker2020")
    labels = labels_of(source, 12)
    donors = [["1221", "1666", "1702"][number // len(source.labels) % 3] for number in range(len(labels))]
    obs = pd.DataFrame({"biological.individual": donors, "chamber": "LV", "nUMI": 1.0, "Cluster": labels})
    path = folder / "healthy_human_4chamber_map_unnormalized_V4.h5ad"
    return write_h5ad(path, counts_of(labels, source, genes), obs, pd.DataFrame(index=genes.index))


def heca(folder, genes):
    source = heart_source("heca")
    kinds = ["Cardiomyocyte cell", "T cell", "Fibrocyte", "Macrophage", "Lymphocyte", "Unclassified", "Strange cell"]
    labels = labels_of(source, 15, labels=kinds)
    obs = pd.DataFrame(
        {
            "donor_ID": [f"donor{number // len(kinds) % 3}" for number in range(len(labels))],
            "organ": ["Lung" if number >= 14 * len(kinds) else "Heart" for number in range(len(labels))],
            "cell_type": labels,
            "study_id": "study",
        }
    )
    path = folder / "Heart.h5ad"
    return write_h5ad(
        path, counts_of(labels, source, genes), obs, pd.DataFrame({"Gene_symbol": genes.index}, genes.index)
    )


def wang(folder, genes):
    """Write two matrices with some genes each alone has, and the annotation, as R wrote GEO's."""
    source = heart_source("wang2020")
    labels = labels_of(source, 12)
    counts = counts_of(labels, source, genes).T
    cells = [f"SC_92563_{number}_17" for number in range(len(labels))]
    half = len(cells) // 2
    paths = []
    for name, kept, columns in (
        ("GSE109816_normal_heart_umi_matrix.csv.gz", genes.index[:-1], slice(0, half)),
        ("GSE121893_human_heart_sc_umi.csv.gz", genes.index[1:][::-1], slice(half, None)),
    ):
        rows = genes.index.get_indexer(kept)
        table = pd.DataFrame(counts[rows, columns], index=kept, columns=cells[columns])
        paths.append(folder / name)
        table.to_csv(paths[-1], quoting=2)
    idents = [label if label == "AV" else f"{label}{row % 3 + 1}" for row, label in enumerate(labels)]
    donors = [f"{'N' if row < half else 'D'}{row % 2 + 1}" for row in range(len(cells))]
    table = pd.DataFrame({"ID": cells, "condition": "N_LV_CM", "group": "N", "ident": idents, "sample": donors})
    table.loc[table.index[-1], "ident"] = "NA"
    annotation = folder / "GSE121893_all_heart_cell_cluster_info.txt.gz"
    table.iloc[1:].to_csv(annotation, sep="\t", index=False)
    return paths, annotation


def test_every_source_maps_to_the_first_tier_and_says_from_where_it_knows():
    tiers = first_tier()
    assert len(tiers) == 12
    for source in heart_sources().values():
        assert set(source.labels.values()) <= set(tiers)
        assert not set(source.labels) & set(source.left_out)
        assert all(set(fact) == {"says", "from", "seen"} for fact in source.facts)
        assert source.not_verified
        text = format_source(source)
        assert source.download[0] in text
        assert "Not verified:" in text
    tree = LabelTree.uhaf("Heart")
    assert heart_source("heca").labels["CD4 T helper"] == tree.at_level("CD4 T helper", 1) == "Lymphoid cell"


def test_a_map_to_what_is_no_type_is_refused():
    content = {"labels": {"LV": "T cell", "FB": "Fibroblast"}}
    with pytest.raises(ValueError, match=r"new maps \{'LV': 'T cell'\}; types .* are Adipocyte, Cardiomyocyte cell"):
        HeartSource.from_json("new", content)
    with pytest.raises(ValueError, match="source got 'tucker'; there are litvinukova2020, tucker2020"):
        heart_source("tucker")


@pytest.mark.parametrize(
    ("write", "name", "types"), [(litvinukova, "litvinukova2020", 10), (tucker, "tucker2020", 9), (heca, "heca", 4)]
)
def test_a_file_as_its_portal_gives_it_goes_through_the_comparison(tmp_path, genes, write, name, types):
    path = write(tmp_path, genes)
    checked = check_heart_cells(name, cells_of_source(name, [path], work=tmp_path))
    assert (checked.num_genes, checked.num_known_genes, len(checked.type_counts)) == (150, 150, types)
    where = {"output": tmp_path / "out", "work": tmp_path / "work"}
    result = compare_on_heart(checked, systems=CHEAP, **where)
    assert result["kind"] == "random"
    assert result["left_out"] == {}
    assert result["systems"]["logistic_regression"]["accuracy"] > 0.9 > result["systems"]["majority_class"]["accuracy"]
    told = json.loads((tmp_path / "out" / f"heart-{name}.json").read_text())
    assert told["types"] == checked.type_counts
    assert told["num_compared"] == sum(told["types"].values()) == result["num_cells"]

    split = json.loads((tmp_path / "out" / f"comparison-{name}-random-split.json").read_text())
    (fold,) = split["folds"]
    type_of = dict(zip((f"cell{row}-1" for row in range(len(checked.types))), checked.types.tolist(), strict=True))
    parts = [fold[part] for part in ("train", "validation", "test")]
    assert sorted(cell for part in parts for cell in part) == sorted(cell for cell, type_ in type_of.items() if type_)
    for part, share in zip(parts, (0.6, 0.2, 0.2), strict=True):
        sizes = pd.Series([type_of[cell] for cell in part]).value_counts()
        for type_, number in checked.type_counts.items():
            assert abs(sizes[type_] - share * number) <= 1


def test_labels_become_types_and_what_is_left_out_is_told(tmp_path, genes):
    checked = check_heart_cells("litvinukova2020", litvinukova(tmp_path, genes))
    assert (checked.count_source, checked.gene_source) == ("X", "var_names")
    assert checked.type_counts["Cardiomyocyte cell"] == 30  # atrial and ventricular
    assert checked.left_out_counts == {"doublets": 15, "NotAssigned": 15}
    assert checked.unknown_labels == []
    text = format_check(checked)
    assert "3 donors" in text
    assert f"{'Cardiomyocyte cell':<24}{30:>10}{30 / 165:>8.1%}" in text
    assert f"{'doublets':<30}{15:>10}  no type" in text

    checked = check_heart_cells("heca", heca(tmp_path, genes))
    assert checked.type_counts == {
        "Cardiomyocyte cell": 14, "Fibroblast": 14, "Lymphoid cell": 28, "Myeloid cell": 14
    }  # fmt: skip
    assert checked.unknown_labels == ["Strange cell"]
    assert checked.left_out_counts == {"Unclassified": 14, "Strange cell": 14}
    text = format_check(checked)
    assert "Strange cell" in text
    assert "not in the map" in text
    assert "7 cells are not of {'organ': ('Heart',)}" in text


def test_the_text_matrices_of_wang_become_one_file(tmp_path, genes):
    paths, annotation = wang(tmp_path, genes)
    found = convert_wang2020(paths, annotation, tmp_path / "out.h5ad")
    stored = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert found.shape == stored.shape == (12 * 7 - 1, 148)  # the first cell is not annotated, two genes not shared
    assert stored.var_names.tolist() == genes.index[1:-1].tolist()
    labels = labels_of(heart_source("wang2020"), 12)
    assert stored.obs["cell_type"].astype(str).tolist()[:-1] == labels[1:-1]
    truth = counts_of(labels, heart_source("wang2020"), genes)
    np.testing.assert_array_equal(stored.X.toarray(), truth[1:, 1:-1])

    one = convert_wang2020(paths[0], annotation, tmp_path / "one.h5ad")
    assert one.shape == (12 * 7 // 2 - 1, 149)


def test_wang_goes_through_the_command(tmp_path, genes):
    paths, annotation = wang(tmp_path, genes)
    files = [*(word for path in paths for word in ("--cells", str(path))), "--annotation", str(annotation)]
    options = ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    heart = ["benchmark", "heart", "--source", "wang2020"]
    result = CliRunner().invoke(app, [*heart, *files, *options, "--check"])
    assert result.exit_code == 0, result.output
    assert "Cardiomyocyte cell" in result.output
    assert "(no label)" in result.output
    assert "4 donors" in result.output
    assert not (tmp_path / "out").exists()

    systems = [word for name in CHEAP for word in ("--system", name)]
    result = CliRunner().invoke(app, [*heart, *files, *options, *systems, "--kind", "leave_one_group_out"])
    assert result.exit_code == 0, result.output
    assert "Logistic regression" in result.output
    found = json.loads((tmp_path / "out" / "comparison-wang2020-leave_one_group_out.json").read_text())
    assert found["num_folds"] == 4
    assert found["command"].endswith(
        "--source wang2020 --cells wang2020.h5ad --kind leave_one_group_out --system majority_class "
        "--system logistic_regression --seeds 1"
    )


def test_the_command_without_files_says_where_to_get_them():
    result = CliRunner().invoke(app, ["benchmark", "heart"])
    assert result.exit_code == 0, result.output
    assert all(source.page in result.output for source in heart_sources().values())
    result = CliRunner().invoke(app, ["benchmark", "heart", "--source", "tucker2020"])
    assert "SCP498" in result.output
    assert "GSE109816" not in result.output


def test_ensembl_ids_of_the_atlas_are_used_where_symbols_are_outdated(tmp_path, genes):
    outdated = pd.Series(genes.to_numpy(), index=[*genes.index[:-1], "CH-OLD-NAME"])
    checked = check_heart_cells("litvinukova2020", litvinukova(tmp_path, outdated))
    assert checked.gene_source == "var['gene_ids-Harvard-Nuclei']"
    assert read_heart_cells(checked).adata.var_names.tolist() == genes.tolist()


def test_a_missing_column_is_named_with_what_the_file_has(tmp_path, genes):
    path = tucker(tmp_path, genes)
    adata = anndata.read_h5ad(path)
    adata.obs = adata.obs.rename(columns={"biological.individual": "donor_id", "Cluster": "kind"})
    adata.write_h5ad(path)
    with pytest.raises(
        ValueError,
        match=r"lacks the obs columns 'Cluster' \(label_column\) and 'biological.individual' \(donor_column\) of "
        r"tucker2020, .*V4.h5ad or .*it has \['donor_id', .*'kind'\]. Name them with --label-column and --donor-column",
    ):
        check_heart_cells("tucker2020", path)
    checked = check_heart_cells("tucker2020", path, label_column="kind", donor_column="donor_id")
    assert len(checked.type_counts) == 9
    assert set(read_heart_cells(checked).groups) == {"1221", "1666", "1702"}
    result = CliRunner().invoke(app, ["benchmark", "heart", "--source", "tucker2020", "--cells", str(path), "--check"])
    assert result.exit_code == 1
    assert "lacks the obs columns" in result.output


def test_another_release_is_refused(tmp_path, genes):
    path = litvinukova(tmp_path, genes)
    adata = anndata.read_h5ad(path)
    adata.obs["cell_type"] = [label.replace("_", " ").removesuffix("s") + " cell" for label in adata.obs["cell_type"]]
    adata.write_h5ad(path)
    with pytest.raises(ValueError, match=r"map knows the labels of 0 of 195 heart cells; 'cell_type' has such as \["):
        check_heart_cells("litvinukova2020", path)


def test_normalised_counts_are_refused(tmp_path, genes):
    path = tucker(tmp_path, genes)
    adata = anndata.read_h5ad(path)
    counts = adata.X.toarray()
    adata.X = sparse.csr_matrix(np.log1p(counts / counts.sum(axis=1, keepdims=True) * 10_000))
    adata.write_h5ad(path)
    with pytest.raises(ValueError, match="has no raw counts"):
        check_heart_cells("tucker2020", path)


def test_few_types_and_unknown_genes_are_refused(tmp_path, genes):
    source = heart_source("tucker2020")
    labels = ["07. Pericyte"] * 30 + ["16. Neuronal"] * 9
    obs = pd.DataFrame({"biological.individual": "1221", "Cluster": labels})
    counts = counts_of(labels, source, genes)
    path = write_h5ad(tmp_path / "few.h5ad", counts, obs, pd.DataFrame(index=genes.index))
    with pytest.raises(ValueError, match=r"has the types \{'Pericyte': 30\} with at least 10 cells; two are needed"):
        check_heart_cells("tucker2020", path)
    path = write_h5ad(
        tmp_path / "genes.h5ad", counts, obs, pd.DataFrame(index=[f"unknown-{number}" for number in range(150)])
    )
    with pytest.raises(ValueError, match="the vocabulary knows 0 of 150 genes"):
        check_heart_cells("tucker2020", path)


def test_a_rare_type_is_left_out_and_told(tmp_path, genes):
    labels = ["07. Pericyte"] * 30 + ["01. Fibroblast I"] * 20 + ["16. Neuronal"] * 9
    obs = pd.DataFrame({"biological.individual": "1221", "Cluster": labels})
    counts = counts_of(labels, heart_source("tucker2020"), genes)
    path = write_h5ad(tmp_path / "rare.h5ad", counts, obs, pd.DataFrame(index=genes.index))
    checked = check_heart_cells("tucker2020", path)
    assert checked.left_out_counts == {"16. Neuronal": 9}
    assert checked.unknown_labels == []
    assert "Neuron has fewer than 10 cells" in format_check(checked)


def test_files_that_do_not_fit_their_source_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cells got \['a.csv'\].*tucker2020 takes one file, healthy_human_4chamber"):
        cells_of_source("tucker2020", ["a.csv"], work=tmp_path)
    with pytest.raises(ValueError, match=r"wang2020 takes GSE109816_normal_heart_umi_matrix.csv.gz and"):
        cells_of_source("wang2020", ["a.csv.gz"], work=tmp_path)
    with pytest.raises(ValueError, match=r"cells got \['a.h5ad', 'b.h5ad'\]"):
        cells_of_source("heca", ["a.h5ad", "b.h5ad"], work=tmp_path)


def test_text_matrices_that_are_no_counts_or_of_another_study_are_refused(tmp_path, genes):
    paths, annotation = wang(tmp_path, genes)
    (tmp_path / "bad.csv").write_text('"","a","b"\n"TTN",1,2\n"VWF",0.5,1\n')
    with pytest.raises(ValueError, match=r"bad.csv has values near the gene 'TTN' that are no whole counts"):
        read_text_matrix(tmp_path / "bad.csv")
    (tmp_path / "twice.csv").write_text('"","a","b"\n"TTN",1,2\n"TTN",0,1\n')
    with pytest.raises(ValueError, match=r"twice.csv has genes twice: \['TTN'\]"):
        read_text_matrix(tmp_path / "twice.csv")
    (tmp_path / "other.csv").write_text('"","a","b"\n"TTN",1,2\n')
    with pytest.raises(ValueError, match=r"share 1 genes, and 0 of 2 cells \(such as 'a'\) are in GSE121893_all"):
        convert_wang2020(tmp_path / "other.csv", annotation, tmp_path / "out.h5ad")
    with gzip.open(tmp_path / "clusters.txt.gz", "wt") as file:
        file.write("ID\tCondition\tCluster_ID\tCellType\na\tN\t1\tCM\n")
    with pytest.raises(
        ValueError, match=r"lacks the columns \['ident', 'sample'\]; it has .*'CellType'\]. GSE121893_all"
    ):
        convert_wang2020(paths, tmp_path / "clusters.txt.gz", tmp_path / "out.h5ad")
    with pytest.raises(ValueError, match="umi names no file"):
        convert_wang2020([], annotation, tmp_path / "out.h5ad")
    assert not (tmp_path / "out.h5ad").exists()


def test_drawn_cells_keep_the_shares_and_the_rare(tmp_path, genes):
    labels = np.array(["common"] * 900 + ["some"] * 90 + ["rare"] * 10)
    rows = sample_by_label(labels, 100)
    assert len(rows) == 100
    assert (np.diff(rows) > 0).all()
    assert pd.Series(labels[rows]).value_counts().to_dict() == {"common": 80, "rare": 10, "some": 10}
    assert (rows == sample_by_label(labels, 100)).all()
    assert (rows != sample_by_label(labels, 100, seed=1)).any()
    assert len(sample_by_label(labels, 5000)) == 1000
    with pytest.raises(ValueError, match="num_cells got 29; 3 labels with 10 cells each need at least 30"):
        sample_by_label(labels, 29)

    checked = check_heart_cells("litvinukova2020", litvinukova(tmp_path, genes))
    some = read_heart_cells(checked, max_cells=120)
    everything = read_heart_cells(checked)
    assert (some.name, everything.name) == ("litvinukova2020-120_cells", "litvinukova2020")
    assert (some.adata.n_obs, everything.adata.n_obs) == (120, 165)
    assert set(some.labels) == set(everything.labels)
    same = everything.adata[some.adata.obs_names]
    assert (some.adata.X != same.X).nnz == 0


def test_cells_are_read_over_many_blocks(tmp_path, genes, monkeypatch):
    monkeypatch.setattr("screformer.benchmarks.labelled_data.BLOCK", 7)
    path = litvinukova(tmp_path, genes)
    data = read_labelled_data(path, exclude_labels=["doublets", "Neuronal"], group_column="donor")
    whole = anndata.read_h5ad(path)[data.adata.obs_names]
    assert (data.adata.X != whole.X).nnz == 0
    assert data.labels.tolist() == whole.obs["cell_type"].astype(str).tolist()
    assert data.groups.tolist() == whole.obs["donor"].astype(str).tolist()


def test_runs_on_other_cells_are_not_taken_for_these(tmp_path, genes):
    where = {"systems": CHEAP[:1], "output": tmp_path / "out", "work": tmp_path / "work"}
    for number in (15, 20):
        checked = check_heart_cells("litvinukova2020", litvinukova(tmp_path, genes, number))
        result = compare_on_heart(checked, **where)
        assert sum(result["runs"][0]["num_cells"].values()) == 11 * number
