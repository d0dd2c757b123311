"""A process that compiles one kernel, as the one that forked it sees it."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from typing import NoReturn

# Characters of what a compilation has printed that go into its error.
_MOST_TEXT = 2_000


class Child:
    """The process, and all that it has started: they are a group.

    Attributes:
        number: of the request that it is for.
        is_urgent: whether a call waits for it.
        descriptor: readable when it has ended.
    """

    def __init__(
        self, number: int, is_urgent: bool, folder: str, timeout_s: float, run: Callable[[int, str], NoReturn]
    ) -> None:
        """Forks it.

        Args:
            number: of the request.
            is_urgent: whether a call waits for it.
            folder: where it gets one of its own for files that compilers leave.
            timeout_s: that it may take, beside the time for which it stands.
            run: what it does, given a descriptor for what it prints and its folder, in a group of its own.
        """
        self.number, self.is_urgent = number, is_urgent
        self._timeout_s = timeout_s
        self._log = os.memfd_create("log")
        self._scratch = tempfile.mkdtemp(dir=folder)
        self._process = os.fork()
        if not self._process:
            run(self._log, self._scratch)
        try:
            os.setpgid(self._process, self._process)
        except OSError:
            pass  # it has done so, or has ended
        self.descriptor = os.pidfd_open(self._process)
        self._end_s = time.monotonic() + timeout_s
        self._left_s: float | None = None  # of its time, while it stands
        self._is_late = False

    def stand(self) -> None:
        """It does nothing until it may go on."""
        if self._left_s is None and self._signal(signal.SIGSTOP):
            self._left_s = self._end_s - time.monotonic()

    def go_on(self) -> None:
        """It goes on, if it stands."""
        if self._left_s is not None:
            self._end_s, self._left_s = time.monotonic() + self._left_s, None
            self._signal(signal.SIGCONT)

    def left_s(self) -> float | None:
        """Seconds after which it is late; None while that does not come closer."""
        return None if self._is_late or self._left_s is not None else self._end_s - time.monotonic()

    def end_if_late(self) -> None:
        """Ends it, if it has taken longer than it may."""
        if (left_s := self.left_s()) is not None and left_s <= 0:
            self._is_late = True
            self.kill()

    def kill(self) -> None:
        """Ends it and all that it has started."""
        self._signal(signal.SIGKILL)

    def ended(self) -> str:
        """Cleans up after it has ended. Returns what went wrong, or ""."""
        self.kill()  # what it has left running; the number of its group is its own until the next line
        status = os.waitpid(self._process, 0)[1]
        os.close(self.descriptor)
        error = ""
        if status:
            code = os.waitstatus_to_exitcode(status)
            how = f"took longer than {self._timeout_s:g} s" if self._is_late else f"was ended by signal {-code}"
            text = [f"its process {how}"] if code < 0 else []
            error = "; ".join([*text, *filter(None, [self._last_text()])]) or f"its process ended with {code}"
        os.close(self._log)
        shutil.rmtree(self._scratch, ignore_errors=True)
        return error

    def _signal(self, number: signal.Signals) -> bool:
        """Sends a signal to it and all that it has started. Returns whether there is any left."""
        try:
            os.killpg(self._process, number)
        except ProcessLookupError:
            return False
        return True

    def _last_text(self) -> str:
        """The end of what was printed."""
        size = os.fstat(self._log).st_size
        first = max(0, size - _MOST_TEXT)
        return os.pread(self._log, size - first, first).decode(errors="replace").strip()
