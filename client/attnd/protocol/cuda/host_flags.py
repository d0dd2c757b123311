"""Words of host memory that a GPU reads and writes as well, and hand-overs between two processes through them.

A stream waits for such a word without a kernel that runs, so that two processes on one GPU can wait for each other. And
the processor can always write one, whatever the GPU is busy with.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable
from typing import Any

from attnd.protocol.cuda.driver import CudaError, call, driver

_WORD_BYTES = 4
# Greater than any value that a layer is handed over with, and than them all by less than 2^31, as waits compare.
_RELEASED = 1 << 30
# Looks at a word that was released, to see whether somebody writes it over, and seconds for which it is written again
# and again then. A stream looks at it every few microseconds, and sees it released before long: see `HostFlags.stop`.
_LOOKS, _INSISTING_S = 64, 200e-6


class HostWords:
    """Words of 32 bits in memory of the host, which all GPUs of the process reach.

    Attributes:
        address: of the first, for GPUs.
        num_words: their number.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        """Owns `memory`, which others may map too.

        Raises:
            CudaError: it cannot be made reachable.
        """
        self._memory = memory
        self.num_words = len(memory) // _WORD_BYTES
        self._held = ctypes.c_char.from_buffer(memory)  # keeps the memory mapped
        self._host_address = ctypes.addressof(self._held)
        module = driver()
        flags = module.CU_MEMHOSTREGISTER_PORTABLE | module.CU_MEMHOSTREGISTER_DEVICEMAP
        call("cuMemHostRegister", self._host_address, len(memory), flags)
        self._is_registered = True
        self._words = memoryview(memory).cast("I")
        try:
            self.address = int(call("cuMemHostGetDevicePointer", self._host_address, 0))
        except CudaError:
            self.close()
            raise

    @classmethod
    def private(cls) -> HostWords:
        """A page of zeros that no other process has."""
        return cls(mmap.mmap(-1, mmap.PAGESIZE))

    def address_of(self, index: int) -> int:
        """Of a word, for GPUs."""
        return self.address + index * _WORD_BYTES

    def read(self, index: int) -> int:
        """A word, as the processor sees it."""
        return self._words[index]

    def write(self, index: int, value: int) -> None:
        """Writes a word from the processor, at once."""
        self._words[index] = value

    def close(self) -> None:
        """Takes it from the GPUs, once; no work that uses it may be queued."""
        if self._is_registered:
            self._is_registered = False
            call("cuMemHostUnregister", self._host_address)
            self._words.release()


Writer = Callable[[int, int, int], None]
"""Lets a stream write a word: stream, address, value."""


class HostFlags:
    """One side of the hand-overs between two processes that take turns on a GPU: streams wait for words of the host.

    Both sides know the layers by number. Layer l is handed over with the value l + 1, and who waited for the last one
    sets the word to 0 again, before it hands on itself. So every step has the same operations, and a CUDA graph with
    them is replayed as it is.
    """

    def __init__(self, words: HostWords, signal: int, flag: int, writer: Writer | None = None) -> None:
        """Nothing was handed over yet.

        Args:
            words: that both sides have; owned by this object from now on.
            signal: index of the word that this side writes, 0 at first.
            flag: index of the word that the other side writes, likewise.
            writer: what `signal` writes with, a kernel, which comes sooner after another than an operation of the
                stream; None: such an operation.
        """
        self._words = words
        self._writer = writer
        self._signal, self._flag = signal, flag
        self._operations: dict[tuple[str, int, bool], list[Any]] = {}
        self._enqueue = driver().cuStreamBatchMemOp
        self.is_stopped = False

    def wait(self, stream: int, layer: int, is_last: bool) -> None:
        """Lets `stream` wait until the other side has handed over a layer."""
        self._run("wait", stream, layer, is_last)

    def signal(self, stream: int, layer: int, is_last: bool) -> None:
        """Tells the other side that what `stream` did so far is done."""
        if self._writer is None:
            self._run("signal", stream, layer, is_last)
        else:
            self._writer(stream, *self.signal_of(layer))

    def signal_of(self, layer: int) -> tuple[int, int]:
        """For whoever writes it by a kernel: the address, for GPUs, of the word that tells a layer, and its value."""
        return self._words.address_of(self._signal), layer + 1

    def stop(self) -> None:
        """Lets everything that waits on this side go on. From any thread.

        To be called again until the streams are idle: operations that are queued may write the word meanwhile. So may
        the other side, whose word it is. An operation of a stream waits for one word alone, not for this or one that
        nobody else has, as a gate does. So it is a race, which cannot be lost for long: where the word is written over,
        it is written again for some time, and each look of the stream has its chance.
        """
        self.is_stopped = True
        words, flag = self._words, self._flag
        words.write(flag, _RELEASED)
        if all(words.read(flag) == _RELEASED for _ in range(_LOOKS)):
            return
        until = time.perf_counter() + _INSISTING_S
        while time.perf_counter() < until:
            for _ in range(_LOOKS):
                words.write(flag, _RELEASED)

    def close(self) -> None:
        """Gives the words up; nothing that uses them may be queued."""
        self._words.close()

    def _run(self, kind: str, stream: int, layer: int, is_last: bool) -> None:
        key = kind, layer, is_last
        operations = self._operations.get(key)
        if operations is None:
            operations = self._operations[key] = self._made(*key)
        (result,) = self._enqueue(stream, len(operations), operations, 0)
        if result:
            raise CudaError("cuStreamBatchMemOp", result.name)

    def _made(self, kind: str, layer: int, is_last: bool) -> list[Any]:
        operations = []
        if kind != "wait":
            operations.append(_write(*self.signal_of(layer)))
        if kind != "signal":
            flag = self._words.address_of(self._flag)
            operations.append(_wait(flag, layer + 1))
            if is_last:
                operations.append(_write(flag, 0))
        return operations


def _write(address: int, value: int) -> Any:
    module = driver()
    operation = module.CUstreamBatchMemOpParams()
    operation.operation = module.CUstreamBatchMemOpType.CU_STREAM_MEM_OP_WRITE_VALUE_32
    write = operation.writeValue
    write.operation = module.CUstreamBatchMemOpType.CU_STREAM_MEM_OP_WRITE_VALUE_32
    write.address = module.CUdeviceptr(address)
    write.value = module.cuuint32_t(value)
    write.flags = int(module.CUstreamWriteValue_flags.CU_STREAM_WRITE_VALUE_DEFAULT)
    return operation


def _wait(address: int, value: int) -> Any:
    """Until the word is at least `value`."""
    module = driver()
    operation = module.CUstreamBatchMemOpParams()
    operation.operation = module.CUstreamBatchMemOpType.CU_STREAM_MEM_OP_WAIT_VALUE_32
    wait = operation.waitValue
    wait.operation = module.CUstreamBatchMemOpType.CU_STREAM_MEM_OP_WAIT_VALUE_32
    wait.address = module.CUdeviceptr(address)
    wait.value = module.cuuint32_t(value)
    wait.flags = int(module.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ)
    return operation
