"""The blocked form against the plain one, and what it promises beside the numbers: memory, special inputs, layouts."""

import math
from statistics import median
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from screformer import lsh_attention_blocked as blocked
from screformer import lsh_hashing
from screformer.lsh_attention import lsh_attention
from screformer.lsh_attention_blocked import blocked_attention
from screformer.lsh_hashing import HASHINGS, draw_rotations, lsh_order


class Case(NamedTuple):
    """Inputs of attention, the gradient of its output, and what both forms are given alike."""

    query_key: torch.Tensor
    value: torch.Tensor
    grad_output: torch.Tensor
    order: torch.Tensor
    mask: torch.Tensor | None
    bucket_size: int

    def to(self, dtype):
        floats = (self.query_key, self.value, self.grad_output)
        return Case(*(tensor.to(dtype) for tensor in floats), self.order, self.mask, self.bucket_size)


class Result(NamedTuple):
    output: torch.Tensor
    grad_query_key: torch.Tensor
    grad_value: torch.Tensor


def draw(
    *, batch=2, heads=3, length=150, width=20, rounds=3, bucket_size=16, mask=None, hashing="sign", scale=1.0, seed=0
):
    generator = torch.Generator().manual_seed(seed)
    tensors = torch.randn(3, batch, heads, length, width, generator=generator, dtype=torch.float64)
    query_key, value, grad_output = tensors.unbind(0)
    return make_case(query_key * scale, value, grad_output, rounds, bucket_size, mask, hashing)


def make_case(query_key, value, grad_output, rounds=3, bucket_size=16, mask=None, hashing="sign"):
    rotations = draw_rotations(rounds, query_key.shape[-1], 16, seed=1)
    order = lsh_order(query_key, rotations, bucket_size=bucket_size, attention_mask=mask, hashing=hashing)
    return Case(query_key, value, grad_output, order, mask, bucket_size)


def scattered_mask(batch, length, share=0.7, seed=1):
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < share


def attend(implementation, case, inputs=None):
    query_key, value = (case.query_key, case.value) if inputs is None else inputs
    return lsh_attention(
        query_key,
        value,
        torch.ones(1, query_key.shape[-1], 1),  # not used: the order is given
        bucket_size=case.bucket_size,
        attention_mask=case.mask,
        implementation=implementation,
        order=case.order,
    )


def differentiate(implementation, case):
    inputs = tuple(tensor.detach().requires_grad_() for tensor in (case.query_key, case.value))
    output = attend(implementation, case, inputs)
    return Result(output.detach(), *torch.autograd.grad(output, inputs, case.grad_output))


def assert_near(result, expected, tolerance=1e-12):
    """Float64 rounding, relative to the largest number, or to the inputs' size (one) where the result is all but 0."""
    for name, actual, wanted in zip(Result._fields, result, expected, strict=True):
        scale = max(1.0, wanted.abs().max().item())
        assert (actual - wanted).abs().max().item() <= tolerance * scale, name


# --- The same numbers as the plain form ---


@st.composite
def masks(draw_from, batch, length):
    """Cells of no, one or all tokens, padded at the end or anywhere."""
    if draw_from(st.booleans()):
        return None
    rows = []
    for _ in range(batch):
        kind = draw_from(st.sampled_from(["none", "one", "all", "start", "anywhere"]))
        row = torch.zeros(length, dtype=torch.bool)
        if kind == "one":
            row[draw_from(st.integers(0, length - 1))] = True
        elif kind == "anywhere":
            row = scattered_mask(1, length, draw_from(st.sampled_from([0.1, 0.5, 0.9])), draw_from(st.integers(0, 99)))[
                0
            ]
        elif kind != "none":
            row[: length if kind == "all" else draw_from(st.integers(0, length))] = True
        rows.append(row)
    return torch.stack(rows)


