"""Real server processes for end-to-end tests."""

from __future__ import annotations

import gc
import os
import re
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.descriptors import open_links

ROOT = Path(__file__).resolve().parent.parent


class ServerProcess:
    """`attnd serve` as a child process on a port that the system picks, or on `port`.

    Its log goes to the file `log_path`, its first line of output names the address.
    """

    # What is started; another may begin with doing harm.
    module = "attnd_server"

    def __init__(self, log_path: Path, *options: str, port: int = 0) -> None:
        self.log_path = log_path
        self.banner = ""
        command = [sys.executable, "-m", self.module, "serve", "--port", str(port), *options]
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, env=self.environment(), text=True
            )
        self.address = self._read_address(timeout_s=120)

    @staticmethod
    def environment() -> dict[str, str]:
        """In which it runs."""
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def resident_bytes(self) -> int:
        """Of its memory, those that are in use."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * resource.getpagesize()

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def kill(self) -> None:
        """SIGKILL: the server has no chance to say anything."""
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        """SIGSTOP, and waits until every thread has stopped: one that runs on another core may serve a call yet."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def terminate(self) -> None:
        """SIGTERM: the server drains."""
        self.signal(signal.SIGTERM)

    def signal(self, number: signal.Signals) -> None:
        """Sends it."""
        self._process.send_signal(number)

    def wait(self, timeout_s: float = 30) -> int:
        return self._process.wait(timeout_s)

    def stop(self) -> None:
        if self._process.poll() is None:
            self.terminate()
            try:
                self.wait()
            except subprocess.TimeoutExpired:
                self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _read_address(self, timeout_s: float) -> str:
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
                if found := re.search(r"serves (\S+:\d+) on", line):
                    self.banner = line.strip()
                    return found[1]
        self.stop()
        raise RuntimeError(f"the server did not start: {self.log}")


def mapped(pid: int) -> int:
    """Mappings and descriptors of shared regions that a process has; of this one without garbage of earlier tests."""
    if pid == os.getpid():
        gc.collect()
    maps = Path(f"/proc/{pid}/maps").read_text()
    return maps.count("memfd:attnd") + sum("memfd:attnd" in link for link in open_links(pid))


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    """Waits until it is so; fails with `what` if it is not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
