"""What a user of transformers expects of any model, of the three classes: transformers' own tests need its source, see
test_transformers_common.py.
"""

import inspect

import pytest
import torch
from safetensors.torch import load_file, save_file

from screformer import ScReformerForCellClassification, ScReformerForMaskedLM, ScReformerModel
from screformer.configuration_screformer import CLASSIFIER_PATHS
from screformer.lsh_hashing import draw_rotations

CLASSES = [ScReformerModel, ScReformerForMaskedLM, ScReformerForCellClassification]
of_every_class = pytest.mark.parametrize("model_class", CLASSES)


@pytest.fixture
def build(tiny_config):
    """Return a function: class, options of the configuration -> a model with every path, in eval mode."""

    def make(model_class, **options):
        torch.manual_seed(0)
        return model_class(tiny_config(classifier_paths=list(CLASSIFIER_PATHS), **options)).eval()

    return make


@pytest.fixture
def batch(random_cells, expressed):
    """Return cells of different lengths, their genes in no order and the padding in between."""
    cells = expressed(random_cells(3), padding=2)
    order = torch.randperm(cells["input_ids"].shape[1], generator=torch.Generator().manual_seed(4))
    return {name: tensor[:, order] for name, tensor in cells.items()}


def tensors(output):
    """Return what a model gave as one tuple of tensors."""
    flat = []
    for value in output.values() if isinstance(output, dict) else output:
        flat.extend(value if isinstance(value, tuple) else [value])
    return flat


def assert_same(output, expected, **tolerance):
    found, wanted = tensors(output), tensors(expected)
    assert len(found) == len(wanted) > 0
    for tensor, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(tensor, other, **tolerance)


def labels_of(model, batch):
    if isinstance(model, ScReformerForMaskedLM):
        return {"labels": torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)}
    return {"labels": torch.tensor([2, 0, 1])} if isinstance(model, ScReformerForCellClassification) else {}


# Saving and loading


@torch.no_grad()
@of_every_class
@pytest.mark.parametrize("shard_size", ["5GB", "4KB"])
def test_a_saved_model_gives_the_same_outputs(model_class, shard_size, build, batch, tmp_path):
    model = build(model_class)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    files = {path.suffix for path in tmp_path.iterdir() if "model" in path.name} - {".py"}
    assert files == ({".safetensors"} if shard_size == "5GB" else {".safetensors", ".json"})  # the index of the shards
    opened = model_class.from_pretrained(tmp_path, device_map="cpu")
    assert not opened.training
    assert_same(opened(**batch), model(**batch), atol=0, rtol=0)


@torch.no_grad()
@of_every_class
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_loads_and_runs_in_half_precision(model_class, dtype, build, batch, tmp_path):
    model = build(model_class, attention="exact")  # LSH also moves tokens that lie between two buckets
    model.save_pretrained(tmp_path)
    half = model_class.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    for found, wanted in zip(tensors(half(**batch)), tensors(model(**batch)), strict=True):
        assert found.dtype == dtype
        # A handful of roundings a layer.
        assert (found.float() - wanted).norm() < 8 * torch.finfo(dtype).eps * wanted.norm()


def test_half_precision_trains(build, batch, tmp_path):
    build(ScReformerForCellClassification).save_pretrained(tmp_path)
    half = ScReformerForCellClassification.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    half(**batch, **labels_of(half, batch)).loss.backward()
    gradients = {name: parameter.grad for name, parameter in half.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())


def test_half_precision_keeps_buckets_and_centres_exact(build, tmp_path):
    model = build(ScReformerForCellClassification)
    model.classifier.pooled_path.center.uniform_()
    model.save_pretrained(tmp_path / "single")
    half = ScReformerForCellClassification.from_pretrained(tmp_path / "single", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    opened = ScReformerForCellClassification.from_pretrained(tmp_path / "half", dtype="auto")
    assert opened.dtype == torch.bfloat16
    buffers = dict(opened.named_buffers())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, atol=0, rtol=0)


def test_hash_directions_do_not_depend_on_the_default_precision():
    before = torch.get_default_dtype()
    expected = draw_rotations(2, 8, 5, seed=3)
    try:
        torch.set_default_dtype(torch.bfloat16)
        torch.testing.assert_close(draw_rotations(2, 8, 5, seed=3), expected, atol=0, rtol=0)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("model_class", CLASSES[1:])
def test_a_head_that_a_checkpoint_lacks_is_reported_and_nothing_else(model_class, build, tmp_path):
    build(ScReformerModel).save_pretrained(tmp_path)
    model, report = model_class.from_pretrained(
        tmp_path, classifier_paths=list(CLASSIFIER_PATHS), output_loading_info=True
    )
    assert set(report["missing_keys"]) == {name for name in model.state_dict() if not name.startswith("screformer.")}
    assert not report["unexpected_keys"]