@st.composite
def cases(draw_from):
    batch, length = draw_from(st.integers(1, 3)), draw_from(st.integers(1, 150))
    return draw(
        batch=batch,
        heads=draw_from(st.integers(1, 4)),
        length=length,
        width=draw_from(st.integers(1, 24)),
        rounds=draw_from(st.integers(1, 4)),
        bucket_size=draw_from(st.integers(2, 40)),
        mask=draw_from(masks(batch, length)),
        hashing=draw_from(st.sampled_from(HASHINGS)),
        scale=draw_from(st.sampled_from([0.1, 1.0, 10.0, 1e3])),
        seed=draw_from(st.integers(0, 2**16)),
    )


@settings(derandomize=True, deadline=None, max_examples=60)
@given(cases(), st.sampled_from([1, 40, 300, 2**14]), st.sampled_from([1, 3, 64]))
@example(draw(), 2**14, 64)
@example(draw(batch=1, heads=4, length=1), 2, 1)
def test_outputs_and_gradients_equal_the_plain_form_however_the_work_is_cut(case, group_rows, tile_chunks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lsh_hashing, "CPU_GROUP_ROWS", group_rows)
        patch.setattr(blocked, "CPU_TILE_CHUNKS", tile_chunks)
        assert_near(differentiate("blocked", case), differentiate("reference", case))


@pytest.mark.parametrize(
    ("group_rows", "tile_chunks", "groups_a_cell", "is_one_tile"),
    [
        (2**14, 64, 1, True),
        (2**14, 5, 1, False),
        (300, 64, 2, True),
        (300, 1, 2, False),
        (1, 64, 4, True),
        (1, 3, 4, False),
    ],
)
def test_groups_and_tiles_do_not_change_the_result(monkeypatch, group_rows, tile_chunks, groups_a_cell, is_one_tile):
    case = draw(heads=4)
    expected = differentiate("blocked", case)
    monkeypatch.setattr(lsh_hashing, "CPU_GROUP_ROWS", group_rows)
    monkeypatch.setattr(blocked, "CPU_TILE_CHUNKS", tile_chunks)
    groups = list(blocked._groups(case.query_key, None, case.bucket_size))
    assert len(groups) == 2 * groups_a_cell
    assert all((len(list(group.tiles())) == 1) == is_one_tile for group in groups)
    assert_near(differentiate("blocked", case), expected)


def test_gradients_pass_gradcheck_with_padding_and_three_rounds(monkeypatch):
    monkeypatch.setattr(blocked, "CPU_TILE_CHUNKS", 2)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 0]], dtype=torch.bool)
    case = draw(batch=1, heads=2, length=13, width=3, bucket_size=3, mask=mask)
    inputs = case.query_key.requires_grad_(), case.value.requires_grad_()
    assert torch.autograd.gradcheck(lambda *inputs: attend("blocked", case, inputs), inputs)


def test_second_derivatives_are_refused():
    case = draw(length=20)
    query_key = case.query_key.requires_grad_()
    (gradient,) = torch.autograd.grad(
        attend("blocked", case, (query_key, case.value)).square().sum(), query_key, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --- Precision ---

ULPS = 2  # of the root mean square: both errors may be as small as the rounding of the inputs and of the result


def errors_beside_the_plain_form(case, dtype):
    """Return each result's error and the plain form's, both against the plain form in float64.

    The error is the root mean square: the largest of some thousand rounding errors itself varies more than twofold.
    """
    case = case.to(dtype)
    exact = differentiate("reference", case.to(torch.float64))
    plain, result = differentiate("reference", case), differentiate("blocked", case)
    errors = {}
    for name, *tensors in zip(Result._fields, exact, plain, result, strict=True):
        truth, by_plain, by_blocked = (tensor.double() for tensor in tensors)
        size = truth.square().mean().sqrt()
        errors[name] = tuple(float((each - truth).square().mean().sqrt() / size) for each in (by_blocked, by_plain))
    return errors


def assert_as_precise_as_the_plain_form(case, dtype):
    """The blocked form's error may be twice the plain one's."""
    for name, (error, plain_error) in errors_beside_the_plain_form(case, dtype).items():
        assert error <= 2 * plain_error + ULPS * torch.finfo(dtype).eps, name


@pytest.fixture
def searches(monkeypatch):
    """Return a list that grows with every search for largest scores."""
    calls, search = [], blocked._largest_scores

    def spy(*arguments):
        calls.append(arguments)
        return search(*arguments)

    monkeypatch.setattr(blocked, "_largest_scores", spy)
    return calls


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 30.0])
@pytest.mark.parametrize("seed", range(3))
def test_single_precision_errs_as_little_as_the_plain_form(searches, scale, seed):
    case = draw(mask=scattered_mask(2, 150), scale=scale, seed=seed)
    assert_as_precise_as_the_plain_form(case, torch.float32)
    assert not searches


