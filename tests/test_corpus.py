"""A corpus is the same whatever happened while it was built, and says where every cell came from."""

import hashlib
import json
from pathlib import Path
from unittest.mock import Mock

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

import screformer
from screformer.tokenization import GeneVocabulary, ScReformerTokenizer, build_corpus, corpus_build, open_corpus

NUM_GENES = 20


@pytest.fixture
def tokenizer() -> ScReformerTokenizer:
    ids = [f"ENSG{at:011d}" for at in range(NUM_GENES)]
    return ScReformerTokenizer(GeneVocabulary(ids, symbols=[f"GENE{at}" for at in range(NUM_GENES)]))


@pytest.fixture
def files(tmp_path) -> list[Path]:
    return [_write(tmp_path / f"{name}.h5ad", seed, num_cells) for seed, (name, num_cells) in enumerate(SOURCES)]


SOURCES = [("first", 25), ("second", 13)]


def _write(path: Path, seed: int, num_cells: int) -> Path:
    generator = np.random.default_rng(seed)
    counts = generator.poisson(0.7, size=(num_cells, NUM_GENES))
    counts[:, 0] += 1
    labels = [f"type{at % 3}" for at in range(num_cells)]
    labels[1] = None
    obs = pd.DataFrame({"cell_type": pd.Categorical(labels)}, index=[f"{path.stem}{at}" for at in range(num_cells)])
    var = pd.DataFrame(index=[f"GENE{at}" for at in generator.permutation(NUM_GENES)])
    anndata.AnnData(scipy.sparse.csr_matrix(counts), obs=obs, var=var).write_h5ad(path)
    return path


