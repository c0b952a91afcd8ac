"""Batches of expressed genes alone: laid out on the device they are what the collator lays out, and train the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpus import TINY_MODEL, make_corpus

from screformer.modeling_screformer import ScReformerForCellClassification, ScReformerForMaskedLM
from screformer.tokenization.corpus import open_corpus
from screformer.train.arguments import (
    FineTuningArguments,
    FineTuningDataArguments,
    ModelArguments,
    PretrainingArguments,
    PretrainingDataArguments,
)
from screformer.train.cell_dataset import CellDataset
from screformer.train.cell_trainer import CellTrainer
from screformer.train.collator import CellCollator
from screformer.train.finetune import finetune
from screformer.train.inference import BatchInference
from screformer.train.packed_batches import can_pack, expand_batch
from screformer.train.pretrain import pretrain
from screformer.train.result_files import read_json
from screformer.train.sampler import BatchOfCells

NEW_MODEL = ModelArguments(config_overrides=TINY_MODEL)
NUM_GENES = 300


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def collator(**options):
    return CellCollator(6, 7, NUM_GENES, gene_space="full", **options)


def watch_steps(monkeypatch):
    """Return a list that gets the batch of every training step, as the loader gave it."""
    seen, step = [], CellTrainer.training_step

    def seeing(self, model, inputs, *rest):
        seen.append(inputs)
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(CellTrainer, "training_step", seeing)
    return seen


def assert_same(packed, dense):
    assert set(packed) == set(dense)
    for name, tensor in dense.items():
        assert packed[name].dtype == tensor.dtype
        assert torch.equal(packed[name], tensor), name


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, NUM_GENES), min_size=1, max_size=5), masked=st.sampled_from([0.0, 0.15, 1.0]))
def test_laid_out_it_is_the_dense_batch(sizes, masked):
    generator = np.random.default_rng(sum(sizes))
    rows = [
        {
            "gene_ids": np.sort(generator.permutation(NUM_GENES)[:size]),
            "input_ids": generator.integers(1, 6, size),
        }
        for size in sizes
    ]
    options = {"masked_fraction": masked, "gene_dropout": 0.3, "seed": 3, "deterministic": True}
    packed = collator(packed=True, **options)(rows)
    assert_same(expand_batch(packed, NUM_GENES), collator(**options)(rows))
    num_bytes = sum(tensor.nbytes for name, tensor in packed.items() if name != "counts")
    assert num_bytes == (4 if masked else 3) * len(packed["gene_ids"])


@pytest.mark.parametrize("options", [{"masked_fraction": 0.15}, {"label_column": "cell_type"}])
def test_cells_that_do_not_count_have_no_labels_in_either(corpus, options):
    opened = open_corpus(corpus)
    cells = CellDataset(opened, columns=["cell_type"])
    batch = cells.__getitems__(BatchOfCells([3, 1, 2, 0], num_counted=2, epoch=1))
    model = ScReformerForMaskedLM.config_class(num_genes=40)
    options = {"label2id": {"alpha": 0, "beta": 1}, **options} if "label_column" in options else options
    packed, dense = (CellCollator.from_config(model, packed=packed, **options)(batch) for packed in (True, False))
    assert_same(expand_batch(packed, 40), dense)
    assert (dense["labels"][2:] == -100).all()
    assert (dense["labels"][:2] != -100).any()


def test_what_is_not_packed_stays_as_it_is():
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "gene_ids": torch.zeros(2, 3, dtype=torch.long)}
    assert expand_batch(batch, 300) == batch


@pytest.mark.parametrize(
    ("num_genes", "vocab_size", "fits"), [(32_768, 128, True), (32_769, 8, False), (17_330, 129, False)]
)
def test_what_fits(num_genes, vocab_size, fits):
    assert can_pack(num_genes, vocab_size) is fits


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"packed=True needs gene_space='full' \(got 'expressed'\), at most 32,768"):
        CellCollator(6, 7, 100, gene_space="expressed", packed=True)


def test_pretraining_learns_the_same(corpus, tmp_path, monkeypatch):
    seen = watch_steps(monkeypatch)
    results = {}
    for packed in (True, False):
        training = PretrainingArguments(
            output_dir=str(tmp_path / str(packed)),
            num_train_epochs=2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            use_cpu=True,
            disable_tqdm=True,
            full_determinism=True,
            pack_batches=packed,
        )
        results[packed] = pretrain(NEW_MODEL, PretrainingDataArguments(corpus=corpus, gene_dropout=0.2), training)
    assert {"counts" in inputs for inputs in seen[: len(seen) // 2]} == {True}
    assert {"counts" in inputs for inputs in seen[len(seen) // 2 :]} == {False}
    assert results[True].metrics["held_out_loss"] == results[False].metrics["held_out_loss"]
    assert results[True].metrics["held_out_by_bin"] == results[False].metrics["held_out_by_bin"]
    weights = [ScReformerForMaskedLM.from_pretrained(result.output_dir).state_dict() for result in results.values()]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    logs = [read_json(result.output_dir / "log_history.json") for result in results.values()]
    assert [row.get("grad_norm") for row in logs[0]] == [row.get("grad_norm") for row in logs[1]]


def test_fine_tuning_learns_the_same(corpus, tmp_path):
    weights = []
    for packed in (True, False):
        training = FineTuningArguments(
            output_dir=str(tmp_path / str(packed)),
            num_train_epochs=1,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=1,
            use_cpu=True,
            disable_tqdm=True,
            full_determinism=True,
            pack_batches=packed,
        )
        folder = finetune(NEW_MODEL, FineTuningDataArguments(corpus=corpus), training).output_dir
        weights.append(ScReformerForCellClassification.from_pretrained(folder).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.parametrize(("gene_space", "pack_batches"), [("full", None), ("expressed", True)])
def test_on_a_cpu_batches_are_dense_unless_asked_and_expressed_ones_always(
    corpus, tmp_path, monkeypatch, gene_space, pack_batches
):
    seen = watch_steps(monkeypatch)
    model = replace(NEW_MODEL, config_overrides=[*TINY_MODEL, f"gene_space={gene_space}"])
    training = PretrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=1, use_cpu=True, disable_tqdm=True, pack_batches=pack_batches
    )
    pretrain(model, PretrainingDataArguments(corpus=corpus), training)
    assert ["counts" in inputs for inputs in seen] == [False]


def test_inference_gives_the_same(corpus):
    opened = open_corpus(corpus)
    config = ScReformerForMaskedLM.config_class(
        num_genes=40, num_labels=2, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        bucket_size=8, num_hashes=1, classifier_hidden_sizes=[16, 8],
    )  # fmt: skip
    torch.manual_seed(0)
    model = ScReformerForCellClassification(config).eval()
    plain, packing = (BatchInference(model, "logits", batch_size=5) for _ in range(2))
    packing._collator.packed = True
    cells = CellDataset(opened)
    np.testing.assert_array_equal(packing(cells), plain(cells))
    assert np.unique(plain(cells), axis=0).shape[0] > 40  # each cell its own
