"""Kernels of one thread by which streams of two processes wait for each other while both run.

A gate waits by reading a word again and again until the other side has counted it up. So both sides must run at once:
on a GPU each, or on one under CUDA's Multi-Process Service. Otherwise two processes on one GPU take turns of
milliseconds, and use `HostFlags` instead.

Each side counts its hand-overs in memory of its own, so that a CUDA graph with gates is replayed as it is. Words have
64 bits and never overflow. Release and acquire, for the whole system, order the tensors of both sides around them.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

from attnd.errors import Exhausted
from attnd.protocol.cuda.driver import CudaError, Device, Stream, call, driver, kernels
from attnd.protocol.cuda.host_flags import HostWords

# Turns of a wait between two looks at what lies behind PCIe; a power of two less one.
TURNS = 255


def polled(word: str = "flag", turns: int = TURNS, then: str = "DONE") -> str:
    """PTX that reads a word until it is at least `next`, and goes to a label; every so many turns it comes out here."""
    return f"""AGAIN:
    ld.acquire.sys.global.u64 %seen, [%{word}];
    setp.ge.u64 %decided, %seen, %next;
    @%decided bra {then};
    add.u32 %turn, %turn, 1;
    and.b32 %low, %turn, {turns};
    setp.ne.u32 %decided, %low, 0;
    @%decided bra AGAIN;
"""


def unless_stopped(word: str = "stop_word") -> str:
    """PTX that goes on polling as long as a word is 0."""
    return f"""    ld.volatile.global.u32 %stop, [%{word}];
    setp.eq.u32 %decided, %stop, 0;
    @%decided bra AGAIN;
