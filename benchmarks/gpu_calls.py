"""Calls of CUDA, and of what uses it, that a server makes or avoids while a stream of its process waits in the GPU."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from attnd.protocol.cuda import gate_flags
from attnd.protocol.cuda.driver import Stream, call, device
from attnd.protocol.cuda.host_flags import HostFlags, HostWords
from attnd.protocol.cuda.memory import DeviceMemory
from attnd_server.attention.backends.dense_prefill import dense_kernels
from attnd_server.device.cuda_graph import captured
from attnd_server.device.first_uses import use_libraries
from attnd_server.device.gpu_addresses import GpuAddresses
from attnd_server.device.kernels.loading import KernelLoader, StandIn
from attnd_server.device.kernels.local_memory import LEAST_BYTES, local_memory, user_of
from attnd_server.device.kernels.second_context import second_context
from attnd_server.device.quiet import quiet_gpu

GPU = torch.device("cuda", 0)
WORDS, SPINNING, NONE = "words", "spinning", "none"
KINDS = (WORDS, SPINNING)
_MIB = 1 << 20
# Memory that is registered with CUDA stays mapped: its addresses must not be another's while they are registered.
_words: list[HostWords] = []
_PTX = """.version 7.0
.target sm_70
.address_size 64
.visible .entry kernel_{0}(.param .u64 p) {{ .reg .u64 %a; ld.param.u64 %a, [p]; st.global.u32 [%a], {0}; ret; }}
"""


class Gate:
    """A stream that waits, with work behind: for a word of the host's, in a kernel that spins, or not at all.

    Attributes:
        kind: how it waits.
    """

    def __init__(self, kind: str) -> None:
        """Nothing waits yet."""
        self.kind, self._gpu = kind, device(GPU.index)
        self._gpu.make_current()
        gate_flags.prepare(self._gpu)
        self._stream = Stream(self._gpu)
        self._memory = torch.zeros(64, dtype=torch.int64, device=GPU)
        self._counter = gate_flags.Counter(self._gpu)
        self._words, self._indices = HostWords.private(), itertools.count()
        _words.append(self._words)
        self._flags: HostFlags | gate_flags.GateFlags | None = None

    def hold(self) -> None:
        """Lets the stream wait. The GPU is the thread's current one."""
        if self.kind == NONE:
            return
        first = self._memory.data_ptr()
        if self.kind == SPINNING:
            self._flags = gate_flags.GateFlags(self._gpu, first, first + 8, self._counter)
        else:
            self._flags = HostFlags(self._words, signal=next(self._indices), flag=next(self._indices))
        self._flags.wait(self._stream.handle, 0, is_last=False)
        call("cuMemsetD8Async", first + 256, 0, 8, self._stream.handle)

    def is_holding(self) -> bool:
        """Whether it waits still. May itself wait while another thread is in a call that does."""
        return not self._stream.is_idle()

    def open(self) -> None:
        """Lets it go on. From any thread, whatever CUDA does."""
        if self._flags is not None:
            self._flags.stop()

    def release(self) -> None:
        """Lets it go on, and gets it ready for the next time."""
        if self._flags is None:
            return
        self._flags.stop()
        self._stream.synchronize()
        if isinstance(self._flags, gate_flags.GateFlags):
            self._counter.reset(self._stream.handle)
            self._stream.synchronize()
            self._flags.close()
        self._flags = None


class GpuCall(NamedTuple):
    """A call.

    Attributes:
        name: for people.
        waits: whether it is known to return only when the gate has opened: then a server must not make it.
        prepare: gets everything ready for it, while nothing waits, and returns the call.
    """

    name: str
    waits: bool
    prepare: Callable[[], Callable[[], object]]


@triton.jit
def _add(target, number: tl.constexpr):  # noqa: ANN001, ANN202
    offsets = tl.arange(0, 128)
    tl.store(target + offsets, tl.load(target + offsets) + number)


_numbers = itertools.count(1)


def compiled(target: torch.Tensor) -> tuple[Any, int]:
    """A kernel of Triton's that is not on the GPU yet, and what it adds to each of 128 integers at `target`."""
    number = next(_numbers)
    return _add.warmup(target, number=number, grid=(1,)), number