@pytest.mark.parametrize("scale", [100.0, 1000.0])
@pytest.mark.parametrize("seed", range(3))
def test_lost_sums_are_found_again(searches, scale, seed):
    # The weights of long queries vanish under their bound.
    assert_as_precise_as_the_plain_form(draw(mask=scattered_mask(2, 150), scale=scale, seed=seed), torch.float32)
    assert searches


def test_short_and_long_queries_together_err_as_little_as_in_the_plain_form(searches):
    # One short vector among long ones has most of the error, of either form; the median over seeds is steady.
    lengths = 10 ** (4 * torch.rand(2, 3, 150, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64) - 1)
    cases = [draw(mask=scattered_mask(2, 150), scale=lengths, seed=seed) for seed in range(9)]
    errors = [errors_beside_the_plain_form(case, torch.float32) for case in cases]
    for name in Result._fields:
        assert median(of_case[name][0] / of_case[name][1] for of_case in errors) <= 2, name
    assert searches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_half_precision_errs_as_little_as_the_plain_form(dtype, scale):
    # A length of whole chunks: in float16 the plain form has no gradient for the zeros that fill a chunk up.
    assert_as_precise_as_the_plain_form(draw(length=160, mask=scattered_mask(2, 160), scale=scale), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single_precision_and_rounded_once(dtype):
    case = draw(mask=scattered_mask(2, 150)).to(dtype)
    output = attend("blocked", case)
    assert output.dtype == dtype
    assert torch.equal(output, attend("blocked", case.to(torch.float32)).to(dtype))
    gradients = differentiate("blocked", case)
    assert gradients.grad_query_key.dtype == gradients.grad_value.dtype == dtype


def test_autocast_does_not_change_the_result():
    # The reversible encoder runs the backward pass under autocast, too.
    case = draw(mask=scattered_mask(2, 150)).to(torch.float32)
    expected = differentiate("blocked", case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = differentiate("blocked", case)
    assert all(torch.equal(*pair) for pair in zip(result, expected, strict=True))


# --- Special inputs ---


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_equal_tokens_average_the_values_they_see(scale):
    case = draw(batch=1, heads=1, length=70, bucket_size=16)
    query_key = torch.full_like(case.query_key, scale)
    case = make_case(query_key, case.value, case.grad_output)  # one bucket: tokens keep their order
    result = differentiate("blocked", case)
    for token in range(70):
        chunk = token // 16
        seen = [other for other in range(max(0, 16 * (chunk - 1)), min(70, 16 * (chunk + 1))) if other != token]
        torch.testing.assert_close(result.output[0, 0, token], case.value[0, 0, seen].mean(dim=0))
    assert_near(result, differentiate("reference", case))


def test_repeated_tokens_equal_the_plain_form():
    case = draw()
    few = torch.randint(0, 5, (150,), generator=torch.Generator().manual_seed(0))
    case = make_case(case.query_key[:, :, few], case.value, case.grad_output)
    assert_near(differentiate("blocked", case), differentiate("reference", case))


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_zero_vectors_equal_the_plain_form(share):
    case = draw(mask=scattered_mask(2, 150))
    is_zero = scattered_mask(2, 150, share, seed=3)
    query_key = case.query_key.masked_fill(is_zero[:, None, :, None], 0.0)
    case = make_case(query_key, case.value, case.grad_output, mask=case.mask)
    result = differentiate("blocked", case)
    assert all(tensor.isfinite().all() for tensor in result)
    expected = differentiate("reference", case)
    assert_near(result, expected)
    # A zero key is divided by the smallest norm, and so is its gradient: the others are compared without it.
    others = ~is_zero[:, None, :, None]
    assert_near(
        result._replace(grad_query_key=result.grad_query_key * others),
        expected._replace(grad_query_key=expected.grad_query_key * others),
    )


@pytest.mark.parametrize("length", [2, 18])
@pytest.mark.parametrize("scale", [1.0, 200.0, 2000.0])
def test_a_token_opposite_to_all_it_sees_finds_them_beside_what_fills_its_chunk(searches, length, scale):
    # Its scores are so far below zero that the filling's, were they seen, would outdo them.
    case = draw(batch=1, heads=1, length=length, width=2)
    query_key = torch.zeros_like(case.query_key)
    query_key[..., 0] = scale
    query_key[..., -1, 0] = -scale
    order = torch.arange(length, dtype=torch.int32).expand_as(case.order)
    case = case._replace(query_key=query_key, order=order)
    assert_near(differentiate("blocked", case), differentiate("reference", case))
    assert bool(searches) == (scale > 1)


@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17])
def test_cells_about_one_chunk_long_equal_the_plain_form(length):
    case = draw(length=length)
    assert_near(differentiate("blocked", case), differentiate("reference", case))


