"""Addresses that have memory only where somebody asked for it."""

from __future__ import annotations

import mmap
import sys
from typing import Protocol

import torch


class Addresses(Protocol):
    """Bytes in a row that have memory only where somebody asked for it.

    Attributes:
        unit_bytes: memory comes and goes in multiples of so many bytes.
        tensor: uint8 of all bytes.
    """

    unit_bytes: int
    tensor: torch.Tensor

    def commit(self, start: int, end: int) -> None:
        """Gives the bytes `[start, end)` memory, all zeros. The first unit is nobody's."""

    def give_back(self, start: int, end: int) -> None:
        """Takes back the memory of bytes that were committed together."""

    def close(self) -> None:
        """Gives back the rest."""


class HostAddresses:
    """Implements `Addresses` on a processor: the system gives zeros to whoever touches what was never touched."""

    unit_bytes = mmap.PAGESIZE

    def __init__(self, num_bytes: int) -> None:
        """Takes the addresses. Raises OSError where they count as memory that is not there."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        self._memory = mmap.mmap(-1, num_bytes, flags=flags)
        self.tensor = torch.frombuffer(self._memory, dtype=torch.uint8)

    def commit(self, start: int, end: int) -> None:
        """Nothing to do."""

    def give_back(self, start: int, end: int) -> None:
        """Takes back the memory."""
        self._memory.madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        """Nothing to do: it ends with the last tensor."""


def addresses_on(device: torch.device, num_bytes: int) -> Addresses:
    """So many addresses on a device."""
    if device.type == "cuda":
        from attnd_server.device.gpu_addresses import GpuAddresses

        return GpuAddresses(device, num_bytes)
    if sys.platform != "linux":
        raise OSError(f"{sys.platform} does not give back memory of its own accord")
    return HostAddresses(num_bytes)
