import os
import subprocess
import sys

import pytest
import torch

from screformer import ScReformerForCellClassification, ScReformerModel, token_blocks
from screformer.modeling_screformer import ScReformerLayer
from screformer.reversible import ReversibleSequence, TokenOrders, _RandomState


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


def test_dropout_of_an_apple_gpu_is_replayed_with_its_own_random_state(monkeypatch):
    states = [torch.tensor([7])]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: states[-1])
    monkeypatch.setattr(torch.mps, "set_rng_state", states.append)
    device, before = torch.device("mps"), torch.get_rng_state()
    captured = _RandomState.capture(device)
    states.append(torch.tensor([8]))
    torch.rand(1)
    after = torch.get_rng_state()
    with captured.replay(device):
        assert (states[-1].item(), torch.equal(torch.get_rng_state(), before)) == (7, True)
    assert (states[-1].item(), torch.equal(torch.get_rng_state(), after)) == (8, True)


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


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(token_blocks, "CPU_ATTENTION_TOKENS", 13)
    monkeypatch.setattr(token_blocks, "CPU_FEED_FORWARD_TOKENS", 5)


@pytest.mark.parametrize("reversible", [True, False])
def test_blocks_change_neither_output_nor_gradient(tiny_config, hidden_states, mask, reversible, monkeypatch):
    module, keep = sequence(tiny_config), mask[..., None].double()

    def run():
        leaf = hidden_states.clone().requires_grad_()
        first, second = module(leaf, mask, reversible=reversible)
        # Padding's own output depends on the blocks: nothing that a model returns looks at it.
        loss = (first * keep).square().sum() + (second * keep).square().sum()
        return first[mask], *torch.autograd.grad(loss, [leaf, *module.parameters()])

    whole = run()
    monkeypatch.setattr(token_blocks, "CPU_ATTENTION_TOKENS", 13)
    monkeypatch.setattr(token_blocks, "CPU_FEED_FORWARD_TOKENS", 5)
    for ours, theirs in zip(run(), whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def test_dropout_is_replayed_block_by_block(tiny_config, hidden_states, mask, small_blocks):
    module = sequence(tiny_config, dropout=0.3).train()
    output, reversible = gradients(module, hidden_states, mask, reversible=True)
    plain_output, plain = gradients(module, hidden_states, mask, reversible=False)
    torch.testing.assert_close(output, plain_output, atol=0, rtol=0)
    for ours, theirs in zip(reversible, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def test_short_cells_do_not_pay_for_long_ones(tiny_config, small_blocks):
    def tokens_fed(lengths):
        module, fed = sequence(tiny_config, layers=1), []
        module.layers[0].feed_forward.register_forward_hook(lambda _, inputs, __: fed.append(inputs[0].shape[:2]))
        mask = torch.arange(13) < torch.tensor(lengths)[:, None]
        with torch.no_grad():
            module(torch.zeros(len(lengths), 13, 8, dtype=torch.float64), mask)
        return sum(cells * tokens for cells, tokens in fed)

    assert tokens_fed([13, 2, 2, 2]) == 13 + 3 * 2
    assert tokens_fed([13, 13, 13, 13]) == 4 * 13


def test_the_gradient_and_the_users_tensors_are_left_alone(tiny_config, hidden_states):
    module = sequence(tiny_config)
    first, second = module(hidden_states.requires_grad_())
    outputs, grads = (first.clone(), second.clone()), (torch.ones_like(first), torch.ones_like(second))
    torch.autograd.backward((first, second), grads)
    assert torch.equal(first, outputs[0])
    assert torch.equal(second, outputs[1])
    assert all(torch.equal(grad, torch.ones_like(grad)) for grad in grads)


def test_backward_inside_autocast_still_reaches_the_weights(tiny_config, random_cells):
    # Weights that were cast in the forward pass, which has no graph, must not be taken from autocast's cache.
    torch.manual_seed(0)
    model = ScReformerModel(tiny_config(hidden_dropout_prob=0.0)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(random_cells(2)).cell_embedding.sum().backward()
    weights = [layer.feed_forward[0].weight for layer in model.encoder.layers]
    weights += [layer.attention.value.weight for layer in model.encoder.layers]
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in weights)


@pytest.mark.filterwarnings("ignore")  # torch's own, about its compiler
def test_compiling_the_model_breaks_the_graph_at_the_encoder_only(tiny_config, random_cells):
    model = ScReformerForCellClassification(tiny_config(hidden_dropout_prob=0.0)).eval()
    cells, labels = random_cells(2), torch.tensor([0, 2])
    plain = model(cells, labels=labels)
    explained = torch._dynamo.explain(model)(cells, labels=labels)
    (reason,) = explained.break_reasons
    assert "ReversibleSequence.forward" in reason.reason
    assert explained.graph_count == 3  # embeddings, end of the encoder, head
    compiled = torch.compile(model, backend="aot_eager")(cells, labels=labels)
    torch.testing.assert_close(compiled.logits, plain.logits)
    compiled.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


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


DISTRIBUTED_STEP = """
import sys
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from screformer import ScReformerConfig, ScReformerForCellClassification

rank, folder = int(sys.argv[1]), sys.argv[2]
store = distributed.FileStore(f"{folder}/store", 2)
distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
torch.manual_seed(0)
config = ScReformerConfig.preset("tiny", num_genes=100, num_labels=3, bucket_size=8, hidden_dropout_prob=0.0,
                                 classifier_dropout=0.0, classifier_hidden_sizes=[8, 8])
model = ScReformerForCellClassification(config).train()
cells = torch.randint(0, config.num_bins, (4, 100), generator=torch.Generator().manual_seed(1))
labels = torch.tensor([0, 1, 2, 1])
model(cells, labels=labels).loss.backward()
expected = [parameter.grad.clone() for parameter in model.parameters()]
model.zero_grad()
parallel = DistributedDataParallel(model)
own = slice(2 * rank, 2 * rank + 2)
for _ in range(2):  # the second step fails if a parameter was not ready once, and once only, in the first
    parallel.zero_grad()
    parallel(cells[own], labels=labels[own]).loss.backward()
for parameter, gradient in zip(model.parameters(), expected, strict=True):
    torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)
distributed.destroy_process_group()
"""


def test_two_processes_have_the_gradient_of_the_whole_batch(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", DISTRIBUTED_STEP, str(rank), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("mode", ["gradients", "inference"])
def test_token_orders_of_one_cell_are_those_of_later_passes(tiny_config, hidden_states, reversible, mode):
    module, cell, orders = sequence(tiny_config, num_hashes=3).eval(), hidden_states[:1], TokenOrders()

    def run(states, **given):
        states = states.clone().requires_grad_(mode == "gradients")
        with torch.set_grad_enabled(mode == "gradients"):
            return module(states, None, reversible=reversible, **given).first

    found = run(cell, token_orders=orders)
    torch.testing.assert_close(found, run(cell), atol=0, rtol=0)
    assert [order.shape for order in orders.layers] == [(1, module.layers[0].attention.num_heads, 3, 13)] * 3
    # Twice the same cell, and one whose own order would be another.
    other = cell + torch.randn(cell.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    kept = [order.clone() for order in orders.layers]
    first, second, third = run(torch.cat([cell, cell, other]), token_orders=orders)
    torch.testing.assert_close(torch.stack([first, second]), found.expand(2, -1, -1), atol=1e-12, rtol=1e-12)
    assert all(torch.equal(before, after) for before, after in zip(kept, orders.layers, strict=True))
    assert not torch.allclose(third, run(other)[0])
    own = TokenOrders()
    run(other, token_orders=own)
    assert not torch.equal(own.layers[0], orders.layers[0])


def test_gradients_by_given_token_orders_are_those_of_one_function(tiny_config, hidden_states):
    """With its order given, attention has no jumps: its gradient is that of finite differences."""
    module, orders = sequence(tiny_config, layers=2), TokenOrders()
    cell = hidden_states[:1]
    module(cell, None, token_orders=orders)
    other = (cell + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda states: tuple(module(states, None, token_orders=orders)), (other,))


def test_token_orders_refuse_other_cells(tiny_config, hidden_states):
    module, orders = sequence(tiny_config), TokenOrders()
    with pytest.raises(ValueError, match="token_orders is empty and the batch has 2 cells"):
        module(hidden_states, None, token_orders=orders)
    module(hidden_states[:1], None, token_orders=orders)
    with pytest.raises(ValueError, match="token_orders are of 13 tokens, the batch has 12"):
        module(hidden_states[:1, :12], None, token_orders=orders)


def test_exact_attention_has_no_token_orders(tiny_config, hidden_states):
    module, orders = sequence(tiny_config, attention="exact"), TokenOrders()
    first = module(hidden_states[:1], None, token_orders=orders).first
    assert orders.layers == [None] * 3
    torch.testing.assert_close(module(hidden_states[:1], None, token_orders=orders).first, first)
