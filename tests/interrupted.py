"""A client that is interrupted at random moments, as by Ctrl-C, and compares every answer: started by tests.

A token without a context attends itself alone, so that a call's output is its v. Each call has another v, so that an
answer to another call is noticed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

import attnd
from tests.dying import GEOMETRY

ONE_TOKEN = attnd.StepMetadata([1], [0], [[0]], [0])
# Seconds until an interrupt, at most: as long as several calls take.
LATEST_S = 0.004


class Interrupts:
    """Interrupts the main thread at a random moment of what it does, as Ctrl-C does.

    Attributes:
        count: how often.
    """

    def __init__(self) -> None:
        """The thread that interrupts goes on until the process ends."""
        self.count = 0
        self._is_armed = False
        threading.Thread(target=self._run, daemon=True).start()

    def run(self, what: Callable[[], None]) -> None:
        """Does it again and again until it is interrupted."""
        try:
            self._is_armed = True
            while True:
                what()
        except KeyboardInterrupt:
            self.count += 1

    def _run(self) -> None:
        while True:
            if self._is_armed:
                time.sleep(random.uniform(0, LATEST_S))
                self._is_armed = False
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.0005)


def some_v() -> Any:
    return np.random.default_rng().standard_normal((1, 2, 16), np.float32)


def check(output: Any, v: Any) -> None:
    if not np.array_equal(output, v):
        print(f"answered {output.ravel()[:4]} for {v.ravel()[:4]}", flush=True)
        os._exit(3)


def attend(session: attnd.Session) -> Callable[[], None]:
    """A step of two layers, one call after the other."""

    def run() -> None:
        step = session.step(ONE_TOKEN)
        for layer in range(2):
            v = some_v()
            check(step.attend(layer, v, v, v), v)

    return run


def submit(session: attnd.Session) -> Callable[[], None]:
    """Two steps of two layers, all calls under way at once."""

    def run() -> None:
        calls = []
        for page in range(2):
            step = session.step(attnd.StepMetadata([1], [0], [[page]], [4 * page]))
            for layer in range(2):
                v = some_v()
                calls.append((step.submit(layer, v, v, v), v))
        for call, v in reversed(calls):
            check(call.wait(), v)

    return run


def unary(client: attnd.Client, cache: attnd.Cache) -> Callable[[], None]:
    """Calls without a session."""

    def run() -> None:
        v = some_v()
        check(client.prefill(cache, ONE_TOKEN, 0, v, v, v), v)
        cache.renew()
        client.list_caches()

    return run


def stored(cache: attnd.Cache) -> Callable[[], None]:
    """KV written and read back. Always the same: a chunk that was on its way may be written after the next one."""
    slots = list(range(8, 32))
    k, v = np.random.default_rng().standard_normal((2, len(slots), 2, 16), np.float32)

    def run() -> None:
        cache.store_kv(1, slots, k, v)
        for read, kept in zip(cache.read_kv(1, slots, k), (k, v), strict=True):
            check(read, kept)

    return run


def opened(address: str, plane: str) -> Callable[[], None]:
    """Whole connections, from `connect` to `close`."""

    def run() -> None:
        with attnd.connect(address, plane=plane, timeout_s=5) as client:
            with client.create_cache(**GEOMETRY, ttl_s=5) as cache, cache.session() as session:
                attend(session)()

    return run


@contextmanager
def kinds(address: str, plane: str) -> Iterator[dict[str, Callable[[], None]]]:
    with attnd.connect(address, plane=plane, timeout_s=20) as client, client.create_cache(**GEOMETRY) as cache:
        with cache.session() as session:
            yield {
                "attend": attend(session),
                "submit": submit(session),
                "unary": unary(client, cache),
                "stored": stored(cache),
                "opened": opened(address, plane),
            }


def main(address: str, plane: str, kind: str, count: int) -> None:
    """Is interrupted `count` times. Each time what comes next must do what it did."""
    interrupts = Interrupts()
    with kinds(address, plane) as runs:
        while interrupts.count < count:
            interrupts.run(runs[kind])
            for each in {kind, "attend", "unary"}:
                runs[each]()
    print(f"interrupted {interrupts.count} times", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
