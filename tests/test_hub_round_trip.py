"""A checkpoint goes to a Hub on loopback and comes back, as users do it: by the command line and by transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_stand_in import READER, WRITER, running_hub
from huggingface_hub import close_session, constants
from small_corpus import make_cells, make_tokenizer
from typer.testing import CliRunner

from screformer import ScReformerConfig, ScReformerForCellClassification
from screformer.cli import app
from screformer.model_cards import publish
from screformer.model_cards.model_card import write_model_card

SCRIPT = Path(__file__).parents[1] / "docs" / "examples" / "finetune_with_transformers.py"
SCREFORMER = [sys.executable, "-m", "screformer"]
# What a user writes who has only transformers: the package cannot be imported.
WITHOUT_PACKAGE = """
import sys


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "screformer":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
"""
LOAD = (
    WITHOUT_PACKAGE
    + """
import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

name, options = "me/tiny", {"trust_remote_code": True, **eval(sys.argv[1])}
config = AutoConfig.from_pretrained(name, **options)
tokenizer = AutoTokenizer.from_pretrained(name, **options)
genes = [f"ENSG{number:011}" for number in range(1, 41)]
cells = tokenizer(np.arange(80).reshape(2, 40) % 5, gene_names=genes, gene_space="expressed", return_tensors="pt")
for kind in (AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification):
    model = kind.from_pretrained(name, **options).eval()
    with torch.no_grad():
        outputs = model(**cells)
print([config.id2label[label] for label in outputs.logits.argmax(-1).tolist()])
"""
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "checkpoint"
    config = ScReformerConfig.preset(
        "tiny", num_genes=40, hidden_size=8, intermediate_size=16, num_hidden_layers=1, classifier_hidden_sizes=[16, 8],
        bucket_size=8, id2label={0: "alpha", 1: "beta"},
    )  # fmt: skip
    ScReformerForCellClassification(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    row = {"accuracy": 0.9, "macro_f1": 0.8, "balanced_accuracy": 0.85}
    (folder / "evaluation.json").write_text(json.dumps(row))
    write_model_card(folder)
    return folder


@pytest.fixture(scope="module")
def hub():
    with running_hub() as found:
        yield found


@pytest.fixture(scope="module")
def call(hub, tmp_path_factory):
    """Run a program of a user's, who has a home of their own, and a token or none."""
    home = tmp_path_factory.mktemp("home")

    def run(*words, token=None, cwd=home, **variables):
        dropped = {"HF_TOKEN", "HF_HUB_OFFLINE", "PYTHONPATH"}
        kept = {name: value for name, value in os.environ.items() if name not in dropped}
        more = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        more |= {"HF_HUB_DISABLE_TELEMETRY": "1"} | ({"HF_TOKEN": token} if token else {})
        return subprocess.run(
            words, env=kept | more | variables, cwd=cwd, capture_output=True, text=True, check=False, timeout=300
        )

    return run


@pytest.fixture(scope="module")
def published(hub, checkpoint, call):
    done = call(*SCREFORMER, "publish", str(checkpoint), "--to", "me/tiny", "--allow-holes", "--yes", token=WRITER)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_what_is_published_is_private_shown_and_whole(hub, published):
    assert "model.safetensors" in published.stdout
    assert f"Published: {hub.address}/me/tiny/commit/" in published.stdout
    assert "me/tiny" in hub.private
    _, files = hub.at("me/tiny", "main")
    assert {"README.md", "LICENSE", "checksums.json", "model.safetensors", "modeling_screformer.py"} <= set(files)
    assert b'source = "me/tiny"' in files["README.md"]


def test_it_comes_back_by_every_auto_class_without_the_package(published, call):
    done = call(sys.executable, "-c", LOAD, "{}", token=READER)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() in {str([a, b]) for a in ("alpha", "beta") for b in ("alpha", "beta")}
    again = call(sys.executable, "-c", LOAD, "{}", HF_HUB_OFFLINE="1")  # from the cache
    assert again.stdout == done.stdout, again.stderr[-3000:]