def launched(kernel: Any, target: torch.Tensor, number: int) -> None:
    """Launches such a kernel as Triton does, on the current stream: itself, or what stands in for it."""
    stream = torch.cuda.current_stream(GPU).cuda_stream
    kernel.run(1, 1, 1, stream, kernel.function, kernel.packed_metadata, None, None, None, target, number)


def gpu_calls() -> list[GpuCall]:
    """All of them, for the thread's GPU."""
    torch.cuda.Stream(GPU)  # torch makes a pool of streams at the first, as a server does when it starts
    use_libraries(GPU)
    local_memory(GPU.index).reserve(LEAST_BYTES)
    second_context(GPU.index)
    return [*_modules(), *_libraries(), *_memory(), *_streams(), *_second_context()]


def _modules() -> Iterator[GpuCall]:
    def source() -> bytes:
        return _PTX.format(next(_numbers)).encode() + b"\0"

    def loads() -> Callable[[], object]:
        code = source()
        return lambda: call("cuModuleLoadData", code)

    def unloads() -> Callable[[], object]:
        module = call("cuModuleLoadData", source())
        return lambda: call("cuModuleUnload", module)

    yield GpuCall("cuModuleLoadData", True, loads)
    yield GpuCall("cuModuleUnload", True, unloads)
    sizes = itertools.count(8192, 1024)
    yield GpuCall("first launch, no more local memory than reserved", False, lambda: user_of(GPU.index, LEAST_BYTES))
    yield GpuCall("first launch, more local memory than any before", True, lambda: user_of(GPU.index, next(sizes)))

    def reserved() -> Callable[[], object]:
        num_bytes = next(sizes)
        local_memory(GPU.index).reserve(num_bytes)
        return user_of(GPU.index, num_bytes)

    yield GpuCall("first launch, after as much was reserved", False, reserved)


def _libraries() -> Iterator[GpuCall]:
    doubles = torch.rand(100, dtype=torch.float64, device=GPU)
    halves = torch.rand(2, 64, 64, device=GPU).half()
    unused = iter([torch.logit, torch.atan, torch.expm1])  # in no use elsewhere
    tokens = halves.view(1, 2, 64, 64)

    def never_launched() -> Callable[[], object]:
        function = next(unused)
        return lambda: function(doubles)

    attend = torch.nn.functional.scaled_dot_product_attention
    yield GpuCall("kernel of torch that was never launched", False, never_launched)
    yield GpuCall("product, of a thread's own cuBLAS handle", False, lambda: lambda: torch.bmm(halves, halves))
    yield GpuCall("torch's attention", False, lambda: lambda: attend(tokens, tokens, tokens))
    # Of sizes in no use elsewhere: cuDNN would compile and load a kernel for each.
    sizes = itertools.count(80, 8)

    def dense() -> Callable[[], object]:
        rows = torch.rand(1, 2, 64, next(sizes), device=GPU).half()

        def attends() -> None:
            with dense_kernels():
                attend(rows, rows, rows, is_causal=True)

        return attends

    yield GpuCall("torch's attention, as backend sdpa has it", False, dense)