"""


# counter: where this side counts. signal: the word that the other side waits for. flag: the word that this side waits
# for. stop: a word of the host's that is not 0 once nothing is to wait any more.
_HEAD = """
    .param .u64 counter, .param .u64 signal, .param .u64 flag, .param .u64 stop
) {
    .reg .pred %decided;
    .reg .u32 %turn, %low, %stop;
    .reg .u64 %counter, %signal, %flag, %stop_word, %next, %seen;
    ld.param.u64 %counter, [counter];
    ld.param.u64 %signal, [signal];
    ld.param.u64 %flag, [flag];
    ld.param.u64 %stop_word, [stop];
    ld.global.u64 %next, [%counter];
"""
_COUNT = """
    add.u64 %next, %next, 1;
    st.global.u64 [%counter], %next;
"""
_SIGNAL = """
    st.release.sys.global.u64 [%signal], %next;
"""
_WAIT = f"""
    mov.u32 %turn, 0;
{polled()}{unless_stopped()}DONE:
"""
_BODIES = {"wait": _COUNT + _WAIT, "signal": _SIGNAL}
# What every GPU since 2017 runs; the driver compiles it.
PTX = ".version 7.0\n.target sm_70\n.address_size 64\n" + "".join(
    f".visible .entry attnd_{name}({_HEAD}{body}    ret;\n}}\n" for name, body in _BODIES.items()
)

# Bytes that a word and a counter have.
WORD_BYTES = 8


@cache
def _functions(on: Device) -> dict[str, Any]:
    """The kernels on a GPU, the thread's current one, until the process ends."""
    return kernels(PTX, tuple(f"attnd_{name}" for name in _BODIES))


class GateFlags:
    """One side of the hand-overs between two processes that run at once. The same methods as `HostFlags`, but gates."""

    def __init__(self, on: Device, signal: int, flag: int, counter: Counter | None = None) -> None:
        """Nothing was handed over yet.

        Args:
            on: the GPU of this side, the thread's current one.
            signal: address of the word that this side counts up, 0 at first, in memory of either GPU.
            flag: address of the word that the other side counts up, likewise.
            counter: where this side counts, zero by the time of the first gate; None: its own, freed by `close`.
        """
        self._kernels = _functions(on)
        self._own = counter is None
        self._counter = counter or Counter(on)
        self._stop = _STOP_WORDS.taken()
        first = self._counter.address
        addresses = (first, signal, flag, _STOP_WORDS.address_of(self._stop))
        # The counter, the word beside it, and the others: for `HandOver`.
        self.addresses = (first, first + WORD_BYTES, *addresses[1:])
        self._values = [ctypes.c_uint64(address) for address in addresses]
        self._pointers = (ctypes.c_void_p * len(addresses))(*map(ctypes.addressof, self._values))
        self._arguments = ctypes.addressof(self._pointers)
        self._launch = driver().cuLaunchKernel
        self.is_stopped = False

    def wait(self, stream: int, layer: int, is_last: bool) -> None:
        """Lets `stream` wait until the worker has handed over a layer. The server's; a worker has `HandOver`."""
        self._enqueue("wait", stream)

    def signal(self, stream: int, layer: int, is_last: bool) -> None:
        """Tells the worker that what `stream` did so far is done."""
        self._enqueue("signal", stream)

    def stop(self) -> None:
        """Lets everything that waits on this side go on, now and from now on. From any thread."""
        self.is_stopped = True
        _STOP_WORDS.write(self._stop, 1)

    def close(self) -> None:
        """Frees what this side has of its own, once; no gate may be queued."""
        if self._stop >= 0:
            _STOP_WORDS.give_back(self._stop)
            self._stop = -1
            if self._own:
                self._counter.close()

    def _enqueue(self, kernel: str, stream: int) -> None:
        (result,) = self._launch(self._kernels[f"attnd_{kernel}"], 1, 1, 1, 1, 1, 1, 0, stream, self._arguments, 0)
        if result:
            raise CudaError("cuLaunchKernel", result.name)


class Counter:
    """Where one side counts: two words of its GPU, `start` and zero at first.

    Allocated and freed in the order of a stream, because `cuMemFree` would wait for everybody's.

    Attributes:
        address: of the first.
    """

    def __init__(self, on: Device, start: int = 0) -> None:
        """`on` must be the thread's current GPU; `start` has 32 bits."""

        def allocate(stream: int) -> Any:
            address = call("cuMemAllocAsync", 2 * WORD_BYTES, stream)
            call("cuMemsetD8Async", address, 0, 2 * WORD_BYTES, stream)
            call("cuMemsetD32Async", address, start, 1, stream)
            return address

        self._device = on
        self._memory = _on_stream(on, allocate)
        self.address = int(self._memory)

    def reset(self, stream: int) -> None:
        """Makes it zeros, in the order of `stream`."""
        call("cuMemsetD8Async", self._memory, 0, 2 * WORD_BYTES, stream)

    def close(self) -> None:
        """Frees it, once; no gate may be queued."""
        _on_stream(self._device, lambda stream: call("cuMemFreeAsync", self._memory, stream))


def prepare(on: Device) -> None:
    """Does what the first gate of a process would do, for which the driver may wait for all that runs on the GPU."""
    _functions(on)
    _STOP_WORDS.give_back(_STOP_WORDS.taken())


def _on_stream(on: Device, work: Callable[[int], Any]) -> Any:
    """Does `work` on a stream of its own, waits for it, and returns what it gave."""
    stream = Stream(on)
    try:
        result = work(stream.handle)
        stream.synchronize()
        return result
    finally:
        stream.close()


class _StopWords:
    """The words by which the processor stops gates: one page for the process, because registering may wait for GPUs."""

    def __init__(self) -> None:
        self._words: HostWords | None = None
        self._free: list[int] = []
        self._lock = threading.Lock()

    def taken(self) -> int:
        """The index of a word that nobody has, which is 0."""
        with self._lock:
            if self._words is None:
                self._words = HostWords.private()
                self._free = list(range(self._words.num_words))
            if not self._free:
                raise Exhausted("this process has as many cuda planes as there are words to stop them")
            index = self._free.pop()
            self._words.write(index, 0)
            return index

    def give_back(self, index: int) -> None:
        """Nobody needs it any more."""
        with self._lock:
            self._free.append(index)

    def address_of(self, index: int) -> int:
        """Of a word that was taken, for GPUs."""
        assert self._words is not None
        return self._words.address_of(index)

    def write(self, index: int, value: int) -> None:
        """Writes a word that was taken."""
        assert self._words is not None
        self._words.write(index, value)


_STOP_WORDS = _StopWords()
