"""Keeps launches of resident steps queued while steps come, and none while they do not.

A launch is not a step: its first gate waits for one, or until it is revoked. A thread for each session looks every few
steps what the launches were that have ended, and queues as many behind those that wait already: it does not wait for
the end of each, for which the driver takes longer than all else. Launches are revoked when nothing comes for a while,
before a step by message, and whenever something must not find the GPU waiting. A session without launches is woken by
the number of the step that its worker has counted, which `keeper.py` reads for all.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from attnd.errors import AttndError, DeadlineExceeded
from attnd_server.device.quiet import QuietGpu
from attnd_server.kv.cache import Cache
from attnd_server.planes.cuda.channel import Flags
from attnd_server.planes.cuda.resident.books import BEGAN_NS, BEGUN, DONE, ENDED_NS, LAUNCHES, NUM_REQS, REFUSED, Books
from attnd_server.planes.cuda.resident.told import StepsDone, Told
from attnd_server.planes.cuda.watchdog import STEP_S

# Launches that are queued: one that runs or waits, and those behind it.
AHEAD = 6
# Seconds between two looks of a session's thread, at least and at most: else the time of half the steps that are ahead.
# So nobody has more than so many of them, however short steps are, or however many a worker counts at once.
LEAST_LOOK_S, MOST_LOOK_S = 0.001, 0.02
# Seconds without a step after which a session's launches are revoked.
IDLE_S = 0.02
# Seconds between two looks of who waits for steps to be done.
_PERIOD_S = 0.05


class ResidentLaunches:
    """The launches of one session's resident steps."""

    def __init__(
        self,
        enqueue: Callable[[], Callable[[], None]],
        books: Books,
        flags: Flags,
        cache: Cache,
        quiet: QuietGpu,
        wake: Callable[[], int],
        refuse: Callable[[], None],
        told: Told,
        come_after: Callable[[], None],
        prepare_thread: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts the thread; launches nothing before a step comes.

        Args:
            enqueue: enqueues a launch, and returns what waits until it has ended.
            books: that say what launches did, as before the first.
            flags: of the session.
            cache: held while there are launches.
            quiet: of the device.
            wake: reads the low 32 bits of the number of the last step that the worker has counted.
            refuse: raises why no more steps are to be served.
            told: the session.
            come_after: lets launches come after all work of the cache that has had the device.
            prepare_thread: makes the calling thread one that may launch.
        """
        self._enqueue, self._books, self._flags, self._cache = enqueue, books, flags, cache
        self._quiet, self._wake, self._refuse, self._told = quiet, wake, refuse, told
        self._come_after, self._prepare_thread = come_after, prepare_thread
        self._changed = threading.Condition()
        self._queued: deque[Callable[[], None]] = deque()
        self._num_launched = self._num_ended = 0
        self._look_s = LEAST_LOOK_S
        self._num_paused = 0
        self._must_come_after = False
        self._is_active = self._is_serving = self._is_leaving = self._is_closed = self._has_told = False
        self._failure: Exception | None = None
        self._done = books.read(DONE)
        self._came_at = 0.0  # when something of the session happened last, `time.monotonic`
        self._begun = (self._done, 0.0)  # the last step that was seen to have begun, and when
        self._thread = threading.Thread(target=self._run, name="cuda-resident", daemon=True)
        self._thread.start()

    @property
    def num_done(self) -> int:
        """Steps of the plane's life that are done."""
        return self._books.read(DONE)

    @property
    def is_parked(self) -> bool:
        """Whether nothing is launched until the worker has counted a step."""
        return not self._is_active

    @property
    def is_under_way(self) -> bool:
        """Whether a step has begun and is not done."""
        return self._books.read(BEGUN) != self._books.read(DONE)

    def look(self, now: float) -> None:
        """For the keeper: parks or wakes the session, and ends what takes too long."""
        begun, done = self._books.read(BEGUN), self.num_done
        if begun != done:
            self._came_at = max(self._came_at, now)
            if self._begun[0] != begun:
                self._begun = begun, now
            elif now > self._begun[1] + STEP_S:
                rule = f"the worker did not hand over every layer within {STEP_S:g} s"
                self.fail(DeadlineExceeded(f"resident step {begun} has not ended, but must: {rule}"))
            return
        has_come = self._wake() != done & 0xFFFFFFFF
        if not self._is_active:
            if has_come and self._failure is None:
                self._activate()
        elif now > self._came_at + IDLE_S and not has_come and not self._num_paused:
            with self._changed:
                self._is_active = False
                self._revoke()

    def check(self) -> None:
        """For the keeper, less often: ends the session if it may not go on."""
        try:
            self._refuse()
        except AttndError as error:
            self.fail(error)

    def pause(self, after: int) -> None:
        """Waits until so many steps are done, and the launches behind them have left; then there are none.

        Raises:
            DeadlineExceeded: they were not within the time of a step.
            AttndError: there will be no more.
        """
        deadline = time.monotonic() + STEP_S
        with self._changed:
            while self.num_done < after:
                self._refuse_if_failed()
                self._activate()
                if time.monotonic() > deadline:
                    steps = f"resident step {after} is to come before this one, but only {self.num_done} are done"
                    raise DeadlineExceeded(f"{steps} after {STEP_S:g} s", field="after_resident")
                self._changed.wait(_PERIOD_S)
            self._num_paused += 1
            self._revoke()
            self._changed.wait_for(lambda: not self._is_serving)
            try:
                self._refuse_if_failed()
            except BaseException:
                self._num_paused -= 1
                raise

    def go_on(self, resumed: bool = False) -> None:
        """Ends a `pause`; if refusals were taken back, the next one is told again."""
        with self._changed:
            self._num_paused -= 1
            self._has_told = self._has_told and not resumed
            self._changed.notify_all()

    def leave(self) -> None:
        """Lets launches leave that have no step; they come back when nobody minds. From any thread, does not wait."""
        with self._changed:
            self._is_leaving = True
            self._revoke()

    def make_way(self) -> None:
        """As `leave`; launches come back after the cache's work that has the device. See `layer_group.Writer`."""
        with self._changed:
            self._must_come_after = True
        self.leave()

    def fail(self, error: Exception) -> None:
        """Ends the session: whatever waits is let go. From any thread, does not wait."""
        with self._changed:
            is_first, self._failure = self._failure is None, self._failure or error
            self._revoke()
        if is_first:
            self._flags.stop()
            self._told.failed(error)

    def close(self) -> None:
        """Ends the thread, when nothing waits for the worker any more; see `Channel.drain`."""
        with self._changed:
            self._is_closed = True
            self._revoke()
        self._thread.join()

    def _refuse_if_failed(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._flags.is_stopped:
            raise DeadlineExceeded("the worker has gone, or took too long")

    def _activate(self) -> None:
        with self._changed:
            self._is_active, self._came_at = True, time.monotonic()
            self._changed.notify_all()

    def _revoke(self) -> None:
        """With the lock: every launch up to now leaves, unless its step has come."""
        self._books.revoke(self._num_launched)
        self._changed.notify_all()

    def _run(self) -> None:
        self._prepare_thread()
        while self._await_work():
            try:
                if self._must_come_after:
                    self._must_come_after = False
                    self._come_after()
                with self._quiet.waits(self.leave), self._cache.held():
                    self._serve_or_fail()
            except Exception as error:
                self.fail(error)

    def _serve_or_fail(self) -> None:
        """As `_serve`; pages and the GPU's quiet are held until the last launch has left, whatever happens."""
        try:
            self._serve()
        except Exception as error:
            self.fail(error)
            with suppress(Exception):  # of a device that has failed nothing can be waited for
                if self._queued:
                    self._queued[-1]()  # they were revoked, and nothing waits any more
            self._queued.clear()

    def _await_work(self) -> bool:
        """Waits until launches are to be queued; False: there will be none any more."""
        with self._changed:
            self._is_serving = False
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: (
                    self._is_closed
                    or (self._is_active and not (self._num_paused or self._failure or self._flags.is_stopped))
                )
            )
            self._is_serving, self._is_leaving = not self._is_closed, False
            return self._is_serving

    def _goes_on(self) -> bool:
        return self._is_active and not (
            self._num_paused
            or self._is_leaving
            or self._must_come_after
            or self._is_closed
            or self._failure
            or self._flags.is_stopped
        )

    def _serve(self) -> None:
        """Keeps launches queued until there are to be none, and waits until the last has left."""
        while True:
            with self._changed:
                while self._goes_on() and len(self._queued) < AHEAD:
                    self._num_launched += 1
                    self._queued.append(self._enqueue())
                if not self._queued:
                    return
                if self._goes_on():
                    self._changed.wait(self._look_s)
            if not self._goes_on():
                self._queued[-1]()
            self._enter()

    def _enter(self) -> None:
        """Looks what the launches were that ended."""
        books = self._books
        num_ended, done = books.read(LAUNCHES), books.read(DONE)
        for _ in range(num_ended - self._num_ended):
            self._queued.popleft()
        self._num_ended = num_ended
        if done == self._done:
            return
        count, step_us = done - self._done, max(0, books.read(ENDED_NS) - books.read(BEGAN_NS)) // 1000
        # By the step's own time: steps that come after a pause come as fast as those before it.
        self._look_s = min(max(step_us * 1e-6 * AHEAD / 2, LEAST_LOOK_S), MOST_LOOK_S)
        with self._changed:
            self._done, self._came_at = done, time.monotonic()
            self._changed.notify_all()
        self._cache.renew()
        self._told.done(StepsDone(count, books.read(NUM_REQS), step_us))
        if (refused := books.read(REFUSED)) and not self._has_told:
            self._has_told = True
            self._told.refused(refused)
