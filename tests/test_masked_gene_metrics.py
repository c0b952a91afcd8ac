from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_corpus import TINY_MODEL, make_corpus

from oracles.slow_masked_gene_scores import slow_scores
from screformer.modeling_screformer import ScReformerForMaskedLM
from screformer.tokenization.corpus import open_corpus
from screformer.train import masked_gene_metrics as module
from screformer.train.arguments import ModelArguments, PretrainingArguments, PretrainingDataArguments
from screformer.train.cell_dataset import CellDataset
from screformer.train.masked_gene_metrics import (
    GeneBaselines,
    MaskedGeneMetrics,
    count_gene_bins,
    masked_gene_outcomes,
    targets_of,
)
from screformer.train.pretrain import _make_trainer
from screformer.train.starting_model import starting_model

NUM_GENES, NUM_BINS = 12, 6
# float32 losses and their sums in another order.
CLOSE = {"rel": 1e-5, "abs": 1e-7}


def random_cells(num_cells, seed, num_genes=NUM_GENES):
    """Return cells as {gene: bin}; the last gene is in none of them."""
    generator = np.random.default_rng(seed)
    cells = []
    for _ in range(num_cells):
        genes = np.flatnonzero(generator.random(num_genes - 1) < 0.5)
        bins = np.minimum(1 + generator.geometric(0.5, len(genes)) // (1 + genes % 3), NUM_BINS - 1)
        cells.append({int(gene): int(number) for gene, number in zip(genes, bins, strict=True)})
    return [cell for cell in cells if cell]


def table_of(cells):
    counts = np.zeros((NUM_GENES, NUM_BINS), dtype=np.int64)
    for cell in cells:
        for gene, number in cell.items():
            counts[gene, number] += 1
    return counts


def masked_batch(seed, num_cells=7):
    """Return (labels, inputs, logits, the masked genes as the oracle wants them) of cells laid out in full."""
    generator = np.random.default_rng(seed)
    labels = np.full((num_cells, NUM_GENES), -100)
    tokens = np.zeros((num_cells, NUM_GENES), dtype=np.int64)
    logits = torch.from_numpy(generator.normal(size=(num_cells, NUM_GENES, NUM_BINS))).float()
    expected = []
    for row, cell in enumerate(random_cells(num_cells, seed)):
        # In the first cell everything is masked; elsewhere a gene that training never saw may be.
        cell = {**cell, NUM_GENES - 1: 2} if row % 2 else cell
        masked = [gene for gene in cell if row == 0 or generator.random() < 0.4]
        visible = [number for gene, number in cell.items() if gene not in masked]
        for gene, number in cell.items():
            tokens[row, gene] = number if gene not in masked or generator.random() < 0.3 else NUM_BINS + 1
        for gene in masked:
            labels[row, gene] = cell[gene]
            scores = logits[row, gene].double()
            loss = float(scores.logsumexp(0) - scores[cell[gene]])
            expected.append({"gene": gene, "truth": cell[gene], "predicted": int(scores.argmax()), "loss": loss,
                             "visible": visible})  # fmt: skip
    return torch.from_numpy(labels), {"input_ids": torch.from_numpy(tokens)}, logits, expected


def predict(metrics, labels, inputs, logits, **options):
    targets = targets_of(labels, inputs, NUM_BINS)
    outcomes = masked_gene_outcomes(logits, targets)
    return metrics(SimpleNamespace(predictions=outcomes, label_ids=targets), **options)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == (None if value is None else pytest.approx(value, **CLOSE)), name


def test_scores_equal_those_counted_one_gene_at_a_time():
    training = random_cells(40, seed=1)
    batches = [masked_batch(seed) for seed in (2, 3, 4)]
    metrics = MaskedGeneMetrics(table_of(training))
    expected, by_bin = slow_scores([gene for batch in batches for gene in batch[3]], training, NUM_BINS)
    for _ in range(2):  # The second evaluation starts from nothing.
        assert predict(metrics, *batches[0][:3], compute_result=False) == {}
        assert predict(metrics, *batches[1][:3], compute_result=False) == {}
        assert_same(predict(metrics, *batches[2][:3]), expected)
        assert [row["bin"] for row in metrics.by_bin] == [1, 2, 3, 4, 5]
        for found, row in zip(metrics.by_bin, by_bin, strict=True):
            assert_same(found, row)
    # The ways of answering differ here, so that none could stand for another.
    assert len({round(value, 6) for name, value in expected.items() if name.endswith("accuracy")}) == 5


def test_both_gene_spaces_have_the_same_scores():
    labels, inputs, logits, _ = masked_batch(5)
    metrics = MaskedGeneMetrics(table_of(random_cells(40, seed=1)))
    full = predict(metrics, labels, inputs, logits)
    # The genes of each cell in another order, and padding behind them.
    order = torch.from_numpy(np.random.default_rng(0).permuted(np.tile(np.arange(NUM_GENES), (len(labels), 1)), axis=1))
    padding = ((0, 0), (0, 3))
    expressed = {
        "input_ids": np.pad(inputs["input_ids"].gather(1, order), padding, constant_values=NUM_BINS),
        "gene_ids": np.pad(order, padding),
    }
    moved = torch.from_numpy(np.pad(labels.gather(1, order), padding, constant_values=-100))
    padded = torch.from_numpy(np.pad(logits.gather(1, order[..., None].expand_as(logits)), (*padding, (0, 0))))
    assert predict(metrics, moved, {name: torch.from_numpy(item) for name, item in expressed.items()}, padded) == full


def test_arrays_are_as_good_as_tensors():
    labels, inputs, logits, _ = masked_batch(6)
    metrics = MaskedGeneMetrics(table_of(random_cells(40, seed=1)))
    targets = targets_of(labels, inputs, NUM_BINS)
    outcomes = tuple(item.numpy() for item in masked_gene_outcomes(logits, targets))
    arrays = metrics(SimpleNamespace(predictions=outcomes, label_ids=targets.numpy()))
    assert arrays == predict(metrics, labels, inputs, logits)


def test_a_gene_that_training_never_saw_is_answered_like_all_genes():
    counts = np.zeros((3, 5), dtype=np.int64)
    counts[0], counts[1] = [0, 1, 0, 0, 5], [0, 0, 4, 4, 0]
    baselines = GeneBaselines(counts)
    # Two bins as common: the lower. Of all: once 1, four times 2, four times 3, five times 4.
    assert baselines.majority_bin.tolist() == [4, 2, 4]
    assert baselines.mean_bin.tolist() == [4, 3, 3]  # means 3.5 and 2.5 round up; 41 / 14 = 2.93
    assert np.exp(baselines.log_frequencies[2]).tolist() == pytest.approx([0, 0.25, 0.25, 0.25, 0.25])
    assert np.exp(baselines.log_frequencies[0]).tolist() == pytest.approx([0, 0.2, 0.1, 0.1, 0.6])


def test_of_every_gene_only_two_numbers_are_kept():
    labels, inputs, logits, _ = masked_batch(7)
    predicted, losses = masked_gene_outcomes((logits, "embeddings"), targets_of(labels, inputs, NUM_BINS))
    assert predicted.shape == losses.shape == labels.shape
    assert ((predicted != -100) == (labels != -100)).all()
    assert (losses[labels == -100] == 0).all()
    assert losses.dtype == torch.float32


def test_losses_of_half_precision_logits_are_taken_in_full_precision():
    labels, inputs, logits, _ = masked_batch(8)
    targets = targets_of(labels, inputs, NUM_BINS)
    half = masked_gene_outcomes(logits.bfloat16(), targets)[1]
    whole = masked_gene_outcomes(logits.bfloat16().float(), targets)[1]
    assert torch.equal(half, whole)


def test_a_zero_is_refused_as_a_target():
    labels, inputs, logits, _ = masked_batch(9)
    labels[0, 0] = 0
    metrics = MaskedGeneMetrics(table_of(random_cells(40, seed=1)))
    with pytest.raises(ValueError, match="labels of masked genes must be bins from 1 to 5, got 0"):
        predict(metrics, labels, inputs, logits)


@pytest.mark.parametrize(("place", "message"), [((2, 0), "got 3 in bin 0 of 3"), (None, "got 0 in bin 0 of 0")])
def test_counts_of_zeros_or_of_nothing_are_refused(place, message):
    counts = np.zeros((3, 5), dtype=np.int64)
    if place:
        counts[place] = 3
    with pytest.raises(ValueError, match=message):
        GeneBaselines(counts)


def test_refuses_a_held_out_set_without_masks():
    labels, inputs, logits, _ = masked_batch(9)
    metrics = MaskedGeneMetrics(table_of(random_cells(40, seed=1)))
    with pytest.raises(ValueError, match="give the collator a masked_fraction above 0"):
        predict(metrics, torch.full_like(labels, -100), inputs, logits)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return open_corpus(make_corpus(tmp_path_factory.mktemp("corpus")))


def as_dicts(cells):
    return [
        dict(zip(cells[at]["gene_ids"].tolist(), cells[at]["input_ids"].tolist(), strict=True))
        for at in range(len(cells))
    ]


def test_the_table_counts_the_cells_given_block_by_block_and_share_by_share(corpus, monkeypatch):
    cells = CellDataset(corpus, np.arange(3, 41))
    expected = np.zeros((40, 6), dtype=np.int64)
    for cell in as_dicts(cells):
        for gene, number in cell.items():
            expected[gene, number] += 1
    size = {"num_genes": 40, "num_bins": 6}
    np.testing.assert_array_equal(count_gene_bins(cells, **size), expected)
    monkeypatch.setattr(module, "CELLS_READ_AT_ONCE", 5)
    np.testing.assert_array_equal(count_gene_bins(cells, **size), expected)
    shares = [count_gene_bins(cells, **size, process=number, num_processes=3) for number in range(3)]
    np.testing.assert_array_equal(sum(shares), expected)
    assert all(share.any() for share in shares)


@pytest.mark.parametrize("gene_space", ["full", "expressed"])
def test_an_evaluation_scores_held_out_cells_by_what_training_cells_say(corpus, tmp_path, gene_space):
    model = starting_model(
        ScReformerForMaskedLM,
        corpus.tokenizer(),
        ModelArguments(config_overrides=TINY_MODEL, gene_space=gene_space),
    )
    torch.nn.init.normal_(model.head.decoder.weight, generator=torch.Generator().manual_seed(0))  # answers that differ
    training = PretrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=4
    )
    data = PretrainingDataArguments(corpus=str(corpus.folder), held_out_fraction=0.3, masked_fraction=0.3)
    trainer = _make_trainer(model, corpus, data, training)
    found = trainer.evaluate()
    masked = [item for batch in trainer.get_eval_dataloader() for item in masked_genes_of(model.eval(), batch)]
    expected, by_bin = slow_scores(masked, as_dicts(trainer.train_dataset), 6)
    assert_same({name: found[f"eval_{name}"] for name in expected}, expected)
    for row, slow_row in zip(trainer.describe_evaluation(tmp_path)["by_bin"], by_bin, strict=True):
        assert_same(row, slow_row)
    # A share of the expressed genes and of nothing else: zeros are never counted.
    lengths = trainer.eval_dataset.lengths
    assert found["eval_num_masked_genes"] == sum(max(1, round(0.3 * length)) for length in lengths.tolist())
    assert lengths.max() < 40


def masked_genes_of(model, batch):
    with torch.no_grad():
        logits = model(**{name: item for name, item in batch.items() if name != "labels"}).logits.double()
    for row, labels in enumerate(batch["labels"].tolist()):
        tokens = batch["input_ids"][row].tolist()
        genes = batch["gene_ids"][row].tolist() if "gene_ids" in batch else list(range(len(labels)))
        visible = [token for token, label in zip(tokens, labels, strict=True) if label == -100 and 0 < token < 6]
        for at, label in enumerate(labels):
            if label != -100:
                scores = logits[row, at]
                yield {"gene": genes[at], "truth": label, "predicted": int(scores.argmax()), "visible": visible,
                       "loss": float(scores.logsumexp(0) - scores[label])}  # fmt: skip
