"""Freed memory goes back to the system, where the C library can."""

import ctypes
import sys

import pytest

from screformer.benchmarks.measuring import status_bytes
from screformer.tokenization import count_matrix, example_cells_path, freed_memory, open_count_matrix
from screformer.tokenization.freed_memory import give_back_freed_memory, return_columns


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_holes_between_used_blocks_are_given_back():
    blocks = [bytearray(100_000) for _ in range(2000)]
    kept = blocks[::20]
    full = status_bytes("VmRSS")
    del blocks
    give_back_freed_memory()
    assert status_bytes("VmRSS") < full - 100_000_000
    assert len(kept) == 100


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert give_back_freed_memory() is False


def test_reading_gives_back_what_it_freed_now_and_then(monkeypatch):
    calls = []
    monkeypatch.setattr(count_matrix, "give_back_freed_memory", lambda: calls.append(1))
    monkeypatch.setattr(count_matrix, "BLOCKS_BETWEEN_GIVING_BACK", 4)
    with open_count_matrix(example_cells_path()) as matrix:
        assert len(list(matrix.blocks(10, stop=100))) == 10
    assert len(calls) == 2


def test_building_a_corpus_gives_back_columns_and_keeps_the_small_blocks_of_the_tokenizer(monkeypatch):
    thresholds = []
    monkeypatch.setattr(freed_memory, "return_blocks_from", lambda size: thresholds.append(size) or True)
    assert return_columns() is True
    # A column of a block: 1,024 cells with a thousand genes each, 4 bytes; of the tokenizer: 131,072 entries, 8 bytes.
    assert 131_072 * 8 < thresholds[0] < 1_024 * 1_000 * 4
