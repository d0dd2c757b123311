"""A cuda plane without a GPU: both ends in this process, memory of the host for the GPU's, events for its streams.

Messages, sockets, threads, layout and arithmetic are the real ones. What a stream would do later is done at once, so
that a server that waits for a worker holds up its executor, which the real one never does.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import attnd
from attnd.planes.cuda import layers, opening, plane
from attnd.protocol.cuda.layout import WORDS_BYTES, Place
from attnd.protocol.shm import sockets
from attnd.protocol.tensors import DTYPE_NAMES
from attnd_server.build import build_service
from attnd_server.config import ServerConfig
from attnd_server.inproc import InprocTransport
from attnd_server.planes import server as plane_server
from attnd_server.planes.cuda.planes import CudaPlanes
from attnd_server.planes.negotiation import Planes
from attnd_server.planes.server import PlaneServer
from attnd_server.planes.worker import Worker

GPU = "00000000-1111-2222-3333-444444444444"
# Seconds: longer than anything here should take.
PATIENCE_S = 20.0


class EventFlags:
    """One side of the hand-overs, which are semaphores."""

    def __init__(self, given: threading.Semaphore, taken: threading.Semaphore) -> None:
        self.is_stopped = False
        self.num_waits = 0
        self._given, self._taken = given, taken

    def wait(self, stream: int, layer: int, is_last: bool) -> None:
        self.num_waits += 1
        while not self.is_stopped:
            if self._taken.acquire(timeout=0.01):
                return

    def signal(self, stream: int, layer: int, is_last: bool) -> None:
        self._given.release()

    def stop(self) -> None:
        self.is_stopped = True

    def close(self) -> None:
        pass


class HostChannel:
    """The server's end."""

    capture: Callable[[Callable[[], None]], Callable[[], None]] | None = None
    capture_for = capture

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.handle = 0
        self.region = torch.zeros(num_bytes, dtype=torch.uint8)
        to_server, to_worker = threading.Semaphore(0), threading.Semaphore(0)
        self.flags = EventFlags(to_worker, to_server)
        self.workers_flags = EventFlags(to_server, to_worker)
        self.is_closed = False

    def descriptors(self) -> list[int]:
        return [sockets.sealed_memory(WORDS_BYTES), os.memfd_create("region")]

    def tensor(self, place: Place) -> torch.Tensor:
        part = self.region[place.offset : place.offset + place.num_bytes]
        return part.view(getattr(torch, DTYPE_NAMES[place.dtype])).view(place.shape)

    def current(self) -> AbstractContextManager[object]:
        return nullcontext()

    def mark(self) -> Callable[[], None]:
        return lambda: None

    def drain(self) -> None:
        self.flags.stop()


class HostPlanes(CudaPlanes):
    """Channels of the host. The last one that was opened is where a worker of this process looks for its own end."""

    def __init__(self, num_bytes: int) -> None:
        self.gpu_uuid = GPU
        self.num_bytes = num_bytes
        self.channels: list[HostChannel] = []

    def open(self, worker: Worker) -> Any:
        self.channels.append(HostChannel(self.num_bytes))
        return self.channels[-1]

    def close(self, channel: Any) -> None:
        channel.is_closed = True

    def results_num_bytes(self, worker: Worker) -> int:
        return 0

    def takes_turns(self, worker: Worker) -> bool:
        return True

    def most_beside(self, worker: Worker) -> int | None:
        return None


class _Gpu:
    index, uuid = 0, GPU
    has_mps = False

    def current(self) -> AbstractContextManager[object]:
        return nullcontext()

    def synchronize(self) -> None:
        pass


class _Memory:
    """The worker's mapping of a channel's region."""

    def __init__(self, channel: HostChannel) -> None:
        self.address, self.num_bytes = channel.region.data_ptr(), channel.num_bytes
        self._region = channel.region

    def close(self) -> None:
        pass


class _Counter:
    address = 0

    def __init__(self, gpu: object) -> None:
        pass

    def close(self) -> None:
        pass


class HostPlane(plane.CudaPlane):
    """The worker's end."""

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def is_capturing(self) -> bool:
        return False

    def current_stream(self) -> int:
        return 0

    def hand_over(self, stream: int, layer: int, is_last: bool, inputs: Any, outputs: Any) -> None:
        for place, tensor in inputs:
            ctypes.memmove(self._address(place), tensor.contiguous().data_ptr(), place.num_bytes)
        assert isinstance(self._flags, EventFlags)
        self._flags.signal(stream, layer, is_last)
        self._flags.wait(stream, layer, is_last)
        for place, tensor in outputs:
            ctypes.memmove(tensor.data_ptr(), self._address(place), place.num_bytes)


@contextmanager
def serving(
    folder: Path, patch: pytest.MonkeyPatch, *, region_bytes: int = 1 << 20, **limits: int
) -> Iterator[tuple[attnd.Client, HostPlanes, PlaneServer]]:
    """A server with such planes, and a client that asks for them."""
    planes, offered = HostPlanes(region_bytes), Planes()
    patch.setattr(plane_server, "cuda_planes", lambda device, num_bytes, max_planes: planes)
    service = build_service(ServerConfig(device="cpu", socket_dir=str(folder), **limits), planes=offered)
    server = PlaneServer(service, offered)

    def imported(user: object, descriptor: int, num_bytes: int) -> _Memory:
        os.close(descriptor)
        return _Memory(planes.channels[-1])

    patch.setattr(opening, "worker_gpu", _Gpu)
    patch.setattr(opening, "check_reach", lambda gpu, uuid: None)
    patch.setattr(opening.DeviceMemory, "imported", imported)
    patch.setattr(opening, "HostWords", lambda memory: memory)
    patch.setattr(opening, "HostFlags", lambda words, signal, flag: planes.channels[-1].workers_flags)
    patch.setattr(opening, "CudaPlane", HostPlane)
    patch.setattr(layers, "Copier", lambda gpu: None)
    patch.setattr(layers, "Counter", _Counter)
    patch.setattr(layers, "CopyAndWrite", lambda gpu, arrived: None)
    try:
        with attnd.Client(InprocTransport(service), plane="cuda", timeout_s=PATIENCE_S) as client:
            yield client, planes, server
    finally:
        server.drain()
        server.stop(1)
        service.executor.close()
