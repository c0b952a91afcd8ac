"""Every cell once an epoch, on every rank as many batches, the same order after a resume; and shuffled well enough."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from screformer.train.sampler import (
    BATCHES_GROUPED,
    BlockShuffleSampler,
    CellBatchSampler,
    Padding,
    Rank,
    Shuffling,
)

SMALL = Shuffling(block_size=4, buffer_size=20, seed=3)


def lengths_of(cells):
    return 50 + (np.asarray(cells) * 7919) % 211


def batch_sampler(num_cells=103, batch_size=8, shuffling=SMALL, **options):
    return CellBatchSampler(num_cells, batch_size, shuffling, **options)


def counted(batch):
    return batch[: batch.num_counted]


def ranks(count, **options):
    return [list(batch_sampler(rank=Rank(index, count), **options)) for index in range(count)]


@pytest.mark.parametrize("num_cells", [1, 3, 4, 5, 19, 20, 21, 103, 1000])
@pytest.mark.parametrize("shuffling", [SMALL, Shuffling(1, 1), Shuffling(1, 7), Shuffling(5, 5), Shuffling()])
def test_every_cell_comes_once_an_epoch(num_cells, shuffling):
    sampler = BlockShuffleSampler(num_cells, shuffling)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert sorted(sampler) == list(range(num_cells))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("num_cells", [1, 6, 16, 40, 41, 48, 103, 160, 161])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 8, 30])
def test_ranks_share_the_cells_and_have_as_many_batches(num_cells, count, batch_size, grouped):
    options = {"lengths_of": lengths_of} if grouped else {}
    parts = ranks(count, num_cells=num_cells, batch_size=batch_size, **options)
    assert sorted(cell for part in parts for batch in part for cell in counted(batch)) == list(range(num_cells))
    sampler = batch_sampler(num_cells, batch_size, rank=Rank(0, count), **options)
    assert {len(part) for part in parts} == {len(sampler)}
    assert all(1 <= len(batch) <= batch_size for part in parts for batch in part)
    # Only the last step is smaller, and no rank waits for one with more than a cell more.
    assert all(len(counted(batch)) == batch_size for part in parts for batch in part[:-1])
    assert np.ptp([len(counted(part[-1])) for part in parts]) <= 1


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("num_cells", [47, 48, 49, 161, 500])
def test_ranks_take_together_what_one_process_with_larger_batches_takes(num_cells, count, grouped):
    options = {"lengths_of": lengths_of} if grouped else {}
    parts = ranks(count, num_cells=num_cells, batch_size=3, **options)
    whole = list(batch_sampler(num_cells, 3 * count, **options))
    together = [sorted(cell for batch in step for cell in counted(batch)) for step in zip(*parts, strict=True)]
    assert together == [sorted(batch) for batch in whole]


def test_the_order_of_cells_does_not_depend_on_the_batch_size():
    orders = [[cell for batch in batch_sampler(500, size) for cell in batch] for size in (1, 3, 8, 64)]
    assert all(order == orders[0] for order in orders)
    assert orders[0] == list(BlockShuffleSampler(500, SMALL))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_rank_without_a_cell_in_the_last_step_gets_one_that_does_not_count(batch_size):
    num_cells = 3 * batch_size + 1
    parts = ranks(3, num_cells=num_cells, batch_size=batch_size)
    assert [len(part) for part in parts] == [2, 2, 2]
    assert [len(part[-1]) for part in parts] == [1, 1, 1]
    assert sorted(part[-1].num_counted for part in parts) == [0, 0, 1]
    assert len({part[-1][0] for part in parts}) == 1


def test_a_batch_keeps_what_it_knows_on_its_way_to_a_worker():
    sampler = batch_sampler(17, 8, rank=Rank(0, 2))
    sampler.set_epoch(3)
    *_, last = (pickle.loads(pickle.dumps(batch)) for batch in sampler)
    assert (last.epoch, last.num_counted, len(last)) == (3, 0, 1)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("num_cells", [48, 103, 121, 144])
def test_what_is_not_full_can_be_dropped(num_cells, count, grouped):
    options = {"lengths_of": lengths_of} if grouped else {}
    parts = ranks(count, num_cells=num_cells, drop_last=True, **options)
    assert {len(batch) for part in parts for batch in part} == {8}
    assert {len(part) for part in parts} == {num_cells // (count * 8)}
    given = [cell for part in parts for batch in part for cell in batch]
    assert len(set(given)) == len(given)


def test_the_order_is_the_seeds_and_another_in_every_epoch_and_for_every_seed():
    def order(seed, epoch):
        sampler = BlockShuffleSampler(103, Shuffling(4, 20, seed))
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("rank", "num_cells"), [(Rank(), 103), (Rank(1, 2), 161), (Rank(0, 2), 161)])
def test_a_stopped_epoch_goes_on_where_it_was(rank, num_cells, grouped):
    options = {"rank": rank, "lengths_of": lengths_of if grouped else None}
    sampler = batch_sampler(num_cells, **options)
    sampler.set_epoch(2)
    whole = list(sampler)
    for num_seen in range(len(whole) + 1):
        running = batch_sampler(num_cells, **options)
        running.set_epoch(2)
        iterator = iter(running)
        seen = [next(iterator) for _ in range(num_seen)]
        resumed = batch_sampler(num_cells, **options)
        resumed.load_state_dict(running.state_dict() if num_seen else {"epoch": 2, "start": 0})
        resumed.set_epoch(2)  # as a loader does before it begins
        assert seen + list(resumed) == whole
        assert list(resumed) == whole  # only the first time goes on
        resumed.load_state_dict(running.state_dict())
        resumed.set_epoch(3)
        assert len(list(resumed)) == len(whole)  # another epoch begins at its beginning


def test_single_cells_go_on_where_they_were_too():
    whole = list(BlockShuffleSampler(103, SMALL))
    running = BlockShuffleSampler(103, SMALL)
    seen = [cell for _, cell in zip(range(47), running, strict=False)]
    resumed = BlockShuffleSampler(103, SMALL)
    resumed.load_state_dict(running.state_dict())
    assert seen + list(resumed) == whole


def test_going_on_does_not_look_at_the_cells_before():
    asked = []

    def lengths(cells):
        asked.append(len(cells))
        return lengths_of(cells)

    sampler = batch_sampler(1000, lengths_of=lengths)
    sampler.load_state_dict({"epoch": 0, "start": 120})
    list(sampler)
    assert sum(asked) <= 1000 - 120 * 8 + 16


def test_a_buffer_holds_whole_blocks_of_neighbours():
    first = next(BlockShuffleSampler(1000, SMALL).buffers())
    assert len(first) == 20
    starts, counts = np.unique(first // 4, return_counts=True)
    assert counts.tolist() == [4] * 5
    assert np.ptp(starts) > 5  # from all over the data


def test_a_data_set_within_the_buffer_is_shuffled_fully():
    # Of a full shuffle of 400 cells, 4 of 1,600 pairs of neighbours in the order are neighbours in the data; 5 sigma.
    orders = [list(BlockShuffleSampler(400, Shuffling(16, 400, seed))) for seed in range(4)]
    near = sum(int((np.abs(np.diff(order)) == 1).sum()) for order in orders)
    assert near < 8 + 5 * np.sqrt(8)


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_mostly_read_blocks_of_their_own(count):
    # 32 cells a rank and step, of 64 blocks of 16; where parts meet, chance decides who reads a block.
    parts = ranks(count, num_cells=1024, batch_size=32, shuffling=Shuffling(16, 1024, 3))
    readers = np.array([np.bincount(np.concatenate(part) // 16, minlength=64) > 0 for part in parts]).sum(0)
    assert readers.mean() < 1.7
    # Shared out without regard to blocks, almost every block would be read by all.
    plain = list(batch_sampler(1024, 32, Shuffling(16, 1024, 3)))
    readers = np.array(
        [np.bincount(np.concatenate(plain[rank::count]) // 16, minlength=64) > 0 for rank in range(count)]
    )
    assert readers.sum(0).mean() > 0.95 * count


def test_grouping_leaves_little_padding_and_says_how_much():
    shuffling = Shuffling(4, 4000)
    plain, grouped = batch_sampler(4000, 8, shuffling), batch_sampler(4000, 8, shuffling, lengths_of=lengths_of)

    def padding(batches):
        lengths = [lengths_of(batch) for batch in batches]
        num_tokens = sum(int(values.max()) * len(values) for values in lengths)
        return Padding(num_tokens, num_tokens - sum(int(values.sum()) for values in lengths))

    batches = list(grouped)
    assert grouped.padding == padding(batches)
    assert grouped.padding.share < 0.2 * padding(plain).share
    assert plain.padding == Padding(0, 0)
    # The order of batches is not that of lengths.
    longest = [int(lengths_of(batch).max()) for batch in batches]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 5 / np.sqrt(len(longest))
    assert BATCHES_GROUPED * 8 < 4000


def test_fifteen_million_cells_take_a_few_bytes_a_block():
    import tracemalloc

    sampler = BlockShuffleSampler(15_000_000, Shuffling(16, 16_384))
    tracemalloc.start()
    buffers = sampler.buffers()
    next(buffers)
    next(buffers)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 6e6
    assert peak < 24e6


def test_a_loader_takes_either_sampler():
    cells = torch.arange(103)
    by_batch = DataLoader(cells, batch_sampler=batch_sampler())
    assert sorted(torch.cat(list(by_batch)).tolist()) == list(range(103))
    by_cell = DataLoader(cells, batch_size=8, sampler=BlockShuffleSampler(103, SMALL))
    assert sorted(torch.cat(list(by_cell)).tolist()) == list(range(103))


def test_refuses_what_cannot_be_sampled():
    with pytest.raises(ValueError, match="block_size must be at least 1 and at most buffer_size, got 0 and 8"):
        Shuffling(0, 8)
    with pytest.raises(ValueError, match="got 16 and 8; block_size=1 shuffles fully"):
        Shuffling(16, 8)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        Shuffling(seed=-1)
    with pytest.raises(ValueError, match="rank: process must lie between 0 and num_processes - 1 = 1, got 2"):
        CellBatchSampler(10, 2, rank=Rank(2, 2))
    with pytest.raises(ValueError, match="num_cells must be at least 1, got 0; there is nothing to train on"):
        CellBatchSampler(0, 2)
    with pytest.raises(ValueError, match="num_cells must be at least 1, got 0; there is nothing to shuffle"):
        BlockShuffleSampler(0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        CellBatchSampler(10, 0)
    with pytest.raises(ValueError, match="drop_last leaves no batch of batch_size=8 for 2 processes with 15 cells"):
        CellBatchSampler(15, 8, rank=Rank(0, 2), drop_last=True)
