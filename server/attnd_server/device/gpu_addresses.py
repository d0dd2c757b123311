"""Addresses on a GPU that have memory only where somebody asked for it: CUDA's virtual memory management.

Needs the package cuda-bindings; `page_spaces` does without where it is not installed.
"""

from __future__ import annotations

import torch

from attnd.protocol.cuda.driver import call, driver
from attnd_server.device.quiet import quiet_gpu

# Seconds that a lack of memory waits for a quiet moment, in which torch can give back what it keeps.
_QUIET_S = 0.05


class GpuAddresses:
    """Bytes in a row on a GPU.

    The first unit always has memory: torch and Triton ask the driver where a tensor lies by its first byte.

    Attributes:
        unit_bytes: memory comes and goes in multiples of so many bytes.
        tensor: uint8 of all bytes. What has no memory must not be touched.
    """

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        """Takes at least so many addresses, and memory for the first unit.

        Raises:
            Unsupported: cuda-bindings is not installed.
            RuntimeError: the driver refuses.
        """
        self._driver = module = driver()
        self._device = device
        self._enter()
        self._properties = module.CUmemAllocationProp()
        self._properties.type = module.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location.type = module.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._properties.location.id = device.index
        flag = module.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.unit_bytes = int(call("cuMemGetAllocationGranularity", self._properties, flag))
        self._num_bytes = (-(-num_bytes // self.unit_bytes) + 1) * self.unit_bytes
        self._base = int(call("cuMemAddressReserve", self._num_bytes, 0, 0, 0))
        try:
            self._map(self._base, self.unit_bytes)
        except BaseException:
            call("cuMemAddressFree", self._base, self._num_bytes)
            raise
        self.tensor = torch.as_tensor(_Bytes(self._base, self._num_bytes), device=device)

    def commit(self, start: int, end: int) -> None:
        """Gives the bytes `[start, end)` memory, all zeros. Multiples of the unit, and not of the first one.

        Raises:
            torch.OutOfMemoryError: there is none.
        """
        self._enter()
        try:
            self._map(self._base + start, end - start)
        except RuntimeError:
            with quiet_gpu(self._device).moment(_QUIET_S) as is_quiet:
                if is_quiet:
                    torch.cuda.empty_cache()  # torch keeps what it may need again
            try:
                self._map(self._base + start, end - start)
            except RuntimeError as error:
                kept = "" if is_quiet else "; what torch keeps unused cannot be freed while a cuda plane's step waits"
                raise torch.OutOfMemoryError(f"{self._device} has no {end - start} bytes left: {error}{kept}") from None
        self.tensor[start:end].zero_()

    def give_back(self, start: int, end: int) -> None:
        """Takes the memory of bytes that were committed together.

        Waits for what this thread's stream does, and for no other: whoever has others use the memory keeps it.
        """
        self._enter()
        torch.cuda.current_stream(self._device).synchronize()
        call("cuMemUnmap", self._base + start, end - start)

    def close(self) -> None:
        """Gives back the rest. Nothing is committed any more, and nobody uses the tensor again."""
        self.give_back(0, self.unit_bytes)
        call("cuMemAddressFree", self._base, self._num_bytes)

    def _enter(self) -> None:
        """Makes the device's context this thread's, which the driver's functions need. Waits for nothing."""
        torch.cuda.current_stream(self._device).query()

    def _map(self, address: int, num_bytes: int) -> None:
        """Puts new memory at addresses that have none."""
        handle = call("cuMemCreate", num_bytes, self._properties, 0)
        try:
            call("cuMemMap", address, num_bytes, 0, handle, 0)
        finally:
            call("cuMemRelease", handle)  # it lives as long as it is mapped
        access = self._driver.CUmemAccessDesc()
        access.location = self._properties.location
        access.flags = self._driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        try:
            call("cuMemSetAccess", address, num_bytes, [access], 1)
        except RuntimeError:
            call("cuMemUnmap", address, num_bytes)
            raise


class _Bytes:
    """Memory as torch takes it over."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }
