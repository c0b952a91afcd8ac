import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from screformer import ScReformerForCellClassification, ScReformerForMaskedLM, ScReformerModel
from screformer.modeling_screformer import sinusoidal_positions

ATOL = 1e-5


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    return ScReformerModel(tiny_config()).eval()


@pytest.fixture
def classifier(tiny_config):
    torch.manual_seed(0)
    return ScReformerForCellClassification(tiny_config()).eval()


@torch.no_grad()
def test_a_cell_gives_the_same_output_alone_and_in_any_batch(model, random_cells):
    cells = random_cells(5)
    together = model(cells)
    for row in range(5):
        alone = model(cells[row : row + 1])
        torch.testing.assert_close(together.last_hidden_state[row], alone.last_hidden_state[0], atol=ATOL, rtol=0)
        torch.testing.assert_close(together.cell_embedding[row], alone.cell_embedding[0], atol=ATOL, rtol=0)


@torch.no_grad()
def test_row_order_only_moves_rows(model, random_cells):
    cells, order = random_cells(5), torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(
        model(cells[order]).last_hidden_state, model(cells).last_hidden_state[order], atol=ATOL, rtol=0
    )


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 1, 40])
def test_padding_does_not_change_other_genes(model, random_cells, expressed, padding):
    cells = random_cells(4)
    padded = expressed(cells, padding)
    together = model(**padded)
    for row in range(4):
        length = int(padded["attention_mask"][row].sum())
        alone = model(padded["input_ids"][row, None, :length], padded["gene_ids"][row, None, :length])
        torch.testing.assert_close(
            together.last_hidden_state[row, :length], alone.last_hidden_state[0], atol=ATOL, rtol=0
        )
        torch.testing.assert_close(together.cell_embedding[row], alone.cell_embedding[0], atol=ATOL, rtol=0)
        assert not together.last_hidden_state[row, length:].any()


@torch.no_grad()
def test_padding_may_stand_anywhere(model, random_cells, expressed):
    right = expressed(random_cells(3), padding=5)
    left = {name: tensor.flip(1) for name, tensor in right.items()}
    torch.testing.assert_close(
        model(**left).last_hidden_state.flip(1), model(**right).last_hidden_state, atol=ATOL, rtol=0
    )


@torch.no_grad()
def test_permuting_a_cells_genes_changes_nothing(model, random_cells, expressed):
    batch = expressed(random_cells(3), padding=3)
    order = torch.stack(
        [torch.randperm(batch["input_ids"].shape[1], generator=torch.Generator().manual_seed(row)) for row in range(3)]
    )
    shuffled = {name: tensor.gather(1, order) for name, tensor in batch.items()}
    expected, output = model(**batch), model(**shuffled)
    gathered = expected.last_hidden_state.gather(1, order.unsqueeze(-1).expand(-1, -1, 16))
    torch.testing.assert_close(output.last_hidden_state, gathered, atol=ATOL, rtol=0)
    torch.testing.assert_close(output.cell_embedding, expected.cell_embedding, atol=ATOL, rtol=0)


@torch.no_grad()
def test_full_cells_need_no_gene_ids(model, random_cells):
    cells = random_cells(2)
    everything = torch.arange(60).expand(2, -1)
    with_ids = model(cells, everything, torch.ones_like(cells))
    torch.testing.assert_close(model(cells).last_hidden_state, with_ids.last_hidden_state, atol=ATOL, rtol=0)


@torch.no_grad()
def test_the_classifier_reads_expressed_cells_in_any_batch_and_gene_order(classifier, random_cells, expressed):
    batch = expressed(random_cells(4), padding=9)
    logits = classifier(**batch).logits
    assert logits.std(0).min() > 0  # the head does look at the cell
    for row in range(4):
        length = int(batch["attention_mask"][row].sum())
        order = torch.randperm(length, generator=torch.Generator().manual_seed(row))
        alone = classifier(batch["input_ids"][row, order][None], batch["gene_ids"][row, order][None]).logits
        torch.testing.assert_close(alone[0], logits[row], atol=ATOL, rtol=0)


@torch.no_grad()
def test_the_cell_embedding_is_the_mean_over_expressed_genes(model, random_cells):
    cells = random_cells(1)
    output = model(cells)
    expected = output.last_hidden_state[0, cells[0] > 0].mean(0)
    torch.testing.assert_close(output.cell_embedding[0], expected)


@torch.no_grad()
def test_a_cell_without_expressed_genes_stays_finite(model):
    output = model(torch.zeros(1, 60, dtype=torch.long))
    assert output.last_hidden_state.isfinite().all()
    assert not output.cell_embedding.any()


