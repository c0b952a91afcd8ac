import json
import os
import subprocess
import sys
from html import unescape

import anndata
import numpy as np
import pytest
from typer.testing import CliRunner

from screformer import ScReformerForCellClassification, ScReformerTokenizer
from screformer.cli import app
from screformer.tokenization import open_corpus
from screformer.train import quickstart as module
from screformer.train.quickstart import TEST_DONOR, quickstart

WITHOUT_THE_PACKAGE = """
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname.partition(".")[0] == "screformer":
            raise ModuleNotFoundError("No module named " + repr(fullname), name=fullname)

sys.meta_path.insert(0, Block())
import numpy as np
import transformers

tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
assert transformers.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True).model_type == "screformer"
genes = tokenizer.gene_vocabulary.symbols[:200]
counts = np.random.default_rng(0).poisson(1.0, (3, 200))
batch = tokenizer(counts, gene_names=genes, gene_space="expressed", return_tensors="pt")
for name in ("AutoModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"):
    model = getattr(transformers, name).from_pretrained(sys.argv[1], trust_remote_code=True).eval()
print(model(**batch).logits.tolist())
assert "screformer" not in sys.modules
"""


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_everything_is_left_behind(small_quickstart):
    for name in (
        "corpus",
        "pretrained",
        "checkpoint",
        "annotated.h5ad",
        "metrics.json",
        "report.html",
        "comparison.png",
    ):
        assert (small_quickstart / name).exists(), name
    assert not list(small_quickstart.glob("**/*.partial*"))
    assert not [path for path in small_quickstart.rglob("*") if path.suffix in {".bin", ".pkl", ".pt", ".pth"}]


def test_the_test_donor_is_in_no_training(small_quickstart):
    corpus = open_corpus(small_quickstart / "corpus")
    donor_of = dict(zip(corpus.dataset["cell_id"], corpus.dataset["donor"], strict=True))
    splits = read(small_quickstart / "checkpoint" / "splits.json")
    assert {donor_of[cell] for cell in splits["test"]} == {TEST_DONOR}
    assert TEST_DONOR not in {donor_of[cell] for cell in splits["train"] + splits["validation"]}
    pretraining = read(small_quickstart / "pretrained" / "training.json")
    assert pretraining["cells"]["exclude_groups"] == [TEST_DONOR]


def test_model_and_baselines_are_scored_on_the_same_cells(small_quickstart):
    metrics = read(small_quickstart / "metrics.json")
    rows = [metrics[name] for name in ("model", "logistic_regression", "majority_class")]
    assert len({row["num_cells"] for row in rows}) == 1
    assert rows[1]["accuracy"] > rows[2]["accuracy"]
    gap = metrics["model"]["accuracy"] - metrics["logistic_regression"]["accuracy"]
    assert metrics["model_minus_logistic_regression"]["accuracy"] == pytest.approx(gap)
    assert metrics["verdict"] in (small_quickstart / "report.html").read_text(encoding="utf-8")


def test_masked_genes_stand_beside_their_own_frequencies_everywhere(small_quickstart):
    pretraining = read(small_quickstart / "metrics.json")["pretraining"]
    for name in ("masked", "gene_majority", "gene_mean", "majority_bin"):
        assert 0 < pretraining[f"held_out_{name}_accuracy"] < 1
    share = f"{pretraining['held_out_gene_majority_accuracy']:.3f}"
    for name in ("report.html", "checkpoint/README.md"):
        assert f"commonest bin in the training cells ({share})" in unescape(
            (small_quickstart / name).read_text(encoding="utf-8")
        )


def test_annotated_cells_are_the_new_ones_in_order_with_the_evaluations_labels(small_quickstart):
    annotated = anndata.read_h5ad(small_quickstart / "annotated.h5ad")
    new = anndata.read_h5ad(small_quickstart / "new_cells.h5ad")
    assert list(annotated.obs_names) == list(new.obs_names)
    assert "cell_type" not in new.obs
    lines = (small_quickstart / "checkpoint" / "predictions.tsv").read_text(encoding="utf-8").splitlines()[1:]
    predicted = {line.split("\t")[0]: line.split("\t")[2] for line in lines}
    assert [predicted[name] for name in annotated.obs_names] == list(annotated.obs["screformer_best_guess"])
    answers = annotated.obs["screformer_cell_type"].astype(str)
    np.testing.assert_array_equal(annotated.obs["screformer_abstained"], answers == "unknown")
    assert (answers.eq("unknown") | answers.eq(annotated.obs["screformer_best_guess"].astype(str))).all()
    probabilities = annotated.obsm["screformer_probabilities"]
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)


def test_the_card_shows_logistic_regression_and_the_checkpoint_knows_its_tokenizer(small_quickstart):
    card = (small_quickstart / "checkpoint" / "README.md").read_text(encoding="utf-8")
    assert "Logistic regression" in card
    assert "Baron et al. 2016" in card
    config = ScReformerForCellClassification.from_pretrained(small_quickstart / "checkpoint").config
    assert config.tokenizer_fingerprint == open_corpus(small_quickstart / "corpus").tokenizer().fingerprint


def test_running_again_repeats_no_training(small_quickstart, monkeypatch):
    weights = small_quickstart / "checkpoint" / "model.safetensors"
    before, times = weights.stat().st_mtime_ns, read(small_quickstart / module.STAGES_FILE)
    monkeypatch.setattr("transformers.Trainer.train", lambda *_, **__: pytest.fail("trained again"))
    stages = []
    result = quickstart(
        small_quickstart, cells=small_quickstart.parent / "cells.h5ad", max_steps=2, announce=stages.append
    )
    assert weights.stat().st_mtime_ns == before
    assert result.stage_seconds == times
    assert len(stages) == len(times) == 8


def test_a_donor_that_there_is_not_is_refused(small_quickstart):
    with pytest.raises(ValueError, match=r"test_donor got 'human9'; the donors are human1, human2, human3, human4"):
        quickstart(small_quickstart, cells=small_quickstart.parent / "cells.h5ad", test_donor="human9")


def test_other_settings_in_the_same_folder_are_refused(small_quickstart):
    with pytest.raises(ValueError, match="overwrite"):
        quickstart(small_quickstart, cells=small_quickstart.parent / "cells.h5ad", max_steps=3)


def test_the_checkpoint_opens_without_the_package_and_says_the_same(small_quickstart, tmp_path):
    checkpoint = small_quickstart / "checkpoint"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(checkpoint)],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    tokenizer = ScReformerTokenizer.from_pretrained(checkpoint)
    counts = np.random.default_rng(0).poisson(1.0, (3, 200))
    genes = tokenizer.gene_vocabulary.symbols[:200]
    batch = tokenizer(counts, gene_names=genes, gene_space="expressed", return_tensors="pt")
    expected = ScReformerForCellClassification.from_pretrained(checkpoint).eval()(**batch).logits
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-6)


def test_the_command_says_what_error_rates_and_gene_spaces_gave(small_quickstart, monkeypatch, tmp_path):
    metrics = read(small_quickstart / "metrics.json")
    monkeypatch.setattr(module, "quickstart", lambda output, **_: module.QuickstartResult(output, metrics))
    result = CliRunner().invoke(app, ["quickstart", "--output", str(tmp_path / "new")])
    assert result.exit_code == 0, result.exception
    output = result.output
    spaces = metrics["gene_spaces"]
    assert f"Expressed genes alone: {spaces['ratio']:.1f} times the cells a second of every gene" in output
    assert f"embeddings drift by {spaces['embedding_drift']:.1%}" in output
    assert metrics["answers_sentence"] in output
