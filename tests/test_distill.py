import json
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from seeing_trainer import StopAt
from small_corpus import TINY_MODEL, make_cells, make_corpus, make_tokenizer
from small_teacher import make_teacher
from transformers import AutoModelForSequenceClassification

from screformer.annotation import annotate, annotate_file
from screformer.model_cards.model_card import write_model_card
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.cell_hashes import read_index
from screformer.tokenization.corpus import open_corpus
from screformer.train import distill as distill_module
from screformer.train.arguments import FineTuningArguments, FineTuningDataArguments, ModelArguments
from screformer.train.cell_dataset import CellDataset
from screformer.train.corpus_columns import name_cells
from screformer.train.distill import distill, main
from screformer.train.distillation_arguments import (
    DistillationArguments,
    DistillationDataArguments,
    StudentArguments,
    TeacherArguments,
)
from screformer.train.evaluate import evaluate_checkpoint
from screformer.train.finetune import finetune
from screformer.train.inference import predict_logits
from screformer.train.seen_cells import add_cells_seen_by, record_seen_cells
from screformer.train.taught_cells import choose_taught_cells
from screformer.train.taught_dataset import TaughtCellCollator
from screformer.train.teacher_logits import TeacherLogits
from screformer.train.training_run import CellTrainer

SMALLER = [*TINY_MODEL, "intermediate_size=16"]
BY_DONOR = {"group_column": "donor", "test_groups": ["human4"]}
RUN = {
    "use_cpu": True,
    "disable_tqdm": True,
    "learning_rate": 1e-2,
    "early_stopping_patience": 0,
    # Four times a run: what takes time at this size is saving.
    **dict.fromkeys(("eval_strategy", "save_strategy"), "steps"),
    **dict.fromkeys(("eval_steps", "save_steps", "logging_steps"), 0.25),
}


def student_arguments(**overrides):
    return StudentArguments(**{"config_overrides": SMALLER, "gene_space": "expressed", **overrides})


def settings(output, **overrides):
    defaults = {"num_train_epochs": 12, "per_device_train_batch_size": 14, "learning_rate": 2e-2, "seed": 1}
    return DistillationArguments(output_dir=str(output), **{**RUN, **defaults, **overrides})


def read(folder, name):
    return json.loads((Path(folder) / name).read_text())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def teacher(corpus, tmp_path_factory):
    """Return the folder of a classifier that has learned the two types, in the full gene space."""
    training = FineTuningArguments(
        output_dir=str(tmp_path_factory.mktemp("teacher") / "finetuned"),
        num_train_epochs=16,
        gradient_accumulation_steps=1,
        **RUN,
    )
    model = ModelArguments(config_overrides=TINY_MODEL)
    result = finetune(model, FineTuningDataArguments(corpus=corpus, **BY_DONOR), training)
    assert result.metrics["validation_accuracy"] == 1
    return str(result.output_dir)


@pytest.fixture(scope="module")
def distilled(corpus, teacher, tmp_path_factory):
    """Return the result of one run whose student reads expressed genes only, with a twin that had no teacher."""
    output = tmp_path_factory.mktemp("run") / "distilled"
    teaching = TeacherArguments(teacher=teacher, compare_scratch=True)
    return distill(student_arguments(), DistillationDataArguments(corpus=corpus), teaching, settings(output))


@pytest.fixture
def no_figures(monkeypatch):
    """Leave out the pictures, half the time of a run at this size."""
    for place in (
        "labelled_cells.plot_proportions",
        "telemetry.plot_training_curves",
        "distillation_report.plot_bars",
    ):
        monkeypatch.setattr(f"screformer.train.{place}", lambda *_, **__: None)


def test_the_student_learns_the_types_and_has_the_teachers_labels(distilled, teacher):
    assert distilled.metrics["validation_accuracy"] == 1
    assert distilled.metrics["validation_agreement"] == 1
    model = AutoModelForSequenceClassification.from_pretrained(distilled.output_dir)
    assert isinstance(model, ScReformerForCellClassification)
    assert model.config.id2label == {0: "alpha", 1: "beta"}
    assert (model.config.intermediate_size, model.config.gene_space) == (16, "expressed")
    splits = [read(folder, "splits.json") for folder in (distilled.output_dir, teacher)]
    assert splits[0] == splits[1]


