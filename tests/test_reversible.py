import pytest
import torch

from screformer import ScReformerForCellClassification, ScReformerModel
from screformer.modeling_screformer import ScReformerLayer
from screformer.reversible import ReversibleSequence


def sequence(tiny_config, *, dropout=0.0, layers=3, **overrides):
    torch.manual_seed(0)
    config = tiny_config(hidden_dropout_prob=dropout, hidden_size=8, intermediate_size=8, bucket_size=4, **overrides)
    return ReversibleSequence(ScReformerLayer(config, index) for index in range(layers)).double()


def gradients(module, hidden_states, mask, *, reversible, seed=3):
    """Return the output and the gradients of the input and of every parameter."""
    torch.manual_seed(seed)
    leaf = hidden_states.clone().requires_grad_()
    first, second = module(leaf, mask, reversible=reversible)
    loss = (first * torch.linspace(-1, 1, first.shape[-1])).sum() + second.square().sum()
    return first.detach(), torch.autograd.grad(loss, [leaf, *module.parameters()])


@pytest.fixture
def hidden_states():
    return torch.randn(2, 13, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def mask():
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[1, 9:] = False
    return mask


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("attention", ["lsh", "exact"])
def test_gradients_equal_plain_autograd_with_dropout_on(tiny_config, hidden_states, mask, attention, mode):
    module = sequence(tiny_config, dropout=0.3, attention=attention).train(mode == "train")
    output, reversible = gradients(module, hidden_states, mask, reversible=True)
    plain_output, plain = gradients(module, hidden_states, mask, reversible=False)
    torch.testing.assert_close(output, plain_output, atol=0, rtol=0)
    # The rebuilt inputs differ from the stored ones by rounding only.
    for ours, theirs in zip(reversible, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def test_gradcheck_in_float64_with_dropout_on(tiny_config, hidden_states):
    module = sequence(tiny_config, dropout=0.3, layers=2, attention="exact").train()

    def run(hidden_states, *parameters):
        torch.manual_seed(5)
        return tuple(module(hidden_states, None))

    inputs = (hidden_states[:1, :5].clone().requires_grad_(), *module.parameters())
    assert torch.autograd.gradcheck(run, inputs)


def test_the_forward_pass_keeps_only_the_last_layers_streams(tiny_config, hidden_states):
    def saved_bytes(layers, *, reversible):
        module = sequence(tiny_config, layers=layers)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            module(hidden_states.requires_grad_(), None, reversible=reversible)
        return sum(sizes)

    assert saved_bytes(6, reversible=True) == saved_bytes(1, reversible=True) == 2 * hidden_states.nbytes
    assert saved_bytes(6, reversible=False) > 5 * saved_bytes(1, reversible=False)


def test_buckets_of_the_forward_pass_are_replayed(tiny_config, hidden_states, monkeypatch):
    from screformer import modeling_screformer

    module, calls = sequence(tiny_config), []
    hash_once = modeling_screformer.lsh_order
    monkeypatch.setattr(
        modeling_screformer, "lsh_order", lambda *args, **kwargs: calls.append(1) or hash_once(*args, **kwargs)
    )
    gradients(module, hidden_states, None, reversible=True)
    assert len(calls) == 3  # one a layer, none in the backward pass


def test_backward_leaves_the_global_random_state_as_it_was(tiny_config, hidden_states):
    module = sequence(tiny_config, dropout=0.3).train()
    first, _ = module(hidden_states.requires_grad_())
    before = torch.get_rng_state()
    first.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_graph_may_use_the_module_twice_and_be_walked_twice(tiny_config, hidden_states, mask):
    module = sequence(tiny_config)
    leaf = hidden_states.clone().requires_grad_()

    def loss(reversible):
        return (
            module(leaf, mask, reversible=reversible).first.sum()
            * module(leaf.flip(0), None, reversible=reversible).second.sum()
        )

    ours = loss(True)
    first = torch.autograd.grad(ours, leaf, retain_graph=True)[0]
    second = torch.autograd.grad(ours, leaf)[0]
    expected = torch.autograd.grad(loss(False), leaf)[0]
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    torch.testing.assert_close(first, expected, atol=1e-10, rtol=1e-10)


def test_frozen_layers_get_no_gradient_and_pass_it_on(tiny_config, hidden_states):
    module = sequence(tiny_config)
    module.layers[1].requires_grad_(False)
    leaf = hidden_states.clone().requires_grad_()
    module(leaf).first.square().sum().backward()
    assert all(parameter.grad is None for parameter in module.layers[1].parameters())
    assert all(parameter.grad is not None for parameter in module.layers[0].parameters())
    assert leaf.grad.abs().sum() > 0


def test_every_parameter_accumulates_once(tiny_config, random_cells):
    # DistributedDataParallel marks a parameter ready at its first accumulation and fails at a second one.
    model = ScReformerForCellClassification(tiny_config()).train()
    counts = {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _, name=name: counts.__setitem__(name, counts.get(name, 0) + 1)
        )
    model(random_cells(2), labels=torch.tensor([0, 2])).loss.backward()
    assert set(counts) == {name for name, _ in model.named_parameters()}
    assert set(counts.values()) == {1}


def test_autocast_is_the_same_in_both_passes(tiny_config, random_cells):
    torch.manual_seed(0)
    model = ScReformerModel(tiny_config(hidden_dropout_prob=0.0)).train()

    def gradient(reversible):
        model.config.reversible = reversible
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(random_cells(2)).cell_embedding
        output.sum().backward()
        return model.embeddings.gene_embeddings.weight.grad.clone()

    ours, plain = gradient(True), gradient(False)
    assert plain.abs().max() > 0
    # Streams are rebuilt in float32 from bfloat16 branches: twice the rounding of one branch.
    torch.testing.assert_close(ours, plain, atol=2**-7 * plain.abs().max().item(), rtol=0)
