"""The way of one warm decode call through the server, as documentation: run it with `-s` to read the stations."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from types import FrameType

import torch

import attnd
import attnd_server
from attnd_server.config import ServerConfig
from tests.server_thread import server_thread

ROOT = str(attnd_server.__path__[0]) + "/"
GEOMETRY = {"num_layers": 4, "num_kv_heads": 2, "head_dim": 16, "num_pages": 8, "page_size": 4, "dtype": "float32"}
DECODE = attnd.StepMetadata([1], [5], [[1, 2]], [9], kind="decode")
OPTIONS = attnd.AttentionOptions(backend="sdpa")
MOST_FILES = 12


class Stations:
    """Functions of the server that a thread calls, one after the other.

    Attributes:
        called: file and function of each call.
        entered: how often each file was entered from another one.
    """

    def __init__(self) -> None:
        self.called: list[tuple[str, str]] = []
        self.entered: Counter[str] = Counter()

    def note(self, frame: FrameType, event: str, _: object) -> None:
        """For `sys.setprofile`."""
        path = frame.f_code.co_filename
        if event != "call" or not path.startswith(ROOT):
            return
        file = path.removeprefix(ROOT)
        self.called.append((file, frame.f_code.co_name))
        if frame.f_back is None or frame.f_back.f_code.co_filename != path:
            self.entered[file] += 1


def profile(loop: asyncio.AbstractEventLoop, note: object) -> None:
    """Sets what the thread of an event loop calls at each call of a function; None: nothing."""

    async def set_it() -> None:
        sys.setprofile(note)  # type: ignore[arg-type]

    asyncio.run_coroutine_threadsafe(set_it(), loop).result(10)


def test_a_warm_decode_call_goes_down_once_and_up_once() -> None:
    q, k, v = torch.randn(1, 4, 16), torch.randn(1, 2, 16), torch.randn(1, 2, 16)
    stations = Stations()
    with (
        server_thread(ServerConfig(port=0, device="cpu")) as (server, loop),
        attnd.connect(server.address, plane="inline") as client,
        client.create_cache(**GEOMETRY, renew=False) as cache,
        cache.session() as session,
    ):
        step = session.step(DECODE)
        for layer in range(3):
            step.attend(layer, q, k, v, OPTIONS)
        profile(loop, stations.note)
        step.attend(3, q, k, v, OPTIONS)
        profile(loop, None)
    assert ("attention/backends/sdpa.py", "run") in stations.called
    for file, function in stations.called:
        print(f"{file:40} {function}")
    print(f"{len(stations.entered)} files: {dict(stations.entered)}")
    assert len(stations.entered) <= MOST_FILES, stations.entered
    for file in ("service/service.py", "service/session.py", "execution/executor.py"):
        assert stations.entered[file] == 1, (file, stations.entered)
