"""Memory that was freed and that the C library keeps."""

from __future__ import annotations

import ctypes


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
