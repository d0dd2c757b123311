"""Ctrl-C that comes just before a wait begins, which it does not end then: it is heard all the same."""

from __future__ import annotations

import _thread
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from attnd import threads
from attnd.errors import DeadlineExceeded
from attnd.planes import call_threads
from attnd.planes.cuda.plane import CudaPlane
from attnd.planes.grpc_stream import StreamingCall
from attnd.planes.shm.stream import ShmStream
from attnd.protocol.shm import framing

# Seconds for which nothing comes, as with a server that hangs.
LONG_S = 20.0


@pytest.fixture(autouse=True)
def _hears_signals() -> Iterator[None]:
    """Also where the tests run in the background of a shell, which has SIGINT ignored there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def by_call(ended: threading.Event) -> None:
    call_threads.run(lambda: ended.wait(LONG_S), LONG_S)


def by_stream(ended: threading.Event) -> None:
    def opening(came: Any) -> Iterator[bytes]:
        ended.wait(LONG_S)
        return iter(())

    StreamingCall(opening, "a server").receive(LONG_S)


def by_shm(ended: threading.Event) -> None:
    with shm_stream(LONG_S) as stream:
        stream.receive(LONG_S)


def by_cuda_plane(ended: threading.Event) -> None:
    cuda_plane().told("resident_steps", LONG_S)


def by_cuda_step(ended: threading.Event) -> None:
    threading.Timer(LONG_S, ended.set).start()
    cuda_plane().answer(1, wait=True)


@contextmanager
def shm_stream(timeout_s: float) -> Iterator[ShmStream]:
    """To a server that says nothing."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stream = ShmStream.__new__(ShmStream)
        stream._connection, stream._path, stream._replies = ours, "a socket", framing.Replies(ours)
        stream._set_timeout(timeout_s)
        yield stream


def cuda_plane() -> CudaPlane:
    plane = CudaPlane.__new__(CudaPlane)
    plane._news, plane._told, plane._answers, plane._failures = queue.SimpleQueue(), {}, {}, []
    return plane


@pytest.mark.parametrize("wait", [by_call, by_stream, by_shm, by_cuda_plane, by_cuda_step])
def test_a_signal_that_does_not_end_a_wait_is_heard_soon(wait: Callable[[threading.Event], None]) -> None:
    """`interrupt_main` notes a signal as its handler does, and leaves the main thread in its system call."""
    ended = threading.Event()
    interrupt = threading.Timer(0.2, _thread.interrupt_main)
    interrupt.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        wait(ended)
    assert time.monotonic() < began + LONG_S / 2, "it was heard when the wait was over"
    ended.set()
    interrupt.join()


@pytest.mark.parametrize("timeout_s", [0.01, 0.3])
def test_waiting_in_turns_takes_as_long_as_it_is_to(timeout_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "TURN_S", 0.1)
    empty: queue.SimpleQueue[int] = queue.SimpleQueue()
    began = time.monotonic()
    with pytest.raises(queue.Empty):
        threads.taken(empty, timeout_s)
    assert time.monotonic() >= began + timeout_s
    empty.put(7)
    assert threads.taken(empty, timeout_s) == 7


def test_an_item_is_taken_in_any_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "TURN_S", 0.05)
    items: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Timer(0.17, items.put, (7,)).start()
    assert threads.taken(items) == 7


@pytest.mark.parametrize("timeout_s", [0.2, 0.7])
def test_an_answer_over_shared_memory_is_late_when_it_was_said(timeout_s: float) -> None:
    began = time.monotonic()
    with shm_stream(30.0) as stream, pytest.raises(DeadlineExceeded, match=f"no answer within {timeout_s:g} s"):
        stream.receive(timeout_s)
    assert began + timeout_s <= time.monotonic() < began + LONG_S / 2


def test_an_answer_over_shared_memory_comes_in_a_later_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShmStream, "answer", lambda self, reply: reply)
    reply: Any = SimpleNamespace()
    came = iter([False, False, True])

    def receive() -> Any:
        if not next(came):
            raise BlockingIOError
        return reply

    with shm_stream(30.0) as stream:
        monkeypatch.setattr(stream._replies, "receive", receive)
        assert stream.receive(30.0) is reply
