"""Launches of resident steps without a GPU: a thread for the GPU, and all that is around the launches."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from attnd_server.attention.config import AttentionConfig
from attnd_server.config import ServerConfig
from attnd_server.device.quiet import QuietGpu
from attnd_server.kv.cache import Cache
from attnd_server.kv.caches import CacheTable
from attnd_server.planes.cuda.resident import books as words
from attnd_server.planes.cuda.resident.books import Books
from attnd_server.planes.cuda.resident.launches import IDLE_S, ResidentLaunches
from attnd_server.planes.cuda.resident.told import StepsDone, Told

# Seconds: longer than anything here should take.
PATIENCE_S = 20.0
NUM_REQS = 5
CONFIG = AttentionConfig(num_layers=1, num_kv_heads=1, head_dim=16, num_pages=4, page_size=4, dtype=torch.float32)


class HostBooks(Books):
    """Books whose reader need not look again and again."""

    def __init__(self) -> None:
        super().__init__(memoryview(bytearray(128)).cast("Q"), 0)
        self.changed: Callable[[], None] = lambda: None
        self.about_to_revoke: Callable[[], None] = lambda: None

    def revoke(self, launch: int) -> None:
        self.about_to_revoke()
        super().revoke(launch)
        self.changed()

    def write(self, word: int, value: int) -> None:
        self._words[word] = value


class HostFlags:
    """The word that ends all waits."""

    def __init__(self) -> None:
        self.is_stopped = False
        self.changed: Callable[[], None] = lambda: None

    def stop(self) -> None:
        self.is_stopped = True
        self.changed()


class Gpu:
    """A stream that does launches one after the other as `gates.py` says, and the worker whose steps they serve.

    Attributes:
        num_enqueued: launches up to now.
        most_waiting: of them at once.
        num_counted: steps that the worker has counted.
        served: the numbers of steps, as they ended.
        refused: the first step that is refused, as all after it are.
    """

    def __init__(self, books: HostBooks, flags: HostFlags, num_counted: int) -> None:
        self._books, self._flags = books, flags
        self._changed = threading.Condition()
        books.changed = flags.changed = self._tell
        self._waiting: list[threading.Event] = []
        self._ends_steps, self._is_over = True, False
        self.num_enqueued = self.most_waiting = self.refused = 0
        self.num_counted = num_counted
        self.served: list[int] = []
        self.was_enqueued = threading.Event()
        self.to_fail_at = 0  # the launch that cannot be enqueued
        self.ends: Callable[[], None] = lambda: None  # called by who learns that a launch has ended
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def enqueue(self) -> Callable[[], None]:
        """As the session does."""
        with self._changed:
            self.num_enqueued += 1
            if self.num_enqueued == self.to_fail_at:
                raise ZeroDivisionError
            ended = threading.Event()
            self._waiting.append(ended)
            self.most_waiting = max(self.most_waiting, len(self._waiting))
            self.was_enqueued.set()
            self._changed.notify_all()

        def has_ended() -> None:
            assert ended.wait(PATIENCE_S), "a launch has not left"
            self.ends()

        return has_ended

    def wake(self) -> int:
        return self.num_counted & 0xFFFFFFFF

    def count(self) -> None:
        """As the worker does when a step's metadata is there."""
        with self._changed:
            self.num_counted += 1
            self._changed.notify_all()

    def hold(self) -> None:
        """Steps that come go on, but do not end."""
        with self._changed:
            self._ends_steps = False

    def let_end(self) -> None:
        with self._changed:
            self._ends_steps = True
            self._changed.notify_all()

    @property
    def num_waiting(self) -> int:
        """Launches that have not left."""
        with self._changed:
            return len(self._waiting)

    @property
    def is_free(self) -> bool:
        """Whether the worker may count another step: not more than one beyond that which runs."""
        return self.num_counted <= self._books.read(words.BEGUN)

    def until(self, condition: Callable[[], Any], what: str) -> None:
        """Waits until something of the GPU's is so."""
        with self._changed:
            assert self._changed.wait_for(condition, PATIENCE_S), what

    def until_begun(self, step: int) -> None:
        self.until(lambda: self._books.read(words.BEGUN) >= step, f"step {step} has not begun")

    def until_served(self, step: int) -> None:
        self.until(lambda: self._books.read(words.DONE) >= step, f"step {step} is not done")

    def end(self) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        books, launch = self._books, 0
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._is_over)
                if not self._waiting:
                    return
                launch += 1
                step = books.read(words.DONE) + 1
                if self._comes(launch, step):
                    self._serve(step)
                books.write(words.LAUNCHES, launch)
                self._waiting.pop(0).set()
                self._changed.notify_all()

    def _comes(self, launch: int, step: int) -> bool:
        """The first gate."""

        def leaves() -> bool:
            return self._books.read(words.REVOKED) >= launch or self._flags.is_stopped or self._is_over

        self._changed.wait_for(lambda: leaves() or self.num_counted >= step)
        return not leaves()

    def _serve(self, step: int) -> None:
        books = self._books
        books.write(words.BEGUN, step)
        self._changed.notify_all()
        self._changed.wait_for(lambda: self._ends_steps or self._flags.is_stopped or self._is_over)
        books.write(words.NUM_REQS, NUM_REQS)
        books.write(words.BEGAN_NS, 1_000_000 * step)
        books.write(words.ENDED_NS, 1_000_000 * step + 7_900)
        books.write(words.REFUSED, self.refused if 0 < self.refused <= step else 0)
        self.served.append(step)
        books.write(words.DONE, step)


