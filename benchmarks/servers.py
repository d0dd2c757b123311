"""Servers to time, as processes of their own."""

from __future__ import annotations

import os
import re
import selectors
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0


def environment(defaults: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Of a process that imports what this one does; with `defaults` where this one has nothing."""
    return {**defaults, **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path]))}


@contextmanager
def running(module: str, *arguments: str, defaults: Mapping[str, str] = MappingProxyType({})) -> Iterator[str]:
    """Runs `python -m module arguments` until the end of the block.

    Args:
        module: prints a line with "serves HOST:PORT on" once it listens, and ends on SIGTERM.
        arguments: its command line.
        defaults: of its environment.

    Yields:
        The address that it serves.

    Raises:
        RuntimeError: it ended, or said nothing in time; the message has its last words.
    """
    with started(module, *arguments, defaults=defaults) as child:
        yield child.address()


@contextmanager
def started(module: str, *arguments: str, defaults: Mapping[str, str] = MappingProxyType({})) -> Iterator[Child]:
    """Starts `python -m module arguments`, which ends on SIGTERM, and ends it with the block."""
    command = [sys.executable, "-m", module, *arguments]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            bufsize=0,  # so that select sees each line that has come
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment(defaults),
            start_new_session=True,  # Ctrl-C is for this process, which ends its servers in order
        )
        try:
            yield Child(process, command, log)
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()


class Child:
    """A process to talk with, in lines."""

    def __init__(self, process: subprocess.Popen[bytes], command: list[str], log: IO[bytes]) -> None:
        """Talks with `process`, which runs `command` and writes what went wrong to `log`."""
        self._process = process
        self._command = command
        self._log = log

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def terminate(self) -> None:
        """SIGTERM; what it says then can be read."""
        self._process.terminate()

    def write(self, line: str) -> None:
        """Says something to its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())

    def read(self, pattern: bytes, timeout_s: float) -> re.Match[bytes]:
        """The next line of its standard output that has the pattern.

        Raises:
            RuntimeError: it ended, or said nothing in time; the message has its last words.
        """
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while time.monotonic() < deadline:
                if not selector.select(timeout=1):
                    continue
                line = self._process.stdout.readline()
                if not line:
                    break
                if found := re.search(pattern, line):
                    return found
        self._log.seek(0)
        words = self._log.read()[-4000:].decode()
        raise RuntimeError(f"{shlex.join(self._command)} did not say {pattern.decode()}:\n{words}")

    def address(self) -> str:
        """Where it serves, once it has said so. Raises as `read` does."""
        return self.read(rb"serves (\S+:\d+) on", START_TIMEOUT_S)[1].decode()
