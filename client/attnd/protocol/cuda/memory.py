"""Memory of a GPU that one process makes and another maps, passed as a file descriptor.

It has no name anywhere, and ends with the last process that has it. Whoever got one descriptor reaches that memory and
nothing beside it.
"""

from __future__ import annotations

import os
from typing import Any

from attnd.protocol.cuda.driver import Device, Stream, call, driver


class DeviceMemory:
    """A range of addresses of this process, behind which memory of a GPU lies.

    Attributes:
        address: where it starts.
        num_bytes: its size, what was asked for rounded up to what the GPU gives.
    """

    def __init__(self, handle: Any, num_bytes: int, user: Device) -> None:
        """Maps a handle of the driver's; owns it, whatever happens. Made by `created` and `imported`."""
        self.num_bytes = num_bytes
        self.address = 0
        self._handle = handle
        self._is_mapped = False
        try:
            self._reserved = call("cuMemAddressReserve", num_bytes, 0, 0, 0)
            self.address = int(self._reserved)
            call("cuMemMap", self._reserved, num_bytes, 0, handle, 0)
            self._is_mapped = True
            access = driver().CUmemAccessDesc()
            access.location = _location(user)
            access.flags = driver().CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            call("cuMemSetAccess", self._reserved, num_bytes, [access], 1)
        except BaseException:
            self.close()
            raise

    @classmethod
    def created(
        cls, owner: Device, num_bytes: int, stream: Stream | None = None, user: Device | None = None
    ) -> DeviceMemory:
        """New memory of `owner`, for use by `user`, this thread's current GPU: zeros, at least `num_bytes` of them.

        Args:
            owner: the GPU that has it. No context is made there.
            num_bytes: of the memory.
            stream: an idle one of `user`, on which it is cleared and which is waited for; None: one made for that.
            user: the GPU that reads and writes it; None: `owner`.

        Raises:
            CudaError: there is not so much, or the driver cannot do it.
        """
        size = size_on(owner, num_bytes)
        memory = cls(call("cuMemCreate", size, _wanted(owner), 0), size, user or owner)
        try:
            memory._clear(user or owner, stream)
        except BaseException:
            memory.close()
            raise
        return memory

    @classmethod
    def imported(cls, user: Device, descriptor: int, num_bytes: int) -> DeviceMemory:
        """Memory that another process made, for use by `user`, this thread's current GPU.

        Args:
            user: the GPU that reads and writes it; the memory may be another GPU's.
            descriptor: from `exported`; closed, whatever happens.
            num_bytes: its size there.

        Raises:
            CudaError: it is no such memory or not of that size, or `user` cannot reach it.
        """
        try:
            handle = call("cuMemImportFromShareableHandle", descriptor, _descriptor_type())
        finally:
            os.close(descriptor)
        return cls(handle, num_bytes, user)

    def exported(self) -> int:
        """A descriptor of the memory; the caller closes it."""
        return int(call("cuMemExportToShareableHandle", self._handle, _descriptor_type(), 0))

    def close(self) -> None:
        """Unmaps it, once; no work that uses it may be queued."""
        if self._is_mapped:
            self._is_mapped = False
            call("cuMemUnmap", self._reserved, self.num_bytes)
        if self.address:
            self.address = 0
            call("cuMemAddressFree", self._reserved, self.num_bytes)
        handle, self._handle = self._handle, None
        if handle is not None:
            call("cuMemRelease", handle)

    def _clear(self, user: Device, given: Stream | None) -> None:
        """Nobody shall see what was there. On a stream for which nobody else waits."""
        stream = given or Stream(user)
        try:
            call("cuMemsetD8Async", self._reserved, 0, self.num_bytes, stream.handle)
            stream.synchronize()
        finally:
            if given is None:
                stream.close()


def size_on(owner: Device, num_bytes: int) -> int:
    """Bytes that a GPU gives to whoever asks for `num_bytes`: what both sides must map. Raises CudaError."""
    minimum = driver().CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    return rounded(num_bytes, int(call("cuMemGetAllocationGranularity", _wanted(owner), minimum)))


def rounded(num_bytes: int, granularity: int) -> int:
    """The least multiple of `granularity` that holds `num_bytes`, one at least."""
    return max(1, -(-num_bytes // granularity)) * granularity


def _location(of: Device) -> Any:
    location = driver().CUmemLocation()
    location.type = driver().CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    location.id = of.index
    return location


def _wanted(owner: Device) -> Any:
    wanted = driver().CUmemAllocationProp()
    wanted.type = driver().CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    wanted.requestedHandleTypes = _descriptor_type()
    wanted.location = _location(owner)
    return wanted


def _descriptor_type() -> Any:
    return driver().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
