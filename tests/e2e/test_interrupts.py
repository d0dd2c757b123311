"""Ctrl-C at any moment, on every plane: what comes next works, and never has the answer of what was interrupted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.servers import ROOT, ServerProcess


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with shared memory."""
    folder = tmp_path_factory.mktemp("s")
    with ServerProcess(folder / "log", "--device", "cpu", "--socket-dir", str(folder)) as server:
        yield server


@pytest.mark.parametrize(
    ("plane", "kind", "count"),
    [
        ("inline", "attend", 200),
        ("inline", "submit", 100),
        ("inline", "unary", 100),
        ("inline", "stored", 40),
        ("inline", "opened", 60),
        ("shm", "attend", 200),
        ("shm", "submit", 100),
        ("shm", "opened", 60),
    ],
)
def test_a_client_outlives_interrupts_at_any_moment(both: ServerProcess, plane: str, kind: str, count: int) -> None:
    command = [sys.executable, "-m", "tests.interrupted", both.address, plane, kind, str(count)]
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, f"interrupted {count} times\n"), result.stderr
