"""Compiles kernels in processes beside the service, several at once, those that a call waits for first."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock, Thread
from typing import Any, Protocol

from attnd_server.device.kernels.compile_process import START, Answer, Request, Setup
from attnd_server.device.kernels.folder import KernelFolder
from attnd_server.device.kernels.spec import KernelSpec
from attnd_server.device.machine import num_cores

log = logging.getLogger(__name__)

# How often the process is started; it ends only with the service, unless somebody ends it.
_MOST_STARTS = 4
_END_S = 2.0
# They keep to one thread, so that they may fork, and have no GPU.
_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class CompilationFailed(RuntimeError):
    """A kernel could not be compiled, as the text says."""


class CompilerUnavailable(RuntimeError):
    """No process compiles kernels, as the text says: they may still be compiled in this one."""


class Compiler(Protocol):
    """What brings kernels into Triton's cache on disk."""

    def submit(self, spec: KernelSpec, urgent: bool) -> Future[None]:
        """Has a kernel compiled, once, however often it is asked for.

        Args:
            spec: of the kernel.
            urgent: whether a call waits for it: then it goes before the rest, also if it was asked for before.

        Returns:
            What is done when Triton's cache on disk has the kernel; else it raises `CompilationFailed` or
            `CompilerUnavailable`. It cannot be cancelled.
        """

    def compiling(self) -> set[KernelSpec]:
        """What is being compiled now, and does not wait for its turn."""

    def close(self) -> None:
        """Ends everything at once: what is not compiled yet is unavailable."""


def _running_future() -> Future[None]:
    """One that cannot be cancelled."""
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()
    return future


@dataclass(eq=False)
class _Job:
    """A kernel that is to be compiled.

    Attributes:
        spec: of the kernel.
        is_urgent: whether a call waits for it.
        number: of its request while it is being compiled, else -1.
        future: of who asked for it.
    """

    spec: KernelSpec
    is_urgent: bool
    number: int = -1
    future: Future[None] = field(default_factory=_running_future)


