"""How the C library hands memory back: not at once, where buffers of megabytes come and go all the time.

This module knows nothing about what is allocated.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache

KEPT_BYTES = 256 << 20
"""Freed memory that a process keeps, at most, at the end of its heap."""

_MMAP_THRESHOLD, _MMAP_THRESHOLD_MAX = -3, 32 << 20
_TRIM_THRESHOLD = -1


@cache
def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next buffer, in this whole process; tell whether it does.

    By default it gives a freed buffer of megabytes back to the kernel, and each page of the next one is then cleared
    and mapped anew when it is touched, which costs a good part of what encoding costs. Another C library,
    and one that refuses, is left as it is: nothing but time depends on this. The parameters are those of mallopt(3).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, _MMAP_THRESHOLD_MAX) and mallopt(_TRIM_THRESHOLD, KEPT_BYTES))
