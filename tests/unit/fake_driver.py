"""CUDA's driver as far as virtual memory goes, without memory: what is mapped where, and what breaks its rules."""

from __future__ import annotations

from types import SimpleNamespace

UNIT = 1 << 16


class Result(int):
    name = "CUDA_ERROR_OUT_OF_MEMORY"


class FakeDriver:
    """Implements what `gpu_addresses` calls.

    Attributes:
        reserved: bytes by the address where they start.
        mapped: likewise.
        handles: bytes of memory that was created and is neither released nor mapped.
        free: bytes that may still be created.
    """

    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)

    def __init__(self, free: int) -> None:
        self.reserved: dict[int, int] = {}
        self.mapped: dict[int, int] = {}
        self.accessible: set[int] = set()
        self.handles: dict[int, int] = {}
        self.free = free
        self._next = UNIT

    def CUmemAllocationProp(self) -> SimpleNamespace:
        return SimpleNamespace(location=SimpleNamespace())

    def CUmemAccessDesc(self) -> SimpleNamespace:
        return SimpleNamespace()

    def cuMemGetAllocationGranularity(self, properties: SimpleNamespace, flag: int) -> tuple[Result, int]:
        assert (properties.type, properties.location.type) == (1, 1)
        return Result(0), UNIT

    def cuMemAddressReserve(self, num_bytes: int, *rest: int) -> tuple[Result, int]:
        assert num_bytes % UNIT == 0
        address, self._next = self._next, self._next + num_bytes + UNIT
        self.reserved[address] = num_bytes
        return Result(0), address

    def cuMemAddressFree(self, address: int, num_bytes: int) -> tuple[Result]:
        assert self.reserved.pop(address) == num_bytes
        assert not any(address <= start < address + num_bytes for start in self.mapped)
        return (Result(0),)

    def cuMemCreate(self, num_bytes: int, properties: SimpleNamespace, flags: int) -> tuple[Result, int]:
        assert num_bytes % UNIT == 0
        if num_bytes > self.free:
            return Result(2), 0
        self.free -= num_bytes
        handle = len(self.handles) + 1
        self.handles[handle] = num_bytes
        return Result(0), handle

    def cuMemMap(self, address: int, num_bytes: int, offset: int, handle: int, flags: int) -> tuple[Result]:
        assert self.handles[handle] == num_bytes
        assert any(start <= address and address + num_bytes <= start + size for start, size in self.reserved.items())
        assert not any(start < address + num_bytes and address < start + size for start, size in self.mapped.items())
        self.mapped[address] = num_bytes
        return (Result(0),)

    def cuMemRelease(self, handle: int) -> tuple[Result]:
        del self.handles[handle]
        return (Result(0),)

    def cuMemSetAccess(self, address: int, num_bytes: int, access: list[SimpleNamespace], count: int) -> tuple[Result]:
        assert self.mapped[address] == num_bytes
        self.accessible.add(address)
        return (Result(0),)

    def cuMemUnmap(self, address: int, num_bytes: int) -> tuple[Result]:
        assert self.mapped.pop(address) == num_bytes
        self.free += num_bytes
        return (Result(0),)