def test_a_lone_token_passes_its_value_and_gradient_through():
    for case in (draw(length=1), draw(length=30, mask=torch.arange(30).expand(2, 30) == 7)):
        result, token = differentiate("blocked", case), 0 if case.mask is None else 7
        assert torch.equal(result.output[:, :, token], case.value[:, :, token])
        assert torch.equal(result.grad_value[:, :, token], case.grad_output[:, :, token])
        assert not result.grad_query_key.any()


@pytest.mark.parametrize("group_rows", [1, 2**14])  # a head a group, all heads in one
def test_a_cell_without_tokens_gives_zeros_and_leaves_its_neighbour_alone(group_rows, monkeypatch):
    monkeypatch.setattr(lsh_hashing, "CPU_GROUP_ROWS", group_rows)
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[0] = False
    case = draw(length=50, mask=mask)
    result = differentiate("blocked", case)
    assert not any(tensor[0].any() for tensor in result)
    alone = case._replace(**{name: getattr(case, name)[1:] for name in ("query_key", "value", "grad_output", "order")})
    expected = differentiate("blocked", alone._replace(mask=None))
    assert_near([tensor[1:] for tensor in result], expected)


@pytest.mark.parametrize("garbage", [1e30, math.inf, math.nan])
@pytest.mark.parametrize("hashing", HASHINGS)
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_what_padding_holds_reaches_no_token(garbage, hashing, scale):
    mask = scattered_mask(2, 150)
    case = draw(mask=mask, scale=scale, hashing=hashing).to(torch.float32)
    is_padding = ~mask[:, None, :, None]
    filled = (case[i].masked_fill(is_padding, garbage) for i in range(3))
    result = differentiate("blocked", make_case(*filled, mask=mask, hashing=hashing))
    for tensor, expected in zip(result, differentiate("blocked", case), strict=True):
        assert torch.equal(tensor, expected)
        assert not tensor[is_padding.expand_as(tensor)].any()


# --- Layouts and graphs ---


def test_views_as_the_model_makes_them_equal_copies():
    case = draw(mask=scattered_mask(2, 150))
    views = [case[i].transpose(1, 2).contiguous().transpose(1, 2) for i in range(3)]
    assert not any(view.is_contiguous() for view in views)
    result = differentiate("blocked", case._replace(query_key=views[0], value=views[1], grad_output=views[2]))
    assert all(torch.equal(*pair) for pair in zip(result, differentiate("blocked", case), strict=True))


