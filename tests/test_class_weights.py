"""The loss is what the formulas say, however a step is split into batches, and held-out losses stay plain."""

import numpy as np
import pytest
import torch
from learning_options import make_classifier_trainer, make_uneven_cells, one_step, settings
from seeing_trainer import make_trainer
from small_corpus import make_corpus

from screformer.train.class_weights import ClassWeightedLoss, balanced_weights

SMOOTHING = 0.2
OPTIONS = [
    {"class_weights": "balanced"},
    {"label_smoothing_factor": SMOOTHING},
    {"class_weights": "balanced", "label_smoothing_factor": SMOOTHING},
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), cells=make_uneven_cells())


def loss_by_hand(logits, labels, weights, smoothing):
    """Return (1 / N) sum_i w[y_i] ((1 - e) (-log p[y_i]) + (e / K) sum_c (-log p[c]))."""
    scores = logits.astype(np.float64)
    log_probabilities = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    true = -log_probabilities[np.arange(len(labels)), labels]
    return float(np.mean(weights[labels] * ((1 - smoothing) * true - smoothing * log_probabilities.mean(axis=1))))


def expected_loss(trainer, part, *, is_weighted, smoothing):
    """Return the loss of all cells of a part, by hand from the model's logits."""
    cells = trainer.train_dataset if part == "train" else trainer.eval_dataset
    batch = trainer.data_collator([cells[index] for index in range(len(cells))])
    labels = batch.pop("labels").numpy()
    with torch.no_grad():
        logits = trainer.model.eval()(**batch).logits.numpy()
    assert 0 < labels.sum() < len(labels) / 2
    weights = len(labels) / (2 * np.bincount(labels)) if is_weighted else np.ones(2)
    return loss_by_hand(logits, labels, weights, smoothing)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_loss_is_what_the_formula_says_and_that_of_held_out_cells_is_plain(corpus, tmp_path, options):
    training = one_step(tmp_path, per_device_train_batch_size=30, learning_rate=0.0, **options)
    trainer = make_classifier_trainer(corpus, training)
    assert len(trainer.train_dataset) == 30
    is_weighted, smoothing = "class_weights" in options, options.get("label_smoothing_factor", 0)
    expected = expected_loss(trainer, "train", is_weighted=is_weighted, smoothing=smoothing)
    plain = expected_loss(trainer, "train", is_weighted=False, smoothing=0)
    assert expected != pytest.approx(plain, rel=1e-3)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    held_out = expected_loss(trainer, "validation", is_weighted=False, smoothing=0)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(held_out, rel=1e-5)


@pytest.mark.parametrize("options", OPTIONS[1:])
def test_accumulation_changes_neither_loss_nor_gradient(corpus, tmp_path, options):
    def step(batch_size, accumulation):
        training = one_step(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            learning_rate=0.0,
            **options,
        )
        trainer = make_classifier_trainer(corpus, training)
        trainer.train()
        return trainer.state.log_history[0]

    # Six batches whose shares of the rare type differ.
    whole, accumulated = step(30, 1), step(5, 6)
    assert accumulated["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert accumulated["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_label_smoothing_reaches_pretraining(corpus, tmp_path, smoothing):
    trainer = make_trainer(corpus, tmp_path, label_smoothing_factor=smoothing)
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = next(iter(trainer.get_train_dataloader()))
    is_masked = batch["labels"] != -100
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    log_probabilities = trainer.model(**inputs).logits.log_softmax(-1)[is_masked]
    true = -log_probabilities.gather(1, batch["labels"][is_masked][:, None]).mean()
    expected = (1 - smoothing) * true - smoothing * log_probabilities.mean()
    found = trainer.compute_loss(trainer.model.train(), dict(batch), num_items_in_batch=is_masked.sum())
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    held_out = trainer.compute_loss(trainer.model.eval(), dict(batch), num_items_in_batch=is_masked.sum())
    assert held_out.item() == pytest.approx(true.item(), rel=1e-5)


def test_balanced_weights_make_every_class_count_the_same():
    labels = np.array(["beta"] * 6 + ["alpha"] * 3 + ["delta"])
    weights = balanced_weights(labels, {"delta": 0, "alpha": 1, "beta": 2})
    assert weights.tolist() == pytest.approx([10 / 3, 10 / 9, 10 / 18])
    per_class = weights * torch.tensor([1, 3, 6])
    assert per_class.tolist() == pytest.approx([10 / 3] * 3)
    assert per_class.sum().item() == pytest.approx(10)


def test_a_label_without_a_cell_has_no_weight():
    with pytest.raises(ValueError, match=r"class_weights='balanced' needs a training cell of every label; \['beta'\]"):
        balanced_weights(np.array(["alpha"]), {"alpha": 0, "beta": 1})


def test_a_batch_alone_is_divided_by_its_cells():
    loss = ClassWeightedLoss(torch.tensor([2.0, 0.5]))
    logits, labels = torch.zeros(3, 2), torch.tensor([0, 1, 1])
    assert loss({"logits": logits}, labels).item() == pytest.approx(np.log(2) * 3 / 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_weights": "inverse"}, "class_weights got 'inverse'; allowed are none, balanced"),
        ({"label_smoothing_factor": 1.0}, "label_smoothing_factor got 1.0; it must be at least 0 and below 1"),
        ({"label_smoothing_factor": -0.1}, "label_smoothing_factor got -0.1"),
    ],
)
def test_values_that_cannot_be_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **options)


def test_cells_that_only_keep_a_process_busy_count_for_nothing():
    loss = ClassWeightedLoss(torch.tensor([1.0, 3.0]), 0.1)
    logits, labels = torch.randn(3, 2), torch.tensor([0, 1, 1])
    filled = {"logits": torch.cat([logits, torch.randn(1, 2)])}
    torch.testing.assert_close(loss(filled, torch.tensor([0, 1, 1, -100])), loss({"logits": logits}, labels))
    assert loss({"logits": logits}, torch.full((3,), -100)) == 0
