"""Several clients of shm planes on one thread: who is served where, and that nobody waits for what one of them does."""

from __future__ import annotations

import errno
import select
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import attnd
from attnd.protocol.shm import framing
from attnd_server.execution.executor import Executor
from attnd_server.execution.step import Call, Result
from attnd_server.planes import connection as plane_connection
from attnd_server.planes.server import PlaneServer
from tests.held_device import held
from tests.raw_shm import AGAIN, DECODE, RawClient
from tests.servers import wait_for
from tests.unit.test_shm_server import GEOMETRY, attend, serving

Q, K, V = torch.ones(1, 2, 16), torch.ones(1, 2, 16), torch.ones(1, 2, 16)
LOOP, OWN, EXECUTOR = "shm-loop", "shm-plane", "executor-cpu"


class Served:
    """A server in this process.

    Attributes:
        threads: the names of those that ran calls, in order.
    """

    def __init__(self, server: PlaneServer, client: attnd.Client, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server, self.client = server, client
        self.threads: list[str] = []
        executor = server._service.executor
        really = executor.runner.attend

        def attend_and_note(call: Call) -> Result:
            self.threads.append(threading.current_thread().name)
            return really(call)

        monkeypatch.setattr(executor.runner, "attend", attend_and_note)

    def thread_of(self, session: attnd.Session) -> str:
        """The thread that runs the session's next call."""
        assert torch.equal(attend(session), V)
        return self.threads[-1]


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(Executor, "EXPIRY_PERIOD_S", 1e6)  # so that it never has the device by itself
    with serving(tmp_path) as (server, client):
        yield Served(server, client, monkeypatch)


@contextmanager
def raw_client(served: Served, **changes: object) -> Iterator[RawClient]:
    with served.client.create_cache(**{**GEOMETRY, **changes}) as cache:
        raw = RawClient(served.client, cache)
        try:
            yield raw
        finally:
            raw.close()


def test_a_lone_client_has_its_own_thread_and_several_share_one(served: Served) -> None:
    with served.client.create_cache(**GEOMETRY) as cache, cache.session() as first:
        assert [served.thread_of(first) for _ in range(3)] == [OWN] * 3
        with served.client.create_cache(**GEOMETRY) as other, other.session() as second:
            attend(second)
            attend(first)  # after which its own thread gives it away
            for _ in range(3):
                assert [served.thread_of(session) for session in (first, second)] == [LOOP, LOOP]
        wait_for(lambda: served.thread_of(first) == OWN, "a client that is alone again is still served by the loop")


def test_calls_that_are_under_way_together_are_answered_in_order(served: Served) -> None:
    with served.client.create_cache(**GEOMETRY) as one, served.client.create_cache(**GEOMETRY) as other:
        with one.session() as first, other.session() as second:
            for session in (first, second, first, second):
                attend(session)
            for _ in range(10):
                calls = []
                for session in (first, second):
                    step = session.step(DECODE)
                    for layer in (0, 1, 0):
                        q, k, v = torch.randn(3, 1, 2, 16)
                        calls.append((step.submit(layer, q, k, v), v))
                assert all(torch.equal(call.wait(), v) for call, v in calls)
    assert served.threads[-60:] == [LOOP] * 60


def test_a_message_in_parts_holds_up_nobody_and_is_answered_when_it_is_whole(served: Served) -> None:
    with served.client.create_cache(**GEOMETRY) as cache, cache.session() as session, raw_client(served) as raw:
        attend(session)
        for part in (AGAIN[:3], AGAIN[3:] + AGAIN + AGAIN[:7]):
            raw.socket.sendall(part)
            for _ in range(3):
                attend(session)
        raw.socket.sendall(AGAIN[7:])
        assert [raw.answer() for _ in range(3)] == ["call"] * 3
        raw.socket.sendall(framing.request_bytes(bytes(100_000))[:50_000])
        attend(session)
        raw.socket.sendall(bytes(50_000 + 20))  # what is no message, and three numbers too few for a request
        assert raw.answer() == "error"
        attend(session)


def test_while_the_device_is_busy_calls_wait_and_wrong_ones_are_told_at_once(served: Served) -> None:
    with served.client.create_cache(**GEOMETRY) as cache, cache.session() as session, raw_client(served) as raw:
        for _ in range(2):
            attend(session)
        with held(served.server._service.executor):
            raw.socket.sendall(AGAIN)
            wait_for(lambda: served.server._service.executor.queue_depth == 1, "the call does not wait")
            with pytest.raises(attnd.InvalidRequest, match="layer is 7"):
                session.step(DECODE).attend(7, Q, K, V)
            raw.socket.settimeout(0.05)
            with pytest.raises(TimeoutError):
                raw.answer()
            raw.socket.settimeout(20)
        assert raw.answer() == "call"
        assert EXECUTOR in served.threads


def test_who_reads_no_answers_holds_up_nobody_and_gets_them_all_later(served: Served) -> None:
    with served.client.create_cache(**GEOMETRY) as cache, cache.session() as session, raw_client(served) as raw:
        attend(session)
        num_sent = raw.send_until_nobody_reads(AGAIN)
        for _ in range(10):
            attend(session)
        assert num_sent > 100
        assert [raw.answer() for _ in range(num_sent)] == ["call"] * num_sent


def test_who_reads_nothing_for_too_long_is_ended_alone(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plane_connection, "SEND_S", 0.3)
    with served.client.create_cache(**GEOMETRY) as cache, cache.session() as session, raw_client(served) as raw:
        attend(session)
        with pytest.raises(OSError, match=r"[Bb]roken pipe|reset"):  # noqa: PT012  # which of them is the system's
            for _ in range(100_000):
                raw.socket.sendall(AGAIN)
        wait_for(lambda: len(served.server._connections) == 1, "the plane of a client that reads nothing goes on")
        attend(session)


def test_a_long_call_of_one_is_its_own_threads_business(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnd_server.execution.step.SMALL_STEP_TOKENS", 1)
    long = attnd.StepMetadata([1], [1], [[0]], [1], kind="decode")
    with served.client.create_cache(**GEOMETRY) as cache, cache.session() as session, raw_client(served):
        for _ in range(2):
            attend(session)
        session.step(long).attend(0, Q, K, V)
        assert served.threads[-1] == EXECUTOR
        attend(session)
        assert served.threads[-1] == LOOP


def test_a_call_of_one_token_and_many_heads_is_its_own_threads_business(served: Served) -> None:
    heads, step = torch.ones(1, 4096, 16), attnd.StepMetadata([1], [1200], [[0] * 300], [4], kind="decode")
    with served.client.create_cache(**GEOMETRY) as cache, cache.session() as session, raw_client(served):
        for _ in range(2):
            attend(session)
        assert served.threads[-1] == LOOP
        session.step(step).attend(0, heads, K, V)
        assert served.threads[-1] == EXECUTOR


class FullEpoll:
    """Watches those who are there, and nobody else."""

    def __init__(self, real: select.epoll) -> None:
        self._real = real

    def register(self, descriptor: int, events: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_whom_the_loop_cannot_watch_is_served_by_its_own_thread(served: Served) -> None:
    served.server._loop.clients._epoll = FullEpoll(served.server._loop.clients._epoll)  # type: ignore[assignment]
    with served.client.create_cache(**GEOMETRY) as cache, cache.session() as session, raw_client(served) as raw:
        for _ in range(3):
            assert served.thread_of(session) == OWN
            raw.socket.sendall(AGAIN)
            assert raw.answer() == "call"


def test_a_fault_in_the_loop_ends_whom_it_served_and_nobody_else(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with served.client.create_cache(**GEOMETRY) as cache, cache.session() as session, raw_client(served) as raw:
        assert [served.thread_of(session) for _ in range(3)][1:] == [LOOP, LOOP]
        raw.socket.sendall(AGAIN)
        assert raw.answer() == "call"
        with monkeypatch.context() as broken:
            broken.setattr(served.server._loop, "_run_alone", lambda client, call: 1 // 0)
            raw.socket.sendall(AGAIN)
            assert raw.replies.receive() is None
        assert "ZeroDivisionError" in caplog.text
        attend(session)
        with raw_client(served), served.client.create_cache(**GEOMETRY) as other, other.session() as again:
            assert LOOP in [served.thread_of(each) for each in (session, again, session, again)]


def test_calls_that_wait_at_the_same_time_share_a_launch(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = served.server._service.executor
    attend_one, attend_several = executor.runner.attend, executor.runner.attend_together
    has_begun, go_on, launches = threading.Event(), threading.Event(), []

    def hold(call: Call) -> Result:
        has_begun.set()
        assert go_on.wait(30)
        return attend_one(call)

    def note(calls: list[Call]) -> list[Result]:
        launches.append((threading.current_thread().name, len(calls)))
        return attend_several(calls)

    with ExitStack() as stack:
        clients = [stack.enter_context(raw_client(served, backend="naive")) for _ in range(4)]
        for raw in 2 * clients:  # after which the loop has them all
            raw.socket.sendall(AGAIN)
            assert raw.answer() == "call"
        monkeypatch.setattr(executor.runner, "attend", hold)
        monkeypatch.setattr(executor.runner, "attend_together", note)
        clients[0].socket.sendall(AGAIN)
        assert has_begun.wait(30)
        for raw in clients[1:]:
            raw.socket.sendall(AGAIN)
        go_on.set()
        assert [raw.answer() for raw in clients] == ["call"] * 4
    assert launches == [(LOOP, 3)]


def test_the_end_of_the_server_ends_all_its_clients_and_threads(tmp_path: Path) -> None:
    with serving(tmp_path) as (server, client):
        caches = [client.create_cache(**GEOMETRY) for _ in range(3)]
        sessions = [cache.session() for cache in caches]
        for session in 2 * sessions:
            attend(session)
        server.drain()
        server.stop(0)
        server.stop(0)
        assert not server._loop._thread.is_alive()
        wait_for(lambda: not server._connections, "a client's thread does not end")
        for session in sessions:
            with pytest.raises(attnd.Disconnected):
                attend(session)
            session.close()