def test_gradients_flow_in_eval_mode_and_equal_the_plain_twin(classifier, random_cells):
    cells = random_cells(2)
    embeddings = classifier.get_input_embeddings()(cells).detach().requires_grad_()

    def gradient(reversible):
        classifier.config.reversible = reversible
        logits = classifier(input_ids=cells, inputs_embeds=embeddings).logits
        return torch.autograd.grad(logits[:, 1].sum(), embeddings)[0]

    ours, plain = gradient(True), gradient(False)
    assert not classifier.training
    assert plain.abs().max() > 0
    torch.testing.assert_close(ours, plain, atol=1e-3 * plain.abs().max().item(), rtol=0)


@torch.no_grad()
def test_forward_does_not_touch_the_global_random_state(model, classifier, random_cells):
    cells, before = random_cells(2), torch.get_rng_state()
    model(cells)
    classifier(cells)
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_forward_writes_nothing_but_its_outputs(classifier, random_cells):
    config = classifier.config.to_dict()
    state = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    classifier(random_cells(2), labels=torch.tensor([0, 1]))
    assert classifier.config.to_dict() == config
    assert all(torch.equal(tensor, state[name]) for name, tensor in classifier.state_dict().items())


@torch.no_grad()
def test_long_buckets_make_lsh_exact(tiny_config, random_cells):
    torch.manual_seed(0)
    lsh = ScReformerModel(tiny_config(bucket_size=64)).eval()
    exact = ScReformerModel(tiny_config(bucket_size=64, attention="exact")).eval()
    exact.load_state_dict(lsh.state_dict())
    cells = random_cells(3)
    torch.testing.assert_close(lsh(cells).last_hidden_state, exact(cells).last_hidden_state, atol=ATOL, rtol=0)


@torch.no_grad()
def test_input_embeddings_replace_bins_and_keep_genes(model, random_cells):
    cells = random_cells(2)
    embedded = model.get_input_embeddings()(cells)
    output = model(input_ids=cells, inputs_embeds=embedded)
    torch.testing.assert_close(output.cell_embedding, model(cells).cell_embedding)


@torch.no_grad()
def test_hidden_states_end_with_the_last_one(model, random_cells):
    cells = random_cells(2)
    output = model(cells, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    torch.testing.assert_close(output.hidden_states[-1], model(cells).last_hidden_state, atol=0, rtol=0)
    assert isinstance(model(cells, return_dict=False), tuple)


def test_gradients_reach_the_first_hidden_state(model, random_cells):
    output = model(random_cells(2), output_hidden_states=True)
    output.hidden_states[0].retain_grad()
    output.cell_embedding[:, 0].sum().backward()
    assert output.hidden_states[0].grad.abs().max() > 0


def test_positions_are_the_textbooks_sinusoids():
    table = sinusoidal_positions(50, 8)
    position, pair = 37, 2
    angle = torch.tensor(position / 10_000 ** (2 * pair / 8))
    torch.testing.assert_close(table[position, 2 * pair : 2 * pair + 2], torch.stack([angle.sin(), angle.cos()]))


def test_gene_vectors_start_the_gene_embeddings_where_known(model):
    weight = model.embeddings.gene_embeddings.weight
    before = weight.detach().clone()
    vectors = torch.randn(60, 16, generator=torch.Generator().manual_seed(2)) * 40
    vectors[7] = float("nan")
    model.set_gene_embeddings(vectors)
    torch.testing.assert_close(weight[7], before[7])
    known = torch.arange(60) != 7
    assert weight[known].std().item() == pytest.approx(0.5, rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(weight[known], vectors[known])
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    with pytest.raises(ValueError, match=r"vectors got shape \(3, 16\)"):
        model.set_gene_embeddings(vectors[:3])


# Losses: two of the library's silent traps. By its class name the cell head would get the loss of causal language
# models, which shifts labels; and a head that hides num_items_in_batch gets gradients times the accumulation steps.


def test_the_cell_head_has_the_unshifted_classification_loss(classifier, random_cells):
    labels = torch.tensor([2, 0, 1])
    output = classifier(random_cells(3), labels=labels)
    assert classifier.loss_type == "ForSequenceClassification"
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))


