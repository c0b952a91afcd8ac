"""Calibrating a checkpoint on labelled cells that it was not trained on."""

import json

import pytest
from small_corpus import TINY_MODEL, make_cells, make_corpus
from typer.testing import CliRunner

from screformer.annotation import annotate, calibrate_checkpoint
from screformer.cli import app
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.overlap import find_seen_cells
from screformer.train.arguments import FineTuningArguments, FineTuningDataArguments, ModelArguments
from screformer.train.evaluate import evaluate_checkpoint
from screformer.train.finetune import finetune


@pytest.fixture
def checkpoint(tmp_path):
    """Trained on all of 48 cells: nothing calibrates it."""
    training = FineTuningArguments(
        output_dir=str(tmp_path / "model"),
        use_cpu=True,
        disable_tqdm=True,
        num_train_epochs=5,
        gradient_accumulation_steps=1,
        learning_rate=1e-2,
        eval_strategy="no",
        load_best_model_at_end=False,
    )
    data = FineTuningDataArguments(corpus=make_corpus(tmp_path), validation_fraction=0.0, test_fraction=0.0)
    return finetune(ModelArguments(config_overrides=TINY_MODEL), data, training).output_dir


def test_new_cells_calibrate_and_seen_ones_do_not(checkpoint, tmp_path, caplog):
    assert ScReformerForCellClassification.from_pretrained(checkpoint).config.calibration is None
    new = make_cells(num_cells=60, seed=1)
    with pytest.raises(ValueError, match=r"label_column='cell_type': no cell of cells.h5ad is of use"):
        calibrate_checkpoint(tmp_path / "cells.h5ad", checkpoint, progress=False)
    assert "48 cells were seen in training and are left out" in caplog.text
    new.obs["kind"] = new.obs["cell_type"].astype(object)
    new.obs.loc[new.obs_names[:5], "kind"] = "mystery"
    new.write_h5ad(tmp_path / "new.h5ad")
    before = json.loads((checkpoint / "config.json").read_text())
    record = calibrate_checkpoint(tmp_path / "new.h5ad", checkpoint, label_column="kind", progress=False)
    assert record["num_cells"] == 55
    assert record["fitted_to"] == "cells of new.h5ad"
    assert "5 cells have no label, or one that the model does not know: ['mystery']" in caplog.text
    after = json.loads((checkpoint / "config.json").read_text())
    assert after.pop("calibration") == {
        name: record[name] for name in ("temperatures", "error_rates", "thresholds", "classes")
    }
    before.pop("calibration")
    assert after == before
    assert json.loads((checkpoint / "calibration.json").read_text()) == record
    assert (checkpoint / "calibration.png").exists()
    adata = annotate(make_cells(seed=2), checkpoint, max_error=0.1, copy=True, progress=False)
    assert (adata.obs["screformer_best_guess"] == adata.obs["cell_type"]).mean() > 0.9


def test_cells_that_calibrate_are_known_as_seen_and_may_calibrate_again(checkpoint, tmp_path, caplog):
    names = make_cells(num_cells=60, seed=1).obs_names
    splits = json.loads((checkpoint / "splits.json").read_text())
    (checkpoint / "splits.json").write_text(json.dumps({**splits, "test": [f"cells.h5ad/{names[0]}", names[1]]}))
    make_cells(num_cells=60, seed=1).write_h5ad(tmp_path / "new.h5ad")
    first = calibrate_checkpoint(tmp_path / "new.h5ad", checkpoint, progress=False)
    assert "2 cells have the names of cells in the test part of" in caplog.text
    assert find_seen_cells(tmp_path / "new.h5ad", checkpoint).num_seen == 60
    assert find_seen_cells(tmp_path / "cells.h5ad", checkpoint).num_seen == 48
    facts = json.loads((checkpoint / "seen_cells.json").read_text())
    assert (facts["num_cells"], facts["calibration"]["num_cells"], facts["is_complete"]) == (108, 60, True)
    assert calibrate_checkpoint(tmp_path / "new.h5ad", checkpoint, progress=False)["levels"] == first["levels"]
    assert json.loads((checkpoint / "seen_cells.json").read_text()) == facts
    with pytest.raises(ValueError, match=r"no cell of cells.h5ad is of use"):
        calibrate_checkpoint(tmp_path / "cells.h5ad", checkpoint, progress=False)
    (tmp_path / "other").mkdir()
    corpus = make_corpus(tmp_path / "other", cells=make_cells(num_cells=60, seed=1))
    evaluation = evaluate_checkpoint(checkpoint, corpus, tmp_path / "out", part="all", progress=False)
    assert evaluation["seen_cells"]["num_seen"] == 60
    (checkpoint / "calibration_cells.npy").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"calibration_cells.npy is damaged"):
        calibrate_checkpoint(tmp_path / "new.h5ad", checkpoint, progress=False)


def test_where_no_index_is_none_is_begun(checkpoint, tmp_path, caplog):
    (checkpoint / "seen_cells.json").unlink()
    make_cells(num_cells=60, seed=1).write_h5ad(tmp_path / "new.h5ad")
    calibrate_checkpoint(tmp_path / "new.h5ad", checkpoint, progress=False)
    assert "does not say which cells it has seen; take care" in caplog.text
    assert not (checkpoint / "seen_cells.json").exists()


def test_the_command_line_calibrates(checkpoint, tmp_path):
    make_cells(num_cells=60, seed=1).write_h5ad(tmp_path / "new.h5ad")
    result = CliRunner().invoke(app, ["calibrate", str(tmp_path / "new.h5ad"), "--model", str(checkpoint)])
    assert result.exit_code == 0
    assert "level 1, 60 cells: calibration error" in result.output
    assert "calibrated on 60 cells; --max-error can be 0.0164 or more" in result.output


def test_what_is_no_folder_is_refused(tmp_path):
    make_cells().write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match="checkpoint: somewhere/model is no folder with a checkpoint; copy one"):
        calibrate_checkpoint(tmp_path / "cells.h5ad", "somewhere/model", progress=False)
