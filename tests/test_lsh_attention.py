from functools import partial

import numpy as np
import pytest
import torch

from oracles.slow_attention import slow_exact_attention, slow_lsh_attention
from screformer.lsh_attention import draw_rotations, exact_attention, lsh_attention, lsh_order
from screformer.lsh_hashing import HASHINGS

BUCKET = 8


@pytest.fixture(params=["reference", "blocked"])
def attend(request):
    """Return ``lsh_attention`` in one of its forms, for the laws that all of them keep."""
    return partial(lsh_attention, implementation=request.param)


def draw(batch=2, heads=3, length=50, width=6, rounds=2, columns=8, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    query_key, value = torch.randn(2, batch, heads, length, width, generator=generator, dtype=dtype).unbind(0)
    return query_key, value, draw_rotations(rounds, width, columns, seed=seed)


@pytest.mark.parametrize("hashing", HASHINGS)
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 17, 50, 130])
@pytest.mark.parametrize("rounds", [1, 3])
def test_attention_equals_the_token_by_token_definition(attend, hashing, length, rounds):
    query_key, value, rotations = draw(length=length, rounds=rounds)
    mask = torch.rand(2, length, generator=torch.Generator().manual_seed(1)) < 0.8
    result = attend(query_key, value, rotations, bucket_size=BUCKET, attention_mask=mask, hashing=hashing)
    for cell in range(2):
        for head in range(3):
            heads = query_key[cell, head].numpy(), value[cell, head].numpy()
            expected = slow_lsh_attention(*heads, rotations.double().numpy(), BUCKET, mask[cell], hashing)
            np.testing.assert_allclose(result[cell, head].numpy(), expected, atol=1e-10)


def test_exact_equals_the_token_by_token_definition_across_query_blocks(monkeypatch):
    monkeypatch.setattr("screformer.lsh_attention.EXACT_QUERY_BLOCK", 16)
    query_key, value, _ = draw(length=50)
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[1, 20:] = False
    result = exact_attention(query_key, value, attention_mask=mask)
    for cell in range(2):
        expected = slow_exact_attention(query_key[cell, 1].numpy(), value[cell, 1].numpy(), mask[cell])
        np.testing.assert_allclose(result[cell, 1].numpy(), expected, atol=1e-10)


def test_the_fastest_form_is_the_blocked_one():
    query_key, value, rotations = draw()
    by_default, blocked = (
        lsh_attention(query_key, value, rotations, bucket_size=BUCKET, **choice)
        for choice in ({}, {"implementation": "blocked"})
    )
    assert torch.equal(by_default, blocked)


@pytest.mark.parametrize("hashing", HASHINGS)
def test_hashing_is_that_of_lsh_order(attend, hashing):
    query_key, value, rotations = draw()
    order = lsh_order(query_key, rotations, bucket_size=BUCKET, hashing=hashing)
    given, hashed = (
        attend(query_key, value, rotations, bucket_size=BUCKET, **choice)
        for choice in ({"order": order}, {"hashing": hashing})
    )
    assert torch.equal(given, hashed)


@pytest.mark.parametrize("length", [1, 2, 31, 32])
def test_one_bucket_a_cell_equals_exact_attention(attend, length):
    query_key, value, rotations = draw(length=length)
    one_bucket = attend(query_key, value, rotations, bucket_size=32)
    torch.testing.assert_close(one_bucket, exact_attention(query_key, value), atol=1e-12, rtol=0)


def test_two_chunks_miss_what_exact_attention_sees(attend):
    # The counterpart of the test above: with smaller buckets the two must differ, or nothing was hashed at all.
    query_key, value, rotations = draw(length=48)
    difference = attend(query_key, value, rotations, bucket_size=8) - exact_attention(query_key, value)
    assert difference.abs().max() > 0.01