def test_missing_and_unexpected_weights_are_reported(build, tmp_path):
    build(ScReformerForMaskedLM).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    layers = "screformer.encoder.layers"
    gone, strange = f"{layers}.1.feed_forward.0.weight", f"{layers}.7.attention_norm.bias"
    weights[strange] = weights.pop(gone).clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, report = ScReformerForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert (set(report["missing_keys"]), set(report["unexpected_keys"])) == ({gone}, {strange})
    weight = model.state_dict()[gone]
    assert weight.std() == pytest.approx(weight.shape[1] ** -0.5, rel=0.15)  # as a new model has it


def test_another_number_of_labels_is_refused_unless_asked_for(build, batch, tmp_path):
    model = build(ScReformerForCellClassification)
    model.save_pretrained(tmp_path)
    names = {number: f"type {number}" for number in range(5)}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        ScReformerForCellClassification.from_pretrained(tmp_path, id2label=names)
    opened, report = ScReformerForCellClassification.from_pretrained(
        tmp_path, id2label=names, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert opened(**batch).logits.shape == (3, 5)
    again = {key for key, *_ in report["mismatched_keys"]}
    outputs = (f"classifier.{path}_path.output.{kind}" for path in CLASSIFIER_PATHS for kind in ("weight", "bias"))
    assert again == set(outputs)
    state = opened.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items() if name not in again)


@of_every_class
def test_layers_that_must_stay_on_one_device_are_there(model_class, build):
    kinds = {type(module).__name__ for module in build(model_class).modules()}
    assert set(model_class._no_split_modules) <= kinds


# What a call takes and gives


def test_arguments_stand_in_the_documented_order():
    tokens = ["input_ids", "gene_ids", "attention_mask", "inputs_embeds"]
    rest = {"ScReformerModel": ["output_hidden_states", "token_orders"]}
    for model_class in CLASSES:
        _, *names = inspect.signature(model_class.forward).parameters
        expected = [*tokens, *rest.get(model_class.__name__, ["labels", "output_hidden_states"]), "kwargs"]
        assert names == expected


@torch.no_grad()
@of_every_class
def test_arguments_by_position_are_those_by_name(model_class, build, batch):
    model = build(model_class)
    assert_same(model(*batch.values()), model(**batch), atol=0, rtol=0)


@torch.no_grad()
@of_every_class
def test_a_tuple_holds_what_the_output_object_holds(model_class, build, batch):
    model = build(model_class)
    batch |= {"output_hidden_states": True} | labels_of(model, batch)
    expected = model(**batch)
    assert_same(model(**batch, return_dict=False), expected, atol=0, rtol=0)
    model.config.return_dict = False
    assert isinstance(model(**batch), tuple)
    assert_same(model(**batch), expected, atol=0, rtol=0)
    assert_same(model(**batch, return_dict=True), expected, atol=0, rtol=0)


@torch.no_grad()
@of_every_class
def test_hidden_states_are_the_embeddings_and_every_layer(model_class, build, batch):
    model = build(model_class, output_hidden_states=True)
    output = model(**batch)
    assert [states.shape for states in output.hidden_states] == [(*batch["input_ids"].shape, 16)] * 3
    assert model(**batch, output_hidden_states=False).hidden_states is None
    last = model.base_model(**batch).last_hidden_state
    torch.testing.assert_close(output.hidden_states[-1], last, atol=0, rtol=0)
    # A gene's first vector is its own: none depends on the genes beside it.
    alone = {name: tensor[:, :1] for name, tensor in batch.items()}
    torch.testing.assert_close(model(**alone).hidden_states[0], output.hidden_states[0][:, :1], atol=0, rtol=0)


@of_every_class
def test_gradients_reach_the_first_hidden_state_in_any_gene_order(model_class, build, batch):
    output = build(model_class)(**batch, output_hidden_states=True)
    first = output.hidden_states[0]
    first.retain_grad()
    output[0].square().sum().backward()
    assert (first.grad.abs().sum(-1) > 0).equal(batch["attention_mask"].bool())


@of_every_class
def test_attentions_are_refused_however_they_are_asked_for(model_class, build, batch):
    with pytest.raises(ValueError, match=r"output_attentions=True: .* Leave it out"):
        build(model_class)(**batch, output_attentions=True)
    asking = build(model_class, output_attentions=True)
    with pytest.raises(ValueError, match=r"output_attentions=True: .* Leave it out"):
        asking(**batch)
    asking(**batch, output_attentions=False)


