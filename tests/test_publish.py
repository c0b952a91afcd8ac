"""A checkpoint is staged, verified, uploaded and found damaged: planted faults, each named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_checkpoint import change_record, problems_of_files, write_checkpoint_with_card, write_record
from small_corpus import make_tokenizer
from typer.testing import CliRunner

from screformer import ScReformerConfig, ScReformerForMaskedLM, ScReformerModel
from screformer.cli import app
from screformer.model_cards import golden_cells, publish
from screformer.model_cards.golden_cells import check_golden_cells, write_golden_cells
from screformer.model_cards.publish import _copy, hub_name, is_repo_id, stage_checkpoint, without_places
from screformer.model_cards.verify import verify_checkpoint


def problems(folder):
    return [problem for check in verify_checkpoint(folder) for problem in check.problems]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A classifier with the records of a training, some of them with places of this machine."""
    folder = tmp_path_factory.mktemp("publish") / "checkpoint"
    write_checkpoint_with_card(folder)
    return folder


@pytest.fixture(scope="module")
def staged(checkpoint) -> Path:
    target = checkpoint.with_name("staged")
    stage_checkpoint(checkpoint, target, card={"repo_id": "me/tiny"}, allow_holes=True)
    return target


def test_what_is_staged_verifies_and_holds_what_belongs_to_it(checkpoint, staged):
    names = {path.name for path in staged.iterdir()}
    assert {"README.md", "LICENSE", "checksums.json", "golden_cells.safetensors", "modeling_screformer.py"} <= names
    assert "predictions.tsv" not in names
    assert problems(staged) == []
    assert "Apache License" in (staged / "LICENSE").read_text()
    assert 'source = "me/tiny"' in (staged / "README.md").read_text()
    assert not any(b"/home/me" in path.read_bytes() for path in staged.iterdir())
    assert b"/home/me" in (checkpoint / "evaluation.json").read_bytes()  # which stays as it was
    assert not {"is_local", "local_files_only"} & json.loads((staged / "tokenizer_config.json").read_text()).keys()


