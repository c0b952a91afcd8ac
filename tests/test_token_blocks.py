import pytest
import torch

from screformer import token_blocks
from screformer.token_blocks import TokenBlock, plan_blocks


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(token_blocks, "CPU_ATTENTION_TOKENS", 24)
    monkeypatch.setattr(token_blocks, "CPU_FEED_FORWARD_TOKENS", 8)


def times_covered(blocks, batch, width):
    """Return how often each token is in a block, (batch, width)."""
    counts = torch.zeros(batch, width, dtype=torch.int64)
    for block in blocks:
        block.of(counts).add_(1)
    return counts


@pytest.mark.parametrize("lengths", [[30], [1, 30, 2], [7, 7, 7, 7, 7], [3, 0, 30, 30, 1, 1], [0, 0], [24, 1]])
def test_every_token_is_in_one_block_of_each_kind(lengths):
    mask = torch.arange(30) < torch.tensor(lengths)[:, None]
    plan = plan_blocks(torch.zeros(len(lengths), 30, 4), mask)
    for blocks in (plan.attention, plan.feed_forward):
        counts = times_covered(blocks, len(lengths), 30)
        assert counts.max() <= 1
        assert (counts[mask] == 1).all()


def test_padding_behind_a_blocks_longest_cell_is_left_out():
    mask = torch.arange(30) < torch.tensor([5, 6, 30])[:, None]
    plan = plan_blocks(torch.zeros(3, 30, 4), mask)
    assert plan.attention == [TokenBlock(slice(0, 2), slice(0, 6)), TokenBlock(slice(2, 3), slice(0, 30))]
    for blocks in (plan.attention, plan.feed_forward):
        assert times_covered(blocks, 3, 30)[:2, 6:].sum() == 0


def test_attention_has_whole_cells_and_the_feed_forward_network_parts_of_long_ones():
    plan = plan_blocks(torch.zeros(2, 30, 4), None)
    assert [block.tokens for block in plan.attention] == [slice(0, 30)] * 2
    assert [block.tokens for block in plan.feed_forward[:4]] == [
        slice(0, 8),
        slice(8, 16),
        slice(16, 24),
        slice(24, 30),
    ]


def test_padding_in_front_is_kept_with_its_cell():
    mask = torch.zeros(1, 30, dtype=torch.bool)
    mask[0, 20:] = True
    plan = plan_blocks(torch.zeros(1, 30, 4), mask)
    assert times_covered(plan.attention, 1, 30)[mask].min() == 1


def test_other_devices_get_larger_blocks_whose_padding_is_not_looked_at(monkeypatch):
    plan = plan_blocks(torch.zeros(5, 30, 4, device="meta"), None)
    assert plan.attention == plan.feed_forward == [TokenBlock(slice(0, 5), slice(0, 30))]
    monkeypatch.setattr(token_blocks, "ACCELERATOR_ATTENTION_TOKENS", 70)
    monkeypatch.setattr(token_blocks, "ACCELERATOR_FEED_FORWARD_TOKENS", 30)
    plan = plan_blocks(torch.zeros(5, 30, 4, device="meta"), None)
    assert [block.cells for block in plan.attention] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert [block.cells for block in plan.feed_forward] == [slice(number, number + 1) for number in range(5)]
    for blocks in (plan.attention, plan.feed_forward):
        assert (times_covered(blocks, 5, 30) == 1).all()


def test_the_paper_s_batch_is_cut_in_three_on_an_accelerator():
    plan = plan_blocks(torch.zeros(64, 17_330, 1, device="meta"), None)
    assert [block.cells.stop - block.cells.start for block in plan.attention] == [30, 30, 4]
    assert {block.cells.stop - block.cells.start for block in plan.feed_forward} == {15, 4}


def test_a_block_without_padding_has_no_mask():
    mask = torch.arange(30) < torch.tensor([6, 6, 30, 9])[:, None]
    first, second, third = plan_blocks(torch.zeros(4, 30, 4), mask).masks
    assert first is second is third is None
    mask[1, 3] = False
    first, _, _ = plan_blocks(torch.zeros(4, 30, 4), mask).masks
    assert first.sum() == 11
