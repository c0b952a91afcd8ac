"""A checkpoint says which cells it has seen, and a corpus which it keeps from training."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
from small_corpus import TINY_MODEL, make_cells, make_corpus, make_tokenizer

from screformer.tokenization import build_corpus, open_corpus
from screformer.tokenization.cell_hashes import read_index
from screformer.tokenization.corpus_split import HoldOut
from screformer.train.arguments import (
    FineTuningArguments,
    FineTuningDataArguments,
    ModelArguments,
    PretrainingArguments,
    PretrainingDataArguments,
)
from screformer.train.finetune import finetune
from screformer.train.pretrain import pretrain
from screformer.train.seen_cells import record_seen_cells


def settings(kind, output):
    return kind(output_dir=str(output), use_cpu=True, disable_tqdm=True, max_steps=1, per_device_train_batch_size=8)


def index_of(folder):
    return set(read_index(folder, make_tokenizer().gene_vocabulary).tolist())


def test_a_checkpoint_has_seen_the_cells_of_both_trainings_but_not_those_of_the_test(tmp_path, caplog) -> None:
    corpus = open_corpus(make_corpus(tmp_path))
    donors = np.array(corpus.dataset["donor"][:])
    hashes = corpus.cell_hashes
    cells = PretrainingDataArguments(corpus=str(corpus.folder), group_column="donor", exclude_groups=["human4"])
    pretrained = pretrain(
        ModelArguments(config_overrides=TINY_MODEL), cells, settings(PretrainingArguments, tmp_path / "pretrained")
    ).output_dir
    assert index_of(pretrained) == set(hashes[donors != "human4"].tolist())
    labelled = FineTuningDataArguments(corpus=str(corpus.folder), group_column="donor", test_groups=["human1"])
    tuned = finetune(
        ModelArguments(checkpoint=str(pretrained)), labelled, settings(FineTuningArguments, tmp_path / "tuned")
    ).output_dir
    assert index_of(tuned) == set(hashes.tolist())
    assert json.loads((tuned / "seen_cells.json").read_text())["is_complete"] is True
    # Without that of its beginnings an index is not complete, and says so.
    (pretrained / "seen_cells.npy").unlink()
    record_seen_cells(tuned, corpus, np.arange(5), checkpoint=str(pretrained))
    assert json.loads((tuned / "seen_cells.json").read_text())["is_complete"] is False
    assert "does not say which cells it has seen" in caplog.text
    # What begins with such a one is not complete either.
    next_one = tmp_path / "next"
    next_one.mkdir()
    record_seen_cells(next_one, corpus, np.arange(9), checkpoint=str(tuned))
    assert json.loads((next_one / "seen_cells.json").read_text())["is_complete"] is False


def test_pretraining_holds_out_what_the_corpus_does(tmp_path, caplog, monkeypatch) -> None:
    from screformer.train import pretrain as module

    make_cells().write_h5ad(tmp_path / "cells.h5ad")
    corpus = build_corpus(
        tmp_path / "cells.h5ad",
        tmp_path / "corpus",
        tokenizer=make_tokenizer(),
        obs_columns=["donor"],
        hold_out=HoldOut(0.25, "donor"),
    )
    cells = PretrainingDataArguments(corpus=str(corpus.folder), held_out_fraction=0.5)
    with caplog.at_level(logging.INFO):
        kept, held_out = module._split_cells(corpus, cells, 0)
    assert held_out.tolist() == corpus.held_out.tolist()
    assert kept.tolist() == corpus.training.tolist()
    assert f"held out: {len(held_out)} cells, as the corpus says; held_out_fraction is not used" in caplog.text
    excluded = replace(cells, group_column="donor", exclude_groups=corpus.manifest["split"]["groups"])
    with pytest.raises(ValueError, match=r"exclude_groups leaves 36 cells to train on and 0 held out"):
        module._split_cells(corpus, excluded, 0)


def test_a_corpus_of_an_older_release_records_nothing(tmp_path, caplog) -> None:
    corpus = open_corpus(make_corpus(tmp_path))
    corpus.manifest["version"] = 1
    record_seen_cells(tmp_path, corpus, np.arange(5), checkpoint=None)
    assert "made by an older release" in caplog.text
    assert not (tmp_path / "seen_cells.npy").exists()
