"""The folder for a Hugging Face Space is complete, and its program serves the model that it was written for."""

import runpy
from importlib.metadata import version

import pytest
import yaml
from packaging.requirements import Requirement
from small_corpus import NUM_GENES, TYPES, make_tokenizer
from typer.testing import CliRunner

from screformer.annotation import app
from screformer.annotation.app_space import write_space
from screformer.annotation.trained_model import load_classifier
from screformer.cli import app as command_line
from screformer.modeling_screformer import ScReformerForCellClassification


@pytest.fixture
def checkpoint(tiny_config, tmp_path):
    tokenizer = make_tokenizer()
    config = tiny_config(num_genes=NUM_GENES, tokenizer_fingerprint=tokenizer.fingerprint, num_labels=len(TYPES))
    ScReformerForCellClassification(config).save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "predictions.tsv").write_text("cells of patients")
    return tmp_path / "checkpoint"


@pytest.fixture
def served(monkeypatch):
    """Return what the Space's program asks to be served, instead of serving it."""
    calls = []
    monkeypatch.setattr(app, "serve", lambda model, **options: calls.append((model, options)))
    return calls


def front_matter(folder):
    _, text, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(text)


def test_the_space_of_a_folder_holds_the_model_and_serves_it(checkpoint, served, tmp_path):
    said = CliRunner().invoke(
        command_line,
        ["app", "--model", str(checkpoint), "--write-space", str(tmp_path / "space"), "--max-upload-mb", "50"],
    )
    assert said.exit_code == 0, said.output
    assert "hf upload NAME/SPACE" in said.output
    names = sorted(str(path.relative_to(tmp_path / "space")) for path in (tmp_path / "space").rglob("*.*"))
    parts = ["config.json", "genes.json", "model.safetensors", "tokenizer_config.json"]
    assert names == ["README.md", "app.py", *(f"model/{part}" for part in parts), "requirements.txt"]
    runpy.run_path(str(tmp_path / "space" / "app.py"), run_name="__main__")
    [(model, options)] = served
    options.pop("announce")
    assert options == {"host": "0.0.0.0", "port": 7860, "max_upload_mb": 50}
    assert load_classifier(model).model.config.num_labels == len(TYPES)


def test_the_space_of_a_hub_id_names_it(served, tmp_path):
    write_space(tmp_path / "space", "me/my-cell-types")
    assert not (tmp_path / "space" / "model").exists()
    assert front_matter(tmp_path / "space")["models"] == ["me/my-cell-types"]
    runpy.run_path(str(tmp_path / "space" / "app.py"), run_name="__main__")
    assert served[0][0] == "me/my-cell-types"


def test_the_front_matter_is_what_a_space_reads(checkpoint, tmp_path):
    write_space(tmp_path / "space", checkpoint)
    facts = front_matter(tmp_path / "space")
    assert facts["sdk"] == "gradio"
    assert facts["sdk_version"] == version("gradio")
    assert (tmp_path / "space" / facts["app_file"]).is_file()
    assert "models" not in facts
    [requirement] = (tmp_path / "space" / "requirements.txt").read_text().splitlines()
    assert Requirement(requirement).extras == {"app"}
    assert Requirement(requirement).specifier.contains(version("screformer"))


def test_importing_the_program_serves_nothing(checkpoint, served, tmp_path):
    write_space(tmp_path / "space", checkpoint)
    runpy.run_path(str(tmp_path / "space" / "app.py"), run_name="app")
    assert not served


def test_a_folder_that_holds_something_and_half_a_checkpoint_are_refused(checkpoint, tmp_path):
    with pytest.raises(FileExistsError, match="exists and is no empty folder"):
        write_space(checkpoint, checkpoint)
    (checkpoint / "genes.json").unlink()
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks genes.json, \*.safetensors; give a whole checkpoint"):
        write_space(tmp_path / "space", checkpoint)
    assert not (tmp_path / "space").exists()