def _memory() -> Iterator[GpuCall]:
    cudart = torch.cuda.cudart()
    kept: list[Any] = []

    def region(is_registered: bool) -> int:
        memory = mmap.mmap(-1, 16 * _MIB)
        kept.append(memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        if is_registered:
            cudart.cudaHostRegister(address, 16 * _MIB, 1)
        return address

    def registers() -> Callable[[], object]:
        address = region(False)
        return lambda: cudart.cudaHostRegister(address, 16 * _MIB, 1)

    def unregisters() -> Callable[[], object]:
        address = region(True)
        return lambda: cudart.cudaHostUnregister(address)

    yield GpuCall("cudaHostRegister", False, registers)
    yield GpuCall("cudaHostUnregister", True, unregisters)
    yield GpuCall("cuMemHostRegister", False, lambda: lambda: kept.append(HostWords.private()))
    yield GpuCall("cuMemHostUnregister", True, lambda: HostWords.private().close)

    sizes = itertools.count(3 * _MIB + 1, 4 * _MIB)  # none that torch has kept

    def pins() -> None:
        kept.append(torch.empty(next(sizes), dtype=torch.uint8, pin_memory=True))

    def frees_pinned() -> Callable[[], object]:
        torch.empty(next(sizes), dtype=torch.uint8, pin_memory=True)
        return torch._C._host_emptyCache

    yield GpuCall("cudaHostAlloc", False, lambda: pins)
    yield GpuCall("cudaFreeHost", True, frees_pinned)

    def allocates() -> Callable[[], object]:
        torch.cuda.empty_cache()
        return lambda: torch.empty(300 * _MIB, dtype=torch.uint8, device=GPU)

    def empties() -> Callable[[], object]:
        torch.empty(300 * _MIB, dtype=torch.uint8, device=GPU)
        return torch.cuda.empty_cache

    yield GpuCall("cudaMalloc", False, allocates)
    yield GpuCall("cudaFree", True, empties)

    def frees() -> Callable[[], object]:
        address = call("cuMemAlloc", 16 * _MIB)
        return lambda: call("cuMemFree", address)

    yield GpuCall("cuMemFree", True, frees)
    yield GpuCall("cuMemAllocAsync, cuMemFreeAsync", False, lambda: lambda: _counted_and_freed())

    def maps() -> None:
        memory = DeviceMemory.created(device(GPU.index), 64 * _MIB)
        os.close(memory.exported())
        memory.close()

    yield GpuCall("memory of a plane: made, exported and freed", False, lambda: maps)

    def pages() -> None:
        addresses = GpuAddresses(GPU, 64 * _MIB)
        addresses.commit(addresses.unit_bytes, 3 * addresses.unit_bytes)
        addresses.give_back(addresses.unit_bytes, 3 * addresses.unit_bytes)
        addresses.close()

    yield GpuCall("memory of a cache: made, cleared and freed", False, lambda: pages)
    yield GpuCall("cuMemGetInfo", False, lambda: lambda: torch.cuda.mem_get_info(GPU))


def _counted_and_freed() -> None:
    gate_flags.Counter(device(GPU.index)).close()


def _streams() -> Iterator[GpuCall]:
    numbers = torch.zeros(4 * _MIB, dtype=torch.uint8, device=GPU)
    host = torch.zeros(4 * _MIB, dtype=torch.uint8)
    numbers.add_(1)
    numbers.copy_(host)

    def streams() -> None:
        stream = Stream(device(GPU.index))
        stream.synchronize()
        stream.close()

    def graph() -> None:
        stream = torch.cuda.Stream(GPU)
        replay = captured(lambda: numbers.add_(1), stream)
        replay()
        torch.cuda.current_stream(GPU).synchronize()

    def copies() -> None:
        numbers.copy_(host)
        numbers.cpu()

    yield GpuCall("stream: made, waited for and destroyed", False, lambda: streams)
    yield GpuCall("CUDA graph: captured, replayed and destroyed", False, lambda: graph)
    yield GpuCall("copies of pageable memory", False, lambda: copies)
    yield GpuCall("cudaDeviceSynchronize", True, lambda: torch.cuda.synchronize)


def _second_context() -> Iterator[GpuCall]:
    target = torch.zeros(128, dtype=torch.int32, device=GPU)
    quiet, loader = quiet_gpu(GPU), KernelLoader(GPU)

    def loads() -> Callable[[], object]:
        kernel, _ = compiled(target)
        return lambda: second_context(GPU.index).load(kernel, quiet)

    def stands_in() -> Callable[[], object]:
        kernel, number = compiled(target)

        def load_and_launch() -> None:
            stand_in = loader.load(kernel)
            assert isinstance(stand_in, StandIn)
            before = target.cpu()
            launched(stand_in, target, number)
            assert torch.equal(target.cpu(), before + number)

        return load_and_launch

    yield GpuCall("second context: a kernel is loaded", False, loads)
    yield GpuCall("a kernel is loaded and launched while a step waits", False, stands_in)
