"""A region that a process with a GPU has pinned, as far as it uses it: the GPU copies from and to it by itself.

What is not pinned the driver copies by way of memory of its own, piece by piece, at a fraction of the speed. torch is a
peer: whoever has tensors of a GPU has it.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from typing import TYPE_CHECKING, Any

from attnd import forks

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# Bytes: what is pinned grows by so much, because each growth waits for the GPU.
_CHUNK_BYTES = 32 << 20
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every GPU of the process


class PinnedRegion:
    """The beginning of a region, pinned as long as this object is not closed, and what a GPU still reads there."""

    def __init__(self, memory: memoryview) -> None:
        """Nothing is pinned yet."""
        self._memory: memoryview | None = memory
        self._num_bytes = 0  # that are pinned
        self._may_try = True
        self._reads: list[Any] = []  # events behind copies to a GPU
        self._made = forks.generation

    def pin(self, num_bytes: int) -> None:
        """Has the first `num_bytes` pinned, if that can be; where it cannot, copies work all the same."""
        memory = self._memory
        if num_bytes <= self._num_bytes or not self._may_try or memory is None:
            return
        self.await_reads()
        self._unpin()
        wanted = min(-(-num_bytes // _CHUNK_BYTES) * _CHUNK_BYTES, memory.nbytes)
        if error := int(_cudart().cudaHostRegister(_address(memory), wanted, _PORTABLE)):
            self._may_try = False
            log.warning("the region of a session cannot be pinned, so its copies are slower: CUDA error %d", error)
        else:
            self._num_bytes = wanted

    def note_read(self, device: torch.device) -> None:
        """The current stream of a GPU reads here, up to what was enqueued now."""
        cuda = sys.modules["torch"].cuda
        event = cuda.Event()
        event.record(cuda.current_stream(device))
        self._reads.append(event)

    def await_reads(self) -> None:
        """Waits until no GPU reads here any more."""
        while self._reads:
            self._reads.pop().synchronize()

    def close(self) -> None:
        """Lets go of the memory, which is ordinary again."""
        if self._made == forks.generation:  # else it is the parent's, as all of CUDA's is
            self.await_reads()
            self._unpin()
        self._memory, self._num_bytes = None, 0

    def _unpin(self) -> None:
        if self._num_bytes and self._memory is not None:
            _cudart().cudaHostUnregister(_address(self._memory))
            self._num_bytes = 0


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _cudart() -> Any:
    return sys.modules["torch"].cuda.cudart()
