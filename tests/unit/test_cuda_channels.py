"""What a server makes ahead for cuda planes, with a driver that only notes what it is asked."""

from __future__ import annotations

import itertools
import mmap
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from ctypes import addressof, c_char
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from attnd.errors import Exhausted
from attnd.protocol.cuda import copies as cuda_copies
from attnd.protocol.cuda import driver as cuda_driver
from attnd.protocol.cuda import gate_flags as cuda_gates
from attnd.protocol.cuda import host_flags as cuda_words
from attnd.protocol.cuda import memory as cuda_memory
from attnd.protocol.cuda.device_bytes import CPU
from attnd.protocol.cuda.layout import TO_SERVER, TO_WORKER, WORDS_BYTES
from attnd_server.device.kernels.local_memory import local_memory
from attnd_server.device.kernels.second_context import second_context
from attnd_server.planes.cuda import gpu_channel
from attnd_server.planes.cuda import planes as planes_of_gpu
from attnd_server.planes.cuda import streams as cuda_streams
from attnd_server.planes.cuda.gpu_channel import CudaChannel
from attnd_server.planes.cuda.leases import SharedWords
from attnd_server.planes.cuda.planes import CudaPlanes
from attnd_server.planes.worker import Worker

# What waits for all that runs on a GPU, as measured by benchmarks/whole_gpu.py, or is made ahead for another reason.
SLOW = {
    "cuCtxSynchronize",
    "cuMemAllocAsync",
    "cuMemFree",
    "cuMemFreeAsync",
    "cuMemHostUnregister",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuStreamCreate",
    "cuStreamDestroy",
}
GPU, OTHER_GPU = Worker("00000000-0000-0000-0000-000000000000"), Worker("another")