@pytest.mark.parametrize("hashing", HASHINGS)
def test_more_rounds_come_nearer_to_exact_attention(attend, hashing):
    query_key, value, rotations = draw(length=256, rounds=16, columns=16)
    exact = exact_attention(query_key, value)
    errors = [
        (attend(query_key, value, rotations[:rounds], bucket_size=BUCKET, hashing=hashing) - exact).square().mean()
        for rounds in (1, 4, 16)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_a_lone_token_attends_to_itself(attend):
    query_key, value, rotations = draw(length=1)
    torch.testing.assert_close(attend(query_key, value, rotations, bucket_size=BUCKET), value)
    torch.testing.assert_close(exact_attention(query_key, value), value)


def test_the_first_chunk_does_not_see_the_last(attend):
    query_key, value, rotations = draw(batch=1, heads=1, length=32, rounds=1)
    order = lsh_order(query_key, rotations, bucket_size=BUCKET)[0, 0, 0].long()
    changed = value.clone()
    changed[:, :, order[-BUCKET:]] += 100.0
    before, after = (attend(query_key, v, rotations, bucket_size=BUCKET) for v in (value, changed))
    torch.testing.assert_close(after[:, :, order[:BUCKET]], before[:, :, order[:BUCKET]], atol=0, rtol=0)
    assert (after[:, :, order[-BUCKET:]] - before[:, :, order[-BUCKET:]]).abs().max() > 1


@pytest.mark.parametrize("hashing", HASHINGS)
@pytest.mark.parametrize("padding", [1, 8, 61])
def test_padding_changes_nothing_and_comes_back_as_zero(attend, hashing, padding):
    query_key, value, rotations = draw(batch=1, length=50)
    alone = attend(query_key, value, rotations, bucket_size=BUCKET, hashing=hashing)
    garbage = torch.full((1, 3, padding, 6), 7.0, dtype=torch.float64)
    mask = torch.cat([torch.ones(1, 50), torch.zeros(1, padding)], dim=1)
    padded = attend(
        torch.cat([query_key, garbage], 2),
        torch.cat([value, garbage], 2),
        rotations,
        bucket_size=BUCKET,
        attention_mask=mask,
        hashing=hashing,
    )
    torch.testing.assert_close(padded[:, :, :50], alone, atol=1e-12, rtol=0)
    assert not padded[:, :, 50:].any()


@pytest.mark.parametrize("hashing", HASHINGS)
def test_padding_in_the_middle_changes_nothing(attend, hashing):
    query_key, value, rotations = draw(batch=1, length=80)
    mask = torch.rand(1, 80, generator=torch.Generator().manual_seed(1)) < 0.6
    padded = attend(query_key, value, rotations, bucket_size=BUCKET, attention_mask=mask, hashing=hashing)
    tokens = query_key[:, :, mask[0]], value[:, :, mask[0]]
    alone = attend(*tokens, rotations, bucket_size=BUCKET, hashing=hashing)
    torch.testing.assert_close(padded[:, :, mask[0]], alone, atol=1e-12, rtol=0)
    assert not padded[:, :, ~mask[0]].any()


def test_gradients_at_padding_are_zero(attend):
    query_key, value, rotations = draw(length=80)
    mask = torch.rand(2, 80, generator=torch.Generator().manual_seed(1)) < 0.6
    inputs = query_key.requires_grad_(), value.requires_grad_()
    attend(*inputs, rotations, bucket_size=BUCKET, attention_mask=mask).square().sum().backward()
    for each in inputs:
        at_padding = (~mask)[:, None, :, None].expand_as(each)
        assert not each.grad[at_padding].any()
        assert each.grad[~at_padding].all()


@pytest.mark.parametrize("hashing", HASHINGS)
def test_a_short_cell_is_the_same_beside_a_long_one(attend, hashing):
    query_key, value, rotations = draw(batch=2, length=120)
    mask = torch.ones(2, 120, dtype=torch.bool)
    mask[0, 40:] = False
    together = attend(query_key, value, rotations, bucket_size=BUCKET, attention_mask=mask, hashing=hashing)
    alone = attend(query_key[:1, :, :40], value[:1, :, :40], rotations, bucket_size=BUCKET, hashing=hashing)
    torch.testing.assert_close(together[:1, :, :40], alone, atol=1e-12, rtol=0)


def test_a_cell_without_tokens_gives_zeros(attend):
    query_key, value, rotations = draw()
    mask = torch.zeros(2, 50, dtype=torch.bool)
    for result in (
        attend(query_key, value, rotations, bucket_size=BUCKET, attention_mask=mask),
        exact_attention(query_key, value, attention_mask=mask),
    ):
        assert not result.any()


def test_equal_keys_average_their_values(attend):
    # Every score ties: the result is the mean over the other tokens of the window.
    _, value, rotations = draw(batch=1, heads=1, length=8)
    query_key = torch.ones(1, 1, 8, 6, dtype=torch.float64)
    result = attend(query_key, value, rotations, bucket_size=BUCKET)
    torch.testing.assert_close(result, (value.sum(2, keepdim=True) - value) / 7)


def test_gradients_pass_gradcheck(attend):
    query_key, value, rotations = draw(batch=1, heads=2, length=19, width=4)
    mask = torch.ones(1, 19, dtype=torch.bool)
    mask[:, 15:] = False
    order = lsh_order(query_key, rotations, bucket_size=4, attention_mask=mask)

    def function(query_key, value):
        return attend(query_key, value, rotations, bucket_size=4, attention_mask=mask, order=order)

    assert torch.autograd.gradcheck(function, (query_key.requires_grad_(), value.requires_grad_()))


def test_a_given_order_replaces_hashing(attend):
    query_key, value, rotations = draw()
    order = lsh_order(query_key, rotations, bucket_size=BUCKET)
    expected = attend(query_key, value, rotations, bucket_size=BUCKET)
    replayed = attend(query_key, value, torch.zeros_like(rotations), bucket_size=BUCKET, order=order)
    torch.testing.assert_close(replayed, expected, atol=0, rtol=0)


def test_attention_leaves_the_global_generator_alone(attend):
    query_key, value, rotations = draw()
    before = torch.get_rng_state()
    attend(query_key.requires_grad_(), value, rotations, bucket_size=BUCKET).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_and_near(attend, dtype):
    query_key, value, rotations = draw(length=64)
    expected = attend(query_key, value, rotations, bucket_size=BUCKET)
    order = lsh_order(query_key, rotations, bucket_size=BUCKET)
    result = attend(query_key.to(dtype), value.to(dtype), rotations, bucket_size=BUCKET, order=order)
    # Twice the error of rounding scores and values to this precision once.
    torch.testing.assert_close(result.double(), expected, atol=8 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"implementation": "magic"}, ValueError, "implementation got 'magic'; allowed are 'auto'"),
        ({"hashing": "magic"}, ValueError, "hashing got 'magic'; allowed are 'sign', 'cross_polytope'"),
        ({"bucket_size": 1}, ValueError, "bucket_size got 1"),
        ({"value": torch.zeros(2, 3, 50, 5)}, ValueError, r"got shapes \(2, 3, 50, 6\) and \(2, 3, 50, 5\)"),
        ({"query_key": torch.zeros(2, 3, 50, 6, dtype=torch.long)}, TypeError, "must be floating point"),
        ({"rotations": torch.zeros(2, 5, 8)}, ValueError, r"it must be \(rounds, 6, columns\)"),
        ({"attention_mask": torch.ones(2, 49)}, ValueError, r"it must be \(2, 50\)"),
    ],
)
def test_wrong_input_is_named(change, error, message):
    query_key, value, rotations = draw()
    arguments = {"query_key": query_key, "value": value, "rotations": rotations, "bucket_size": BUCKET, **change}
    with pytest.raises(error, match=message):
        lsh_attention(**arguments)


@pytest.mark.parametrize("implementation", ["reference", "blocked", "exact"])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_what_padding_holds_reaches_no_token(implementation, garbage):
    query_key, value, rotations = draw(length=50)
    mask = torch.arange(50) < torch.tensor([50, 31])[:, None]
    clean, dirty = (
        lsh_attention(
            *(each.masked_fill(~mask[:, None, :, None], filling) for each in (query_key, value)),
            rotations, bucket_size=8, attention_mask=mask, implementation=implementation,
        )
        for filling in (0.0, garbage)
    )  # fmt: skip
    assert torch.equal(clean, dirty)
