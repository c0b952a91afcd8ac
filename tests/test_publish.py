"""A checkpoint is staged, verified, uploaded and found damaged: ten planted faults, each named."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file
from small_corpus import make_tokenizer
from typer.testing import CliRunner

from screformer import ScReformerConfig, ScReformerForCellClassification, ScReformerForMaskedLM, ScReformerModel
from screformer.cli import app
from screformer.model_cards import publish
from screformer.model_cards.golden_cells import check_golden_cells
from screformer.model_cards.model_card import write_model_card
from screformer.model_cards.publish import hub_name, is_repo_id, stage_checkpoint, without_places
from screformer.model_cards.verify import check_files, verify_checkpoint


def problems_of_files(folder):
    return [problem for check in check_files(folder) for problem in check.problems]


def problems(folder):
    return [problem for check in verify_checkpoint(folder) for problem in check.problems]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A classifier with the records of a training, some of them with places of this machine."""
    folder = tmp_path_factory.mktemp("publish") / "checkpoint"
    config = ScReformerConfig.preset(
        "tiny", num_genes=40, hidden_size=8, intermediate_size=16, num_hidden_layers=1, classifier_hidden_sizes=[16, 8],
        bucket_size=8, id2label={0: "alpha", 1: "beta"}, tokenizer_fingerprint=make_tokenizer().fingerprint,
    )  # fmt: skip
    ScReformerForCellClassification(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    row = {"accuracy": 0.9, "macro_f1": 0.8, "balanced_accuracy": 0.85}
    (folder / "evaluation.json").write_text(json.dumps(row | {"checkpoint": "/home/me/secret/checkpoint"}))
    (folder / "predictions.tsv").write_text("cell\tlabel\n")
    write_model_card(folder, model_name="tiny")
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


def test_a_checkpoint_with_a_pickle_is_refused(checkpoint, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    (folder / "optimizer.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"has pickles, which can run any code: optimizer\.pt; remove them"):
        stage_checkpoint(folder, tmp_path / "out", allow_holes=True)


@pytest.fixture
def without_golden_outputs(monkeypatch):
    """No golden cells, which take a process of their own."""
    monkeypatch.setattr(publish, "write_golden_cells", lambda _: None)


def test_another_licence_needs_its_text(checkpoint, tmp_path, without_golden_outputs):
    with pytest.raises(ValueError, match="licence got 'mit', of which this package has no text"):
        stage_checkpoint(checkpoint, tmp_path / "out", card={"licence": "mit"}, allow_holes=True)
    (tmp_path / "MIT").write_text("Permission is granted\n")
    stage_checkpoint(
        checkpoint, tmp_path / "out", card={"licence": "mit"}, allow_holes=True, licence_file=tmp_path / "MIT"
    )
    assert (tmp_path / "out" / "LICENSE").read_text() == "Permission is granted\n"
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()


def test_a_card_written_by_hand_stays(checkpoint, tmp_path, without_golden_outputs):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    (folder / "card.json").unlink()
    text = (folder / "README.md").read_text() + "\nA word of mine.\n"
    (folder / "README.md").write_text(text)
    stage_checkpoint(folder, tmp_path / "out", allow_holes=True)
    assert (tmp_path / "out" / "README.md").read_text() == text
    assert problems_of_files(tmp_path / "out") == []


def test_the_code_is_that_of_this_release(checkpoint, staged, tmp_path, without_golden_outputs):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    (folder / "reversible.py").write_text("# of an earlier release\n")
    (folder / "helper.py").write_text("x = 1\n")
    stage_checkpoint(folder, tmp_path / "out", allow_holes=True)
    code = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.py")}
    assert code == {path.name: path.read_bytes() for path in checkpoint.glob("*.py")}


def test_places_are_left_out_of_records():
    given = {"a": ["/home/me/cells.h5ad", "runs/one", "C:\\data\\x.h5ad", 3, None], "b": {"c": "/"}}
    assert without_places(given) == {"a": ["cells.h5ad", "runs/one", "x.h5ad", 3, None], "b": {"c": ""}}


def append(path, text):
    path.write_text(path.read_text() + text)


def change_json(path, **values):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **values}))


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
        lambda folder: change_json(folder / "tokenizer_config.json", num_bins=9),
        "the tokenizer has 9 bins, the model 6",
    ),
    "genes": (
        lambda folder: change_json(folder / "config.json", num_genes=41),
        "genes.json has 40 genes, config.json says 41",
    ),
    "another tokenizer": (
        lambda folder: change_json(folder / "tokenizer_config.json", target_sum=1_000),
        "the model was trained with",
    ),
    "genes in another order": (swap_genes, "genes.json:"),
    "no golden cells": (lambda folder: (folder / "golden_cells.safetensors").unlink(), "nothing shows that it works"),
}  # fmt: skip


FAULTS_OF_OUTPUTS = {"weights that give other outputs", "no golden cells"}  # to see the first takes a process


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(fault, staged, tmp_path):
    plant, words = FAULTS[fault]
    folder = tmp_path / "staged"
    shutil.copytree(staged, folder)
    plant(folder)
    found = problems(folder) if fault in FAULTS_OF_OUTPUTS else problems_of_files(folder)
    assert any(words in problem for problem in found), found


def test_code_that_is_not_ours_is_not_run_unless_it_is_trusted(staged, tmp_path):
    folder = tmp_path / "staged"
    shutil.copytree(staged, folder)
    with (folder / "modeling_screformer.py").open("a") as file:
        file.write(f"\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n")
    assert any("it was not tried" in problem for problem in problems(folder))
    assert not (tmp_path / "ran").exists()
    verify_checkpoint(folder, trust_code=True)
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
    assert proved.output.count("ok   ") == 6
    assert all(one["problems"] == [] for one in json.loads((tmp_path / "found.json").read_text()))
    (tmp_path / "out" / "genes.json").unlink()
    found = runner.invoke(app, ["verify", "out"])
    assert found.exit_code == 1
    assert "FAIL its files are those that were published\n       genes.json is missing" in found.output
    nowhere = runner.invoke(app, ["verify", "nowhere"])
    assert nowhere.exit_code == 1
    assert "nowhere" in nowhere.output
