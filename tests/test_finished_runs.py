"""A finished run is known by what it began with and by what chose its weights, and not by names alone."""

import json

import pytest
from small_teacher import make_teacher

from screformer.train.arguments import FineTuningArguments, FineTuningDataArguments, ModelArguments
from screformer.train.result_files import read_json, write_json
from screformer.train.training_run import begin_run, describe_run


def described(folder, *, checkpoint=None, gene2vec=None, label_tree=None, **options):
    training = FineTuningArguments(output_dir=str(folder), use_cpu=True, **options)
    model = ModelArguments(checkpoint=checkpoint, gene2vec=gene2vec)
    cells = FineTuningDataArguments(corpus="corpus", label_tree=label_tree)
    return training, describe_run("fine-tuning", training, {"num_cells": 3}, model=model, cells=cells)


def finish(folder, **options):
    _, record = described(folder, **options)
    write_json(folder / "training.json", {**record, "state": "finished"})
    write_json(folder / "metrics.json", {"accuracy": 1.0})


def begin(folder, **options):
    return begin_run(*described(folder, **options))


def test_other_weights_under_the_same_name_are_another_run(tmp_path):
    start = make_teacher(tmp_path / "start")
    finish(tmp_path / "run", checkpoint=start)
    assert begin(tmp_path / "run", checkpoint=start).metrics == {"accuracy": 1.0}
    make_teacher(tmp_path / "start", seed=1)
    with pytest.raises(
        ValueError, match=r"other settings \(the content of checkpoint has changed since\).*--overwrite"
    ):
        begin(tmp_path / "run", checkpoint=start)


@pytest.mark.parametrize(("name", "prefix"), [("gene2vec", ""), ("label_tree", ""), ("label_tree", "cell_ontology:")])
def test_other_files_under_the_same_name_are_another_run(tmp_path, name, prefix):
    path = tmp_path / "file.txt"
    path.write_text("one")
    given = {name: f"{prefix}{path}"}
    finish(tmp_path / "run", **given)
    begin(tmp_path / "run", **given)
    path.write_text("two")
    with pytest.raises(ValueError, match=f"the content of {name} has changed since"):
        begin(tmp_path / "run", **given)
    path.unlink()  # a finished run does not need it
    begin(tmp_path / "run", **given)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("unknown_types", False, True),
        ("load_best_model_at_end", True, False),
        ("greater_is_better", True, False),
        ("eval_strategy", "epoch", "steps"),
        ("eval_steps", 10, 20),
    ],
)
def test_what_chooses_the_weights_or_lies_beside_them_is_compared(tmp_path, name, first, second):
    others = {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 40} if name == "eval_steps" else {}
    strategies = {"save_strategy": second, "save_steps": 0.02} if name == "eval_strategy" else {}
    finish(tmp_path, **{**others, name: first})
    begin(tmp_path, **{**others, name: first})
    with pytest.raises(ValueError, match=f"{name}: {first!r} -> {second!r}"):
        begin(tmp_path, **{**others, **strategies, name: second})


def test_evaluations_that_choose_nothing_may_be_others(tmp_path):
    nothing = {"load_best_model_at_end": False, "early_stopping_patience": 0}
    finish(tmp_path, eval_strategy="no", **nothing)
    begin(tmp_path, eval_strategy="epoch", **nothing)


def test_the_record_of_an_older_run_is_accepted(tmp_path):
    start = make_teacher(tmp_path / "start")
    finish(tmp_path / "run", checkpoint=start)
    record = read_json(tmp_path / "run/training.json")
    del record["content"], record["training"]["unknown_types"], record["training"]["greater_is_better"]
    (tmp_path / "run/training.json").write_text(json.dumps(record))
    assert begin(tmp_path / "run", checkpoint=start).metrics == {"accuracy": 1.0}
