import numpy as np
import pytest
import torch

from oracles.slow_attention import slow_lsh_order
from screformer import lsh_hashing
from screformer.lsh_hashing import HASHINGS, draw_rotations, lengths_of_cells, lsh_order, num_hash_columns

BUCKET = 8
BUCKET_IDS = {"sign": lsh_hashing._sign_buckets, "cross_polytope": lsh_hashing._cross_polytope_buckets}


def draw(batch=2, heads=3, length=120, width=6, rounds=3, columns=16, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    query_key = torch.randn(batch, heads, length, width, generator=generator, dtype=dtype)
    return query_key, draw_rotations(rounds, width, columns, seed=seed)


def assert_order_is_the_oracles(order, query_key, rotations, bucket_size, mask, hashing):
    for cell, is_token in enumerate(mask):
        for head in range(query_key.shape[1]):
            expected = slow_lsh_order(query_key[cell, head], rotations, bucket_size, is_token, hashing)
            np.testing.assert_array_equal(order[cell, head], expected)


@pytest.mark.parametrize("hashing", HASHINGS)
@pytest.mark.parametrize("length", [1, 2, 8, 9, 17, 50, 130])
@pytest.mark.parametrize("columns", [2, 16])  # two are fewer than the longest cells ask for
def test_order_equals_the_token_by_token_definition(hashing, length, columns):
    query_key, rotations = draw(length=length, columns=columns)
    query_key[:, :, ::7] = 0.0
    mask = torch.rand(2, length, generator=torch.Generator().manual_seed(1)) < torch.tensor([[0.9], [0.4]])
    order = lsh_order(query_key, rotations, bucket_size=BUCKET, attention_mask=mask, hashing=hashing)
    assert order.dtype == torch.int32
    assert_order_is_the_oracles(order, query_key, rotations, BUCKET, mask, hashing)


@pytest.mark.parametrize("hashing", HASHINGS)
def test_without_a_mask_every_position_is_a_token(hashing):
    query_key, rotations = draw()
    mask = torch.ones(2, 120)
    bare = lsh_order(query_key, rotations, bucket_size=BUCKET, hashing=hashing)
    masked = lsh_order(query_key, rotations, bucket_size=BUCKET, attention_mask=mask, hashing=hashing)
    assert torch.equal(bare, masked)
    assert_order_is_the_oracles(bare, query_key, rotations, BUCKET, mask, hashing)


def test_hashing_is_the_reformers_unless_said_otherwise():
    query_key, rotations = draw()
    default = lsh_order(query_key, rotations, bucket_size=BUCKET)
    by_name = [lsh_order(query_key, rotations, bucket_size=BUCKET, hashing=hashing) for hashing in HASHINGS]
    assert torch.equal(default, by_name[HASHINGS.index("cross_polytope")])
    assert not torch.equal(*by_name)


@pytest.mark.parametrize("hashing", HASHINGS)
@pytest.mark.parametrize("tied", [torch.zeros(6), torch.ones(6), -torch.ones(6)])
def test_tied_tokens_keep_their_order(hashing, tied):
    _, rotations = draw()
    order = lsh_order(tied.expand(1, 2, 120, 6), rotations, bucket_size=BUCKET, hashing=hashing)
    assert torch.equal(order, torch.arange(120, dtype=torch.int32).expand(1, 2, 3, 120))


@pytest.mark.parametrize("hashing", HASHINGS)
def test_tied_directions_count_as_the_first_of_them(hashing):
    query_key, rotations = draw()
    rotations[:, :, 1::2] = rotations[:, :, ::2]
    order = lsh_order(query_key, rotations, bucket_size=BUCKET, hashing=hashing)
    assert_order_is_the_oracles(order, query_key, rotations, BUCKET, torch.ones(2, 120), hashing)


@pytest.mark.parametrize("hashing", HASHINGS)
def test_padding_comes_last_and_keeps_its_order(hashing):
    query_key, rotations = draw()
    mask = torch.rand(2, 120, generator=torch.Generator().manual_seed(1)) < 0.6
    order = lsh_order(query_key, rotations, bucket_size=BUCKET, attention_mask=mask, hashing=hashing)
    for cell, is_token in enumerate(mask):
        padding = (~is_token).nonzero()[:, 0].int()
        assert torch.equal(order[cell, ..., is_token.sum() :], padding.expand(3, 3, -1))


@pytest.mark.parametrize("hashing", HASHINGS)
@pytest.mark.parametrize("garbage", [7.0, float("inf"), float("nan")])
def test_what_padding_holds_does_not_change_the_order(hashing, garbage):
    query_key, rotations = draw()
    mask = torch.rand(2, 120, generator=torch.Generator().manual_seed(1)) < 0.6
    filled = query_key.masked_fill(~mask[:, None, :, None], garbage)
    orders = [
        lsh_order(vectors, rotations, bucket_size=BUCKET, attention_mask=mask, hashing=hashing)
        for vectors in (query_key, filled)
    ]
    assert torch.equal(*orders)


@pytest.mark.parametrize("hashing", HASHINGS)
def test_a_cell_has_the_same_order_alone_and_beside_a_longer_one(hashing):
    query_key, rotations = draw()
    mask = torch.ones(2, 120, dtype=torch.bool)
    mask[0, 40:] = False
    together = lsh_order(query_key, rotations, bucket_size=BUCKET, attention_mask=mask, hashing=hashing)
    alone = lsh_order(query_key[:1, :, :40], rotations, bucket_size=BUCKET, hashing=hashing)
    assert torch.equal(together[:1, ..., :40], alone)
    # With the longer cell's columns the order is another one, or the length would not have mattered.
    assert not torch.equal(lsh_order(query_key, rotations, bucket_size=BUCKET, hashing=hashing)[0, ..., :40], alone[0])


@pytest.mark.parametrize("hashing", HASHINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_hashed_in_single_precision(hashing, dtype):
    query_key, rotations = draw(dtype=torch.float32)
    halves = query_key.to(dtype)
    order = lsh_order(halves, rotations, bucket_size=BUCKET, hashing=hashing)
    assert torch.equal(order, lsh_order(halves.float(), rotations, bucket_size=BUCKET, hashing=hashing))


@pytest.mark.parametrize("hashing", HASHINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_the_order(hashing, dtype):
    query_key, rotations = draw(dtype=torch.float32)
    expected = lsh_order(query_key, rotations, bucket_size=BUCKET, hashing=hashing)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(lsh_order(query_key, rotations, bucket_size=BUCKET, hashing=hashing), expected)
        # The product alone would have been rounded.
        assert (query_key @ rotations[0]).dtype == dtype


@pytest.mark.parametrize("hashing", HASHINGS)
def test_views_as_the_model_makes_them_hash_like_copies(hashing):
    query_key, rotations = draw()
    view = query_key.transpose(1, 2).contiguous().transpose(1, 2)
    assert not view.is_contiguous()
    orders = [lsh_order(each, rotations, bucket_size=BUCKET, hashing=hashing) for each in (view, query_key)]
    assert torch.equal(*orders)


@pytest.mark.parametrize("hashing", HASHINGS)
def test_hashing_has_no_gradient_and_leaves_the_global_generator_alone(hashing):
    query_key, rotations = draw()
    before = torch.get_rng_state()
    order = lsh_order(query_key.requires_grad_(), rotations, bucket_size=BUCKET, hashing=hashing)
    assert not order.requires_grad
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_hashing_is_named():
    query_key, rotations = draw()
    with pytest.raises(ValueError, match="hashing got 'magic'; allowed are 'sign', 'cross_polytope'"):
        lsh_order(query_key, rotations, bucket_size=BUCKET, hashing="magic")


@pytest.mark.parametrize(
    ("hashing", "columns"),
    [
        ("sign", 13),
        ("sign", 14),  # the most that 16 bits hold
        ("sign", 15),
        ("sign", 16),
        ("cross_polytope", 16_383),  # the most that 16 bits hold beside an id for padding
        ("cross_polytope", 16_384),
        ("cross_polytope", 20_000),  # 40,000 buckets
    ],
)
def test_any_number_of_buckets_sorts_right(monkeypatch, hashing, columns):
    # So many buckets belong to long cells; a short one is told to use them.
    monkeypatch.setattr("screformer.lsh_hashing.num_hash_columns", lambda *_: columns)
    monkeypatch.setattr("oracles.slow_attention.slow_num_columns", lambda *_: columns)
    query_key, rotations = draw(batch=1, heads=1, length=80, width=3, rounds=1, columns=columns)
    # The first and the last of all buckets are taken: only the last column is long, or all are on one side.
    rotations[:, 0] = 1.0
    rotations[:, 0, -1] = 100.0
    query_key[..., ::7, :] = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    query_key[..., 1::7, :] = torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64)
    mask = torch.arange(80)[None] % 5 > 0
    order = lsh_order(query_key, rotations, bucket_size=BUCKET, attention_mask=mask, hashing=hashing)
    assert_order_is_the_oracles(order, query_key, rotations, BUCKET, mask, hashing)
    buckets = BUCKET_IDS[hashing](query_key[0], rotations.double())
    num_buckets = 2**columns if hashing == "sign" else 2 * columns
    assert buckets.max() == num_buckets - 1
    assert buckets.max() < torch.iinfo(buckets.dtype).max  # one is left for padding


@pytest.mark.parametrize(
    ("length", "sign", "cross_polytope"),
    [(0, 3, 1), (1, 3, 1), (65, 4, 1), (129, 5, 2), (256, 5, 2), (257, 6, 3), (4096, 9, 32), (4097, 10, 33)],
)
def test_buckets_follow_the_chunks_and_signs_have_eight_for_each(length, sign, cross_polytope):
    assert num_hash_columns(length, 64, "sign") == sign
    assert num_hash_columns(length, 64, "cross_polytope") == cross_polytope


@pytest.mark.parametrize("hashing", HASHINGS)
def test_near_tokens_share_a_bucket_more_often_than_far_ones(hashing):
    near, middle, far = (share_of_pairs_in_a_bucket(hashing, angle) for angle in (0.2, 0.7, np.pi / 2))
    assert near > 1.5 * middle
    assert middle > 1.5 * far


@pytest.mark.parametrize("angle", [0.1, 0.5, 1.0, np.pi / 2, 2.5])
def test_a_plane_parts_two_tokens_as_often_as_their_angle_says(angle):
    # Charikar 2002: each column agrees with probability 1 - angle / pi. Six standard deviations of 32,000 trials.
    expected = (1 - angle / np.pi) ** 4
    margin = 6 * np.sqrt(expected * (1 - expected) / 32_000)
    assert share_of_pairs_in_a_bucket("sign", angle) == pytest.approx(expected, abs=margin)


def share_of_pairs_in_a_bucket(hashing, angle, pairs=500, rounds=64, columns=4):
    """Return how often two vectors at an angle share a bucket, over pairs and rounds."""
    generator = torch.Generator().manual_seed(0)
    first, other = torch.randn(2, pairs, 16, generator=generator, dtype=torch.float64).unbind(0)
    first = torch.nn.functional.normalize(first, dim=-1)
    across = torch.nn.functional.normalize(other - (other * first).sum(-1, keepdim=True) * first, dim=-1)
    second = np.cos(angle) * first + np.sin(angle) * across
    rotations = draw_rotations(rounds, 16, columns, seed=1).double()
    of_first, of_second = BUCKET_IDS[hashing](torch.stack([first, second]), rotations)
    return (of_first == of_second).double().mean().item()


def test_rotations_come_from_their_seed_and_leave_the_global_state_alone():
    before = torch.get_rng_state()
    first, again, other = (draw_rotations(2, 4, 8, seed=seed) for seed in (1, 1, 2))
    assert first.shape == (2, 4, 8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_rotations_are_on_the_default_device():
    with torch.device("meta"):
        assert draw_rotations(2, 4, 8, seed=1).device.type == "meta"
    assert draw_rotations(2, 4, 8, seed=1).device.type == "cpu"


def test_rotations_are_standard_normal():
    rotations = draw_rotations(10, 100, 100, seed=0)
    # Six standard deviations of the mean and of the variance of 100,000 numbers.
    assert rotations.mean().item() == pytest.approx(0, abs=6 / np.sqrt(1e5))
    assert rotations.var().item() == pytest.approx(1, abs=6 * np.sqrt(2 / 1e5))


def test_lengths_count_what_is_not_padding():
    assert lengths_of_cells(torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]]), 3, 3) == [2, 0, 3]
    assert lengths_of_cells(None, 2, 5) == [5, 5]
