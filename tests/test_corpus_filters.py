"""Cells that are dropped are counted by reason, and duplicates stay once; what is held out is recorded."""

import anndata
import numpy as np
import pytest
import scipy.sparse
from small_corpus import make_cells, make_tokenizer

from screformer.tokenization import build_corpus, open_corpus
from screformer.tokenization.cell_filters import CellFilters
from screformer.tokenization.corpus_split import HoldOut, choose_groups
from screformer.tokenization.mitochondrial_genes import is_mitochondrial
from screformer.train.corpus_columns import name_cells


def write(path, cells, counts=None):
    if counts is not None:
        cells = cells.copy()
        cells.X = scipy.sparse.csr_matrix(counts)
    cells.write_h5ad(path)
    return path


def build(tmp_path, paths, name="corpus", **options):
    options = {"tokenizer": make_tokenizer(), "obs_columns": ["donor"], "cells_per_shard": 15} | options
    return build_corpus(paths, tmp_path / name, **options)


def test_each_dropped_cell_is_counted_under_its_first_reason(tmp_path) -> None:
    cells = make_cells(40)
    counts = cells.X.toarray()
    counts[3] = 0  # empty
    counts[4:6] = 0
    counts[4, :30] = 1  # few counts
    counts[5, :3] = 1000, 2000, 3000  # few genes
    mitochondrial = np.zeros((40, 1), np.int32)
    mitochondrial[[6, 20], 0] = 50_000
    names = [*cells.var_names, "MT-ND1"]
    adata = anndata.AnnData(scipy.sparse.csr_matrix(np.concatenate([counts, mitochondrial], axis=1)), obs=cells.obs)
    adata.var_names = names
    adata.write_h5ad(tmp_path / "cells.h5ad")
    filters = CellFilters(min_genes=10, min_counts=100, max_mitochondrial_share=0.5)
    corpus = build(tmp_path, tmp_path / "cells.h5ad", filters=filters)
    dropped = {"empty": 1, "below_min_counts": 1, "below_min_genes": 1, "above_max_mitochondrial_share": 2}
    assert corpus.manifest["totals"]["dropped"] == corpus.manifest["sources"][0]["dropped"] == dropped
    assert [shard["num_cells"] for shard in corpus.manifest["shards"]] == [11, 14, 10]
    assert [shard["num_source_cells"] for shard in corpus.manifest["shards"]] == [15, 15, 10]
    kept = [name for at, name in enumerate(cells.obs_names) if at not in (3, 4, 5, 6, 20)]
    assert corpus.dataset["cell_id"][:] == kept
    expected = make_tokenizer()(adata[kept])["input_ids"]
    for row, bins in zip(corpus.dataset, expected, strict=True):
        assert row["input_ids"] == bins[np.flatnonzero(bins)].tolist()
    assert "dropped: 1 empty, 1 below min counts, 1 below min genes, 2 above max mito" in corpus.summary()
    assert corpus.summary().startswith("35 cells, ")


def test_of_duplicates_the_first_stays(tmp_path) -> None:
    first, second = make_cells(30, seed=0), make_cells(40, seed=1)
    second.obs_names = "second" + second.obs_names
    counts = second.X.toarray()
    counts[10] = counts[2]
    counts[12] = first.X.toarray()[5]
    counts[15:30] = first.X.toarray()[:15]  # a whole shard
    paths = [write(tmp_path / "a.h5ad", first), write(tmp_path / "b.h5ad", second, counts)]
    corpus = build(tmp_path, paths)
    assert corpus.manifest["totals"]["dropped"] == {"duplicate": 17}
    assert [source["num_kept"] for source in corpus.manifest["sources"]] == [30, 23]
    assert [shard["file"] for shard in corpus.manifest["shards"]] == [f"cells-0000{at}.arrow" for at in (0, 1, 2, 4)]
    kept = [name for at, name in enumerate(second.obs_names) if at not in (10, 12, *range(15, 30))]
    assert corpus.dataset["cell_id"][:] == [*first.obs_names, *kept]
    assert len(np.unique(corpus.cell_hashes)) == len(corpus) == 53
    assert sum(shard["num_tokens"] for shard in corpus.manifest["shards"]) == sum(map(len, corpus.dataset["gene_ids"]))
    everything = build(tmp_path, paths, "all", filters=CellFilters(drop_duplicates=False))
    assert len(everything) == 70
    assert (np.load(everything.folder / "cell_hashes.npy") == np.unique(corpus.cell_hashes)).all()


