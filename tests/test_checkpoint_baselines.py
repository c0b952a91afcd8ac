import json
import shutil

import anndata
import pytest
from typer.testing import CliRunner

from screformer.benchmarks.checkpoint_baselines import score_baselines
from screformer.cli import app

SEED = 2022  # the quickstart's


def test_baselines_are_those_of_the_quickstart(small_quickstart):
    checkpoint = small_quickstart / "checkpoint"
    names = json.loads((checkpoint / "evaluation.json").read_text())["label_names"]
    found = score_baselines(small_quickstart.parent / "cells.h5ad", checkpoint, names, seed=SEED)
    told = json.loads((small_quickstart / "metrics.json").read_text())
    for name in ("logistic_regression", "majority_class"):
        assert found[name]["accuracy"] == pytest.approx(told[name]["accuracy"])
        assert found[name]["macro_f1"] == pytest.approx(told[name]["macro_f1"])
    assert_pairs_are_those_of_the_predictions(checkpoint, found)


def assert_pairs_are_those_of_the_predictions(checkpoint, found):
    lines = (checkpoint / "predictions.tsv").read_text().splitlines()[1:]
    is_right = [line.split("\t")[1] == line.split("\t")[2] for line in lines]
    for row in found.values():
        pair = row["paired"]
        gap = pair["only_model_right"] - pair["only_baseline_right"]
        assert gap == sum(is_right) - round(row["accuracy"] * len(lines))
        assert 0 < pair["p_value"] <= 1
    assert found["majority_class"]["paired"]["only_model_right"] <= sum(is_right)


def test_cells_with_labels_above_the_classes_are_left_out(small_quickstart):
    checkpoint = small_quickstart / "checkpoint"
    found = score_baselines(small_quickstart.parent / "cells.h5ad", checkpoint, ["alpha", "ductal"], seed=SEED)
    assert {row["num_cells"] for row in found.values()} == {30}  # of 45, a third of which are beta cells
    assert set(found["logistic_regression"]["per_class"]) == {"alpha", "ductal"}


def test_a_file_that_lacks_cells_is_refused(small_quickstart, tmp_path):
    cells = anndata.read_h5ad(small_quickstart.parent / "cells.h5ad")
    cells[:50].copy().write_h5ad(tmp_path / "few.h5ad")
    with pytest.raises(
        ValueError, match=r"few\.h5ad lacks \d+ cells of splits\.json, such as '.*the file that the corpus"
    ):
        score_baselines(tmp_path / "few.h5ad", small_quickstart / "checkpoint", ["alpha"], seed=SEED)


def test_what_is_published_has_logistic_regression_beside_it(small_quickstart, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(small_quickstart / "checkpoint", checkpoint)
    (checkpoint / "card.json").unlink()  # as `screformer finetune` and `evaluate` leave it
    (checkpoint / "README.md").unlink()
    given = ["publish", str(checkpoint), "--to", str(tmp_path / "out"), "--data", "Islets|Doe et al.|somewhere|MIT"]
    given += ["--pretraining", str(small_quickstart / "pretrained")]
    without = CliRunner().invoke(app, given)
    assert without.exit_code == 1
    assert "the card of checkpoint does not know" in without.output
    assert "Logistic regression was not measured" in without.output
    done = CliRunner().invoke(app, [*given, "--counts", str(small_quickstart.parent / "cells.h5ad")])
    assert done.exit_code == 0, done.output
    card = (tmp_path / "out" / "README.md").read_text()
    told = json.loads((small_quickstart / "metrics.json").read_text())["logistic_regression"]
    assert f"| Logistic regression | {told['accuracy']:.3f} |" in card
    (checkpoint / "evaluation.json").unlink()
    nothing = CliRunner().invoke(app, [*given, "--counts", str(small_quickstart.parent / "cells.h5ad")])
    assert nothing.exit_code == 1
    assert "has no evaluation.json; make it first: screformer evaluate" in nothing.output