class ProcessCompiler:
    """A compiler with a process that forks for each kernel: see `compile_process.py`.

    The process is started at once, and takes seconds until it has imported everything. If it ends it is started again.
    """

    def __init__(
        self,
        target: Any,
        modules: Iterable[str],
        folder: KernelFolder | None = None,
        *,
        places: int = 0,
        timeout_s: float = 120.0,
    ) -> None:
        """Starts it.

        Args:
            target: the `GPUTarget` to compile for.
            modules: that have kernels; others are imported for each kernel again.
            folder: to keep them in, which this process uses too; None: Triton's own.
            places: kernels compiled at once, and as many urgent ones: while these are under way, no other one begins
                unless it has a place beside them, and a quarter of the places go on. 0: half of the cores.
            timeout_s: that one kernel may take.
        """
        self._target, self._modules, self._folder, self._timeout_s = target, tuple(modules), folder, timeout_s
        self._places = places or max(1, num_cores() // 2)
        self._lock = Lock()
        self._jobs: dict[KernelSpec, _Job] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None  # of a process that is ready
        self._next_number = 0
        self._unavailable = ""  # why, for good
        self._thread = Thread(target=self._run, name="compile kernels", daemon=True)
        self._thread.start()

    def submit(self, spec: KernelSpec, urgent: bool) -> Future[None]:
        """See `Compiler.submit`."""
        with self._lock:
            job = self._jobs.get(spec) or _Job(spec, urgent)
            if self._unavailable:
                job.future.set_exception(CompilerUnavailable(self._unavailable))
                return job.future
            self._jobs[spec] = job
            if urgent and not job.is_urgent:
                job.is_urgent = True
                if job.number >= 0:
                    self._send(job)
            self._fill()
        return job.future

    def compiling(self) -> set[KernelSpec]:
        """See `Compiler.compiling`."""
        with self._lock:
            return {job.spec for job in self._jobs.values() if job.number >= 0}

    def close(self) -> None:
        """See `Compiler.close`."""
        with self._lock:
            self._unavailable = self._unavailable or "the compiler is closed"
            if self._connection is not None:
                _hang_up(self._connection)
            elif self._process is not None:
                self._process.kill()  # it has forked nothing yet
        self._thread.join(2 * _END_S)

    def _run(self) -> None:
        """On a thread of its own: keeps the process running, and tells who waits."""
        reason = f"the process that compiles kernels has ended {_MOST_STARTS} times"
        try:
            for _ in range(_MOST_STARTS):
                with tempfile.TemporaryDirectory(prefix="attnd-compile-", ignore_cleanup_errors=True) as scratch:
                    self._serve(scratch)
                if self._unavailable:
                    break
        except OSError as error:
            reason = f"no process could be started: {error}"
        finally:
            self._give_up(reason)

    def _serve(self, scratch: str) -> None:
        """Has one process, until it ends or this is closed."""
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-I", "-c", START, json.dumps(sys.path)]
        errors = Path(scratch, "stderr")
        with theirs, open(errors, "wb") as stderr, self._lock:
            if self._unavailable:
                ours.close()
                return
            # A session of its own: what a terminal sends to the service is not for it.
            process = self._process = subprocess.Popen(
                command, env=os.environ | _ENVIRONMENT, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=stderr,
                start_new_session=True,
            )  # fmt: skip
        connection = Connection(ours.detach())
        try:
            num_beside = self._places // 4
            connection.send(Setup(self._target, self._modules, self._folder, scratch, self._timeout_s, num_beside))
            while True:
                self._take(connection, connection.recv())
        except (EOFError, OSError):
            pass  # it has ended, or this is closed
        finally:
            with self._lock:
                self._connection = self._process = None
                for job in self._jobs.values():
                    job.number = -1
            connection.close()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if not self._unavailable:
            text = errors.read_text(errors="replace")[-1000:]
            log.warning(
                "the process that compiles kernels has ended", extra={"code": process.returncode, "stderr": text}
            )

    def _take(self, connection: Connection, answer: Answer) -> None:
        """Of the process: that it is ready, or how a compilation ended."""
        with self._lock:
            if answer.number < 0:
                if answer.error:
                    self._unavailable = f"the process that compiles kernels does not start: {answer.error}"
                    _hang_up(connection)
                    return
                self._connection = connection
            done = next((job for job in self._jobs.values() if job.number == answer.number >= 0), None)
            if done is not None:
                del self._jobs[done.spec]
            self._fill()
        if done is None:
            return
        if answer.error:
            name = f"{done.spec.module}.{done.spec.name}"
            done.future.set_exception(CompilationFailed(f"{name} could not be compiled: {answer.error}"))
        else:
            done.future.set_result(None)

    def _fill(self) -> None:
        """Gives the process what it has places for. The lock is held."""
        while self._connection is not None and (job := self._next_job()) is not None:
            job.number = self._next_number
            self._next_number += 1
            self._send(job)

    def _send(self, job: _Job) -> None:
        """Asks the process for a kernel, or tells it that a call waits for it by now. The lock is held."""
        try:
            if self._connection is not None:
                self._connection.send(Request(job.number, job.spec, job.is_urgent))
        except OSError:
            self._connection = None  # it has ended: the thread that listens to it will see

    def _next_job(self) -> _Job | None:
        """What goes next: for what is urgent, others count for nothing."""
        for is_urgent in (True, False):
            jobs = [job for job in self._jobs.values() if job.is_urgent or not is_urgent]
            if sum(job.number >= 0 for job in jobs) < self._places:
                waiting = (job for job in jobs if job.number < 0 and job.is_urgent is is_urgent)
                if (job := next(waiting, None)) is not None:
                    return job
        return None

    def _give_up(self, reason: str) -> None:
        """No process will compile anything any more."""
        with self._lock:
            self._unavailable = self._unavailable or reason
            jobs = list(self._jobs.values())
            self._jobs.clear()
        for job in jobs:
            job.future.set_exception(CompilerUnavailable(self._unavailable))


def _hang_up(connection: Connection) -> None:
    """Closes a connection for both ends, though another thread reads from it."""
    with socket.socket(fileno=os.dup(connection.fileno())) as other:
        try:
            other.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is closed
