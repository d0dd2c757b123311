"""Threads in which gRPC's Python runs: reused, ended when idle, and out of an interrupt's reach."""

from __future__ import annotations

import queue
import threading
from functools import partial
from typing import Any

import pytest

import attnd
from attnd import threads
from attnd.planes import call_threads
from tests.servers import wait_for


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "attnd-call"]


def test_a_job_runs_on_another_thread_and_gives_what_it_gives() -> None:
    assert call_threads.run(threading.get_ident, 10) != threading.get_ident()

    def refuse() -> None:
        raise attnd.Exhausted("full", retry_after_s=0.5)

    with pytest.raises(attnd.Exhausted, match="full") as raised:
        call_threads.run(refuse, 10)
    assert raised.value.retry_after_s == 0.5
    with pytest.raises(ZeroDivisionError):
        call_threads.run(lambda: 1 // 0, 10)


def test_threads_are_used_again_and_end_without_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_threads, "IDLE_S", 0.2)
    for _ in range(50):
        call_threads.run(lambda: None, 10)
    assert len(names()) < 10  # one may not wait yet when the next is asked for, now and then
    wait_for(lambda: not names(), "an idle thread does not end")
    assert call_threads._idle == []
    assert call_threads.run(lambda: 7, 10) == 7


def test_what_a_job_held_goes_when_it_has_run() -> None:
    """An idle thread would keep a channel alive."""
    gone: queue.SimpleQueue[None] = queue.SimpleQueue()

    class Held:
        def __del__(self) -> None:
            gone.put(None)

    held = Held()
    job = partial(id, held)
    del held
    call_threads.run(job, 10)
    del job
    gone.get(timeout=10)


def test_a_job_that_does_not_end_is_waited_for_no_longer_than_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_threads, "GRACE_S", 0.05)
    stuck: queue.SimpleQueue[None] = queue.SimpleQueue()
    with pytest.raises(attnd.DeadlineExceeded, match=r"within 0\.05 s"):
        call_threads.run(stuck.get, 0.05)
    assert call_threads.run(lambda: 7, 10) == 7  # one that is stuck stops no other
    stuck.put(None)


class NobodyIsIdle(list[Any]):
    """A thread of another test may become idle at any time."""

    def append(self, jobs: object) -> None:
        pass


def test_without_threads_a_call_is_refused_and_tidying_up_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads._thread, "start_new_thread", refuse)
    monkeypatch.setattr(call_threads, "_idle", NobodyIsIdle())
    with pytest.raises(attnd.Exhausted, match="no thread can be started: can't start new thread"):
        call_threads.run(lambda: None, 10)
    call_threads.start_last(lambda: None)
