"""Settings of a process that passes big messages all day: they cost nothing and save milliseconds a call."""

from __future__ import annotations

import ctypes
import sys

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8


def tune_process() -> None:
    """Tunes allocator and interpreter of this process; `attnd serve` does so itself, a worker may.

    glibc gives big blocks back to the system after each message and faults them in again for the next, the more so in
    the small arenas of threads. CPython lets a busy thread keep the interpreter for 5 ms while a reply waits.
    """
    sys.setswitchinterval(5e-5)
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # not glibc
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, 1 << 30)
    mallopt(_M_TOP_PAD, 64 << 20)
    mallopt(_M_ARENA_MAX, 1)
