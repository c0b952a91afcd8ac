"""The GPU kernels, run on the CPU by Triton's interpreter (see conftest.py), against the plain form in float64."""

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from screformer import lsh_attention as lsh_attention_module
from screformer import lsh_attention_triton
from screformer.lsh_attention import lsh_attention
from screformer.lsh_attention_triton import (
    _as_rows,
    triton_attention,
    triton_sign_codes,
    triton_sign_order,
    why_not_triton,
)
from screformer.lsh_hashing import FINER_COLUMNS, _sign_buckets, draw_rotations, lsh_order

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    why_not_triton(CPU, 16, 16) is not None, reason="needs Triton's interpreter, and no GPU in its place"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(batch, heads, length, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query_key, value, gradient = (
        torch.randn(batch, length, heads, width, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)
    )
    return query_key, value, gradient


def make_mask(batch, length, seed=0):
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.7
    mask[:, length // 2] = True
    return mask


def differentiate(implementation, query_key, value, gradient, **options):
    """Return output and gradients."""
    query_key, value = (tensor.detach().clone().requires_grad_() for tensor in (query_key, value))
    output = lsh_attention(query_key, value, implementation=implementation, **options)
    output.backward(gradient)
    return output.detach(), query_key.grad, value.grad


def error(result, expected):
    return float(
        (result.double() - expected).norm() / expected.norm().clamp(min=1.0)
    )  # one token alone has no gradient


def check_against_the_plain_form(query_key, value, gradient, *, rounds, bucket_size, mask=None, floor=None):
    rotations = draw_rotations(rounds, query_key.shape[-1], 12, seed=1)
    order = lsh_order(query_key, rotations, bucket_size=bucket_size, attention_mask=mask, hashing="sign")
    options = {"rotations": rotations, "bucket_size": bucket_size, "attention_mask": mask, "order": order}
    exact = differentiate("reference", query_key.double(), value.double(), gradient.double(), **options)
    plain = differentiate("reference", query_key, value, gradient, **options)
    ours = differentiate("triton", query_key, value, gradient, **options)
    # Rounding of results alone; the interpreter cuts bfloat16 off instead of rounding it.
    floor = floor or {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[query_key.dtype]
    for result, rough, expected in zip(ours, plain, exact, strict=True):
        assert result.dtype == query_key.dtype
        assert error(result, expected) <= max(2 * error(rough, expected), floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 20, 32, 64])
def test_outputs_and_gradients_are_those_of_the_plain_form(width, dtype):
    check_against_the_plain_form(*make(2, 2, 75, width, dtype), rounds=2, bucket_size=16, mask=make_mask(2, 75))


@settings(max_examples=12, deadline=None, phases=[Phase.generate])  # shrinking takes minutes
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    length=st.integers(1, 70),
    rounds=st.integers(1, 3),
    bucket_size=st.sampled_from([16, 32]),
    is_padded=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_shape_gives_the_numbers_of_the_plain_form(batch, heads, length, rounds, bucket_size, is_padded, seed):
    mask = make_mask(batch, length, seed) if is_padded else None
    tensors = make(batch, heads, length, 20, torch.float32, seed)
    check_against_the_plain_form(*tensors, rounds=rounds, bucket_size=bucket_size, mask=mask)


@pytest.mark.parametrize("kind", ["equal", "repeated", "zero", "long", "lonely"])
def test_odd_keys(kind):
    query_key, value, gradient = make(1, 1, 40, 16, torch.float32)
    mask = None
    if kind == "equal":
        query_key = query_key[:, :, :1].expand_as(query_key)
    elif kind == "repeated":
        query_key = query_key[:, :, torch.arange(40) % 5]
    elif kind == "zero":
        query_key = query_key.clone()
        query_key[:, :, 3] = 0
        gradient = gradient.clone()
        value = value[:, :, :1].expand_as(value)  # or the gradient through a zero key's length is 1e12
    elif kind == "long":  # scores of hundreds: any shift but the largest score's would overflow or vanish
        query_key = 300 * query_key
    else:
        mask = torch.zeros(1, 40, dtype=torch.bool)
        mask[0, 7] = True
    floor = 1e-5 if kind == "long" else None  # what rounding leaves of scores of hundreds
    check_against_the_plain_form(query_key, value, gradient, rounds=2, bucket_size=16, mask=mask, floor=floor)


def test_every_element_is_written(monkeypatch):
    """Memory that kernels get is poisoned; where there is no padding nothing clears it first."""
    query_key, value, gradient = make(1, 2, 50, 20, torch.float32)
    rotations = draw_rotations(3, 20, 12, seed=1)
    options = {"rotations": rotations, "bucket_size": 16, "hashing": "sign"}
    expected = differentiate("triton", query_key, value, gradient, **options)

    def poisoned(make_empty):
        def make_poisoned(*arguments, **keywords):
            memory = make_empty(*arguments, **keywords)
            return memory.fill_(math.nan) if memory.is_floating_point() else memory

        return make_poisoned

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(lsh_attention_triton.torch, "empty_like", poisoned(torch.empty_like))
    for result, known in zip(differentiate("triton", query_key, value, gradient, **options), expected, strict=True):
        assert torch.equal(result, known)


def test_padding_is_zero_and_what_it_holds_does_not_matter():
    query_key, value, gradient = make(2, 1, 45, 16, torch.float32)
    mask = make_mask(2, 45)
    rotations = draw_rotations(2, 16, 12, seed=1)
    options = {"rotations": rotations, "bucket_size": 16, "attention_mask": mask, "hashing": "sign"}
    expected = differentiate("triton", query_key, value, gradient, **options)
    hidden = ~mask[:, None, :, None].expand_as(value)
    spoiled = (tensor.masked_fill(hidden, math.nan) for tensor in (query_key, value, gradient))
    for result, known in zip(differentiate("triton", *spoiled, **options), expected, strict=True):
        assert torch.equal(result, known)
        assert not result[hidden].any()


def test_the_same_cell_gives_the_same_bits_in_any_batch():
    query_key, value, gradient = make(3, 2, 45, 20, torch.float32)
    mask = make_mask(3, 45)
    mask[1, 30:] = False
    rotations = draw_rotations(2, 20, 12, seed=1)
    options = {"rotations": rotations, "bucket_size": 16, "hashing": "sign"}
    together = differentiate("triton", query_key, value, gradient, attention_mask=mask, **options)
    alone = differentiate(
        "triton",
        *(tensor[1:2, :, :30] for tensor in (query_key, value, gradient)),
        attention_mask=mask[1:2, :30],
        **options,
    )
    for result, known in zip(together, alone, strict=True):
        assert torch.equal(result[1:2, :, :30], known)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hash_codes_are_those_of_the_plain_form(dtype):
    query_key, *_ = make(2, 2, 90, 20, dtype)
    rotations = draw_rotations(3, 20, 9, seed=1)
    codes = triton_sign_codes(query_key, rotations, torch.tensor([9, 5], dtype=torch.int32))
    for cell, columns in enumerate((9, 5)):
        projected = query_key[cell].double() @ rotations[..., :columns].double().permute(1, 0, 2).reshape(20, -1)
        is_clear = (projected.abs() > 1e-4).unflatten(-1, (3, columns)).all(dim=-1).transpose(1, 2)
        expected = _sign_buckets(query_key[cell].float(), rotations[..., :columns])
        assert is_clear.float().mean() > 0.9
        assert torch.equal(codes[cell][is_clear], expected[is_clear])


def test_the_order_is_that_of_the_plain_form_and_puts_padding_last():
    query_key, *_ = make(3, 2, 90, 20, torch.float32)
    mask = make_mask(3, 90)
    mask[1, 10:] = False
    mask[1, 2] = True
    rotations = draw_rotations(2, 20, 7, seed=1)
    options = {"bucket_size": 16, "attention_mask": mask}
    order = triton_sign_order(query_key, rotations, finer_columns=FINER_COLUMNS, **options)
    assert order.dtype == torch.int32
    assert torch.equal(order, lsh_order(query_key, rotations, hashing="sign", **options))
    for cell, length in enumerate(mask.sum(dim=-1).tolist()):
        assert mask[cell][order[cell, ..., :length].long()].all()


@pytest.mark.parametrize(
    ("bucket_size", "head_dim", "reason"), [(48, 16, "power of two"), (8, 16, "from 16"), (16, 256, "256 wide")]
)
def test_shapes_that_the_kernels_do_not_take_are_named(bucket_size, head_dim, reason):
    query_key, value, _ = make(1, 1, 20, head_dim, torch.float32)
    rotations = draw_rotations(1, head_dim, 4, seed=1)
    with pytest.raises(ValueError, match=f"'triton' cannot run: .*{reason}.*Use 'auto'"):
        lsh_attention(query_key, value, rotations, bucket_size=bucket_size, implementation="triton")


def test_double_precision_is_refused():
    query_key, value, _ = make(1, 1, 20, 16, torch.float64)
    order = torch.arange(20).expand(1, 1, 1, 20)
    with pytest.raises(TypeError, match="float64"):
        triton_attention(query_key, value, order, bucket_size=16)


@pytest.mark.parametrize("cause", ["missing", "old", "cpu"])
def test_where_the_kernels_cannot_run_the_reason_is_said(monkeypatch, cause):
    device = torch.device("cuda", 0)
    if cause == "missing":
        monkeypatch.setattr(lsh_attention_triton, "triton", None)
        expected = "not installed"
    elif cause == "old":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla P100")
        expected = "Tesla P100 is older"
    else:
        device = CPU
        monkeypatch.setattr(lsh_attention_triton, "is_interpreted", lambda: False)
        expected = "on the CPU"
    assert expected in why_not_triton(device, 64, 20)


def test_auto_takes_the_blocked_form_with_one_line_where_the_kernels_cannot_run(monkeypatch, caplog):
    class OnDevice:
        device, dtype, shape = torch.device("meta"), torch.float32, (1, 1, 20, 16)

    lsh_attention_module._say_once.cache_clear()
    monkeypatch.setattr(lsh_attention_module, "why_not_triton", lambda *_: "Triton is not installed")
    for _ in range(2):
        assert not lsh_attention_module._takes_triton(OnDevice, 64, "auto")
    assert [record.message for record in caplog.records] == [
        "LSH attention runs without its GPU kernels, slower: Triton is not installed"
    ]
    monkeypatch.setattr(lsh_attention_module, "why_not_triton", lambda *_: None)
    assert lsh_attention_module._takes_triton(OnDevice, 64, "auto")
    assert not lsh_attention_module._takes_triton(torch.zeros(1, 1, 20, 16), 64, "auto")  # a CPU has its own


def test_a_model_learns_with_the_kernels_as_without(monkeypatch):
    from screformer import ScReformerConfig, ScReformerForMaskedLM
    from screformer import modeling_screformer as modeling

    config = ScReformerConfig.preset(
        "tiny", num_genes=60, hidden_size=32, num_attention_heads=2, bucket_size=16, num_hidden_layers=2
    )
    batch = {"input_ids": torch.randint(0, 5, (2, 60), generator=torch.Generator().manual_seed(0))}
    batch["labels"] = batch["input_ids"].clone()
    results = []
    for implementation in ("blocked", "triton"):
        torch.manual_seed(0)
        model = ScReformerForMaskedLM(config).eval()
        monkeypatch.setattr(
            modeling,
            "lsh_attention",
            lambda *arguments, chosen=implementation, **options: lsh_attention(
                *arguments, **{**options, "implementation": chosen}
            ),
        )
        loss = model(**batch).loss
        loss.backward()
        results.append((loss.detach(), [parameter.grad for parameter in model.parameters()]))
    (loss, gradients), (other_loss, other_gradients) = results
    assert loss == pytest.approx(float(other_loss), rel=1e-6)
    for gradient, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-7)


def test_vectors_that_lie_too_far_apart_for_offsets_of_32_bits_are_put_together():
    near, far = (torch.empty_strided((1, 2, 1024, 16), (16, 16, stride, 1), device="meta") for stride in (2**20, 2**21))
    assert _as_rows(near) is near
    assert _as_rows(far).stride() == (2 * 1024 * 16, 1024 * 16, 16, 1)
    assert _as_rows(near.transpose(2, 3)).stride(-1) == 1
