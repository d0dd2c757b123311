"""Which errors say that memory is short: of Python, numpy, torch and the system, whatever class they have."""

from __future__ import annotations

import errno
import re

import torch

# torch's allocator of the processor raises a plain RuntimeError, and so does C++ through it; a thread needs a stack.
_TEXT = re.compile(
    r"DefaultCPUAllocator|can't allocate memory|not enough memory|[Cc]annot allocate memory|out of memory|bad_alloc"
    r"|can't start new thread|unable to mmap"
)


def is_memory_error(error: BaseException) -> bool:
    """Whether an error says that there was no memory for what was asked, and nothing else went wrong."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):  # numpy's is a MemoryError
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _TEXT.search(str(error).split("\n", 1)[0]) is not None
