"""Clients that end themselves in the middle of something: started by tests, each in a process of its own."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

import attnd

GEOMETRY: dict[str, Any] = {
    "num_layers": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "num_pages": 8,
    "page_size": 4,
    "dtype": "float32",
}
CLIENT = str(Path(attnd.__file__).parent)


def one(num_heads: int = 2) -> Any:
    """q, k or v of one token."""
    return np.ones((1, num_heads, 16), np.float32)


def decode_metadata(context_len: int) -> attnd.StepMetadata:
    """A token behind a context, all in page order."""
    return attnd.StepMetadata([1], [context_len], [[0, 1, 2, 3, 4, 5, 6, 7]], [context_len], kind="decode")


class Killer:
    """Ends the process by SIGKILL at the n-th line of the client's code that is run from now on, or counts them."""

    def __init__(self, at_line: int, count: Synchronized[int]) -> None:
        """Never, if `at_line` is 0."""
        self._left = at_line
        self._count = count

    def __enter__(self) -> None:
        """From now on."""
        sys.settrace(self._call)

    def __exit__(self, *_: object) -> None:
        """Until now."""
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        return self._line if frame.f_code.co_filename.startswith(CLIENT) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        if event == "line":
            self._count.get_obj().value += 1
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return self._line


def die_in_a_step(address: str, plane: str, at_line: int, count: Synchronized[int]) -> None:
    """Opens a session and a step, has calls answered and calls under way, and is killed at a line of it."""
    client = attnd.connect(address, plane=plane, timeout_s=20)
    cache = client.create_cache(**GEOMETRY, ttl_s=1, name="of somebody dead")
    with Killer(at_line, count):
        session = cache.session()
        step = session.step(decode_metadata(0))
        step.attend(0, one(), one(), one())
        calls = [step.submit(1, one(), one(), one()) for _ in range(2)]
        next_step = session.step(decode_metadata(1))
        calls.append(next_step.submit(0, one(), one(), one()))
        for call in calls:
            call.wait()
        cache.store_kv(0, [8, 9], *[np.ones((2, 2, 16), np.float32)] * 2)
        session.close()


def die_while_storing(address: str) -> None:
    """Is killed between two chunks of a StoreKv, of which the server has answered the first."""
    client = attnd.connect(address, timeout_s=20)
    cache = client.create_cache(**GEOMETRY, ttl_s=1, name="of somebody dead")
    from attnd.protocol import requests

    def chunks() -> Any:
        kv = [np.ones((2, 2, 16), np.float32)] * 2
        yield from requests.store_kv(cache.ref, 0, [0, 1], *kv)
        yield from requests.store_kv(cache.ref, 0, [2, 3], *kv)
        answered.wait()
        os.kill(os.getpid(), signal.SIGKILL)

    import threading

    answered = threading.Event()
    for _ in client.transport.store_kv(chunks(), 20):
        answered.set()
