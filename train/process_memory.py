"""What a process takes of the system's memory, and what it keeps of freed memory."""

import re
import sys
from pathlib import Path

from screformer.tokenization.freed_memory import return_blocks_from

# Setting the threshold also stops glibc from raising it, which it does up to 32 MB: then streams of a base model share
# one heap with small blocks that stay, and holes between those add a third to a training step's memory at 6 layers.
# Below 8 MB the blocks of a layer's inner work would go back and be cleared again, thousands of times a step.
STREAM_BYTES = 8 * 10**6
PROCESS = Path("/proc/self")
CLEAR_PEAK = "5"  # proc(5): sets VmHWM back to what is resident now


def return_large_blocks() -> bool:
    """Let the C library hand freed blocks of 8 MB and more back to the system at once; return whether it does so."""
    return return_blocks_from(STREAM_BYTES)


def peak_process_memory() -> int:
    """Return the most bytes that were resident at once: since `forget_peak`, or, where that can't be, since the start.

    0 where the system does not say. Pages of files that are mapped into memory count, though the system can drop them.
    """
    try:
        status = (PROCESS / "status").read_text(encoding="ascii", errors="replace")
    except OSError:
        status = ""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else _peak_without_proc()


def forget_peak() -> bool:
    """Let the peak begin at what is resident now; return whether the system does so, as Linux mostly does."""
    try:
        (PROCESS / "clear_refs").write_text(CLEAR_PEAK, encoding="ascii")
    except OSError:
        return False
    return True


def _peak_without_proc() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
