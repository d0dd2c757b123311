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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0


@contextmanager
def running(module: str, *arguments: str) -> Iterator[str]:
    """Runs `python -m module arguments` until the end of the block.

    Args:
        module: prints a line with "serves HOST:PORT on" once it listens, and ends on SIGTERM.
        arguments: its command line.

    Yields:
        The address that it serves.

    Raises:
        RuntimeError: it ended, or said nothing in time; the message has its last words.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path]))}
    command = [sys.executable, "-m", module, *arguments]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C is for this process, which ends its servers in order
        )
        try:
            yield _address(process, command, log)
        finally:
            _stop(process)


def _address(process: subprocess.Popen[bytes], command: list[str], log: IO[bytes]) -> str:
    assert process.stdout is not None
    deadline = time.monotonic() + START_TIMEOUT_S
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while time.monotonic() < deadline:
            if not selector.select(timeout=1):
                continue
            line = process.stdout.readline()
            if not line:
                break
            if found := re.search(rb"serves (\S+:\d+) on", line):
                return found[1].decode()
    log.seek(0)
    raise RuntimeError(f"{shlex.join(command)} did not start:\n{log.read()[-4000:].decode()}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdout is not None
    process.stdout.close()