def test_of_a_teacher_without_validation_cells_some_training_cells_select(corpus, teacher, caplog):
    split = read(teacher, "splits.json")
    split["train"], split["validation"] = split["train"] + split["validation"], []
    data = DistillationDataArguments(corpus=corpus).with_split_of_teacher(split)
    with caplog.at_level("WARNING", logger="screformer"):
        found = choose_taught_cells(open_corpus(corpus), data, split, ["alpha", "beta"], teacher=teacher, seed=1)
    names = name_cells(open_corpus(corpus))[found.labelled.rows]
    train, validation, test = (set(names[part].tolist()) for part in found.labelled.split)
    assert len(validation) == round(0.2 * len(split["train"]))
    assert (train | validation, test) == (set(split["train"]), set(split["test"]))
    assert not train & validation
    assert "the teacher's split has no validation cells" in caplog.text


def test_the_output_is_a_checkpoint_like_any_other(distilled, corpus, tmp_path):
    evaluation = evaluate_checkpoint(distilled.output_dir, corpus, tmp_path / "evaluation", progress=False)
    assert (evaluation["part"], evaluation["num_cells"]) == ("test", 12)
    assert evaluation["accuracy"] > 0.9
    annotate_file(Path(corpus).parent / "cells.h5ad", distilled.output_dir, tmp_path / "annotated.h5ad")
    annotated = anndata.read_h5ad(tmp_path / "annotated.h5ad")
    assert (annotated.obs["screformer_cell_type"].astype(str) == annotated.obs["cell_type"].astype(str)).mean() > 0.9
    names = [path.name for path in distilled.output_dir.rglob("*")]
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]


def test_the_report_has_what_was_measured(distilled, corpus, teacher):
    report = read(distilled.output_dir, "distillation.json")
    assert list(report["models"]) == ["teacher", "student", "without teacher"]
    assert (report["part"], report["num_cells"], report["num_labelled_cells"]) == ("validation", 8, 8)
    cells = CellDataset(open_corpus(corpus))
    folders = {"teacher": teacher, "student": distilled.output_dir, "without teacher": None}
    folders["without teacher"] = distilled.output_dir / "without_teacher"
    row_of = {name: row for row, name in enumerate(open_corpus(corpus).dataset["cell_id"])}
    rows = [row_of[name] for name in read(teacher, "splits.json")["validation"]]
    answers = {}
    for name, folder in folders.items():
        model, facts = ScReformerForCellClassification.from_pretrained(folder), report["models"][name]
        assert facts["parameters"] == sum(weights.numel() for weights in model.parameters())
        assert facts["bytes"] == sum(tensor.nbytes for tensor in load_file(Path(folder) / "model.safetensors").values())
        answers[name] = predict_logits(model, cells, progress=False)[rows].argmax(axis=1)
        assert facts["accuracy"] == np.mean(answers[name] == np.array(rows) % 2)
        assert facts["agreement"] == np.mean(answers[name] == answers["teacher"])
        assert len(facts["seconds"]) == 3
        assert facts["cells_per_second"] == pytest.approx(8 / np.median(facts["seconds"]))
    student = report["models"]["student"]
    ratios = report["student_to_teacher"]
    assert ratios["parameters"] == student["parameters"] / report["models"]["teacher"]["parameters"] < 1
    assert min(ratios["speed_by_round"]) <= ratios["speed"] <= max(ratios["speed_by_round"])
    text = (distilled.output_dir / "distillation.md").read_text()
    assert f"| student | {student['accuracy']:.3f} |" in text
    assert (distilled.output_dir / "distillation.png").read_bytes().startswith(b"\x89PNG")


def test_the_card_says_from_what_it_was_distilled(distilled, teacher):
    card = write_model_card(distilled.output_dir).read_text()
    sha256 = read(distilled.output_dir, "training.json")["teacher"]["weights_sha256"]
    assert (
        f"It was distilled from finetuned ({ScReformerForCellClassification.from_pretrained(teacher).num_parameters()}"
        in card
    )
    assert f"SHA-256 of its weights {sha256}" in card
    assert "a share of 0.5 was the divergence from the teacher's probabilities at temperature 2" in card
    assert "| Student | 1.000 | 1.000 | 1.000 |" in card
    assert "There was no pretraining" in card
    assert "It imitates another model" in card
    assert teacher not in card  # a path of this machine


