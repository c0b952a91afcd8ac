"""What a process keeps of the memory that it has freed."""

from __future__ import annotations

import ctypes
import os

# mallopt(3): bytes from which a block has its own pages and gives them back when freed.
M_MMAP_THRESHOLD = -3
THRESHOLD_VARIABLE = "MALLOC_MMAP_THRESHOLD_"  # how a user sets it
# Whole columns of a block of cells are above it. What the tokenizer makes of a hundred cells at a time is below: pages
# that come and go thousands of times a second would cost a third of its speed.
COLUMN_BYTES = 3 * 10**6


def give_back_freed_memory() -> bool:
    """Hand freed memory back to the system, holes between used blocks included; return whether there was any.

    Reading a large HDF5 file leaves such holes, 250 MB after half a million cells: its compressed chunks differ in
    size, and what HDF5 remembers of each lies between them. It takes milliseconds, and does nothing where the C library
    is not glibc.
    """
    try:
        malloc_trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; Windows
        return False
    return bool(malloc_trim(0))


def return_blocks_from(num_bytes: int) -> bool:
    """Let the C library hand freed blocks of this size and more back to the system at once; return whether it does so.

    It holds for the whole process, so that programs call it, libraries do not. It does nothing where the C library is
    not glibc, or the user has set ``MALLOC_MMAP_THRESHOLD_``.
    """
    if THRESHOLD_VARIABLE in os.environ:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; Windows
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, num_bytes))


def return_columns() -> bool:
    """Let a process that builds a corpus give back each block's columns; return whether the C library does so.

    Left to itself, a process grows by a fifth from ten thousand to a million cells: columns of many sizes share a heap
    with small blocks that stay.
    """
    return return_blocks_from(COLUMN_BYTES)
