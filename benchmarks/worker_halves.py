"""A worker that splits its batch over two sessions: while the server attends for one, the other has the worker's GPU.

Each half is a worker with its own cache, stream and graph, and the same weights. What it is compared with is the whole
batch in one graph with its KV on the worker's own GPU: two GPUs against one, so tokens a second a GPU stand beside it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import ExitStack
from typing import Any

import torch

from benchmarks.worker_checks import first_tokens, refuse_wrong_in_place, refuse_wrong_way
from benchmarks.worker_contexts import Batch, Contexts
from benchmarks.worker_local import LocalAttention
from benchmarks.worker_model import Model
from benchmarks.worker_server import Server, warm_up
from benchmarks.worker_ways import Cell, Local, RemoteSession, Resident


class Half:
    """A worker with resident steps on a stream of its own."""

    def __init__(
        self, model: Model, batch: Batch, server: Server, local: LocalAttention, seed: int, stack: ExitStack
    ) -> None:
        """Fills its cache, checks its steps, and captures one. Raises WrongResult: attention is wrong."""
        self.stream = torch.cuda.Stream(model.device)
        contexts = Contexts(batch, model.shape, model.device, seed)
        cache = stack.enter_context(server.create_cache(batch, model.shape))
        warm_up(cache, batch, model.shape, on_gpu=True)
        filling = RemoteSession(cache, "cuda", model.shape.num_heads)
        contexts.fill(filling)
        filling.close()
        with torch.cuda.stream(self.stream):
            self.way = Resident(Cell(model, contexts, cache, local, has_cuda_plane=True))
            stack.callback(self.way.close)
            self.way.prepare()
            refuse_wrong_in_place(self.way, refuse_wrong_way(self.way, None))

    def restart(self) -> None:
        """Goes back to the first step behind the contexts."""
        with torch.cuda.stream(self.stream):
            self.way.restart(first_tokens(self.way)[0])
            self.stream.synchronize()

    def start(self) -> None:
        """Enqueues a step."""
        with torch.cuda.stream(self.stream):
            self.way.replay()
            self.way.tokens.fetch()

    def is_done(self) -> bool:
        """Whether its tokens are on the host."""
        return self.way.tokens.are_there()

    def finish(self) -> None:
        """Waits until its tokens are on the host, and learns how it went."""
        with torch.cuda.stream(self.stream):
            self.way.tokens.wait()
            self.way.opened.finish()


def _seconds(halves: list[Half], num_steps: int) -> float:
    """Of so many steps of each, every next one begun as soon as the one before is there."""
    started, left = time.perf_counter(), [num_steps] * len(halves)
    for half in halves:
        half.start()
    while any(left):
        for index, half in enumerate(halves):
            if left[index] and half.is_done():
                half.finish()
                left[index] -= 1
                if left[index]:
                    half.start()
    return time.perf_counter() - started


def measure_halves(
    size: Any, model: Model, local: LocalAttention, server: Server, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of a cell: the whole batch with its own KV, and two halves with theirs on the server.

    Args:
        size: requests, an even number, and context of each.
        model: of both.
        local: of the worker with its own KV.
        server: on the other GPU.
        options: have `rounds`, and `steps` and `warm_up` of each.

    Raises:
        WrongResult: attention is wrong.
    """
    num_steps = options.warm_up + options.steps + 1
    rows = []
    with ExitStack() as stack:
        contexts = Contexts(Batch(size.num_reqs, size.context_len, num_steps), model.shape, model.device)
        cache = stack.enter_context(server.create_cache(Batch(1, 16, 1), model.shape))  # of nobody
        way = Local(Cell(model, contexts, cache, local, has_cuda_plane=True))
        way.prepare()
        refuse_wrong_way(way, None)
        milliseconds = []
        for _ in range(options.rounds):
            way.restart(first_tokens(way)[0])
            for index in range(options.warm_up + options.steps):
                started = time.perf_counter()
                way.step(more=True)
                if index >= options.warm_up:
                    milliseconds.append((time.perf_counter() - started) * 1e3)
        rows.append(_row(size, "local", statistics.median(milliseconds), 1))
        del way
        torch.cuda.empty_cache()
    with ExitStack() as stack:
        batch = Batch(size.num_reqs // 2, size.context_len, num_steps)
        halves = [Half(model, batch, server, local, 1 + index, stack) for index in range(2)]
        seconds = []
        for _ in range(options.rounds):
            for half in halves:
                half.restart()
            _seconds(halves, options.warm_up)
            seconds.append(_seconds(halves, options.steps) / options.steps)
        rows.append(_row(size, "two halves", statistics.median(seconds) * 1e3, 2))
        for half in halves[:1]:
            half.restart()
            alone = _seconds([half], options.steps) / options.steps
            rows.append(_row(size, "one half alone", alone * 1e3, 2, size.num_reqs // 2))
    return rows


def _row(size: Any, way: str, ms: float, num_gpus: int, num_reqs: int = 0) -> dict[str, Any]:
    rate = (num_reqs or size.num_reqs) / ms * 1e3
    return {
        "table": "halves",
        "cell": str(size),
        "way": way,
        "step_ms": ms,
        "tokens_per_s": rate,
        "tokens_per_s_gpu": rate / num_gpus,
    }