def test_strided_inputs_equal_copies():
    case = draw()
    wide = torch.stack(case[:3], dim=-1)
    result = differentiate("blocked", Case(*wide.unbind(-1), *case[3:]))
    assert all(torch.equal(*pair) for pair in zip(result, differentiate("blocked", case), strict=True))


def test_an_expanded_gradient_equals_a_copy():
    case = draw()
    expected = differentiate("blocked", case._replace(grad_output=torch.ones_like(case.value)))
    inputs = case.query_key.requires_grad_(), case.value.requires_grad_()
    attend("blocked", case, inputs).sum().backward()
    assert torch.equal(inputs[0].grad, expected.grad_query_key)
    assert torch.equal(inputs[1].grad, expected.grad_value)


@pytest.mark.parametrize("index", [0, 1])
def test_one_input_alone_gets_the_gradient_it_gets_with_the_other(index):
    case = draw()
    inputs = [case.query_key, case.value]
    inputs[index] = inputs[index].clone().requires_grad_()
    attend("blocked", case, inputs).backward(case.grad_output)
    assert torch.equal(inputs[index].grad, differentiate("blocked", case)[1 + index])
    assert inputs[1 - index].grad is None


def test_nothing_is_kept_without_a_gradient():
    case = draw()
    assert attend("blocked", case).grad_fn is None
    with torch.no_grad():
        assert not attend("blocked", case, (case.query_key.requires_grad_(), case.value)).requires_grad


def test_inputs_are_left_as_they_were():
    case = draw(mask=scattered_mask(2, 150), scale=1e3)
    before = [tensor.clone() for tensor in case[:5]]
    differentiate("blocked", case)
    assert all(torch.equal(*pair) for pair in zip(case[:5], before, strict=True))


def test_joining_the_heads_copies_nothing():
    output = attend("blocked", draw())
    joined = output.transpose(1, 2).flatten(2)
    assert joined.data_ptr() == output.data_ptr()


def test_an_integer_mask_is_read_as_truth():
    case = draw(mask=scattered_mask(2, 150))
    by_integers = blocked_attention(
        case.query_key, case.value, case.order, bucket_size=case.bucket_size, attention_mask=case.mask.long()
    )
    assert torch.equal(by_integers, attend("blocked", case))


# --- Memory ---


class LargestMemory(TorchDispatchMode):
    """Notes the numbers in the largest piece of memory behind any result of an operation; views add nothing."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("scale", [1.0, 1e3])  # with the second, largest scores are searched too
def test_no_piece_of_memory_grows_with_heads_and_rounds(scale):
    heads, length, width, rounds, bucket_size = 8, 4096, 20, 2, 64
    case = draw(batch=1, heads=heads, length=length, width=width, rounds=rounds, bucket_size=bucket_size, scale=scale)
    # The backward pass's operands are the widest: four times 24 columns (20, two more, and two to a multiple of eight).
    # A sixteenth covers the empty chunk that each of a group's heads gets, and the filling of its last one.
    limit = 4 * 24 * lsh_hashing.CPU_GROUP_ROWS * 17 // 16
    assert case.value.numel() < limit < heads * length * 2 * bucket_size
    largest = {}
    for implementation in ("blocked", "reference"):
        with LargestMemory() as memory:
            differentiate(implementation, case.to(torch.float32))
        largest[implementation] = memory.numbers
    assert largest["blocked"] <= limit
    assert largest["reference"] >= heads * length * 2 * bucket_size


@pytest.mark.parametrize("length", [1.5e4, 1e6])
def test_scores_below_any_bound_are_found(length):
    # Two opposite tokens: each sees only the other, at a score far below those of rows that fill the chunk up.
    query_key = length * torch.tensor([[1.0, 0.0], [-1.0, 0.0]])[None, None]
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None]
    order = torch.arange(2, dtype=torch.int32).expand(1, 1, 1, 2)
    assert torch.equal(blocked_attention(query_key, value, order, bucket_size=4), value.flip(2))