def test_the_masked_head_has_the_unshifted_loss_over_masked_genes(tiny_config, random_cells):
    torch.manual_seed(0)
    model = ScReformerForMaskedLM(tiny_config()).eval()
    cells = random_cells(3)
    labels = torch.full_like(cells, -100)
    labels[:, 5::7] = cells[:, 5::7]
    output = model(cells, labels=labels)
    assert output.logits.shape == (3, 60, 6)
    is_masked = labels >= 0
    expected = torch.nn.functional.cross_entropy(output.logits[is_masked], labels[is_masked])
    torch.testing.assert_close(output.loss, expected)


def test_losses_honour_the_number_of_items_over_accumulated_batches(tiny_config, random_cells):
    torch.manual_seed(0)
    cells, labels = random_cells(4), torch.tensor([2, 0, 1, 1])
    classifier = ScReformerForCellClassification(tiny_config()).eval()
    whole = classifier(cells, labels=labels).loss
    parts = [
        classifier(cells[i : i + 2], labels=labels[i : i + 2], num_items_in_batch=torch.tensor(4)).loss for i in (0, 2)
    ]
    torch.testing.assert_close(sum(parts), whole)
    masked = ScReformerForMaskedLM(tiny_config()).eval()
    bins = torch.where(torch.arange(60) % 3 == 0, cells, -100)
    count = (bins >= 0).sum()
    whole = masked(cells, labels=bins).loss
    parts = [masked(cells[i : i + 2], labels=bins[i : i + 2], num_items_in_batch=count).loss for i in (0, 2)]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "input_ids and inputs_embeds are both None"),
        ({"input_ids": torch.zeros(60, dtype=torch.long)}, r"input_ids got shape \(60,\)"),
        ({"input_ids": torch.zeros(2, 59, dtype=torch.long)}, "got 59 genes a cell and no gene_ids"),
        ({"input_ids": torch.full((1, 60), 8)}, "input_ids got 8 to 8; this model knows 0 to 7"),
        (
            {"input_ids": torch.zeros(1, 3, dtype=torch.long), "gene_ids": torch.tensor([[1, 2, 60]])},
            "gene_ids got 1 to 60; this model knows 0 to 59",
        ),
        (
            {"input_ids": torch.zeros(1, 3, dtype=torch.long), "gene_ids": torch.tensor([[1, 2]])},
            r"gene_ids got shape \(1, 2\)",
        ),
        ({"inputs_embeds": torch.zeros(1, 60, 8)}, r"must be \(1, 60, 16\)"),
        ({"input_ids": torch.zeros(1, 60, dtype=torch.long), "output_attentions": True}, "never builds"),
    ],
)
def test_wrong_input_is_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**arguments)


def test_every_checkpoint_opens_in_every_head(tmp_path, tiny_config, random_cells):
    torch.manual_seed(0)
    cells = random_cells(2)
    classes = {
        "base": ScReformerModel,
        "masked": ScReformerForMaskedLM,
        "cells": ScReformerForCellClassification,
    }
    for saved, saved_class in classes.items():
        original = saved_class(tiny_config()).eval()
        original.save_pretrained(tmp_path / saved)
        encoder = getattr(original, "screformer", original)
        expected = encoder(cells).last_hidden_state
        for opened_class in classes.values():
            opened = opened_class.from_pretrained(tmp_path / saved).eval()
            opened_encoder = getattr(opened, "screformer", opened)
            torch.testing.assert_close(opened_encoder(cells).last_hidden_state, expected, atol=0, rtol=0)


def test_auto_classes_need_no_trust_with_the_package(tmp_path, tiny_config, random_cells):
    torch.manual_seed(0)
    model = ScReformerForMaskedLM(tiny_config()).eval()
    model.save_pretrained(tmp_path)
    opened = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(opened) is ScReformerForMaskedLM
    torch.testing.assert_close(opened(random_cells(2)).logits, model(random_cells(2)).logits, atol=0, rtol=0)
    assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path)) is ScReformerForCellClassification


def test_a_checkpoint_keeps_rotations_and_restores_positions(tmp_path, tiny_config):
    torch.manual_seed(0)
    model = ScReformerModel(tiny_config())
    model.encoder.layers[0].attention.rotations.mul_(-1)
    model.save_pretrained(tmp_path)
    opened = ScReformerModel.from_pretrained(tmp_path)
    assert torch.equal(opened.encoder.layers[0].attention.rotations, model.encoder.layers[0].attention.rotations)
    assert torch.equal(opened.embeddings.positions, sinusoidal_positions(60, 16))


def test_bins_cannot_be_resized(classifier):
    assert classifier.resize_token_embeddings() is classifier.get_input_embeddings()
    with pytest.raises(ValueError, match="new_num_tokens got 20; tokens are the 6 expression bins"):
        classifier.resize_token_embeddings(20)