def test_what_the_teacher_had_seen_the_student_has_seen(distilled, corpus, teacher, tmp_path, caplog):
    opened = open_corpus(corpus)
    vocabulary = opened.tokenizer().gene_vocabulary
    facts = read(distilled.output_dir, "seen_cells.json")
    assert (facts["num_cells"], facts["is_complete"]) == (36, True)
    record_seen_cells(tmp_path, opened, np.arange(44, 48), checkpoint=None)
    add_cells_seen_by(teacher, tmp_path, opened)
    expected = np.union1d(opened.cell_hashes[44:], read_index(teacher, vocabulary))
    assert read_index(tmp_path, vocabulary).tolist() == expected.tolist()
    assert read(tmp_path, "seen_cells.json")["is_complete"] is True
    add_cells_seen_by(str(tmp_path / "nobody"), tmp_path, opened)
    assert "nobody does not say which cells it has seen" in caplog.text
    assert read(tmp_path, "seen_cells.json")["is_complete"] is False


def cells_as_text(batch):
    """Return each cell's genes and bins; the same in any batch."""
    rows = zip(batch["gene_ids"].tolist(), batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
    return [str([(gene, token) for gene, token, real in zip(*row, strict=True) if real]) for row in rows]


@pytest.mark.usefixtures("no_figures")
def test_test_cells_are_seen_by_nobody(corpus, teacher, tmp_path, monkeypatch):
    seen, asked = {"training": [], "validation": []}, []

    class SeeingTrainer(CellTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen["training"] += cells_as_text(inputs)
            return super().training_step(model, inputs, *args, **kwargs)

        def prediction_step(self, model, inputs, *args, **kwargs):
            seen["validation"] += cells_as_text(inputs)
            return super().prediction_step(model, inputs, *args, **kwargs)

    monkeypatch.setattr(distill_module, "CellTrainer", SeeingTrainer)
    fill = TeacherLogits.fill
    monkeypatch.setattr(
        TeacherLogits, "fill", lambda self, *a, **b: asked.extend(self.rows.tolist()) or fill(self, *a, **b)
    )
    data = DistillationDataArguments(corpus=corpus)
    distill(
        student_arguments(), data, TeacherArguments(teacher=teacher), settings(tmp_path / "run", num_train_epochs=2)
    )
    opened = open_corpus(corpus)
    splits, rows = read(teacher, "splits.json"), CellDataset(opened)
    row_of = {name: row for row, name in enumerate(opened.dataset["cell_id"])}
    collator = TaughtCellCollator.from_config(
        ScReformerForCellClassification.from_pretrained(teacher).config, gene_space="expressed"
    )
    text_of = {}
    for part in ("train", "validation", "test"):
        cells = rows.__getitems__([row_of[name] for name in splits[part]])
        text_of[part] = set(cells_as_text(super(TaughtCellCollator, collator).__call__(cells)))
    assert set(seen["training"]) == text_of["train"]
    assert len(seen["training"]) == 2 * 28
    assert set(seen["validation"]) == text_of["validation"]
    assert sorted(asked) == sorted(row_of[name] for part in ("train", "validation") for name in splits[part])
    assert not text_of["test"] & (text_of["train"] | text_of["validation"])


@pytest.mark.usefixtures("no_figures")
def test_test_cells_have_no_influence_on_the_student(corpus, teacher, tmp_path):
    # The same cells, but those of the test donor measured anew: the weights must be the same to the last bit.
    cells, others = make_cells(), make_cells(seed=9)
    is_test = (cells.obs["donor"] == "human4").to_numpy()
    cells.X = np.where(is_test[:, None], others.X.toarray(), cells.X.toarray())
    changed = make_corpus(tmp_path, cells=cells)
    weights = []
    for number, folder in enumerate((corpus, changed)):
        data = DistillationDataArguments(corpus=folder)
        training = settings(tmp_path / f"run{number}", max_steps=3)
        result = distill(student_arguments(), data, TeacherArguments(teacher=teacher), training)
        weights.append((result.output_dir / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.usefixtures("no_figures")
def test_a_teacher_without_weight_is_plain_fine_tuning(corpus, teacher, tmp_path):
    shared = {**RUN, "num_train_epochs": 2, "per_device_train_batch_size": 5, "gradient_accumulation_steps": 3}
    model = {"config_overrides": [*SMALLER, "hidden_dropout_prob=0.1"], "preset": "tiny"}
    tuned = finetune(
        ModelArguments(**model),
        FineTuningDataArguments(corpus=corpus, **BY_DONOR),
        FineTuningArguments(output_dir=str(tmp_path / "finetuned"), **shared),
    )
    student = distill(
        StudentArguments(**model),
        DistillationDataArguments(corpus=corpus),
        TeacherArguments(teacher=teacher, teacher_weight=0.0),
        DistillationArguments(output_dir=str(tmp_path / "distilled"), **shared),
    )
    before, after = (load_file(result.output_dir / "model.safetensors") for result in (tuned, student))
    for name, tensor in before.items():
        # The same sums, taken in another order.
        assert torch.allclose(tensor, after[name], atol=1e-5), name
    for key in ("validation_loss", "training_loss"):
        assert student.metrics[key] == pytest.approx(tuned.metrics[key], rel=1e-5)


@pytest.mark.usefixtures("no_figures")
def test_a_killed_run_goes_on_and_the_teacher_is_not_asked_again(corpus, teacher, tmp_path, monkeypatch):
    data, teaching = DistillationDataArguments(corpus=corpus), TeacherArguments(teacher=teacher)
    unbroken = distill(student_arguments(), data, teaching, settings(tmp_path / "unbroken", num_train_epochs=3))
    stopping = settings(tmp_path / "broken", num_train_epochs=3)
    monkeypatch.setattr(distill_module, "early_stopping", lambda training: [StopAt(4)])
    with pytest.raises(KeyboardInterrupt):
        distill(student_arguments(), data, teaching, stopping)
    monkeypatch.undo()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "broken" / "teacher_logits").iterdir()}
    assert written
    resumed = distill(student_arguments(), data, teaching, settings(tmp_path / "broken", num_train_epochs=3))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "broken" / "teacher_logits").iterdir()} == written
    weights = [(result.output_dir / "model.safetensors").read_bytes() for result in (unbroken, resumed)]
    assert weights[0] == weights[1]
    assert (resumed.output_dir / "distillation.json").exists()


