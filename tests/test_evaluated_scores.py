"""Scores that are published are of the weights and the test cells that they are said to be of."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file
from small_checkpoint import SCORES, change_record, problems_of_files, write_checkpoint, write_record
from small_corpus import make_cells
from typer.testing import CliRunner

from screformer.cli import app
from screformer.model_cards import publish
from screformer.model_cards.publish import stage_checkpoint
from screformer.train.arguments import PretrainingArguments
from screformer.train.result_files import hash_weights
from screformer.train.training_run import begin_run


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A checkpoint that was split by donor and evaluated on its test cells; golden cells are not made."""
    monkeypatch.setattr(publish, "write_golden_cells", lambda _: None)
    folder = tmp_path / "own"
    write_checkpoint(folder)
    write_split(folder, "human4")
    return folder


def write_split(folder: Path, donor: str) -> None:
    cells = make_cells()
    is_test = (cells.obs["donor"] == donor).to_numpy()
    others = cells.obs_names[~is_test].tolist()
    parts = {"test": cells.obs_names[is_test].tolist(), "train": others[:24], "validation": others[24:]}
    numbers = {name: len(part) for name, part in parts.items()}
    write_record(
        folder, "splits", label_column="cell_type", group_column="donor", test_groups=[donor], seed=0,
        num_cells=numbers, **parts,
    )  # fmt: skip
    write_record(
        folder, "evaluation", **SCORES, part="test", num_cells=numbers["test"], label_names=["alpha", "beta"],
        checkpoint={"name": "/home/me/runs/secret", "weights_sha256": hash_weights(folder)},
        corpus={"name": "/home/me/secret/corpus"},
    )  # fmt: skip


def run(*words):
    return CliRunner().invoke(app, list(map(str, words)))


def change_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({name: one * 1.5 for name, one in load_file(path).items()}, path, metadata={"format": "pt"})


def test_the_sum_of_one_file_is_its_own_and_that_of_several_is_of_all(tmp_path):
    write_checkpoint(tmp_path / "one")
    write_checkpoint(tmp_path / "several", max_shard_size="2KB")
    weights = (tmp_path / "one" / "model.safetensors").read_bytes()
    assert hash_weights(tmp_path / "one") == hashlib.sha256(weights).hexdigest()
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    before = hash_weights(tmp_path / "several")
    (tmp_path / "several" / "unrelated.safetensors").write_bytes(b"")
    assert before == hash_weights(tmp_path / "several")
    last = tmp_path / "several" / max(index["weight_map"].values())
    save_file({name: one + 1 for name, one in load_file(last).items()}, last, metadata={"format": "pt"})
    assert hash_weights(tmp_path / "several") not in {before, None}
    assert hash_weights(tmp_path / "nowhere") is None


@pytest.mark.parametrize("name", ["../one/model.safetensors", "model.bin", "model-1.safetensors"])
def test_weights_that_are_not_beside_their_index_are_refused(tmp_path, name):
    write_record(tmp_path, "model.safetensors.index", weight_map={"weight": name})
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"index\.json names .*, which is no safetensors file beside it"):
        hash_weights(tmp_path)
    write_record(tmp_path, "model.safetensors.index")
    with pytest.raises(ValueError, match=r"index\.json has no weight_map"):
        hash_weights(tmp_path)


@pytest.mark.parametrize("record", ["evaluation", "distillation"])
def test_scores_of_other_weights_are_refused_and_found_in_what_was_published(folder, tmp_path, record):
    models = {"student": {"weights_sha256": hash_weights(folder)}}
    write_record(folder, "distillation", models=models)
    stage_checkpoint(folder, tmp_path / "out", allow_holes=True)
    assert problems_of_files(tmp_path / "out") == []
    own = json.loads((folder / f"{record}.json").read_text())
    changed = json.loads(json.dumps(own).replace(hash_weights(folder), "0" * 64))
    for place in (folder, tmp_path / "out"):
        (place / f"{record}.json").write_text(json.dumps(changed))
    words = rf"{record}\.json is of other weights: their sha256 is 000000000000, those that are here have"
    with pytest.raises(ValueError, match=rf"{words} .*; evaluate again: screformer evaluate"):
        stage_checkpoint(folder, tmp_path / "again", allow_holes=True)
    assert any(f"{record}.json is of other weights" in problem for problem in problems_of_files(tmp_path / "out"))


