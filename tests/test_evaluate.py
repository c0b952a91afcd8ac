import csv
import json

import numpy as np
import pytest
from small_corpus import TINY_MODEL, make_cells, make_corpus

from screformer.configuration_screformer import ScReformerConfig
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.corpus import open_corpus
from screformer.train.arguments import FineTuningArguments, FineTuningDataArguments, ModelArguments
from screformer.train.evaluate import evaluate_checkpoint, main
from screformer.train.finetune import finetune
from screformer.train.metrics import classification_metrics


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def checkpoint(corpus, tmp_path_factory):
    training = FineTuningArguments(
        output_dir=str(tmp_path_factory.mktemp("run") / "finetuned"),
        use_cpu=True,
        disable_tqdm=True,
        num_train_epochs=10,
        gradient_accumulation_steps=1,
        learning_rate=1e-2,
        early_stopping_patience=0,
        metric_for_best_model="eval_loss",  # the accuracy is 1 long before the types are learned
    )
    data = FineTuningDataArguments(corpus=corpus, group_column="donor", test_groups=["human4"])
    return finetune(ModelArguments(config_overrides=TINY_MODEL), data, training).output_dir


def read_predictions(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_evaluation_is_of_the_test_cells_alone(checkpoint, corpus, tmp_path):
    evaluation = evaluate_checkpoint(checkpoint, corpus, tmp_path, progress=False)
    names = {path.name for path in tmp_path.iterdir()}
    figures = {"confusion_matrix.png", "roc_curves.png", "reliability.png"}
    assert names == {"evaluation.json", "predictions.tsv"} | figures
    assert json.loads((tmp_path / "evaluation.json").read_text()) == evaluation
    splits = json.loads((checkpoint / "splits.json").read_text())
    predictions = read_predictions(tmp_path / "predictions.tsv")
    assert [row["cell_id"] for row in predictions] == splits["test"]
    # Its types differ plainly, so an unseen donor is no harder.
    assert evaluation["accuracy"] == 1


def test_fine_tuning_calibrates_on_validation_cells_and_evaluation_says_what_it_is_worth(checkpoint, corpus, tmp_path):
    config = ScReformerConfig.from_pretrained(checkpoint)
    fitted = json.loads((checkpoint / "calibration.json").read_text())
    assert fitted["num_cells"] == len(json.loads((checkpoint / "splits.json").read_text())["validation"])
    assert {name: fitted[name] for name in config.calibration} == config.calibration
    assert (checkpoint / "calibration.png").exists()
    evaluation = evaluate_checkpoint(checkpoint, corpus, tmp_path, part="all", progress=False)
    (level,) = evaluation["calibration"]["levels"]
    assert level["num_cells"] == 48
    assert level["expected_calibration_error"] == pytest.approx(evaluation["expected_calibration_error"], abs=1e-6)
    assert [row["asked"] for row in evaluation["answers"]] == [0.01, 0.02, 0.05, 0.1]
    # Eight validation cells without an error vouch for one error in nine, and for no less.
    assert {row["threshold"] for row in evaluation["answers"]} == {None}


def test_probabilities_are_the_calibrated_ones(checkpoint, corpus, tmp_path):
    model = ScReformerForCellClassification.from_pretrained(checkpoint)
    model.config.calibration |= {"temperatures": [1e6]}
    model.save_pretrained(tmp_path / "flat")
    evaluate_checkpoint(tmp_path / "flat", corpus, tmp_path / "out", part="all", progress=False)
    assert {row["confidence"] for row in read_predictions(tmp_path / "out" / "predictions.tsv")} <= {
        f"0.50000{digit}" for digit in range(9)
    }


def test_evaluation_says_what_was_measured_on_what(checkpoint, corpus, tmp_path):
    evaluation = evaluate_checkpoint(checkpoint, corpus, tmp_path, progress=False)
    fingerprint = open_corpus(corpus).tokenizer().fingerprint
    assert evaluation["part"] == "test"
    assert (
        evaluation["checkpoint"]["tokenizer_fingerprint"]
        == evaluation["corpus"]["tokenizer_fingerprint"]
        == fingerprint
    )
    assert len(evaluation["checkpoint"]["weights_sha256"]) == 64
    assert evaluation["corpus"]["sources"][0]["name"] == "cells.h5ad"
    assert evaluation["date"].endswith("+00:00")
    assert "torch" in evaluation["versions"]


def test_numbers_follow_from_the_written_predictions(checkpoint, corpus, tmp_path):
    evaluation = evaluate_checkpoint(checkpoint, corpus, tmp_path, part="all", progress=False)
    rows = read_predictions(tmp_path / "predictions.tsv")
    assert len(rows) == 48
    probabilities = np.array([[float(row["probability_alpha"]), float(row["probability_beta"])] for row in rows])
    metrics = classification_metrics([int(row["label"] == "beta") for row in rows], probabilities, ["alpha", "beta"])
    assert {name: evaluation[name] for name in ("accuracy", "macro_f1", "confusion_matrix")} == {
        name: metrics[name] for name in ("accuracy", "macro_f1", "confusion_matrix")
    }
    assert all(
        row["predicted"] == ("alpha" if p[0] > p[1] else "beta") for row, p in zip(rows, probabilities, strict=True)
    )


def test_labels_that_the_model_does_not_know_count_as_errors(checkpoint, tmp_path, caplog):
    cells = make_cells()
    cells.obs["cell_type"] = np.where(cells.obs["donor"] == "human1", "mast", cells.obs["cell_type"])
    folder = make_corpus(tmp_path, cells=cells)
    evaluation = evaluate_checkpoint(checkpoint, folder, tmp_path / "out", part="all", progress=False)
    assert evaluation["unknown_labels"] == ["mast"]
    assert evaluation["accuracy"] <= 36 / 48
    assert "the model does not know these labels" in caplog.text


def test_cells_without_a_value_in_another_column_are_left_out_of_every_part(checkpoint, tmp_path, caplog):
    cells = make_cells()
    labels = cells.obs["cell_type"].astype(object)
    test = json.loads((checkpoint / "splits.json").read_text())["test"]
    labels.loc[test[:3]] = np.nan
    cells.obs["other"] = labels
    other = make_corpus(tmp_path, cells=cells, obs_columns=["cell_type", "donor", "other"])
    evaluation = evaluate_checkpoint(checkpoint, other, tmp_path / "out", label_column="other", progress=False)
    assert evaluation["num_cells"] == len(test) - 3
    assert evaluation["unknown_labels"] == []
    assert f"3 of {len(test)} cells have no label and are left out" in caplog.text


def test_a_checkpoint_without_splits_is_evaluated_on_all_cells_only(checkpoint, corpus, tmp_path):
    ScReformerForCellClassification.from_pretrained(checkpoint).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"splits: .* does not exist.*--part all"):
        evaluate_checkpoint(tmp_path / "bare", corpus, tmp_path / "out")
    named = evaluate_checkpoint(
        tmp_path / "bare", corpus, tmp_path / "out", splits=checkpoint / "splits.json", progress=False
    )
    assert named["num_cells"] == 12
    assert (
        evaluate_checkpoint(tmp_path / "bare", corpus, tmp_path / "out", part="all", progress=False)["num_cells"] == 48
    )


