"""A server of one's own: `attnd serve` as a child process that cannot outlive its parent."""

from __future__ import annotations

import ctypes
import os
import re
import selectors
import signal
import stat
import subprocess
import sys
import tempfile
import time
from functools import partial
from types import TracebackType

from attnd.errors import Disconnected

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0


class LocalServer:
    """A server process on a free loopback port, with shared memory for clients where there can be any.

    Attributes:
        core: the one core that it runs on, on a machine of two; None: any. See `attnd_server.cli.demo.setup.start`.

    ```
    with LocalServer(device="cpu") as server:
        client = attnd.connect(server.wait())
    ```
    """

    def __init__(self, *, device: str = "auto") -> None:
        """Remembers what to start.

        Args:
            device: torch's name of the device, or "auto".
        """
        options = {"port": 0, "device": device, "drain-s": 1, "log-level": "warning"}
        folder = _private_folder() if sys.platform == "linux" else None
        if folder is not None:
            options["socket-dir"] = folder
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        self._command = [sys.executable, "-m", "attnd_server", "serve", *arguments]
        self.core = _core()
        self.banner = ""

    def __enter__(self) -> LocalServer:
        """Starts the process and does not wait for it."""
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            # This module may have been found without an installation.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            # Ctrl-C is for us: a server that ends first would leave us with errors instead of an end.
            start_new_session=True,
            preexec_fn=partial(_in_child, self.core) if sys.platform == "linux" else None,
        )
        return self

    def wait(self) -> str:
        """Waits until the server listens, and returns its address, "host:port".

        Raises:
            Disconnected: it did not start; with the end of its log.
        """
        stdout = self._process.stdout
        assert stdout is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while not self.banner and time.monotonic() < deadline:
                if selector.select(timeout=0.2):
                    line = stdout.readline().decode()
                    if not line:
                        break
                    self.banner = line.strip()
        found = re.search(r"serves (\S+:\d+) on", self.banner)
        if found is None:
            self._log.seek(0)
            log = self._log.read().decode(errors="replace").strip()
            raise Disconnected(f"the server did not start: {log[-2000:] or self.banner or 'it said nothing'}")
        return found[1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the process: SIGTERM, and SIGKILL if that does not help."""
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _private_folder() -> str | None:
    """A folder for the sockets of this user's servers, always the same: each removes what killed ones left there.

    None if somebody else has made it before, to have our sockets in a place of theirs.
    """
    path = os.path.join(tempfile.gettempdir(), f"attnd-{os.geteuid()}")
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        status = os.lstat(path)
    except OSError:
        return None
    is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
    return path if is_ours else None


def _core() -> int | None:
    """The server's core if there are two; None with more, which are enough, or on systems that do not say."""
    cores = os.sched_getaffinity(0) if sys.platform == "linux" else ()
    return min(cores) if len(cores) == 2 else None


def _in_child(core: int | None) -> None:
    """In the new process: the kernel shall kill it when its parent ends, however that happens."""
    pr_set_pdeathsig = 1  # from sys/prctl.h
    assert _libc is not None
    _libc.prctl(pr_set_pdeathsig, signal.SIGKILL)
    if core is not None:
        os.sched_setaffinity(0, {core})