def test_a_corpus_without_cells_is_refused(tmp_path) -> None:
    path = write(tmp_path / "cells.h5ad", make_cells(10))
    with pytest.raises(ValueError, match=r"no cell is left, all were dropped \(\{'below_min_genes': 10\}\)"):
        build(tmp_path, path, filters=CellFilters(min_genes=100))
    assert not (tmp_path / "corpus").exists()


def test_a_filter_that_can_drop_nothing_is_noted(tmp_path, caplog) -> None:
    path = write(tmp_path / "cells.h5ad", make_cells(10))
    corpus = build(tmp_path, path, filters=CellFilters(max_mitochondrial_share=0.1))
    note = "no gene is named as mitochondrial: max_mitochondrial_share dropped no cell"
    assert note in corpus.manifest["sources"][0]["notes"]
    assert note in caplog.text


def test_mitochondrial_genes_are_known_by_id_and_by_symbol() -> None:
    ids = ["ENSG00000198888", "ENSG00000211459", "ENSG00000210082.2", "ENSG00000209082"]  # ND1, RNR1, RNR2, TL1
    assert is_mitochondrial(ids).all()
    assert is_mitochondrial(["MT-ND1", "MT-RNR1", "MT.RNR2", "MT-TL1"]).all()
    assert not is_mitochondrial(["MT1X", "MTOR", "ENSG00000198793"]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_genes": -1}, "min_genes: 0 .no minimum. or more, got -1"),
        ({"min_counts": -1}, "min_counts: 0"),
        ({"max_mitochondrial_share": 20}, "max_mitochondrial_share: a share from 0 to 1, such as 0.2, got 20"),
    ],
)
def test_filters_out_of_range_are_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CellFilters(**options)


# Splits


def test_the_same_cell_is_on_the_same_side_of_every_corpus(tmp_path) -> None:
    cells = make_cells(200)
    whole = build(tmp_path, write(tmp_path / "a.h5ad", cells), "whole", hold_out=HoldOut(0.3))
    part = build(tmp_path, write(tmp_path / "b.h5ad", cells[50:120, ::-1]), "part", hold_out=HoldOut(0.3))
    held_out = set(whole.dataset.select(whole.held_out)["cell_id"])
    assert whole.manifest["split"] == {
        "fraction": 0.3,
        "by": "cell",
        "seed": 2022,
        "groups": None,
        "num_held_out": len(held_out),
    }
    # Four standard deviations of 200 cells.
    assert abs(len(held_out) - 60) < 4 * np.sqrt(200 * 0.3 * 0.7)
    assert sorted([*whole.held_out, *whole.training]) == list(range(200))
    assert set(part.dataset.select(part.held_out)["cell_id"]) == held_out & set(part.dataset["cell_id"])
    other = build(tmp_path, tmp_path / "a.h5ad", "other", hold_out=HoldOut(0.3, seed=1))
    assert set(other.held_out.tolist()) != set(whole.held_out.tolist())


def test_whole_donors_are_held_out(tmp_path) -> None:
    cells = make_cells(80)
    cells.obs["donor"] = cells.obs["donor"].astype(object)
    cells.obs.iloc[:4, cells.obs.columns.get_loc("donor")] = None
    corpus = build(tmp_path, write(tmp_path / "a.h5ad", cells), hold_out=HoldOut(0.25, "donor"))
    [donor] = corpus.manifest["split"]["groups"]
    donors = np.array([value or "" for value in corpus.dataset["donor"]])
    assert corpus.held_out.tolist() == np.flatnonzero(donors == donor).tolist()
    assert len(corpus.held_out) == corpus.manifest["split"]["num_held_out"]
    assert f"held out by donor: {len(corpus.held_out)} cells: {donor}" in corpus.summary()