def test_it_verifies_from_the_hub_and_a_revision_is_kept(hub, published, checkpoint, call):
    proved = call(*SCREFORMER, "verify", "me/tiny", token=READER)
    assert proved.returncode == 0, proved.stdout + proved.stderr
    first, _ = hub.at("me/tiny", "main")
    renamed = ["--name", "Another name", "--allow-holes", "--yes"]
    done = call(*SCREFORMER, "publish", str(checkpoint), "--to", "me/tiny", *renamed, token=WRITER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert b"# Another name" in hub.at("me/tiny", "main")[1]["README.md"]
    assert b"# Another name" not in hub.at("me/tiny", first)[1]["README.md"]
    done = call(sys.executable, "-c", LOAD, str({"revision": first}), token=READER)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_download_that_broke_off_goes_on_where_it_was(hub, call, tmp_path):
    content = bytes(range(256)) * 100_000  # more than huggingface_hub keeps in memory at once
    hub.commits["me/large"], hub.branches["me/large"] = [("1" * 40, {"weights.npy": content})], {"main": 0}
    hub.break_off = "weights.npy"
    program = "from screformer.model_cards.hub_upload import download_checkpoint as load; print(load('me/large'))"
    done = call(sys.executable, "-c", program, HF_HOME=str(tmp_path))
    assert hub.break_off is None
    if done.returncode:  # an earlier huggingface_hub does not try again by itself
        assert "the connection to the Hub broke" in done.stderr
        done = call(sys.executable, "-c", program, HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert Path(done.stdout.strip(), "weights.npy").read_bytes() == content
    last = next(line for line in reversed(hub.requests) if line.startswith("GET") and "weights.npy" in line)
    assert 0 < int(last.partition("bytes=")[2].rstrip("-")) <= len(content) // 2


@pytest.fixture
def user(hub, tmp_path, monkeypatch):
    """Run a command in this process, which is quick, as a user with a home, a token or none, and a Hub."""

    def run(*words, token=None, endpoint=hub.address, offline=False):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN", raising=False)
        close_session()
        return CliRunner().invoke(app, [*words, *(["--allow-holes", "--yes"] if words[0] == "publish" else [])])

    yield run
    close_session()


@pytest.mark.parametrize(
    ("words", "given", "message"),
    [
        (["verify", "me/nothing"], {"token": READER}, "the Hub has no me/nothing, or does not show it to you"),
        (["verify", "me/tiny", "--revision", "v9"], {"token": READER}, "me/tiny has no such revision"),
        (["verify", "me/tiny"], {"token": "hf_wrong"}, "hf auth login"),
        (["verify", "me/other"], {"offline": True}, "me/other is not in the cache"),
        (["publish", "{checkpoint}", "--to", "me/tiny"], {"token": READER}, "a token with the role write"),
        (
            ["publish", "{checkpoint}", "--to", "me/tiny"],
            {"token": "hf_wrong"},
            "set HF_TOKEN to a token that is valid",
        ),
        (["publish", "{checkpoint}", "--to", "me/tiny"], {"offline": True}, "HF_HUB_OFFLINE is set"),
        (["verify", "me/new"], {"endpoint": "http://127.0.0.1:9"}, "cannot be reached"),
        (
            ["publish", "{checkpoint}", "--to", "me/new"],
            {"endpoint": "http://127.0.0.1:9"},
            "connection to the Hub broke",
        ),
    ],
)
def test_what_the_hub_refuses_is_told_with_the_remedy(words, given, message, published, checkpoint, user, monkeypatch):
    monkeypatch.setattr(publish, "write_golden_cells", lambda _: None)  # a process of its own
    done = user(*(word.format(checkpoint=checkpoint) for word in words), **given)
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert message in done.output


def test_a_trainer_script_with_transformers_alone_fine_tunes_and_pushes(hub, published, call, tmp_path):
    make_cells(60, types=["alpha", "beta", "duct"]).write_h5ad(tmp_path / "cells.h5ad")
    given = ["me/tiny", "cells.h5ad", "--epochs", "1", "--output", "tuned", "--push-to", "me/tuned"]
    program = f"{WITHOUT_PACKAGE}\nimport runpy\nsys.argv = {['script', *given]!r}\nrunpy.run_path({str(SCRIPT)!r})"
    done = call(sys.executable, "-c", program, token=WRITER, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "accuracy on 12 cells that were held out: 0." in done.stdout
    _, files = hub.at("me/tuned", "main")
    assert {"model.safetensors", "modeling_screformer.py", "genes.json", "tokenizer_config.json"} <= set(files)
    assert list(json.loads(files["config.json"])["id2label"].values()) == ["alpha", "beta", "duct"]
    opened = LOAD.replace("me/tiny", "me/tuned")
    assert call(sys.executable, "-c", opened, "{}", token=READER).returncode == 0