def test_refuses_an_unknown_part_and_another_corpus(checkpoint, corpus, tmp_path):
    with pytest.raises(ValueError, match="part must be 'train', 'validation', 'test' or 'all', got 'holdout'"):
        evaluate_checkpoint(checkpoint, corpus, tmp_path / "out", part="holdout")
    fewer = make_corpus(tmp_path, cells=make_cells(num_cells=20))
    with pytest.raises(ValueError, match=r"8 of 12 cells of part 'test' are not in the corpus, the first is 'cell22'"):
        evaluate_checkpoint(checkpoint, fewer, tmp_path / "out")


def test_refuses_a_part_without_cells(checkpoint, corpus, tmp_path):
    splits = json.loads((checkpoint / "splits.json").read_text())
    (tmp_path / "splits.json").write_text(json.dumps({**splits, "test": []}))
    with pytest.raises(ValueError, match="part 'test' has no labelled cell"):
        evaluate_checkpoint(checkpoint, corpus, tmp_path / "out", splits=tmp_path / "splits.json")


def test_refuses_a_corpus_of_another_tokenizer(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="Build the corpus again with the checkpoint's tokenizer"):
        evaluate_checkpoint(checkpoint, make_corpus(tmp_path, num_bins=8), tmp_path / "out")


def test_command_line_evaluates(checkpoint, corpus, tmp_path):
    main([str(checkpoint), corpus, "--output", str(tmp_path), "--part", "validation", "--device", "cpu"])
    assert json.loads((tmp_path / "evaluation.json").read_text())["num_cells"] == 8


def test_command_line_ends_with_a_message_where_something_is_wrong(checkpoint, corpus, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"error: label_column: the corpus .* has no column 'lineage'"):
        main([str(checkpoint), corpus, "--output", str(tmp_path), "--label_column", "lineage"])
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "python -m screformer.train.evaluate finetuned corpus --output evaluation" in capsys.readouterr().out
