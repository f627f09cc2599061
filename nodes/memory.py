"""How this process deals with memory that it has freed."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_KEPT_BYTES, _LARGEST_BYTES = 1 << 30, 32 << 20  # the second is the largest that glibc takes


def keep_freed_memory() -> None:
    """Has glibc keep what is freed for the next allocation; other C libraries do as they do.

    It would give megabytes back to the kernel at once, which hands them out again page by page, cleared: a third of the
    CPU time of decoding a long capture (`gradtap bench decode`), where payloads come and go. The peak is as before.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_BYTES)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