class Rig:
    """Launches with all that is around them.

    Attributes:
        done: what was told of steps that are done; `refused` and `failed` likewise.
        num_told: the number of the last step of which something was.
        num_came_after: times that launches waited for the cache's work.
        device: who computes for the cache has it.
    """

    def __init__(self, num_done: int = 0) -> None:
        """After so many steps of the plane's life."""
        self.books, self.flags, self.quiet = HostBooks(), HostFlags(), QuietGpu()
        self.books.start(num_done)
        self.gpu = Gpu(self.books, self.flags, num_done)
        self.table = CacheTable(ServerConfig(), torch.device("cpu"), kv_bytes=CONFIG.num_bytes)
        self.cache: Cache = self.table.create(CONFIG, principal="a", ttl_s=1000, name="")
        self.done: queue.SimpleQueue[StepsDone] = queue.SimpleQueue()
        self.num_told, self._telling = num_done, threading.Condition()
        self.refused: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.failed: queue.SimpleQueue[Exception] = queue.SimpleQueue()
        self.device, self.num_came_after = threading.Lock(), 0
        self.comes_after = threading.Event()
        self.is_ready = threading.Event()
        self.refuse: Callable[[], None] = self.cache.refuse_if_closed
        self.told_done: Callable[[StepsDone], None] = self._count
        self.launches = ResidentLaunches(
            self.gpu.enqueue,
            self.books,
            self.flags,  # type: ignore[arg-type]
            self.cache,
            self.quiet,
            self.gpu.wake,
            lambda: self.refuse(),
            Told(lambda done: self.told_done(done), self.refused.put, self.failed.put),
            self.come_after,
            self.is_ready.set,
        )
        self.cache.when_closed(self.launches.leave)

    def come_after(self) -> None:
        self.comes_after.set()
        assert self.device.acquire(timeout=PATIENCE_S), "the device is not given back"
        self.num_came_after += 1
        self.device.release()

    def step(self, number: int = 1) -> None:
        """Serves steps, one after the other."""
        for _ in range(number):
            self.gpu.count()
            self.launches.look(time.monotonic())
            self.until_done(self.gpu.num_counted)

    def _count(self, done: StepsDone) -> None:
        self.done.put(done)
        with self._telling:
            self.num_told += done.count
            self._telling.notify_all()

    def until_done(self, step: int) -> None:
        """Waits until the session was told of it."""
        self.gpu.until_served(step)
        with self._telling:
            assert self._telling.wait_for(lambda: self.num_told >= step, PATIENCE_S), f"nobody was told of step {step}"

    def park(self) -> None:
        """As when nothing comes for a while."""
        self.launches.look(time.monotonic() + 2 * IDLE_S)
        assert self.launches.is_parked
        assert self.quiet.are_over(PATIENCE_S)

    def until_parked(self) -> None:
        """Waits until the launches' thread has nothing to do. Not while it is to launch something."""
        with self.launches._changed:
            assert self.launches._changed.wait_for(lambda: not self.launches._is_serving, PATIENCE_S)

    def begun_but_held(self, step: int = 1) -> None:
        """A step is under way, and does not end before the test says so."""
        self.gpu.hold()
        self.gpu.count()
        self.launches.look(time.monotonic())
        self.gpu.until_begun(step)

    def close(self) -> None:
        self.flags.stop()
        closing = Doing(self.launches.close)
        closing.result()
        self.gpu.end()


class Doing:
    """Something that another thread does."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.is_over = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error
        self.is_over.set()

    def result(self) -> None:
        assert self.is_over.wait(PATIENCE_S), "it goes on and on"
        if self._error is not None:
            raise self._error
