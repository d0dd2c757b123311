"""Moments in which no stream of this process waits inside a GPU for somebody outside it.

Some calls of CUDA return only when all that the process has on the GPU is done: docs/planes.md has the list. The driver
holds a lock meanwhile, so that no other thread of the process launches anything either. A step on a cuda plane may wait
for its worker for a minute. So such calls are made only while no step does, and put off until then.
"""

from __future__ import annotations

import atexit
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

log = logging.getLogger(__name__)

# Seconds: a step that takes longer most likely waits for a worker that has stopped, and nobody is held back for it.
_STALLED_S = 1.0
# Seconds for which new steps are held back at first until those under way are over, and at most: each try is longer
# than the one before, for sessions whose steps are long. Between two tries so many times that.
_TRY_S, _MOST_TRY_S, _PAUSE_PER_TRY = 0.05, 0.4, 10
# Seconds that the end of the process gives what was put off.
_END_S = 2.0


@dataclass(eq=False)
class _Wait:
    """What may be waiting in the GPU.

    Attributes:
        began: `time.monotonic`; infinite: it has nothing to end yet.
        leave: see `QuietGpu.waits`.
    """

    began: float
    leave: Callable[[], None] | None


class QuietGpu:
    """Knows which steps may be waiting in a GPU, and finds moments when none is. Any thread may use it."""

    def __init__(self) -> None:
        """None is."""
        self._changed = threading.Condition()
        self._waits: list[_Wait] = []  # those under way
        self._is_held_back = False  # whether new ones are
        self._num_held_back = 0
        self._turn = threading.Lock()  # one moment at a time
        self._put_off: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @contextmanager
    def waits(self, leave: Callable[[], None] | None = None) -> Iterator[None]:
        """What may wait for somebody outside the process lies inside, until its stream is done with it.

        Is held back while a moment lasts or is looked for: not for a thread that others wait for.

        Args:
            leave: asks for the end of what waits for something to begin, when a moment is looked for: it counts as
                stalled only if it does not end then. Must not block. None: nothing hastens it.
        """
        wait = _Wait(time.monotonic() if leave is None else math.inf, leave)
        with self._changed:
            self._num_held_back += 1
            self._changed.wait_for(lambda: not self._is_held_back)
            self._num_held_back -= 1
            self._waits.append(wait)
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._waits.remove(wait)
                self._changed.notify_all()

    @contextmanager
    def moment(self, timeout_s: float) -> Iterator[bool]:
        """A block in which nothing waits in the GPU nor begins to, if that comes within so many seconds.

        Args:
            timeout_s: for which new waits are held back at most, until those under way are over. Less if one of these
                has gone on for so long that it will not be.

        Yields:
            Whether it is so. If not, nobody is held back any more.
        """
        deadline = time.monotonic() + timeout_s
        if not self._turn.acquire(timeout=timeout_s):
            yield False
            return
        try:
            with self._changed:
                self._hold_back(timeout_s)
                if not (is_quiet := self._all_end(deadline)):
                    self._let_on()
            yield is_quiet
        finally:
            self._let_on()
            self._turn.release()

    @contextmanager
    def holding_back(self) -> Iterator[None]:
        """A block in which nothing begins to wait; what did before may go on. For milliseconds."""
        with self._turn:
            try:
                with self._changed:
                    self._hold_back()
                yield
            finally:
                self._let_on()

    def later(self, work: Callable[[], None]) -> None:
        """Has `work` done in a quiet moment, on a thread of its own; pieces of work one after the other, in order."""
        with self._changed:
            self._put_off.append(work)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="quiet-gpu", daemon=True)
                self._thread.start()
                atexit.register(self.close, _END_S)
            self._changed.notify_all()

    def has_stalled(self) -> bool:
        """Whether a step has been under way for so long that no moment is to be expected."""
        with self._changed:
            return time.monotonic() >= self._stalls_at()

    def are_over(self, timeout_s: float) -> bool:
        """Whether no step may be waiting any more within so many seconds; holds nobody back."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waits, timeout_s)

    def close(self, timeout_s: float) -> None:
        """Waits so many seconds for what was put off, drops what is left, and ends the thread once it is idle."""
        with self._changed:
            self._changed.wait_for(lambda: not self._put_off, timeout_s)
            self._is_closed = True
            self._put_off.clear()
            self._changed.notify_all()

    def _hold_back(self, timeout_s: float | None = None) -> None:
        """New waits from now on; those that a moment before held back begin first. With the lock."""
        self._changed.wait_for(lambda: not self._num_held_back, timeout_s)
        self._is_held_back = True
        for wait in self._waits:
            if wait.leave is not None and wait.began == math.inf:
                wait.began = time.monotonic()
                wait.leave()

    def _stalls_at(self) -> float:
        """When the first of those under way counts as stalled. With the lock."""
        return min((wait.began for wait in self._waits), default=math.inf) + _STALLED_S

    def _all_end(self, deadline: float) -> bool:
        """Whether all that wait are over by then, or before one counts as stalled. With the lock."""
        while self._waits:
            now, stalls_at = time.monotonic(), self._stalls_at()
            if now >= min(deadline, stalls_at):
                return False
            self._changed.wait(min(deadline, stalls_at) - now)
        return True

    def _let_on(self) -> None:
        with self._changed:
            self._is_held_back = False
            self._changed.notify_all()

    def _run(self) -> None:
        try_s = _TRY_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._put_off or self._is_closed)
                if self._is_closed:
                    return
            with self.moment(try_s) as is_quiet:
                if is_quiet:
                    self._do_next()
            if is_quiet:
                try_s = _TRY_S
                continue
            with self._changed:  # unless it becomes quiet by itself
                self._changed.wait_for(lambda: not self._waits or self._is_closed, _PAUSE_PER_TRY * try_s)
            try_s = min(2 * try_s, _MOST_TRY_S)

    def _do_next(self) -> None:
        with self._changed:
            work = self._put_off[0] if self._put_off else None
        if work is None:
            return
        try:
            work()
        except Exception:
            log.exception("what was put off until nothing waits in the GPU failed")
        with self._changed:
            if self._put_off and self._put_off[0] is work:
                self._put_off.popleft()
            self._changed.notify_all()


@cache
def quiet_gpu(device: torch.device) -> QuietGpu:
    """That of a device, given with its index; one for all servers of the process."""
    return QuietGpu()