def test_whole_files_are_held_out(tmp_path) -> None:
    paths = [write(tmp_path / f"{seed}.h5ad", make_cells(20, seed=seed)) for seed in range(4)]
    corpus = build(tmp_path, paths, hold_out=HoldOut(0.5, "file"))
    assert len(corpus.manifest["split"]["groups"]) == 2
    first = [int(name[0]) * 20 for name in corpus.manifest["split"]["groups"]]
    assert corpus.held_out.tolist() == [*range(first[0], first[0] + 20), *range(first[1], first[1] + 20)]


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path) -> None:
    paths = [tmp_path / place / "cells.h5ad" for place in ("a/x", "b/x", "b/y")] + [tmp_path / "other.h5ad"]
    for seed, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, make_cells(20, seed=seed))
    corpus = build(tmp_path, paths, hold_out=HoldOut(0.25, "file"))
    names = [source["name"] for source in corpus.manifest["sources"]]
    assert names == ["a/x/cells.h5ad", "b/x/cells.h5ad", "y/cells.h5ad", "other.h5ad"]
    (held_out,) = corpus.manifest["split"]["groups"]
    first = names.index(held_out) * 20
    assert corpus.held_out.tolist() == list(range(first, first + 20))
    cell_names = name_cells(corpus).tolist()
    assert len(set(cell_names)) == 80
    assert cell_names[20] == "b/x/cells.h5ad/cell0"


def test_groups_come_as_near_to_the_fraction_as_they_can() -> None:
    sizes = {f"group{at}": 10 for at in range(20)}
    chosen = choose_groups(HoldOut(0.2, "donor"), sizes)
    assert len(chosen) == 4
    assert choose_groups(HoldOut(0.2, "donor"), dict(reversed(sizes.items()))) == chosen
    assert choose_groups(HoldOut(0.2, "donor", seed=1), sizes) != chosen
    assert choose_groups(HoldOut(0.01, "donor"), {"large": 90, "small": 10}) == ["small"]
    assert len(choose_groups(HoldOut(0.99, "donor"), sizes)) == 19


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda: HoldOut(0), "hold_out: a fraction above 0 and below 1, such as 0.1, got 0"),
        (lambda: HoldOut(1.0), "hold_out: a fraction"),
        (
            lambda: HoldOut(0.1, "dataset"),
            r"by='dataset' is neither 'cell' nor 'file' nor a kept obs column",
        ),
        (lambda: HoldOut(1e-9), r"hold_out: 1e-09 of 10 cells holds out 0; at least one cell must be on each side"),
        (lambda: HoldOut(0.1, "file"), r"needs at least two of them, the corpus has \['cells.h5ad'\]"),
    ],
)
def test_a_split_that_cannot_be_is_refused(tmp_path, rule, message: str) -> None:
    path = write(tmp_path / "cells.h5ad", make_cells(10))
    with pytest.raises(ValueError, match=message):
        build(tmp_path, path, hold_out=rule())
    assert not (tmp_path / "corpus").exists()


def test_another_split_goes_on_with_the_shards_of_one_that_could_not_be(tmp_path) -> None:
    path = write(tmp_path / "cells.h5ad", make_cells(10))
    with pytest.raises(ValueError, match="at least two"):
        build(tmp_path, path, hold_out=HoldOut(0.1, "file"))
    corpus = build(tmp_path, path, hold_out=HoldOut(0.3, "donor"))
    assert '"num_shards_kept": 1' in (corpus.folder / "build_log.json").read_text()
    with pytest.raises(ValueError, match=r"hold_out \{'fraction': 0.3.* there, None now"):
        build(tmp_path, path)


def test_a_corpus_without_a_split_says_so(tmp_path) -> None:
    corpus = build(tmp_path, write(tmp_path / "cells.h5ad", make_cells(10)))
    assert not corpus.has_split
    with pytest.raises(ValueError, match=r"has no split; build it with hold_out"):
        _ = corpus.held_out
    manifest = corpus.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 2', '"version": 1'))
    with pytest.raises(ValueError, match="made by an older release and has no cell hashes"):
        _ = open_corpus(corpus.folder).cell_hashes
