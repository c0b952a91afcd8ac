import subprocess
import sys

import anndata
import pytest
from typer.testing import CliRunner

from screformer import __version__
from screformer.cli import app

COMMANDS = (
    "quickstart",
    "inspect",
    "corpus",
    "pretrain",
    "finetune",
    "distill",
    "evaluate",
    "annotate",
    "embed",
    "explain",
    "perturb",
    "interactions",
    "app",
)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_lists_every_command():
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.output for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_with_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0, result.output
    assert "xample" in result.output


@pytest.mark.parametrize(
    "benchmark", ["attention", "encoder", "memory", "donors", "heart", "systems", "tokenizing", "feeding"]
)
def test_every_benchmark_helps_with_an_example(benchmark):
    result = run("benchmark", benchmark, "--help")
    assert result.exit_code == 0, result.output
    assert "xample" in result.output
    assert benchmark in run("benchmark", "--help").output


def test_the_list_of_systems_says_which_are_ready(monkeypatch, tmp_path):
    from screformer.benchmarks.known_systems import SYSTEMS

    monkeypatch.setenv("PATH", str(tmp_path))
    rows = {line.split()[0]: line for line in run("benchmark", "systems").output.splitlines()}
    assert set(rows) == {"screformer", *SYSTEMS}
    assert rows["knn"].split()[-2:] == ["inductive", "ready"]
    assert "transductive  R is not installed" in rows["seurat"]


def test_the_attention_benchmark_measures_nearness_and_speed(tmp_path, monkeypatch):
    from screformer.benchmarks import attention, hashing

    calls = []
    for module in (attention, hashing):
        monkeypatch.setattr(module, "main", lambda arguments, name=module.NAME: calls.append((name, arguments)))
    assert run("benchmark", "attention", "-o", tmp_path, "--checkpoint", "model", "--quick").exit_code == 0
    assert [name for name, _ in calls] == ["hashing", "attention"]
    assert calls[0][1][:4] == ["--output", str(tmp_path), "--checkpoint", "model"]
    assert run("benchmark", "attention", "--only", "speed").exit_code == 0
    assert run("benchmark", "attention", "--only", "defaults").exit_code == 0
    assert [name for name, _ in calls[2:]] == ["attention", "hashing"]
    assert calls[3][1] == ["--output", "benchmarks/results"]


def test_version():
    assert run("--version").output.strip() == f"screformer {__version__}"


def test_annotate_and_embed_write_what_they_say(small_quickstart, tmp_path):
    cells = small_quickstart / "new_cells.h5ad"
    for command, model in (("annotate", "checkpoint"), ("embed", "pretrained")):
        output = tmp_path / f"{command}.h5ad"
        result = run(command, cells, "--model", small_quickstart / model, "-o", output)
        assert result.exit_code == 0, result.output
        assert str(output) in result.output.replace("\n", "")
    assert "screformer_cell_type" in anndata.read_h5ad(tmp_path / "annotate.h5ad").obs
    assert anndata.read_h5ad(tmp_path / "embed.h5ad").obsm["X_screformer"].shape == (45, 32)


def test_corpus_then_evaluate(small_quickstart, tmp_path):
    made = run("corpus", small_quickstart.parent / "cells.h5ad", "-o", tmp_path / "corpus", "--obs", "cell_type")
    assert made.exit_code == 0, made.output
    assert "180 cells" in made.output
    result = run(
        "evaluate", small_quickstart / "checkpoint", tmp_path / "corpus", "--part", "all", "--output", tmp_path / "out"
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "evaluation.json").exists()


def test_a_mistake_is_one_message_without_a_traceback(tmp_path):
    result = run("corpus", tmp_path / "absent.h5ad", "-o", tmp_path / "corpus")
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert "absent.h5ad" in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_quickstart_does_not_touch_a_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for extra in ((), ("--overwrite",)):
        result = run("quickstart", "--output", tmp_path, *extra)
        assert result.exit_code == 1
        assert "holds files that are no quickstart's" in result.output
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_package_can_be_run_as_a_module_which_launchers_do():
    result = subprocess.run(
        [sys.executable, "-m", "screformer", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("screformer ")
