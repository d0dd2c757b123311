"""What a cuda plane has on the server: memory of the GPU that its worker maps too, a stream, and words between them.

A session's steps run on a stream of its own, of which the driver lets no other stream wait. Streams are kept when a
session ends, for the next: torch keeps what it allocated on a stream for work on that stream.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from attnd.errors import Exhausted, Unsupported
from attnd.planes import sockets
from attnd.planes.cuda_layout import TO_SERVER, TO_WORKER, WORDS_BYTES, Place
from attnd.planes.device_bytes import CUDA, DeviceBytes
from attnd.tensors import DTYPE_NAMES
from attnd_server.backends.cuda_graph import captured

if TYPE_CHECKING:
    from attnd.planes.cuda_driver import Device, Stream

# How often a stream that must not wait any more is let go, in seconds.
_STOP_PERIOD_S = 0.001


class Flags(Protocol):
    """One side of the hand-overs: `HostFlags` or `GateFlags`."""

    is_stopped: bool

    def close(self) -> None:
        """Frees what this side has of its own."""

    def wait(self, stream: int, layer: int, is_last: bool) -> None:
        """Lets `stream` wait until the worker has handed over a layer."""

    def signal(self, stream: int, layer: int, is_last: bool) -> None:
        """Tells the worker that what `stream` did so far is done."""

    def stop(self) -> None:
        """Lets everything that waits go on. To be called again until the stream is idle."""


class Lane(Protocol):
    """What a session computes on.

    Attributes:
        num_bytes: of the region.
        flags: of this side.
        handle: the stream, for the flags.
        capture: runs launches on the stream in a way that only records them, and returns what launches them all at
            once; None: there is no such thing.
    """

    num_bytes: int
    flags: Flags
    handle: int
    capture: Callable[[Callable[[], None]], Callable[[], None]] | None

    def tensor(self, place: Place) -> torch.Tensor:
        """A tensor of the region."""

    def current(self) -> AbstractContextManager[object]:
        """Makes the stream the calling thread's current one, after all that was enqueued on the one before."""

    def mark(self) -> Callable[[], None]:
        """What waits until all that was enqueued up to now is done."""

    def drain(self) -> None:
        """Lets go of what waits for the worker, until the stream is idle."""


class CudaLane:
    """Implements `Lane` on a GPU. Made by `CudaPlanes.open`."""

    capture: Callable[[Callable[[], None]], Callable[[], None]] | None

    def __init__(self, device: Device, stream: Stream, num_bytes: int, on_same_gpu: bool) -> None:
        """Takes the memory. The device must be the thread's current one.

        Raises:
            CudaError: there is not so much.
        """
        from attnd.planes.cuda_gates import GateFlags
        from attnd.planes.cuda_memory import DeviceMemory
        from attnd.planes.cuda_words import HostFlags, HostWords

        self._stream = stream
        self.handle = stream.handle
        self._device = torch.device("cuda", device.index)
        self._torch_stream = torch.cuda.ExternalStream(stream.handle, device=self._device)
        self.capture = partial(captured, stream=self._torch_stream)
        self._region = DeviceMemory.created(device, num_bytes)
        self.num_bytes = self._region.num_bytes
        self._words = -1
        self.flags: Flags
        try:
            self._words = sockets.sealed_memory(WORDS_BYTES)
            if on_same_gpu:
                words = HostWords(sockets.map_memory(os.dup(self._words), WORDS_BYTES))
                self.flags = HostFlags(words, signal=TO_WORKER // 4, flag=TO_SERVER // 4)
            else:
                address = self._region.address
                self.flags = GateFlags(device, signal=address + TO_WORKER, flag=address + TO_SERVER)
        except BaseException:
            self._close_words()
            self._region.close()
            raise
        # torch's own DLPack import, because it takes our word for the device.
        self._bytes = torch.utils.dlpack.from_dlpack(
            DeviceBytes(self._region.address, self.num_bytes, (CUDA, device.index))
        )

    def descriptors(self) -> list[int]:
        """Of the region and of the host's words; the caller closes them. Once."""
        words, self._words = self._words, -1
        return [self._region.exported(), words]

    def tensor(self, place: Place) -> torch.Tensor:
        """A tensor of the region."""
        dtype = getattr(torch, DTYPE_NAMES[place.dtype])
        return self._bytes[place.offset : place.offset + place.num_bytes].view(dtype).view(place.shape)

    def current(self) -> AbstractContextManager[object]:
        """Makes the stream the calling thread's current one, after all that was enqueued on the one before."""
        self._torch_stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._torch_stream)

    def mark(self) -> Callable[[], None]:
        """What waits until all that was enqueued up to now is done. The waiting thread sleeps."""
        event = torch.cuda.Event(blocking=True)
        event.record(self._torch_stream)
        return event.synchronize

    def drain(self) -> None:
        """Lets go of what waits for the worker, until the stream is idle."""
        while not self._stream.is_idle():
            self.flags.stop()
            time.sleep(_STOP_PERIOD_S)

    def close(self) -> Stream:
        """Frees the memory; what is enqueued and waits is let go. Gives back the stream. The device is current."""
        self.drain()
        self._bytes = torch.empty(0)
        self._close_words()
        self.flags.close()
        self._region.close()
        return self._stream

    def _close_words(self) -> None:
        if self._words >= 0:
            os.close(self._words)
            self._words = -1


class CudaPlanes:
    """The cuda planes of a server. Any thread may use it.

    Attributes:
        gpu_uuid: of the server's GPU.
        num_bytes: of each region.
    """

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        """Looks whether there can be any.

        Raises:
            Unsupported: not on this device, or not with what is installed; the message says why.
        """
        if device.type != "cuda":
            raise Unsupported(f"the server's device is {device}, and it needs a GPU", field="plane")
        from attnd.planes import cuda_driver

        torch.cuda.init()
        found = cuda_driver.device_of(str(torch.cuda.get_device_properties(device).uuid))
        refusal = "the driver does not show the server's GPU" if found is None else found.refusal()
        if found is None or refusal is not None:
            raise Unsupported(refusal or "", field="plane")
        self._device = found
        self.gpu_uuid = found.uuid
        self.num_bytes = num_bytes
        self._idle: list[Stream] = []
        self._lock = threading.Lock()

    def open(self, worker_gpu: str) -> CudaLane:
        """Memory, words and a stream for a session.

        Args:
            worker_gpu: UUID of the worker's GPU.

        Raises:
            Exhausted: the GPU's memory is full.
        """
        from attnd.planes.cuda_driver import CudaError, Stream

        self._device.make_current()
        with self._lock:
            stream = self._idle.pop() if self._idle else None
        try:
            if stream is None:
                stream = Stream(self._device)
            return CudaLane(self._device, stream, self.num_bytes, worker_gpu == self.gpu_uuid)
        except BaseException as error:
            self._give_back(stream)
            if isinstance(error, CudaError):
                raise Exhausted(f"no memory for a cuda plane's region of {self.num_bytes} bytes: {error}") from None
            raise

    def close(self, lane: CudaLane) -> None:
        """Frees what `open` gave; what is enqueued and waits for the worker is let go."""
        self._device.make_current()
        self._give_back(lane.close())

    def _give_back(self, stream: Stream | None) -> None:
        with self._lock:
            if stream is not None:
                self._idle.append(stream)
