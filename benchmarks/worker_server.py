"""The server of a worker's benchmark: a process of its own, on the other GPU."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil  # type: ignore[import-untyped]  # no types of its own, and none here
from rich.console import Console

import attnd
from attnd.errors import Exhausted
from benchmarks.endpoints import TIMEOUT_S
from benchmarks.servers import Child, started
from benchmarks.worker_contexts import PAGE_SIZE, Batch
from benchmarks.worker_model import ModelShape

T = TypeVar("T")
_PATIENCE_S = 30.0


@dataclass(frozen=True, eq=False)
class Server:
    """A server that runs.

    Attributes:
        client: to it.
        pid: of its process.
        kv_split: of its caches; None: the default.
    """

    client: attnd.Client
    pid: int
    kv_split: attnd.KVSplit | None = None

    def cpu_s(self) -> float:
        """Seconds of processors that it has used, in its own code and in the system's.

        By thread and in nanoseconds where the kernel has them: of a process there are hundredths of a second.
        """
        nanoseconds = 0
        for thread in Path(f"/proc/{self.pid}/task").iterdir():
            try:
                nanoseconds += int((thread / "schedstat").read_text().split()[0])
            except OSError:  # it has just ended, or the kernel does not count
                continue
        if nanoseconds:
            return nanoseconds / 1e9
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def create_cache(self, batch: Batch, shape: ModelShape) -> attnd.Cache:
        """A cache with exactly the pages of a batch, in all layers."""
        return self.client.create_cache(
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            num_pages=batch.num_pages,
            page_size=PAGE_SIZE,
            dtype=shape.dtype,
            kv_split=self.kv_split,
        )


@contextmanager
def serving(device: str, more: Sequence[str], err: Console, kv_split: attnd.KVSplit | None = None) -> Iterator[Server]:
    """Starts a server and connects to it; ends it with the block, and shows what it logged if that raises.

    Args:
        device: of the server.
        more: of its options.
        err: is shown the log.
        kv_split: of its caches.
    """
    with tempfile.TemporaryDirectory(prefix="attnd-") as folder:
        options = ["--port", "0", "--device", device, "--socket-dir", folder, *more]
        with started("attnd_server", "serve", *options) as child:
            address = child.address()
            try:
                with attnd.connect(address, timeout_s=TIMEOUT_S) as client:
                    yield Server(client, child.pid, kv_split)
            except Exception:
                err.print(_last_words(child), markup=False, highlight=False, soft_wrap=True)
                raise


def _last_words(child: Child) -> str:
    """The end of its log, as `read` tells it where it waited for a line in vain."""
    try:
        child.read(rb"(?!)", 0.0)
    except RuntimeError as error:
        return str(error)
    return ""


def when_free(call: Callable[[], T]) -> T:
    """What a call gives that needs a cuda plane: those of sessions that were closed are free a moment later."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return call()
        except Exhausted:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def warm_up(cache: attnd.Cache, batch: Batch, shape: ModelShape, on_gpu: bool) -> Any:
    """Has the server load its kernels while nothing waits on its GPU, and capture what its other planes replay."""
    if on_gpu:
        most = batch.context_len + batch.num_steps
        cache.warm_up(num_heads=shape.num_heads, max_reqs=batch.num_reqs, max_context_len=most, timeout_s=600)