def test_a_card_with_holes_is_refused_and_nothing_is_left(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"the card of checkpoint does not know \d+ things: .*--allow-holes"):
        stage_checkpoint(checkpoint, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(checkpoint, staged):
    with pytest.raises(FileExistsError, match="staged is there; choose another folder"):
        stage_checkpoint(checkpoint, staged, allow_holes=True)


@pytest.fixture
def without_golden_outputs(monkeypatch):
    """No golden cells, which take a process of their own."""
    monkeypatch.setattr(publish, "write_golden_cells", lambda _: None)


@pytest.fixture
def own(checkpoint, tmp_path, without_golden_outputs) -> Path:
    """A copy of the checkpoint, to be changed."""
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_checkpoint_with_a_pickle_is_refused_but_what_stays_behind_may_be_one(own, tmp_path):
    (own / "checkpoint-7").mkdir()
    (own / "checkpoint-7" / "optimizer.pt").write_bytes(b"PK\x03\x04")
    stage_checkpoint(own, tmp_path / "out", allow_holes=True)
    assert problems_of_files(tmp_path / "out") == []
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    shutil.copytree(own / "checkpoint-7", tmp_path / "out" / "checkpoint-7")
    found = problems_of_files(tmp_path / "out")
    assert "checkpoint-7/optimizer.pt was not published with it" in found
    assert any("checkpoint-7/optimizer.pt is a pickle" in problem for problem in found)
    (own / "optimizer.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"has pickles, which can run any code: optimizer\.pt; remove them"):
        stage_checkpoint(own, tmp_path / "again", allow_holes=True)


def test_a_folder_of_a_name_like_that_of_the_target_stays(own, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    stage_checkpoint(own, tmp_path / "out", allow_holes=True)
    assert (tmp_path / "out.partial" / "notes.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "out", "out.partial"}
    (tmp_path / "new").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_outputs_that_are_not_finite_are_refused(staged, tmp_path, monkeypatch):
    shutil.copytree(staged, tmp_path / "staged")
    outputs = load_file(staged / "golden_cells.safetensors")["outputs"]
    outputs[[2, 5], 0] = np.nan, np.inf
    monkeypatch.setattr(golden_cells, "_outputs_without_the_package", lambda _: outputs)
    with pytest.raises(ValueError, match="staged gives NaN or infinity for 2 of 8 cells: its training diverged, or"):
        write_golden_cells(tmp_path / "staged")


def test_a_student_is_published_with_how_it_agrees_with_its_teacher(own, tmp_path):
    teacher = {"name": "/home/me/teacher", "num_parameters": 10, "weights_sha256": "ab", "temperature": 2.0}
    write_record(own, "training", task="distillation", teacher=teacher | {"teacher_weight": 0.5})
    scores = {"accuracy": 0.5, "macro_f1": 0.5, "parameters": 10, "cells_per_second": 7.0}
    models = {"teacher": scores | {"agreement": 1.0}, "student": scores | {"agreement": 0.8125}}
    write_record(
        own, "distillation", models=models, num_cells=16, student_to_teacher={"speed": 2.0}, timing={"device": "cpu"}
    )
    (own / "distillation.md").write_text("A table.\n")
    stage_checkpoint(own, tmp_path / "out", allow_holes=True)
    assert "| Student | 0.500 | 0.500 | 0.812 | 10 | 7.0 |" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "distillation.md").exists()
    assert problems_of_files(tmp_path / "out") == []


def test_another_licence_needs_its_text(checkpoint, tmp_path, without_golden_outputs):
    with pytest.raises(ValueError, match="licence got 'mit', of which this package has no text"):
        stage_checkpoint(checkpoint, tmp_path / "out", card={"licence": "mit"}, allow_holes=True)
    (tmp_path / "MIT").write_text("Permission is granted\n")
    stage_checkpoint(
        checkpoint, tmp_path / "out", card={"licence": "mit"}, allow_holes=True, licence_file=tmp_path / "MIT"
    )
    assert (tmp_path / "out" / "LICENSE").read_text() == "Permission is granted\n"
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()


MINE = "# My cell types\n\nA word of mine.\n"


def give_card(folder, front_matter=""):
    (folder / "card.json").unlink(missing_ok=True)
    (folder / "README.md").write_text(f"---\n{front_matter}\n---\n{MINE}" if front_matter else MINE)


def metrics_of(**values):
    """Return the front matter of somebody's own card with metrics by their types."""
    metrics = "".join(f"\n    - type: {name}\n      value: {value}" for name, value in values.items())
    return (
        "license: apache-2.0\nmodel-index:\n- name: mine\n  results:\n  - task:\n      type: x\n    dataset:\n"
        f"      name: y\n      type: y\n    metrics:{metrics}"
    )


@pytest.mark.parametrize("front_matter", ["", "license: apache-2.0", metrics_of(accuracy=0.9), metrics_of(auroc=0.5)])
def test_a_card_written_by_hand_stays_and_gives_what_it_likes(own, tmp_path, front_matter):
    give_card(own, front_matter)
    change_record(own / "evaluation.json", accuracy=0.9012)
    text = (own / "README.md").read_text()
    stage_checkpoint(own, tmp_path / "out", allow_holes=True)
    assert (tmp_path / "out" / "README.md").read_text() == text
    assert problems_of_files(tmp_path / "out") == []


@pytest.mark.parametrize("value", [0.93, 0.9, 1])
def test_a_number_of_a_card_written_by_hand_must_be_what_was_measured(own, tmp_path, value):
    give_card(own, metrics_of(accuracy=value))
    change_record(own / "evaluation.json", accuracy=0.9149)
    with pytest.raises(ValueError, match=rf"README.md gives Accuracy as {value}, evaluation.json as 0.9149"):
        stage_checkpoint(own, tmp_path / "out", allow_holes=True)


def test_options_that_a_card_written_by_hand_has_no_place_for_are_refused(own, tmp_path):
    give_card(own)
    given = ["publish", str(own), "--to", str(tmp_path / "out"), "--allow-holes"]
    options = ["--data", "a|b|c|d", "--counts", "x.h5ad", "--pretraining", "p", "--other-split", "o", "--name", "n"]
    refused = CliRunner().invoke(app, [*given, *options])
    assert refused.exit_code == 1
    named = refused.output.removeprefix("error: ").partition(":")[0].split(", ")
    assert sorted(named) == sorted(option for option in options if option.startswith("--"))
    assert "was written by hand (there is no card.json), so that nothing is added to it" in refused.output
    with pytest.raises(ValueError, match=r"--name: README\.md of .* was written by hand"):
        stage_checkpoint(own, tmp_path / "out", card={"model_name": "n"}, allow_holes=True)


def test_the_licence_of_a_card_written_by_hand_is_its_own(own, tmp_path):
    give_card(own, "license: mit")
    (tmp_path / "MIT").write_text("Permission is granted\n")
    with pytest.raises(ValueError, match="licence got 'mit', of which this package has no text"):
        stage_checkpoint(own, tmp_path / "out", allow_holes=True)
    with pytest.raises(ValueError, match=r"licence got 'apache-2\.0', README\.md, which .* by hand, says 'mit'"):
        stage_checkpoint(own, tmp_path / "out", card={"licence": "apache-2.0"}, allow_holes=True)
    stage_checkpoint(own, tmp_path / "out", allow_holes=True, licence_file=tmp_path / "MIT")
    assert (tmp_path / "out" / "LICENSE").read_text() == "Permission is granted\n"


def test_the_code_is_that_of_this_release(checkpoint, staged, tmp_path, without_golden_outputs):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    (folder / "reversible.py").write_text("# of an earlier release\n")
    (folder / "helper.py").write_text("x = 1\n")
    stage_checkpoint(folder, tmp_path / "out", allow_holes=True)
    code = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.py")}
    assert code == {path.name: path.read_bytes() for path in checkpoint.glob("*.py")}


def test_places_are_left_out_of_records():
    given = {"a": ("/home/me/cells.h5ad", "runs/one", "C:\\data\\x.h5ad", 3, None), "b": {"c": "/"}}
    assert without_places(given) == {"a": ["cells.h5ad", "runs/one", "x.h5ad", 3, None], "b": {"c": ""}}


def test_cell_types_that_look_like_paths_keep_their_names(tmp_path):
    names = {"0": "CD4+/CD45RA+/CD25- Naive T", "1": "/T/NK"}
    config = {"id2label": names, "label2id": {name: int(key) for key, name in names.items()}, "auto_map": {}}
    (tmp_path / "config.json").write_text(json.dumps({**config, "_name_or_path": "/home/me/model"}))
    _copy(tmp_path / "config.json", tmp_path / "copy.json")
    kept = json.loads((tmp_path / "copy.json").read_text())
    assert (kept["id2label"], kept["label2id"]) == (config["id2label"], config["label2id"])
    assert kept["_name_or_path"] == "model"


def append(path, text):
    path.write_text(path.read_text() + text)


def halve(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def swap_genes(folder):
    content = json.loads((folder / "genes.json").read_text())
    name = next(key for key, value in content.items() if isinstance(value, list))
    content[name][:2] = content[name][1::-1]
    (folder / "genes.json").write_text(json.dumps(content))


def change_weights(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file({name: one * 1.5 for name, one in weights.items()}, path, metadata={"format": "pt"})


FAULTS = {
    "other weights": (change_weights, "model.safetensors is not the file that was published"),
    "weights that give other outputs": (change_weights, "outputs differ by"),
    "code": (
        lambda folder: append(folder / "reversible.py", "\n# changed\n"), "reversible.py is not that of this",
    ),
    "foreign code": (
        lambda folder: (folder / "helper.py").write_text("x = 1\n"), "helper.py is no file of this package",
    ),
    "pickle": (
        lambda folder: (folder / "pytorch_model.bin").write_bytes(b"\x80\x04abc"), "pytorch_model.bin is a pickle",
    ),
    "hidden pickle": (
        lambda folder: (folder / "notes.txt").write_bytes(b"\x80\x04abc"), "notes.txt is a pickle",
    ),
    "missing file": (lambda folder: (folder / "genes.json").unlink(), "genes.json is missing"),
    "number of the card": (
        lambda folder: (folder / "README.md").write_text((folder / "README.md").read_text().replace("0.9", "0.99", 1)),
        "README.md gives Accuracy as 0.99, evaluation.json as 0.9000",
    ),
    "bins": (
        lambda folder: change_record(folder / "tokenizer_config.json", num_bins=9),
        "the tokenizer has 9 bins, the model 6",
    ),
    "genes": (
        lambda folder: change_record(folder / "config.json", num_genes=41),
        "genes.json has 40 genes, config.json says 41",
    ),
    "another tokenizer": (
        lambda folder: change_record(folder / "tokenizer_config.json", target_sum=1_000),
        "the model was trained with",
    ),
    "genes in another order": (swap_genes, "genes.json:"),
    "half of the weights": (lambda folder: halve(folder / "model.safetensors"), "model.safetensors cannot be read ("),
    "half of the golden cells": (
        lambda folder: halve(folder / "golden_cells.safetensors"), "golden_cells.safetensors cannot be read (",
    ),
    **{
        f"half of {name}": (lambda folder, name=name: halve(folder / name), f"{name} is not JSON (")
        for name in ("config.json", "tokenizer_config.json", "evaluation.json", "card.json", "checksums.json")
    },
    "half of genes.json": (lambda folder: halve(folder / "genes.json"), "genes.json:"),
    "half of golden_cells.json": (
        lambda folder: halve(folder / "golden_cells.json"), "golden_cells.json is not JSON (",
    ),
    "a card of a later release": (
        lambda folder: change_record(folder / "card.json", poem="..."),
        "card.json has 'poem', which this release does not know; it is of a later one: update screformer",
    ),
    "a source of a later release": (
        lambda folder: change_record(folder / "card.json", data_sources=[{"name": "x", "colour": "red"}]),
        "card.json has 'colour', which this release does not know",
    ),
    "a metric that is text": (
        lambda folder: (folder / "README.md").write_text((folder / "README.md").read_text().replace("0.9", "high", 1)),
        "README.md gives Accuracy as 'high', which is no number",
    ),
    "a metric that is no number": (
        lambda folder: (folder / "README.md").write_text((folder / "README.md").read_text().replace("0.9", ".nan", 1)),
        "README.md gives Accuracy as nan, evaluation.json as 0.9000",
    ),
    "records of another shape": (lambda folder: (folder / "evaluation.json").write_text("[1]"), "a file is damaged: "),
    "no golden cells": (lambda folder: (folder / "golden_cells.safetensors").unlink(), "nothing shows that it works"),
}  # fmt: skip


# To see the first takes a process; the others are seen before there is one.
FAULTS_OF_OUTPUTS = {
    "weights that give other outputs", "no golden cells", "half of the golden cells", "half of golden_cells.json",
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(fault, staged, tmp_path):
    plant, words = FAULTS[fault]
    folder = tmp_path / "staged"
    shutil.copytree(staged, folder)
    plant(folder)
    found = problems(folder) if fault in FAULTS_OF_OUTPUTS else problems_of_files(folder)
    assert any(words in problem for problem in found), found


def test_what_is_damaged_hides_no_other_fault(staged, tmp_path):
    folder = tmp_path / "staged"
    shutil.copytree(staged, folder)
    for name in ("config.json", "genes.json", "evaluation.json", "card.json"):
        halve(folder / name)
    append(folder / "reversible.py", "\n# changed\n")
    (folder / "notes.txt").write_bytes(b"\x80\x04abc")
    checks = verify_checkpoint(folder)
    assert len(checks) == 7
    found = " ".join(problem for check in checks for problem in check.problems)
    for words in ("config.json is not the file that was published", "notes.txt is a pickle", "reversible.py is not"):
        assert words in found
    with pytest.raises(FileNotFoundError, match=r"has no config\.json; give the folder of a saved model"):
        verify_checkpoint(tmp_path)


def test_code_that_is_not_ours_is_not_run_unless_it_is_trusted(staged, tmp_path):
    folder = tmp_path / "staged"
    shutil.copytree(staged, folder)
    with (folder / "modeling_screformer.py").open("a") as file:
        file.write(f"\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n")
    # By which peft would take the weights from elsewhere.
    write_record(folder, "adapter_config", base_model_name_or_path=str(tmp_path / "elsewhere"), peft_type="LORA")
    assert any("it was not tried" in problem for problem in problems(folder))
    assert not (tmp_path / "ran").exists()
    assert verify_checkpoint(folder, trust_code=True)[-1].problems == []
    assert (tmp_path / "ran").exists()


def test_names_on_the_hub_are_told_from_folders(tmp_path, monkeypatch):
    assert is_repo_id("me/tiny-1.0")
    assert not any(map(is_repo_id, ("./tiny", "tiny", "/tmp/tiny", "a/b/c", "../tiny", "me/")))
    monkeypatch.chdir(tmp_path)
    assert hub_name("me/tiny") == hub_name("hf://me/tiny") == "me/tiny"
    assert hub_name("./me/tiny") is None
    (tmp_path / "me").mkdir()
    with pytest.raises(
        ValueError, match=r"to got 'me/tiny', which may be .* write \./me/tiny for the folder, hf://me/tiny"
    ):
        hub_name("me/tiny")


@pytest.mark.parametrize("kind", [ScReformerForMaskedLM, ScReformerModel])
def test_encoders_are_published_too(kind, tmp_path):
    config = ScReformerConfig.preset(
        "tiny", num_genes=40, hidden_size=8, intermediate_size=16, num_hidden_layers=1, bucket_size=8
    )
    kind(config).save_pretrained(tmp_path / "encoder")
    make_tokenizer().save_pretrained(tmp_path / "encoder")
    stage_checkpoint(tmp_path / "encoder", tmp_path / "out", allow_holes=True)
    outputs = load_file(tmp_path / "out" / "golden_cells.safetensors")["outputs"]
    assert outputs.shape[0] == 8
    assert check_golden_cells(tmp_path / "out") is None


def test_a_dry_run_shows_what_would_go_and_leaves_nothing(checkpoint, tmp_path, monkeypatch, without_golden_outputs):
    monkeypatch.chdir(tmp_path)
    runner, given = CliRunner(), ["publish", str(checkpoint), "--allow-holes"]
    shown = runner.invoke(app, [*given, "--to", "me/tiny", "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "model.safetensors" in shown.output
    assert "Nothing was published: --dry-run." in shown.output
    assert not list(tmp_path.iterdir())
    shown = runner.invoke(app, [*given, "--to", "./tiny/", "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert not list(tmp_path.iterdir())
    refused = runner.invoke(app, [*given, "--to", "./other", "--data", "Islets"])
    assert refused.exit_code == 1
    assert "--data got 'Islets'; four parts are needed" in refused.output


def test_the_command_lines(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner, given = CliRunner(), ["publish", str(checkpoint), "--allow-holes"]
    source = "Islets|Doe et al. 2020|https://example.org|CC BY 4.0"
    made = runner.invoke(app, [*given, "--to", "./out", "--data", source, "--name", "A tiny one"])
    assert made.exit_code == 0, made.output
    assert "out is ready, and verifies: screformer verify out" in made.output
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# A tiny one" in card
    assert "| Islets | Doe et al. 2020 | https://example.org | CC BY 4.0 |" in card
    proved = runner.invoke(app, ["verify", "out", "--json", "found.json"])
    assert proved.exit_code == 0, proved.output
    assert proved.output.count("ok   ") == 7
    assert all(one["problems"] == [] for one in json.loads((tmp_path / "found.json").read_text()))
    (tmp_path / "out" / "genes.json").unlink()
    found = runner.invoke(app, ["verify", "out"])
    assert found.exit_code == 1
    assert "FAIL its files are those that were published\n       genes.json is missing" in found.output
    nowhere = runner.invoke(app, ["verify", "nowhere"])
    assert nowhere.exit_code == 1
    assert "nowhere" in nowhere.output
