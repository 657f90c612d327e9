"""Memory of this process."""

from __future__ import annotations

import ctypes
import resource


def trim() -> None:
    """Give the system back what the allocator keeps free, where it can.

    glibc keeps what large tensors left between small ones: gradients of twelve layers gigabytes.
    """
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)


def peak_mb() -> float:
    """The most that this process has held so far, in MB of 10^6 bytes (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