@of_every_class
def test_activation_checkpointing_is_refused_with_the_reason(model_class, build):
    with pytest.raises(ValueError, match=rf"{model_class.__name__} got activation checkpointing, .* reversible=True"):
        build(model_class).activation_checkpointing_enable()


@torch.no_grad()
@of_every_class
def test_embedded_bins_are_as_good_as_bins(model_class, build):
    model = build(model_class)
    bins = torch.randint(1, 6, (3, 60), generator=torch.Generator().manual_seed(5))  # every gene is expressed
    embedded = model.get_input_embeddings()(bins)
    assert_same(model(inputs_embeds=embedded), model(bins))


@torch.no_grad()
@of_every_class
def test_other_input_embeddings_are_used(model_class, build, batch):
    model = build(model_class)
    before = tensors(model(**batch))[0]
    other = torch.nn.Embedding(8, 16)
    other.weight.copy_(model.get_input_embeddings().weight.flip(0))
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is model.base_model.get_input_embeddings() is other
    assert not torch.allclose(tensors(model(**batch))[0], before)


@of_every_class
def test_no_weights_are_tied(model_class, build):
    """Whatever the configuration says: bins that come in and bins that are predicted are not the same in number."""
    model = build(model_class, tie_word_embeddings=True)
    addresses = [tensor.data_ptr() for tensor in model.state_dict(keep_vars=True).values()]
    assert len(set(addresses)) == len(addresses)
    assert model.get_output_embeddings() is None


@torch.no_grad()
@of_every_class
def test_dropout_is_for_training_alone(model_class, build, batch):
    model = build(model_class)
    assert_same(model(**batch), model(**batch), atol=0, rtol=0)
    model.train()
    torch.manual_seed(1)
    assert not torch.equal(tensors(model(**batch))[0], tensors(model(**batch))[0])


# Kinds of labels


def test_a_cell_may_have_several_labels(build, batch):
    model = build(ScReformerForCellClassification, problem_type="multi_label_classification")
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    output = model(**batch, labels=labels)
    logits = output.logits.double()
    by_hand = -(labels * logits.sigmoid().log() + (1 - labels) * (1 - logits.sigmoid()).log()).mean()
    torch.testing.assert_close(output.loss, by_hand.float())


@pytest.mark.parametrize("num_labels", [1, 2])
def test_a_cell_may_have_numbers_for_labels(num_labels, build, batch):
    model = build(ScReformerForCellClassification, problem_type="regression", num_labels=num_labels)
    labels = torch.arange(3.0 * num_labels).reshape((3, num_labels) if num_labels > 1 else (3,))
    output = model(**batch, labels=labels)
    torch.testing.assert_close(output.loss, (output.logits.reshape(labels.shape) - labels).square().mean())


def test_one_label_is_a_number_unless_said_otherwise(build):
    assert build(ScReformerForCellClassification, num_labels=1).config.problem_type == "regression"
    assert build(ScReformerForCellClassification, num_labels=2).config.problem_type == "single_label_classification"


def test_one_label_is_nothing_to_choose_from(build, tmp_path):
    build(ScReformerForCellClassification).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"num_labels is 1 .* Give two labels or more, or problem_type='regression'"):
        ScReformerForCellClassification.from_pretrained(tmp_path, num_labels=1, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification", "regression"])
def test_losses_of_parts_of_a_step_add_up_to_that_of_the_step(problem_type, build, batch):
    model = build(ScReformerForCellClassification, problem_type=problem_type)
    labels = torch.tensor([0, 2, 1])
    if problem_type != "single_label_classification":
        labels = torch.nn.functional.one_hot(labels, 3).float()
    parts = [{name: tensor[rows] for name, tensor in batch.items()} for rows in (slice(0, 1), slice(1, 3))]
    by_part = [
        model(**part, labels=some, num_items_in_batch=torch.tensor(labels.numel())).loss
        for part, some in zip(parts, (labels[:1], labels[1:]), strict=True)
    ]
    torch.testing.assert_close(sum(by_part), model(**batch, labels=labels).loss)


@pytest.mark.parametrize(
    ("problem_type", "shape", "expected"),
    [
        (None, (3, 3), r"\(3,\)"),
        ("single_label_classification", (2,), r"\(3,\)"),
        ("multi_label_classification", (3,), r"\(3, 3\)"),
        ("regression", (3, 2), r"\(3, 3\)"),
    ],
)
def test_labels_of_another_shape_are_named(problem_type, shape, expected, build, batch):
    model = build(ScReformerForCellClassification, problem_type=problem_type)
    kind = problem_type or "single_label_classification"
    with pytest.raises(ValueError, match=rf"labels got shape .*problem_type='{kind}'.* it must be {expected}"):
        model(**batch, labels=torch.zeros(shape))
