"""No code but this release's runs when a checkpoint is verified, wherever it lies and whatever names it."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from small_checkpoint import change_record, problems_of_files, write_checkpoint, write_record

from screformer.configuration_screformer import AUTO_MAP
from screformer.model_cards import publish
from screformer.model_cards.publish import stage_checkpoint
from screformer.model_cards.published_files import checksums_of
from screformer.model_cards.verify import verify_checkpoint

CLASSIFIER = "AutoModelForSequenceClassification"
NOT_OURS = "has code loaded that is not this release's: auto_map"
NOT_TRIED = "it was not tried: not all of it is this release's"


def planted(folder: Path) -> None:
    """Write code that leaves a file where it is run."""
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w').close()\n")


@pytest.fixture
def staged(tmp_path, monkeypatch) -> Path:
    """A published checkpoint whose golden cells hold nothing: who comes to read them has run what is there."""
    monkeypatch.setattr(publish, "write_golden_cells", lambda place: (place / "golden_cells.safetensors").touch())
    write_checkpoint(tmp_path / "checkpoint")
    stage_checkpoint(tmp_path / "checkpoint", tmp_path / "staged", allow_holes=True)
    assert problems_of_files(tmp_path / "staged") == []
    return tmp_path / "staged"


def name_code(folder: Path, reference: str) -> None:
    change_record(folder / "config.json", auto_map={**AUTO_MAP, CLASSIFIER: reference})


def record_anew(folder: Path) -> None:
    """Let the checksums be those of what is there: who plants code can do that."""
    files = checksums_of(folder) | {"sub/evil.py": "0" * 64}
    change_record(folder / "checksums.json", sha256={**files})


FAULTS = {
    "code in a folder": (lambda folder: planted(folder / "sub"), "sub/evil.py is no file of this package"),
    "a file of ours in a folder": (
        lambda folder: shutil.copytree(folder, folder / "sub"), "sub/modeling_screformer.py is no file of this package",
    ),
    "a folder's class": (lambda folder: name_code(folder, "sub/evil.X"), f"config.json {NOT_OURS}"),
    "another repository's class": (lambda folder: name_code(folder, "org/name--file.X"), f"config.json {NOT_OURS}"),
    "another class of ours": (lambda folder: name_code(folder, AUTO_MAP["AutoModel"]), f"config.json {NOT_OURS}"),
    "another auto class": (
        lambda folder: change_record(folder / "config.json", auto_map={**AUTO_MAP, "AutoProcessor": "evil.X"}),
        f"config.json {NOT_OURS}",
    ),
    "the tokenizer's class": (
        lambda folder: change_record(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.X", None]}),
        f"tokenizer_config.json {NOT_OURS}",
    ),
    "the tokenizer's class, as it once was": (
        lambda folder: change_record(folder / "tokenizer_config.json", auto_map=["evil.X", None]),
        f"tokenizer_config.json {NOT_OURS}",
    ),
    "a pipeline": (
        lambda folder: change_record(folder / "config.json", custom_pipelines={"cells": {"impl": "evil.X"}}),
        "config.json has code loaded from elsewhere: custom_pipelines",
    ),
    "a kernel": (
        lambda folder: change_record(folder / "config.json", attn_implementation="org/kernel"),
        "config.json has code loaded from elsewhere: attn_implementation 'org/kernel'",
    ),
    "weights of elsewhere": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter_config.json was not published",
    ),
    "a link to a folder": (
        lambda folder: os.symlink(folder.parent, folder / "sub"), "sub was not published with it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_could_run_other_code_is_named_and_nothing_is_run(fault, staged):
    plant, words = FAULTS[fault]
    plant(staged)
    record_anew(staged)
    checks = verify_checkpoint(staged)
    found = [problem for check in checks for problem in check.problems]
    assert any(words in problem for problem in found), found
    assert checks[-1].problems[0].startswith(NOT_TRIED)


def test_a_file_in_a_folder_that_the_record_lists_was_not_published(staged):
    planted(staged / "sub")
    record_anew(staged)
    assert "sub/evil.py was not published with it" in problems_of_files(staged)


@pytest.mark.parametrize("name", [".git/config", ".gitattributes", ".cache/huggingface/download/config.json.metadata"])
def test_what_git_and_the_hub_leave_is_no_problem(staged, name):
    (staged / name).parent.mkdir(parents=True, exist_ok=True)
    (staged / name).touch()
    assert problems_of_files(staged) == []


def test_code_that_is_not_in_the_folder_is_not_run_though_it_is_trusted(staged):
    planted(staged.parent / "elsewhere")
    name_code(staged, f"{staged.parent / 'elsewhere'}--evil.X")
    save_file({"outputs": np.zeros((1, 1)), "counts": np.zeros((1, 1))}, staged / "golden_cells.safetensors")
    write_record(staged, "golden_cells", tolerance=0.1, gene_names=["ENSG00000000001"])
    found = verify_checkpoint(staged, trust_code=True)[-1].problems
    assert found[0].startswith("config.json names code that is not beside it: auto_map"), found
    assert not (staged.parent / "ran").exists()


def test_code_is_named_anew_where_a_checkpoint_comes_from_a_repository(tmp_path, staged):
    source = tmp_path / "checkpoint"
    name_code(source, f"me/tiny--{AUTO_MAP[CLASSIFIER]}")
    stage_checkpoint(source, tmp_path / "out", allow_holes=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == AUTO_MAP