def test_a_finished_run_is_returned_and_other_settings_are_refused(distilled, corpus, teacher):
    data, teaching = DistillationDataArguments(corpus=corpus), TeacherArguments(teacher=teacher, compare_scratch=True)
    report = distilled.output_dir / "distillation.json"
    before = report.stat().st_mtime_ns
    assert distill(student_arguments(), data, teaching, settings(distilled.output_dir)) == distilled
    assert report.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"temperature: 2.0 -> 4.0"):
        distill(student_arguments(), data, replace(teaching, temperature=4.0), settings(distilled.output_dir))


@pytest.mark.usefixtures("no_figures")
def test_a_report_that_was_not_reached_is_made_up_for(corpus, teacher, tmp_path, monkeypatch):
    def run(**options):
        data = DistillationDataArguments(corpus=corpus)
        return distill(
            student_arguments(), data, TeacherArguments(teacher=teacher, **options), settings(tmp_path, max_steps=2)
        )

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(distill_module, "report_distillation", fail)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.undo()
    run()
    assert list(read(tmp_path, "distillation.json")["models"]) == ["teacher", "student"]
    run(compare_scratch=True)  # asked for afterwards
    assert list(read(tmp_path, "distillation.json")["models"]) == ["teacher", "student", "without teacher"]


@pytest.mark.usefixtures("no_figures")
def test_a_student_learns_from_a_teacher_on_cells_without_labels(corpus, teacher, tmp_path):
    # Other cells than the teacher's, and not one label among them.
    strangers = make_cells(num_cells=60, seed=5)
    strangers.obs_names = [f"stranger{number}" for number in range(60)]
    folder = make_corpus(tmp_path, cells=strangers, obs_columns=())
    result = distill(
        student_arguments(),
        DistillationDataArguments(corpus=folder, split="new", use_unlabelled=True, validation_fraction=0.3),
        TeacherArguments(teacher=teacher, teacher_weight=1.0),
        settings(tmp_path / "run"),
    )
    assert result.metrics["validation_agreement"] > 0.8  # chance is 0.5
    assert "validation_accuracy" not in result.metrics
    assert read(result.output_dir, "splits.json")["num_cells"] == {"train": 0, "validation": 0, "test": 0}
    assert len(read(result.output_dir, "splits.json")["unlabelled_train"]) == 42
    assert "Trained on 0 labelled cells and 42 without a label" in write_model_card(result.output_dir).read_text()
    evaluation = evaluate_checkpoint(result.output_dir, corpus, tmp_path / "out", part="all", progress=False)
    assert evaluation["accuracy"] > 0.8
    report = read(result.output_dir, "distillation.json")
    assert report["num_labelled_cells"] == 0
    assert "accuracy" not in report["models"]["student"]


