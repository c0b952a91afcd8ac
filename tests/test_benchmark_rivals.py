from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from screformer.benchmarks import rivals
from screformer.benchmarks.measuring import STEPS, Shape, make_call
from screformer.benchmarks.rivals import ATTENTION, ENCODERS, OURS, choose_contestants

# 144 genes are nine chunks: reformer-pytorch, which wants an even number, pads within the call.
SHAPE = Shape(
    144, batch_size=2, num_layers=2, hidden_size=16, num_heads=2, intermediate_size=64, bucket_size=16, num_hashes=2
)
RIVALS = ("reformer_pytorch", "performer_pytorch")
EVERY = [(kind, name) for kind, table in (("attention", ATTENTION), ("encoder", ENCODERS)) for name in table]


def build(kind, name, shape=SHAPE):
    if name in RIVALS and find_spec(name) is None:
        pytest.skip(f"needs {name}")
    return (ATTENTION if kind == "attention" else ENCODERS)[name].build(shape, "cpu")


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_outputs_have_the_shape_of_the_inputs_and_every_input_and_parameter_gets_a_gradient(kind, name):
    workload = build(kind, name)
    output = workload.forward()
    width = SHAPE.hidden_size * (2 if (kind, name) == ("encoder", "transformers") else 1)  # both streams
    assert output.shape == workload.gradient.shape == (2, 144, width)
    assert output.dtype == workload.gradient.dtype
    assert output.isfinite().all()
    for step in STEPS:
        make_call(workload, step)()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in workload.inputs)
    assert all(tensor.grad is not None for tensor in workload.parameters)


def test_every_encoder_has_about_the_same_parameters():
    # The others have: a final norm (transformers), a separate key and biases (performer-pytorch).
    counts = {name: sum(each.numel() for each in build("encoder", name).parameters) for name in ENCODERS}
    assert counts["reformer_pytorch"] == counts[OURS]
    assert max(counts.values()) < 1.2 * min(counts.values())


@pytest.mark.parametrize("name", [name for name in ATTENTION if name != "performer_pytorch"])
def test_attention_over_equal_values_returns_them(name):
    # Whatever the weights are, they add up to one (not performer-pytorch's exactly): heads are merged rightly.
    workload = build("attention", name, replace(SHAPE, length=128))
    value = workload.inputs[1]
    value.copy_(value[:1, :1].expand_as(value))
    torch.testing.assert_close(workload.forward().float(), value.float(), atol=2e-2, rtol=0)


def test_building_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    for table in (ATTENTION, ENCODERS):
        table[OURS].build(SHAPE, "cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_library_that_is_missing_is_named_with_the_remedy():
    with pytest.raises(ImportError, match=r'no_such_library .*pip install "screformer\[benchmarks\]"'):
        rivals._import("no_such_library")


def test_contestants_keep_their_order_and_must_be_known_and_include_ours():
    assert list(choose_contestants(ATTENTION, ["exact", OURS])) == [OURS, "exact"]
    with pytest.raises(ValueError, match="got ours, nobody"):
        choose_contestants(ATTENTION, [OURS, "nobody"])
    with pytest.raises(ValueError, match="'ours' among them, got exact"):
        choose_contestants(ATTENTION, ["exact"])


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(rivals, "RIVAL_PACKAGES", ("torch", "no-such-package"))
    assert rivals.rival_versions() == {"torch": str(torch.__version__), "no-such-package": None}
