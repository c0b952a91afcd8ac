"""What a process keeps of freed memory."""

import ctypes
import os

# mallopt(3). Bytes from which a block has its own pages and gives them back when freed. Setting it also stops glibc
# from raising it, which it does up to 32 MB: then streams of a base model share one heap with small blocks that stay,
# and holes between those add a third to a training step's memory at 6 layers. Below 8 MB the blocks of a layer's inner
# work would go back and be cleared again, thousands of times a step.
M_MMAP_THRESHOLD, MMAP_THRESHOLD = -3, 8 * 10**6
VARIABLE = "MALLOC_MMAP_THRESHOLD_"  # how a user sets it


def return_large_blocks() -> bool:
    """Let the C library hand freed blocks of 8 MB and more back to the system at once; return whether it does so.

    It holds for the whole process, so that programs call it, libraries do not. It does nothing where the C library is
    not glibc, or the user has set ``MALLOC_MMAP_THRESHOLD_``.
    """
    if VARIABLE in os.environ:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; Windows
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD))