def test_labels_are_needed_where_they_count(teacher, tmp_path):
    folder = make_corpus(tmp_path, obs_columns=())
    data = DistillationDataArguments(corpus=folder, split="new", use_unlabelled=True)
    with pytest.raises(ValueError, match=r"teacher_weight=0.5 and compare_scratch=False need labels, but no training"):
        distill(student_arguments(), data, TeacherArguments(teacher=teacher), settings(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_figures")
def test_a_student_can_start_from_a_checkpoint(corpus, teacher, tmp_path):
    start = make_teacher(tmp_path / "start", label_names=["x", "y", "z"])
    config = read(start, "config.json")
    config["calibration"] = {"temperatures": [0.3], "error_rates": [0.1], "thresholds": [0.9]}
    (Path(start) / "config.json").write_text(json.dumps(config))
    result = distill(
        StudentArguments(checkpoint=start),
        DistillationDataArguments(corpus=corpus),
        TeacherArguments(teacher=teacher),
        settings(tmp_path / "run", max_steps=1, learning_rate=0.0),
    )
    before, after = load_file(Path(start) / "model.safetensors"), load_file(result.output_dir / "model.safetensors")
    encoder = [name for name in before if name.startswith("screformer.")]
    assert encoder
    assert all(torch.equal(before[name], after[name]) for name in encoder)
    config = read(result.output_dir, "config.json")
    assert config["id2label"] == {"0": "alpha", "1": "beta"}
    assert config["calibration"] is None  # the start's is of other labels and weights


@pytest.mark.usefixtures("no_figures")
def test_a_student_has_the_label_tree_of_its_teacher(corpus, tmp_path):
    teacher = make_teacher(tmp_path / "teacher")
    config = read(teacher, "config.json")
    parents = {"islet": None, "alpha": "islet", "beta": "islet"}
    (tmp_path / "teacher/config.json").write_text(json.dumps({**config, "label_parents": parents}))
    result = distill(
        student_arguments(),
        DistillationDataArguments(corpus=corpus, split="new"),
        TeacherArguments(teacher=teacher),
        settings(tmp_path / "run", max_steps=1, learning_rate=0.0),
    )
    assert read(result.output_dir, "config.json")["label_parents"] == parents
    adata = annotate(make_cells(), result.output_dir, copy=True, progress=False)
    assert set(adata.obs["screformer_level_1"]) == {"islet"}


def test_refuses_a_teacher_without_split_or_with_another_tokenizer(corpus, tmp_path):
    data, output = DistillationDataArguments(corpus=corpus), settings(tmp_path / "run")
    bare = make_teacher(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"teacher '.*bare' has no splits.json beside it"):
        distill(student_arguments(), data, TeacherArguments(teacher=bare), output)
    foreign = make_teacher(tmp_path / "foreign", num_bins=8)
    assert make_tokenizer(8).fingerprint != make_tokenizer().fingerprint
    with pytest.raises(ValueError, match=r"was trained with tokenizer .*, but the corpus was made with"):
        distill(student_arguments(), replace(data, split="new"), TeacherArguments(teacher=foreign), output)
    stranger = make_teacher(tmp_path / "stranger", label_names=["alpha", "mast"])
    with pytest.raises(ValueError, match=r"have the labels \['beta'\], which teacher .* does not know"):
        distill(student_arguments(), replace(data, split="new"), TeacherArguments(teacher=stranger), output)
    assert not (tmp_path / "run").exists()


def test_command_line_distills(corpus, teacher, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"teacher: {teacher}\ncorpus: {corpus}\nmax_steps: 1\nuse_cpu: true\ndisable_tqdm: true\n"
        f"output_dir: {tmp_path / 'run'}\nconfig_overrides: {json.dumps(SMALLER)}\n"
    )
    main([str(tmp_path / "run.yaml"), "--temperature", "4", "--teacher_gene_space", "expressed", "--compare_scratch"])
    record = read(tmp_path / "run", "training.json")
    assert record["teacher"]["temperature"] == 4
    assert record["teacher"]["gene_space"] == "expressed"
    assert read(tmp_path / "run", "distillation.json")["models"]["teacher"]["gene_space"] == "expressed"


def test_command_line_ends_with_a_message(corpus, tmp_path):
    bare = make_teacher(tmp_path / "bare")
    with pytest.raises(SystemExit, match=r"error: split='teacher': teacher .* has no splits.json"):
        main(["--teacher", bare, "--corpus", corpus, "--output_dir", str(tmp_path / "run"), "--use_cpu"])
