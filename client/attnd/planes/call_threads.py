"""Threads of the process in which gRPC's Python runs, so that no thread of the caller ever holds gRPC's locks.

A caller may be interrupted anywhere: by Ctrl-C, a signal handler that raises, an exception that another thread sends.
gRPC's Python takes locks in a way that an interrupt leaves locked for good. So callers wait for answers in
`queue.SimpleQueue.get`, which an interrupt ends cleanly, and only threads that nobody interrupts enter gRPC.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from attnd.errors import AttndError, DeadlineExceeded, Exhausted
from attnd.threads import start_thread, taken

Result = TypeVar("Result")
Job = Callable[[], object]

# Seconds after which a thread without a job ends.
IDLE_S = 1.0
# Seconds that a job may take longer than its own deadline says, before nobody waits for it any more.
GRACE_S = 5.0
# Of threads that wait for a job, what gives it to them. `pop` and `append` are atomic, so no lock can be left locked.
_idle: list[queue.SimpleQueue[Job]] = []


def start(job: Job) -> None:
    """Runs `job`, which raises nothing, on a thread of its own, and does not wait.

    Raises:
        Exhausted: there are no more threads.
    """
    try:
        jobs = _idle.pop()
    except IndexError:
        start_thread(partial(_run, job), "attnd-call")
    else:
        jobs.put(job)


def start_last(job: Job) -> None:
    """As `start`, of what only tidies up: without threads, as when the interpreter ends, it is left undone."""
    try:
        start(job)
    except Exhausted:
        pass


def run(job: Callable[[], Result], timeout_s: float) -> Result:
    """What `job` gives, or raises, on another thread.

    Args:
        job: ends by itself, after `timeout_s` seconds at the latest.
        timeout_s: seconds.

    Raises:
        DeadlineExceeded: it did not end.
        Exhausted: there are no more threads.
    """
    results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    start(partial(_settle, job, results))
    try:
        result, error = taken(results, timeout_s + GRACE_S)
    except queue.Empty:
        raise DeadlineExceeded(f"no answer within {timeout_s:g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def _run(job: Job | None) -> None:
    """A thread: one job after the other."""
    jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
    while job is not None:
        job()
        job = None  # whatever it holds may go
        _idle.append(jobs)
        job = _next(jobs)


def _next(jobs: queue.SimpleQueue[Job]) -> Job | None:
    try:
        return jobs.get(timeout=IDLE_S)
    except queue.Empty:
        pass
    try:
        _idle.remove(jobs)
    except ValueError:  # somebody has taken it just now, unless an interrupt came between
        try:
            return jobs.get(timeout=IDLE_S)
        except queue.Empty:
            pass
    return None


def _settle(job: Callable[[], object], results: queue.SimpleQueue[tuple[Any, BaseException | None]]) -> None:
    try:
        results.put((job(), None))
    except AttndError as error:
        # Frames hold objects of gRPC's, which must not go on the caller's thread.
        results.put((None, error.with_traceback(None)))
    except BaseException as error:
        results.put((None, error))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # there the threads do not exist