def _bytes(folder: Path) -> dict[str, bytes]:
    """Everything but the log, which has times."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "build_log.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_every_cell_is_what_the_tokenizer_says(tmp_path, files, tokenizer) -> None:
    corpus = build_corpus(
        files, tmp_path / "corpus", tokenizer=tokenizer, obs_columns=["cell_type"], cells_per_shard=10
    )
    assert len(corpus) == len(corpus.dataset) == 38
    assert str(corpus.dataset.features["input_ids"]) == "List(Value('uint8'))"
    assert str(corpus.dataset.features["gene_ids"]) == "List(Value('uint16'))"
    rows = iter(corpus.dataset)
    for path in files:
        adata = anndata.read_h5ad(path)
        expected = tokenizer(adata)["input_ids"]
        for cell, label, bins in zip(adata.obs_names, adata.obs["cell_type"], expected, strict=True):
            row = next(rows)
            genes = np.flatnonzero(bins)
            assert row["gene_ids"] == genes.tolist()
            assert row["input_ids"] == bins[genes].tolist()
            assert row["cell_id"] == cell
            assert row["cell_type"] == (None if pd.isna(label) else label)


def test_manifest_says_where_everything_came_from(tmp_path, files, tokenizer) -> None:
    corpus = build_corpus(files, tmp_path / "corpus", tokenizer=tokenizer, cells_per_shard=10)
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    assert manifest == corpus.manifest
    assert manifest["tokenizer"]["fingerprint"] == tokenizer.fingerprint == corpus.tokenizer().fingerprint
    for source, path, (_, num_cells) in zip(manifest["sources"], files, SOURCES, strict=True):
        assert source["name"] == path.name
        assert source["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert source["num_cells"] == num_cells
        assert (source["count_source"], source["gene_source"]) == ("X", "var_names")
        assert source["gene_coverage"] == 1
        assert source["passport"]["gene_mapping"]["num_genes_found"] == NUM_GENES
        assert (source["num_kept"], source["dropped"]) == (num_cells, {})
    assert [shard["num_cells"] for shard in manifest["shards"]] == [10, 10, 5, 10, 3]
    for shard in manifest["shards"]:
        content = (tmp_path / "corpus" / shard["file"]).read_bytes()
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()
    assert manifest["totals"] == {
        "num_cells": 38,
        "num_tokens": sum(map(len, corpus.dataset["gene_ids"])),
        "dropped": {},
    }
    assert manifest["software"]["screformer"] == screformer.__version__
    log = json.loads((tmp_path / "corpus" / "build_log.json").read_text())
    assert (log["num_cells_read"], log["num_shards_kept"], log["num_workers"]) == (38, 0, 1)
    assert log["seconds"] > 0
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()} - {path.name for path in files}
    assert left == {
        *(f"cells-{at:05d}.arrow" for at in range(5)),
        *("manifest.json", "build_log.json", "cell_hashes.npy", "genes.json", "tokenizer_config.json"),
        *(path.name for path in (tmp_path / "corpus" / "tokenizer").iterdir()),
    }


def test_the_same_input_gives_the_same_bytes(tmp_path, files, tokenizer, monkeypatch) -> None:
    for name in ("a", "b"):
        build_corpus(files, tmp_path / name, tokenizer=tokenizer, obs_columns=["cell_type"])
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b")


@pytest.mark.parametrize("num_done", [0, 1, 3])
def test_a_stopped_run_goes_on_and_gives_the_same_bytes(tmp_path, files, tokenizer, monkeypatch, num_done: int) -> None:
    options = {"tokenizer": tokenizer, "obs_columns": ["cell_type"], "cells_per_shard": 10}
    build_corpus(files, tmp_path / "whole", **options)
    written: list[str] = []
    write_shard = corpus_build.write_shard

    def stop_after(item, **options):
        if len(written) == num_done:
            (Path(item.folder) / (item.file + ".part")).write_bytes(b"half a shard")
            raise OSError("no space left on device")
        written.append(item.file)
        return write_shard(item, **options)

    monkeypatch.setattr(corpus_build, "write_shard", stop_after)
    with pytest.raises(OSError, match="no space left"):
        build_corpus(files, tmp_path / "stopped", **options)
    assert not (tmp_path / "stopped").exists()
    assert (tmp_path / "stopped.partial").exists() == (num_done > 0)
    if num_done:
        with pytest.raises(FileNotFoundError, match="was begun and not finished"):
            open_corpus(tmp_path / "stopped")
    again: list[str] = []

    def note(item, **options):
        again.append(item.file)
        return write_shard(item, **options)

    monkeypatch.setattr(corpus_build, "write_shard", note)
    build_corpus(files, tmp_path / "stopped", **options)
    assert len(again) == 5 - num_done
    assert _bytes(tmp_path / "stopped") == _bytes(tmp_path / "whole")
    assert not (tmp_path / "stopped.partial").exists()


def _stop(tmp_path: Path, files: list[Path], monkeypatch, **options) -> Path:
    """Leave a corpus with two finished shards."""
    write_shard = corpus_build.write_shard

    def stop_at_third(item, **options):
        if item.file == "cells-00002.arrow":
            raise KeyboardInterrupt
        return write_shard(item, **options)

    with monkeypatch.context() as patch:
        patch.setattr(corpus_build, "write_shard", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            build_corpus(files, tmp_path / "corpus", cells_per_shard=10, **options)
    return tmp_path / "corpus.partial"


def test_a_damaged_shard_of_a_stopped_run_is_made_again(tmp_path, files, tokenizer, monkeypatch) -> None:
    partial = _stop(tmp_path, files, monkeypatch, tokenizer=tokenizer)
    (partial / "cells-00001.arrow").write_bytes(b"damaged")
    build_corpus(files, tmp_path / "corpus", tokenizer=tokenizer, cells_per_shard=10)
    build_corpus(files, tmp_path / "whole", tokenizer=tokenizer, cells_per_shard=10)
    assert _bytes(tmp_path / "corpus") == _bytes(tmp_path / "whole")


@pytest.mark.parametrize("error", [ValueError("a worker of another release"), OSError("no space left on device")])
def test_a_resume_that_fails_keeps_the_finished_shards(tmp_path, files, tokenizer, monkeypatch, error) -> None:
    partial = _stop(tmp_path, files, monkeypatch, tokenizer=tokenizer)
    kept = _bytes(partial)
    for step in ("_survey", "_inspect_sources", "_write_shards"):
        with monkeypatch.context() as patch:
            patch.setattr(corpus_build, step, Mock(side_effect=error))
            with pytest.raises(type(error), match=str(error)):
                build_corpus(files, tmp_path / "corpus", tokenizer=tokenizer, cells_per_shard=10)
        assert _bytes(partial) == kept


def test_shards_that_were_finished_before_a_refusal_are_kept(tmp_path, files, tokenizer, monkeypatch) -> None:
    write_shard = corpus_build.write_shard

    def refuse_second(item, **options):
        if item.file == "cells-00001.arrow":
            raise ValueError("a worker of another release")
        return write_shard(item, **options)

    monkeypatch.setattr(corpus_build, "write_shard", refuse_second)
    with pytest.raises(ValueError, match="another release"):
        build_corpus(files, tmp_path / "corpus", tokenizer=tokenizer)
    assert (tmp_path / "corpus.partial" / "cells-00000.arrow").is_file()


def test_a_stopped_run_is_not_mixed_with_another(tmp_path, files, tokenizer, monkeypatch) -> None:
    _stop(tmp_path, files, monkeypatch, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"cells_per_shard 10 there, 11 now\. To start over, delete that folder"):
        build_corpus(files, tmp_path / "corpus", tokenizer=tokenizer, cells_per_shard=11)


def test_a_finished_corpus_is_opened_not_built_again(tmp_path, files, tokenizer, monkeypatch) -> None:
    build_corpus(files, tmp_path / "corpus", tokenizer=tokenizer)
    monkeypatch.setattr(corpus_build, "write_shard", None)
    assert len(build_corpus(files, tmp_path / "corpus", tokenizer=tokenizer)) == 38


def test_a_folder_with_another_corpus_is_refused(tmp_path, files, tokenizer) -> None:
    build_corpus(files, tmp_path / "corpus", tokenizer=tokenizer)
    before = _bytes(tmp_path / "corpus")
    other = ScReformerTokenizer(tokenizer.gene_vocabulary, num_bins=9)
    with pytest.raises(ValueError, match=r"made otherwise: tokenizer fingerprint .*num_bins 6 there, 9 now"):
        build_corpus(files, tmp_path / "corpus", tokenizer=other)
    with pytest.raises(ValueError, match=r"options obs_columns \[\] there, \['cell_type'\] now"):
        build_corpus(files, tmp_path / "corpus", tokenizer=tokenizer, obs_columns=["cell_type"])
    with pytest.raises(ValueError, match=r"files \['first.h5ad', 'second.h5ad'\] there, \['first.h5ad'\] now"):
        build_corpus(files[0], tmp_path / "corpus", tokenizer=tokenizer)
    content = tokenizer.gene_vocabulary.to_dict() | {"aliases": [["other"]] * NUM_GENES}
    renamed = ScReformerTokenizer(GeneVocabulary.from_dict(content))
    assert renamed.fingerprint == tokenizer.fingerprint
    with pytest.raises(ValueError, match="vocabulary_sha256"):
        build_corpus(files, tmp_path / "corpus", tokenizer=renamed)
    assert _bytes(tmp_path / "corpus") == before


def test_a_damaged_corpus_is_refused(tmp_path, files, tokenizer) -> None:
    build_corpus(files, tmp_path / "corpus", tokenizer=tokenizer)
    shard = tmp_path / "corpus" / "cells-00001.arrow"
    shard.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"shards \['cells-00001.arrow'\] of .* are damaged"):
        build_corpus(files, tmp_path / "corpus", tokenizer=tokenizer)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks the shards \['cells-00001.arrow'\]"):
        open_corpus(tmp_path / "corpus")


def test_a_folder_that_is_no_corpus_is_left_alone(tmp_path, files, tokenizer) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not a corpus, it has no manifest\.json\. Make one"):
        open_corpus(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is an empty folder that exists already"):
        build_corpus(files, tmp_path / "empty", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="exists and is not a corpus"):
        build_corpus(files, tmp_path, tokenizer=tokenizer)
    build_corpus(files, tmp_path / "corpus", tokenizer=tokenizer)
    manifest = tmp_path / "corpus" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 3}))
    with pytest.raises(ValueError, match=r"version 3; this release reads 'screformer-corpus' versions \[1, 2\]"):
        open_corpus(tmp_path / "corpus")


def test_a_file_given_twice_is_refused(tmp_path, files, tokenizer) -> None:
    copy = tmp_path / "copy.h5ad"
    copy.write_bytes(files[0].read_bytes())
    for twice in (files[0], copy):
        with pytest.raises(ValueError, match="has the same content as"):
            build_corpus([*files, twice], tmp_path / "corpus", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"paths": []}, ValueError, "at least one file of cells"),
        ({"paths": ["absent.h5ad"]}, FileNotFoundError, "there is no file absent.h5ad"),
        ({"cells_per_shard": 0}, ValueError, "cells_per_shard: at least 1"),
        ({"num_workers": 0}, ValueError, "num_workers: at least 1, got 0"),
        ({"allow": ["everything"]}, ValueError, "allow: 'everything' is no code of a problem"),
        ({"obs_columns": "cell_type"}, TypeError, r"write \['cell_type'\]"),
        ({"obs_columns": ["cell_id"]}, ValueError, "each name once, and none of"),
        ({"obs_columns": ["cell_type", "cell_type"]}, ValueError, "each name once"),
        ({"obs_columns": ["donor"]}, ValueError, r"first.h5ad has no 'donor', it has \['cell_type'\]"),
    ],
)
def test_wrong_arguments_leave_nothing_behind(tmp_path, files, tokenizer, arguments, error, message: str) -> None:
    arguments = {"paths": files} | arguments
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        build_corpus(output=tmp_path / "corpus", tokenizer=tokenizer, **arguments)
    assert sorted(tmp_path.iterdir()) == before


def test_unfit_cells_are_refused_by_file_and_leave_nothing_behind(tmp_path, files, tokenizer) -> None:
    adata = anndata.read_h5ad(files[0])
    bad = tmp_path / "bad.h5ad"

    def refuses(message: str, cells: anndata.AnnData) -> None:
        cells.write_h5ad(bad)
        with pytest.raises(ValueError, match=message):
            build_corpus(bad, tmp_path / "corpus", tokenizer=tokenizer)
        assert not (tmp_path / "corpus.partial").exists()

    foreign = adata.copy()
    foreign.var_names = ["GENE1"] + [f"other{at}" for at in range(NUM_GENES - 1)]
    refuses(r"bad.h5ad: .*% of the counts fall on genes", foreign[foreign[:, "GENE1"].X.toarray()[:, 0] > 0])
    foreign.var_names = [f"other{at}" for at in range(NUM_GENES)]
    refuses("bad.h5ad: .*none of the 20", foreign)
    no_cells = adata[:0].copy()
    no_cells.X = scipy.sparse.csr_matrix((0, NUM_GENES))
    refuses("bad.h5ad", no_cells)


def test_kept_empty_cells_stay_in_their_rows(tmp_path, files, tokenizer) -> None:
    adata = anndata.read_h5ad(files[0])
    adata.X = scipy.sparse.csr_matrix(adata.X.toarray() * (np.arange(25) != 7)[:, None])
    adata.write_h5ad(tmp_path / "kept.h5ad")
    keeper = ScReformerTokenizer(tokenizer.gene_vocabulary, on_empty_cells="keep")
    corpus = build_corpus(tmp_path / "kept.h5ad", tmp_path / "corpus", tokenizer=keeper)
    assert len(corpus) == 25
    assert corpus.cell_hashes[7] == 0
    assert len(np.load(tmp_path / "corpus" / "cell_hashes.npy", allow_pickle=False)) == 24
    assert corpus.dataset[7]["input_ids"] == []
    assert corpus.dataset[8]["input_ids"] != []
