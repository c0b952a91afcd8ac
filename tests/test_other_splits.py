"""A card beside whose own split others stand: what they say together, and runs that cannot be compared."""

import json
import shutil

import pytest
from test_model_card import other_split
from typer.testing import CliRunner

from screformer.cli import app
from screformer.model_cards.checkpoint_records import Checkpoint
from screformer.model_cards.other_splits import (
    check_splits,
    headline_of_splits,
    other_splits_paragraphs,
    record_of_split,
    split_config,
)
from screformer.model_cards.verify import check_files
from screformer.train.evaluate import evaluate_checkpoint
from screformer.train.finetune import finetune
from screformer.train.quickstart import _fine_tuning

SPLITS = {"group_column": "donor", "test_groups": ["d2"], "label_column": "cell_type"}
OWN = Checkpoint.of_records(training={"training": {"seed": 2022}}, metrics={})._replace(splits=SPLITS)
RESULTS = other_split("d2", 0.01)["results"]


def test_wins_and_losses_of_all_splits_are_counted():
    others = [other_split("d1", -0.03), other_split("d3", -0.02), other_split("d4", 0.0002)]
    told = headline_of_splits(RESULTS, OWN, others)
    assert told == (
        "Split by donor (4): macro-F1 0.890 (SD 0.018), logistic regression 0.900 (SD 0.000): the model is higher on "
        "1, lower on 2, -1.0 points on average."
    )


def test_without_a_regression_on_every_split_no_advantage_is_claimed():
    other = other_split("d1", 0.05)
    del other["results"]["logistic_regression"]
    assert headline_of_splits(RESULTS, OWN, [other]) is None
    text = "\n".join(other_splits_paragraphs(RESULTS, OWN, [other]))
    assert "logistic regression was not measured on all of them" in text
    assert "Accuracy, logistic regression" not in text


def test_cells_that_pretraining_has_read_are_counted_and_those_of_no_record_are_not():
    other = other_split("d1", 0.05)
    del other["results"]["model"]["seen_cells"]
    text = other_splits_paragraphs(RESULTS, OWN, [other, other_split(None, 0.05, seen=1100)])[2]
    assert "| donor: d1 | 1200 | 0.950 | 0.900 | 0.950 | 0.900 | - |" in text
    assert "| random | 1200 | 0.950 | 0.900 | 0.950 | 0.900 | 1100 |" in text


def test_one_split_alone_has_no_section():
    assert other_splits_paragraphs(RESULTS, OWN, []) == []
    assert headline_of_splits(RESULTS, OWN, []) is None
    assert split_config({}) is None


@pytest.mark.parametrize("others", [[other_split("d2", 0.1)], [other_split("d1", 0.1), other_split("d1", 0.2)]])
def test_a_split_that_is_given_twice_is_refused(others):
    with pytest.raises(
        ValueError, match=r"other_split: donor: d[12], seed 2022, is given twice, or is the checkpoint's"
    ):
        check_splits(others, OWN)


def test_another_seed_of_the_same_split_may_stand_beside_it():
    check_splits([{**other_split("d2", 0.1), "seed": 7}], OWN)


@pytest.fixture(scope="module")
def two_splits(small_quickstart, tmp_path_factory):
    """The quickstart's checkpoint, and the same settings on another donor, whose cells its pretraining has read."""
    place = tmp_path_factory.mktemp("splits")
    shutil.copytree(small_quickstart / "checkpoint", place / "checkpoint")
    for name in ("card.json", "README.md"):
        (place / "checkpoint" / name).unlink()
    model, cells, training, classifier = _fine_tuning(small_quickstart, "human3", 2)
    training.output_dir = str(place / "other")
    other = finetune(model, cells, training, classifier).output_dir
    evaluate_checkpoint(other, small_quickstart / "corpus", other, progress=False)
    return place


def publish(place, quickstart, *more):
    return CliRunner().invoke(
        app,
        [
            *("publish", str(place / "checkpoint"), "--to", str(place / "published")),
            *("--data", "Islets|Doe et al.|somewhere|MIT", "--pretraining", str(quickstart / "pretrained")),
            *("--counts", str(quickstart.parent / "cells.h5ad"), "--other-split", str(place / "other"), *more),
        ],
    )


def test_publish_gives_scores_on_other_splits_and_verify_compares_them(two_splits, small_quickstart):
    done = publish(two_splits, small_quickstart)
    assert done.exit_code == 0, done.output
    folder = two_splits / "published"
    card = (folder / "README.md").read_text()
    own, other = (json.loads((two_splits / name / "evaluation.json").read_text()) for name in ("checkpoint", "other"))
    # The pretraining left out human4 alone, but for the cells it held out itself.
    assert own["seen_cells"] == {"num_seen": 0, "num_cells": 45, "is_complete": True}
    assert 0 < other["seen_cells"]["num_seen"] <= 45
    assert "None of the test cells was read" in card
    assert "| cells.h5ad | h5ad | human | 180 | 180 | X | 20,125 | symbol, var_names |" in card
    assert f"| donor: human3 | 45 | {other['accuracy']:.3f} |" in card
    assert f" | {other['seen_cells']['num_seen']} |\n\n- Split by donor (2): macro-F1" in card
    assert [problem for check in check_files(folder) for problem in check.problems] == []
    kept = json.loads((folder / "card.json").read_text())
    kept["other_splits"][0]["results"]["model"]["accuracy"] = 0.9999
    (folder / "card.json").write_text(json.dumps(kept))
    found = [problem for check in check_files(folder) for problem in check.problems]
    assert any("README.md gives Accuracy, held-out donor: human3" in problem for problem in found), found


@pytest.mark.parametrize(
    ("part", "name", "value", "words"),
    [
        ("training", "learning_rate", 0.5, r"learning_rate 0\.5, not 1e-05; a card compares splits"),
        ("training", "lr_scheduler_type", "cosine", "lr_scheduler_type 'cosine', not 'linear'"),
        ("classifier", "linear_start", "zeros", "linear_start 'zeros', not 'principal_components'"),
        ("cells", "cells_per_label", 5, "cells_per_label 5, not None"),
        ("model", "lora_rank", 8, "lora_rank 8, not None"),
        ("model", "checkpoint", None, "started from a checkpoint False, not True"),
    ],
)
def test_a_run_of_other_settings_is_refused(part, name, value, words, two_splits, tmp_path):
    folder = tmp_path / "slow"
    shutil.copytree(two_splits / "other", folder)
    record = json.loads((folder / "training.json").read_text())
    record_of_split(folder, two_splits / "checkpoint", RESULTS)
    record[part][name] = value
    (folder / "training.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"slow was trained with {words}"):
        record_of_split(folder, two_splits / "checkpoint", RESULTS)
    (folder / "splits.json").unlink()
    with pytest.raises(ValueError, match=r"slow has no splits\.json; give the folder that fine-tuning wrote"):
        record_of_split(folder, two_splits / "checkpoint", RESULTS)
