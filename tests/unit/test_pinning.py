"""Which regions are pinned, for how long, and what becomes of those that cannot be; with a fake for CUDA."""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from attnd_server.device.quiet import QuietGpu
from attnd_server.planes import server as plane_server
from attnd_server.planes.shm.pinning import CudaRegistrar, Pinning, registrar_for
from tests.servers import wait_for
from tests.unit.test_shm_server import GEOMETRY, attend, serving


class FakeRegistrar:
    """Knows what is registered; refuses everything if it is given a reason."""

    def __init__(self, refusal: str = "") -> None:
        self.registered: dict[int, int] = {}
        self.num_registered = 0
        self._refusal = refusal

    def register(self, address: int, num_bytes: int) -> None:
        if self._refusal:
            raise RuntimeError(self._refusal)
        assert address not in self.registered
        self.registered[address] = num_bytes
        self.num_registered += 1

    def unregister(self, address: int) -> None:
        del self.registered[address]


@pytest.fixture
def registrar(monkeypatch: pytest.MonkeyPatch) -> FakeRegistrar:
    fake = FakeRegistrar()
    monkeypatch.setattr(plane_server, "registrar_for", lambda device: fake)
    return fake


def wait_until_nothing_is_registered(registrar: FakeRegistrar) -> None:
    wait_for(lambda: not registrar.registered, "the region of a session that has ended is still registered")


def test_memory_is_pinned_where_it_lies_until_the_end_of_the_block() -> None:
    registrar, memory = FakeRegistrar(), mmap.mmap(-1, 8192)
    pinning = Pinning(registrar)
    with pinning.pinned(memory) as is_pinned:
        assert is_pinned
        ((address, num_bytes),) = registrar.registered.items()
        memory[5:8] = b"abc"
        assert ctypes.string_at(address + 5, 3) == b"abc"
        assert num_bytes == pinning.num_bytes == 8192
    assert registrar.registered == {}
    assert pinning.num_bytes == 0
    memory.close()  # nothing views it any more


def test_memory_is_unpinned_after_a_failure_too() -> None:
    registrar = FakeRegistrar()
    with pytest.raises(ZeroDivisionError), Pinning(registrar).pinned(mmap.mmap(-1, 4096)):
        raise ZeroDivisionError
    assert registrar.registered == {}


def test_what_cannot_be_pinned_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    pinning = Pinning(FakeRegistrar("CUDA error: operation not supported"))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with pinning.pinned(mmap.mmap(-1, 4096)) as is_pinned:
                assert not is_pinned
    assert len(caplog.messages) == 1
    assert "cannot be pinned" in caplog.messages[0]
    assert "operation not supported" in caplog.messages[0]
    assert pinning.num_bytes == 0


def test_no_more_than_the_limit_is_pinned(caplog: pytest.LogCaptureFixture) -> None:
    registrar = FakeRegistrar()
    pinning = Pinning(registrar, max_bytes=8192)
    first, second, third = (mmap.mmap(-1, 4096) for _ in range(3))
    with pinning.pinned(first), pinning.pinned(second), pinning.pinned(third) as is_pinned:
        assert not is_pinned
        assert len(registrar.registered) == 2
        assert "8192 bytes are, of at most 8192" in caplog.messages[0]
    with pinning.pinned(third) as is_pinned:
        assert is_pinned


def test_what_is_pinned_stays_so_and_counts_while_a_step_waits_in_the_gpu() -> None:
    registrar, quiet = FakeRegistrar(), QuietGpu()
    pinning = Pinning(registrar, quiet, max_bytes=8192)
    memory = mmap.mmap(-1, 8192)
    is_there = weakref.ref(memory)
    with quiet.waits():
        with pinning.pinned(memory):
            pass
        del memory
        assert pinning.num_bytes == sum(registrar.registered.values()) == 8192
        assert is_there() is not None  # mapped
        with pinning.pinned(mmap.mmap(-1, 4096)) as is_pinned:
            assert not is_pinned
    wait_until_nothing_is_registered(registrar)
    wait_for(lambda: pinning.num_bytes == 0 and is_there() is None, "the region is still there")
    with pinning.pinned(mmap.mmap(-1, 4096)) as is_pinned:
        assert is_pinned
    assert not registrar.registered  # at once, where nothing waits
    quiet.close(1)


def test_a_processor_needs_no_pinned_memory() -> None:
    assert registrar_for(torch.device("cpu")) is None
    assert isinstance(registrar_for(torch.device("cuda", 0)), CudaRegistrar)
    with Pinning(None).pinned(mmap.mmap(-1, 4096)) as is_pinned:
        assert not is_pinned


class FakeCudart:
    """Refuses to register, and says on which thread it was asked."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        self.threads.append(threading.current_thread())
        return 801

    def cudaError(self, code: int) -> str:
        return f"code {code}"

    def cudaGetErrorString(self, error: str) -> str:
        return f"not supported, {error}"


def test_what_cuda_refuses_is_no_error_of_the_threads_that_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = FakeCudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with pytest.raises(RuntimeError, match="CUDA error 801: not supported, code 801"):
        CudaRegistrar(torch.device("cuda", 0)).register(4096, 4096)
    (thread,) = cudart.threads
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


def test_a_session_has_its_region_pinned_until_it_ends(tmp_path: Path, registrar: FakeRegistrar) -> None:
    with serving(tmp_path) as (_, client), client.create_cache(**GEOMETRY) as cache:
        with cache.session() as first, cache.session() as second:
            attend(first)
            attend(second)
            assert list(registrar.registered.values()) == [1 << 20] * 2
        wait_until_nothing_is_registered(registrar)
        assert registrar.num_registered == 2


def test_a_client_that_sends_garbage_leaves_nothing_pinned(tmp_path: Path, registrar: FakeRegistrar) -> None:
    with serving(tmp_path) as (_, client), client.create_cache(**GEOMETRY) as cache:
        with cache.session() as session:
            attend(session)
            session._stream._connection.sendall(b"\xff" * 64)  # type: ignore[union-attr]
            wait_until_nothing_is_registered(registrar)


def test_sessions_work_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plane_server, "registrar_for", lambda device: FakeRegistrar("no memory can be pinned"))
    with serving(tmp_path) as (_, client), client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        assert torch.equal(attend(session), torch.ones(1, 2, 16))
        assert session.plane == "shm"