class NotingDriver:
    """Says yes to everything.

    Attributes:
        asked: names of functions, by the thread that asked.
        is_full: whether there is no memory.
        busy: how often a stream is still found busy.
        held_up: streams that are always.
        others_get_on: whether the stream of all other work does.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[int, str]] = []
        self.is_full = False
        self.busy = 0
        self.held_up: set[int] = set()
        self.others_get_on = True
        self._numbers = itertools.count(1)
        self._memory: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu") or not name[2].isupper():
            return MagicMock()
        special = getattr(self, f"_{name}", None) if f"_{name}" in type(self).__dict__ else None
        plain = {"cuDeviceGetUuid": SimpleNamespace(bytes=bytes(16)), "cuMemGetAllocationGranularity": 4096}
        gives_nothing = {"cuStreamQuery", "cuLaunchKernel", "cuStreamBatchMemOp"}

        def function(*arguments: Any) -> tuple[Any, ...]:
            self.asked.append((threading.get_ident(), name))
            if special is not None:
                return (0, special(*arguments)) if name != "cuStreamQuery" else (special(*arguments),)
            if name in gives_nothing:
                return (0,)
            return 0, plain.get(name, next(self._numbers))

        if name == "cuMemCreate" and self.is_full:
            return lambda *_: (SimpleNamespace(name="CUDA_ERROR_OUT_OF_MEMORY"), None)
        return function

    def _cuMemAddressReserve(self, num_bytes: int, *_: int) -> int:
        memory = mmap.mmap(-1, num_bytes)
        self._memory.append(c_char.from_buffer(memory))
        return addressof(self._memory[-1])

    def _cuMemHostGetDevicePointer(self, address: int, _: int) -> int:
        return address

    def _cuMemExportToShareableHandle(self, *_: Any) -> int:
        return os.memfd_create("region")

    def _cuStreamQuery(self, stream: int) -> Any:
        self.busy -= 1
        is_busy = self.busy >= 0 or stream in self.held_up
        return SimpleNamespace(name="CUDA_ERROR_NOT_READY") if is_busy else 0

    def asked_here(self) -> Counter[str]:
        """By this thread, since it last asked."""
        here = Counter(name for thread, name in self.asked if thread == threading.get_ident())
        self.asked = [each for each in self.asked if each[0] != threading.get_ident()]
        return here

    def asked_elsewhere(self) -> Counter[str]:
        return Counter(name for thread, name in self.asked if thread != threading.get_ident())


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[NotingDriver]:
    noting = NotingDriver()
    for module in (cuda_copies, cuda_driver, cuda_gates, cuda_memory, cuda_words):
        monkeypatch.setattr(module, "driver", lambda: noting)
    monkeypatch.setattr(cuda_driver, "device_of", lambda uuid: cuda_driver.Device(0))
    monkeypatch.setattr(cuda_gates, "_STOP_WORDS", cuda_gates._StopWords())
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=GPU.gpu_uuid))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: SimpleNamespace(handle=handle))
    monkeypatch.setattr(planes_of_gpu, "_let_torch_keep_memory", lambda device: None)
    monkeypatch.setattr(planes_of_gpu, "use_libraries", lambda device: None)
    forget_contexts()
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, **where: zeros(*shape, dtype=dtype))
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(query=lambda: noting.others_get_on)
    )
    monkeypatch.setattr(gpu_channel, "CUDA", CPU)  # for torch, which has no GPU here
    made: list[SharedWords] = []
    make = SharedWords.__init__

    def noted(words: SharedWords) -> None:
        make(words)
        made.append(words)

    monkeypatch.setattr(SharedWords, "__init__", noted)
    OPENED.clear()
    yield noting
    for opened in OPENED:  # they live as long as a server; what they made must not outlive the test
        idle = threading.Event()
        opened._quiet.later(idle.set)
        assert idle.wait(10)
    for words in made:
        words.close()
        words.words._held = None
        words.words._memory.close()
    forget_contexts()


def forget_contexts() -> None:
    """What was made of a driver that is not there any more, or was not yet."""
    local_memory.cache_clear()
    second_context.cache_clear()


OPENED: list[CudaPlanes] = []


def planes(max_planes: int = 2) -> CudaPlanes:
    OPENED.append(CudaPlanes(torch.device("cuda", 0), 1 << 16, max_planes))
    return OPENED[-1]


def wait_until(is_so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.005)
    return is_so()


def take(opened: CudaPlanes, worker: Worker) -> CudaChannel:
    channel = opened.open(worker)
    for descriptor in channel.descriptors():
        os.close(descriptor)
    return channel


@pytest.mark.parametrize("worker", [GPU, OTHER_GPU])
def test_sessions_come_and_go_without_a_call_that_may_wait_for_others(driver: NotingDriver, worker: Worker) -> None:
    opened = planes()
    made = driver.asked_here()
    assert made["cuStreamCreate"] - made["cuStreamDestroy"] == 3  # one of each plane, and one for copies
    assert made["cuModuleLoadData"] == 5  # gates, resident ones, copies, and in both contexts what needs local memory
    num_memories = 1 if worker == GPU else 2  # another GPU gets one for results
    for _ in range(5):
        channels = [take(opened, worker) for _ in range(2)]
        assert channels[0].handle != channels[1].handle
        for layer in range(2):
            channels[0].flags.wait(channels[0].handle, layer, layer == 1)
            channels[0].flags.signal(channels[0].handle, layer, layer == 1)
        for channel in channels:
            opened.close(channel)
        asked = driver.asked_here()
        assert not SLOW & set(asked)
        assert asked["cuMemUnmap"] == asked["cuMemRelease"] == 2 * num_memories
        assert asked["cuMemHostRegister"] == 2
    assert wait_until(lambda: driver.asked_elsewhere()["cuMemHostUnregister"] == 10)


def test_the_words_of_a_session_that_has_ended_stay_while_another_waits(driver: NotingDriver) -> None:
    opened = planes()
    with opened._quiet.waits():
        channel = take(opened, GPU)
        words = channel._words.words
        opened.close(channel)
        other = take(opened, GPU)  # a session that ends frees its place, and all of its memory on the GPU
        assert other.handle != channel.handle
        assert driver.asked_here()["cuMemRelease"]
        time.sleep(0.1)
        assert words._is_registered
        driver.is_full = True
        opened.close(other)
        with pytest.raises(Exhausted):
            opened.open(GPU)
        assert not driver.asked_elsewhere()["cuMemHostUnregister"]
    assert wait_until(lambda: driver.asked_elsewhere()["cuMemHostUnregister"] == 3)


@pytest.mark.parametrize("worker", [GPU, OTHER_GPU])
def test_a_session_begins_with_a_count_of_zero_whoever_had_the_lease_before(
    driver: NotingDriver, monkeypatch: pytest.MonkeyPatch, worker: Worker
) -> None:
    """The gates of a worker with another GPU leave theirs; kernels that count arrivals would wait for ever."""
    opened = planes(max_planes=1)
    opened.close(take(opened, OTHER_GPU))
    reset: list[tuple[int, int]] = []
    monkeypatch.setattr(cuda_gates.Counter, "reset", lambda counter, stream: reset.append((counter.address, stream)))
    channel = take(opened, worker)
    assert reset == [(channel.lease.counter.address, channel.handle)]
    opened.close(channel)


def test_streams_that_share_a_queue_are_not_taken(driver: NotingDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_streams, "_HELD_UP_S", 0.01)
    on, device = cuda_driver.Device(0), torch.device("cuda", 0)
    first = cuda_streams.independent_streams(on, device, 3)
    handles = [stream.handle for stream in first]
    # The driver's numbers rise; of the streams to come, some are held up by those that wait.
    driver.held_up = {handle for handle in range(handles[-1] + 1, handles[-1] + 40) if handle // 2 % 2}
    second = cuda_streams.independent_streams(on, device, 3)
    assert not {stream.handle for stream in second} & driver.held_up
    assert driver.asked_here()["cuMemHostUnregister"] == 2


def test_a_server_with_too_few_queues_says_so_and_does_without(
    driver: NotingDriver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda_streams, "_HELD_UP_S", 0.01)
    driver.others_get_on = False
    streams = cuda_streams.independent_streams(cuda_driver.Device(0), torch.device("cuda", 0), 3)
    assert len({stream.handle for stream in streams}) == 3
    assert "only 0 of 3 streams for cuda planes are independent" in caplog.text


def test_a_channel_is_let_go_before_it_is_freed(driver: NotingDriver) -> None:
    opened = planes()
    channel = take(opened, GPU)
    words = channel._words.words
    driver.busy = 3
    opened.close(channel)
    assert driver.busy < 0
    assert channel.flags.is_stopped
    assert wait_until(lambda: not words._is_registered)
    driver.busy = 0


def test_words_are_where_the_contract_says(driver: NotingDriver) -> None:
    opened = planes()
    channel = take(opened, OTHER_GPU)
    region, results = channel._memory
    assert channel.flags.addresses[2:4] == (results.address + TO_WORKER, region.address + TO_SERVER)
    channel = take(opened, GPU)
    assert channel._words.words.num_words == WORDS_BYTES // 4


@pytest.mark.parametrize(("servers", "workers"), [(True, True), (True, False), (False, True), (False, False)])
def test_on_one_gpu_there_are_gates_where_both_sides_run_at_once(
    driver: NotingDriver, monkeypatch: pytest.MonkeyPatch, servers: bool, workers: bool
) -> None:
    monkeypatch.setattr(cuda_driver.Device, "has_mps", servers)
    opened, worker = planes(), Worker(GPU.gpu_uuid, workers)
    channel = take(opened, worker)
    assert isinstance(channel.flags, cuda_gates.GateFlags) == (servers and workers)
    assert opened.takes_turns(worker) == (not (servers and workers))
    assert opened.most_beside(worker) == (planes_of_gpu.MOST_ON_ONE_GPU if servers and workers else None)
    assert opened.most_beside(Worker("another", workers)) is None
    assert opened.results_num_bytes(worker) == 0
    if servers and workers:
        (region,) = channel._memory
        assert channel.flags.addresses[2:4] == (region.address + TO_WORKER, region.address + TO_SERVER)
    assert not opened.takes_turns(Worker("another", workers))


def test_a_worker_that_the_server_cannot_reach_finds_results_in_the_region(
    driver: NotingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = planes()
    assert opened.results_num_bytes(OTHER_GPU) == opened.num_bytes
    assert opened.results_num_bytes(GPU) == 0
    monkeypatch.setattr(cuda_driver, "device_of", lambda uuid: None)
    assert opened.results_num_bytes(OTHER_GPU) == 0
    channel = take(opened, OTHER_GPU)
    (region,) = channel._memory
    assert channel.flags.addresses[2:4] == (region.address + TO_WORKER, region.address + TO_SERVER)


def test_a_full_gpu_costs_no_stream(driver: NotingDriver) -> None:
    opened = planes(1)
    driver.is_full = True
    for _ in range(3):
        with pytest.raises(Exhausted, match="no memory for a cuda plane's region of 65536 bytes: cuMemCreate failed"):
            opened.open(GPU)
    driver.is_full = False
    opened.close(take(opened, GPU))
