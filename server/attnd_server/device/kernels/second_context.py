"""A second context of this process on its GPU, for kernels that cannot be loaded into the primary one now.

To load a kernel the driver waits for all that runs in the context that gets it: in the primary one, which torch uses, a
step on a cuda plane may wait for its worker there. Another context has all memory of the primary one, at the same
addresses. What is launched there is put in the order of a stream of the primary one by events; contexts that both have
work take turns of milliseconds. It takes half a gigabyte of the GPU, and as much again for the kernels that CUDA loads
into every context where it loads all at once. Servers with cuda planes make it when they start.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from attnd.protocol.cuda.driver import call, device, driver
from attnd_server.device.kernels.local_memory import LEAST_BYTES, LocalMemory
from attnd_server.device.quiet import QuietGpu

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel

log = logging.getLogger(__name__)

# Seconds for which nothing may be launched here at most, until all is over that was, and between two tries: each pause
# is twice the one before.
_TRY_S, _LEAST_PAUSE_S, _MOST_PAUSE_S = 0.05, 0.05, 0.8
# Seconds between two looks at a stream.
_LOOK_S = 0.0005


class SecondContext:
    """Kernels in it, and a stream for each stream of the primary one that they are launched in the order of."""

    def __init__(self, index: int) -> None:
        """Makes it: in 2 to 3 s where CUDA loads all kernels of its libraries into it.

        Args:
            index: of the GPU in this process.

        Raises:
            CudaError: there is no memory for it.
        """
        self._index = index
        self._primary = device(index)
        self._lock = threading.Lock()  # of whoever launches or loads
        self._streams: dict[int, Any] = {}  # by the primary one's
        self._local = LocalMemory(index)
        began = time.perf_counter()
        with self._primary.current():  # whatever the thread had, it has again
            self._context = _created(index)
            call("cuCtxPopCurrent")
        log.info("kernels that cannot wait have a second context", extra={"seconds": time.perf_counter() - began})

    def reserve(self) -> None:
        """Has all threads get the local memory that kernels have from the start. While nothing waits in the GPU.

        The driver gives a kernel that needs more only once all is over, in the other context, too.
        """
        with self._lock, self._current():
            self._local.reserve(LEAST_BYTES)

    def load(self, compiled: CompiledKernel, quiet: QuietGpu) -> int | None:
        """The function of a kernel, on the GPU; None: it needs more local memory than there is, and cannot run here.

        Waits for what was launched here: of a step that waits for its worker only if such a step has kernels here.

        Args:
            compiled: the kernel.
            quiet: holds new steps back for moments, while those before go on.
        """
        pause_s = _LEAST_PAUSE_S
        while True:
            with quiet.holding_back(), self._lock:
                if self._becomes_idle():
                    return self._loaded(compiled)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _MOST_PAUSE_S)

    def launch(self, stream: int, launch: Callable[[int], None]) -> None:
        """Has `launch` launch something on a stream here, this context being current, in the order of another stream.

        Args:
            stream: of the primary context; it may be captured into a graph, which has the launch then.
            launch: is given a stream.
        """
        events: list[Any] = []
        with self._lock, _may_make_streams():
            try:
                with self._primary.current():
                    events.append(_recorded(stream))
                with self._current():
                    own = self._stream_for(stream)
                    call("cuStreamWaitEvent", own, events[0], 0)
                    launch(int(own))
                    events.append(_recorded(own))
                with self._primary.current():
                    call("cuStreamWaitEvent", stream, events[1], 0)
            finally:
                for event in events:
                    call("cuEventDestroy", event)  # once it is over

    def _becomes_idle(self) -> bool:
        """Whether all that was launched here is over soon. With the lock."""
        deadline = time.monotonic() + _TRY_S
        with self._current():
            while not all(_is_idle(stream) for stream in self._streams.values()):
                if time.monotonic() > deadline:
                    return False
                time.sleep(_LOOK_S)
        return True

    def _loaded(self, compiled: CompiledKernel) -> int | None:
        """With the lock."""
        with self._current():
            _, function, _, num_spills, _ = triton_driver().utils.load_binary(
                compiled.name, compiled.kernel, compiled.metadata.shared, self._index
            )
            call("cuFuncLoad", driver().CUfunction(function))
            has_memory = num_spills * 4 <= self._local.num_bytes  # registers of 32 bits
            return int(function) if has_memory else None

    def _stream_for(self, stream: int) -> Any:
        """With the lock."""
        if stream not in self._streams:
            self._streams[stream] = call("cuStreamCreate", int(driver().CUstream_flags.CU_STREAM_NON_BLOCKING))
        return self._streams[stream]

    @contextmanager
    def _current(self) -> Iterator[None]:
        call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            call("cuCtxPopCurrent")


@cache
def second_context(index: int) -> SecondContext:
    """That of a GPU of this process, with local memory; made now, while nothing waits there. Raises CudaError."""
    made = SecondContext(index)
    made.reserve()
    return made


def triton_driver() -> Any:
    """Triton's own of this process, which launches its kernels."""
    from triton.runtime import driver as triton_drivers  # not on every processor

    return triton_drivers.active


def _created(index: int) -> Any:
    found = call("cuDeviceGet", index)
    try:
        return call("cuCtxCreate", None, 0, found)
    except TypeError:  # before version 13 of cuda-bindings
        return call("cuCtxCreate", 0, found)


@contextmanager
def _may_make_streams() -> Iterator[None]:
    """Lets the thread make streams and events though it may be capturing another stream."""
    mode = call("cuThreadExchangeStreamCaptureMode", driver().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
    try:
        yield
    finally:
        call("cuThreadExchangeStreamCaptureMode", mode)


def _recorded(stream: Any) -> Any:
    """An event behind what was enqueued on a stream of the current context."""
    event = call("cuEventCreate", int(driver().CUevent_flags.CU_EVENT_DISABLE_TIMING))
    try:
        call("cuEventRecord", event, stream)
    except BaseException:
        call("cuEventDestroy", event)
        raise
    return event


def _is_idle(stream: Any) -> bool:
    """One that is being captured is, and must not be asked: the capture would fail."""
    status = driver().CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE
    if call("cuStreamIsCapturing", stream) != status:
        return True
    (result,) = driver().cuStreamQuery(stream)
    return not result