def test_scores_that_do_not_say_of_which_weights_are_taken_as_they_are(folder, tmp_path):
    change_record(folder / "evaluation.json", checkpoint={"name": "by hand"})
    stage_checkpoint(folder, tmp_path / "out", allow_holes=True)
    assert problems_of_files(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"part": "validation"}, "evaluation.json is of the part 'validation', not 'test'"),
        ({"num_cells": 13}, "evaluation.json is of 13 cells, the test part of splits.json has 12"),
        ({"num_cells_above_classes": 2}, "evaluation.json is of 14 cells"),
    ],
)
def test_scores_of_other_cells_are_published_only_with_holes_and_stand_beside_no_regression(
    folder, tmp_path, changes, words
):
    change_record(folder / "evaluation.json", **changes)
    refused = run("publish", folder, "--to", tmp_path / "out")
    assert refused.exit_code == 1
    assert words in refused.output
    assert "so that they are no test; evaluate again: screformer evaluate" in refused.output
    stage_checkpoint(folder, tmp_path / "out", allow_holes=True)
    make_cells().write_h5ad(tmp_path / "cells.h5ad")
    counts = ("--counts", tmp_path / "cells.h5ad", "--allow-holes")
    refused = run("publish", folder, "--to", tmp_path / "other", *counts)
    assert refused.exit_code == 1
    assert words in refused.output


def test_cells_above_the_classes_of_a_label_tree_are_cells_of_the_test_part(folder, tmp_path):
    change_record(folder / "evaluation.json", num_cells=10, num_cells_above_classes=2)
    with pytest.raises(ValueError, match="the card of own does not know"):  # and nothing worse
        stage_checkpoint(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda other: change_record(other / "evaluation.json", part="all"), "is of the part 'all', not 'test'"),
        (change_weights, "evaluation.json is of other weights"),
    ],
)
def test_another_split_is_of_its_own_weights_and_test_cells(folder, tmp_path, spoil, words):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    write_split(other, "human3")
    spoil(other)
    refused = run("publish", folder, "--to", tmp_path / "out", "--other-split", other, "--allow-holes")
    assert refused.exit_code == 1
    assert str(other) in refused.output
    assert words in refused.output


def test_nothing_that_options_bring_into_the_card_tells_of_this_machine(folder, tmp_path):
    other, before = tmp_path / "other", tmp_path / "before"
    shutil.copytree(folder, other)
    write_split(other, "human3")
    write_checkpoint(before)
    write_record(before, "training", task="pretraining", training={"output_dir": "/home/me/secret/before"})
    write_record(before, "metrics", figures=["/home/me/secret/curves.png"])
    make_cells().write_h5ad(tmp_path / "cells.h5ad")
    done = run(
        *("publish", folder, "--to", tmp_path / "out", "--allow-holes", "--counts", tmp_path / "cells.h5ad"),
        *("--pretraining", before, "--other-split", other),
    )
    assert done.exit_code == 0, done.output
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["results"]["model"]["checkpoint"]["name"] == "secret"
    assert card["pretraining"]["training"]["training"]["output_dir"] == "before"
    assert "logistic_regression" in card["other_splits"][0]["results"]
    assert not [path.name for path in (tmp_path / "out").iterdir() if b"/home/me" in path.read_bytes()]


def test_a_run_that_starts_over_leaves_no_score_or_card_of_the_earlier_one(folder):
    stale = [
        "evaluation.json", "predictions.tsv", "confusion_matrix.png", "roc_curves.png", "reliability.png", "README.md",
        "card.json", "golden_cells.json", "golden_cells.safetensors", "checksums.json", "downstream.json",
        "distillation.json", "distillation.md", "distillation.png", "model.safetensors",
        "model.safetensors.index.json", "model-00001-of-00002.safetensors",
    ]  # fmt: skip
    for name in (*stale, "training.json", "notes.md"):
        (folder / name).write_text("{}")
    training = PretrainingArguments(output_dir=str(folder), overwrite=True, use_cpu=True)
    assert begin_run(training, {"state": "running"}) is None
    assert {path.name for path in folder.iterdir()} & {*stale, "notes.md"} == {"notes.md"}


def test_a_readme_beside_which_there_was_no_run_stays(tmp_path):
    (tmp_path / "README.md").write_text("My project")
    begin_run(PretrainingArguments(output_dir=str(tmp_path), overwrite=True, use_cpu=True), {"state": "running"})
    assert (tmp_path / "README.md").read_text() == "My project"
