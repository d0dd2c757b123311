"""A process in the image's root under bubblewrap: read-only, as the image's user, with a small /tmp. Needs root.

What Docker would do is done here by hand: the image's entry point is process 1 of a namespace of its own, has the
image's environment and no capability, and writes to volumes alone. The network is the host's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TMP_BYTES = 64 << 20
DEADLINE_S = 120.0  # generous: of a start, of a drain, of a death that is noticed


@dataclass(frozen=True)
class Image:
    """What to run: the image's root, mounted, and its configuration.

    Attributes:
        root: where its files are.
        user: "UID:GID".
        environment: NAME=value.
        entrypoint: the command that the image is for.
        volumes: folders of the host by what they are in the container.
    """

    root: Path
    user: str
    environment: Sequence[str]
    entrypoint: Sequence[str]
    volumes: dict[str, Path]


class Container:
    """A process in a container that runs, or has ended."""

    def __init__(self, image: Image, command: Sequence[str], *, binds: dict[str, Path] | None = None) -> None:
        """Starts `command`; `binds` are more folders of the host, read-only."""
        uid, _, gid = image.user.partition(":")
        words = ["bwrap", "--ro-bind", str(image.root), "/", "--proc", "/proc", "--dev", "/dev"]
        words += ["--perms", "1777", "--size", str(TMP_BYTES), "--tmpfs", "/tmp"]
        for inside, outside in image.volumes.items():
            words += ["--bind", str(outside), inside]
        for inside, outside in (binds or {}).items():
            words += ["--ro-bind", str(outside), inside]
        words += ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", "--as-pid-1"]
        words += ["--die-with-parent", "--new-session", "--clearenv", "--chdir", "/"]
        for pair in image.environment:
            words += ["--setenv", *pair.split("=", 1)]
        # Keeps what it takes to become the image's user, who then has nothing.
        words += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SETPCAP"]
        reader, writer = os.pipe()
        words += ["--info-fd", str(writer), "--", "setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups"]
        words += ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", *command]
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=[writer],
        )
        os.close(writer)
        with os.fdopen(reader) as told:
            self.pid = json.load(told)["child-pid"]  # the host's number of process 1
        self.namespace = os.readlink(f"/proc/{self.pid}/ns/pid")
        self._output = ""

    def line(self) -> str:
        """The next line that it writes; "" at its end."""
        line = self._process.stdout.readline()
        self._output += line
        return line

    def lines_until(self, word: str) -> None:
        """Reads until a line has `word`.

        Raises:
            AssertionError: It ended without one, or took too long and was ended.
        """
        deadline = threading.Timer(DEADLINE_S, self._process.kill)
        deadline.start()
        try:
            while word not in (line := self.line()):
                assert line, f"ended without {word!r}:\n{self._output}"
        finally:
            deadline.cancel()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to process 1."""
        os.kill(self.pid, number)

    def ended(self) -> tuple[int, str]:
        """Waits for its end: its exit code, and all that it wrote. A signal's number is 128 less than the code."""
        rest, _ = self._process.communicate(timeout=DEADLINE_S)
        self._output += rest
        return self._process.returncode, self._output

    def kill(self) -> None:
        """Ends it if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def processes_in(namespaces: set[str]) -> list[int]:
    """The host's numbers of processes that live in one of these namespaces."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(path / "ns/pid") in namespaces:
                found.append(int(path.name))
        except OSError:  # It ended meanwhile.
            continue
    return found
