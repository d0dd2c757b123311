"""Many sessions of one worker process: each has a cache, a stream and a graph, and one thread drives them in turn.

There is no model: what is timed is attention of all layers alone, and what each step costs both hosts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch

import attnd
from benchmarks.worker_contexts import Batch, Contexts
from benchmarks.worker_model import Call, ModelShape
from benchmarks.worker_server import Server, warm_up, when_free
from benchmarks.worker_ways import RemoteSession, captured


class Load(NamedTuple):
    """Sessions at one time, and requests of each."""

    num_sessions: int
    num_reqs: int

    def __str__(self) -> str:
        return f"{self.num_sessions} x {self.num_reqs}"


class Worker:
    """One session: a batch whose contexts are on the server, and a graph of its attends."""

    def __init__(self, server: Server, batch: Batch, shape: ModelShape, device: torch.device, seed: int) -> None:
        """Makes the cache; `prepare` does the rest."""
        self.cache = server.create_cache(batch, shape)
        self._batch, self._shape, self._device = batch, shape, device
        self._contexts = Contexts(batch, shape, device, seed)
        on_gpu = device.type == "cuda"
        self._session = RemoteSession(self.cache, "cuda" if on_gpu else "shm", shape.num_heads)
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._event = torch.cuda.Event() if on_gpu else None
        heads = shape.num_heads, shape.num_kv_heads, shape.num_kv_heads
        self._q, self._k, self._v = (
            torch.randn(batch.num_reqs, each, shape.head_dim, device=device).to(shape.dtype) for each in heads
        )
        self._outputs: list[torch.Tensor] = []
        self._replay: Callable[[], None] = self._attend_all
        self._step: Any = None
        self._context_len = batch.context_len
        self._started = 0.0

    def prepare(self) -> None:
        """Fills the cache, checks a step, and captures one.

        Raises:
            WrongResult: attention is wrong.
        """
        when_free(lambda: self._contexts.fill(self._session))
        self._one_step(self._attend_all)
        batch, num_layers = self._batch, self._shape.num_layers
        if self._stream is not None:
            self._one_step(lambda: self._capture(self._stream))
            for output in self._outputs:
                output.fill_(torch.nan)
        self._one_step(self._replay)
        for layer in sorted({0, num_layers // 2, num_layers - 1}):
            call = Call(self._q, self._k, self._v, self._outputs[layer])
            requests = sorted({0, batch.num_reqs // 2, batch.num_reqs - 1})
            self._contexts.refuse_wrong("a session", layer, call, [], requests)

    def _attend_all(self) -> None:
        self._outputs = [self._step.attend(layer, self._q, self._k, self._v) for layer in range(self._shape.num_layers)]

    def _capture(self, stream: torch.cuda.Stream | None) -> None:
        self._replay = captured(self._attend_all, self._device, stream)
        self._replay()  # the step that was captured is still to be computed

    def _one_step(self, run: Callable[[], None]) -> None:
        """A step behind the contexts, to its end."""
        self.restart()
        self._step = self._session.step(self._batch.decode(self._context_len))
        run()
        if self._stream is not None:
            torch.cuda.synchronize(self._device)
        self._step.finish()

    def restart(self) -> None:
        """Goes back to the first step behind the contexts."""
        self._context_len = self._batch.context_len

    def start(self) -> None:
        """Tells the server of a step, and enqueues it."""
        self._started = time.perf_counter()
        self._step = self._session.step(self._batch.decode(self._context_len))
        self._context_len += 1
        if self._stream is None or self._event is None:
            self._replay()
            return
        with torch.cuda.stream(self._stream):
            self._replay()
            self._event.record(self._stream)

    def is_done(self) -> bool:
        """Whether the worker's GPU has all outputs of the step."""
        return self._event is None or self._event.query()

    def finish(self) -> float:
        """Waits for the server's answer. Returns milliseconds since the step was started."""
        self._step.finish()
        return (time.perf_counter() - self._started) * 1e3

    def close(self) -> None:
        """Ends the session, and deletes the cache."""
        self._session.close()
        self.cache.delete()


class ResidentWorker(Worker):
    """The same with resident steps: the graph tells the server of a step, and advances the lengths."""

    def __init__(self, server: Server, batch: Batch, shape: ModelShape, device: torch.device, seed: int) -> None:
        """As `Worker`; on a GPU alone."""
        super().__init__(server, batch, shape, device, seed)
        self._steps: attnd.ResidentSteps | None = None

    def prepare(self) -> None:
        """Likewise."""
        when_free(lambda: self._contexts.fill(self._session))
        batch = self._batch
        self._steps = self._session.resident(self._shape.num_heads, batch.num_reqs, batch.pages_per_req)
        self._steps.page_tables.copy_(batch.page_tables)
        super().prepare()

    def restart(self) -> None:
        """Likewise."""
        super().restart()
        assert self._steps is not None
        self._steps.context_lens.fill_(self._context_len)
        torch.cuda.synchronize(self._device)

    def _attend_all(self) -> None:
        assert self._steps is not None
        self._step = self._steps
        self._steps.begin(self._batch.num_reqs)
        super()._attend_all()
        self._steps.context_lens.add_(1)

    def _one_step(self, run: Callable[[], None]) -> None:
        self.restart()
        run()
        torch.cuda.synchronize(self._device)
        assert self._steps is not None
        self._steps.finish()

    def start(self) -> None:
        """Enqueues a step."""
        assert self._stream is not None
        assert self._event is not None
        self._started = time.perf_counter()
        with torch.cuda.stream(self._stream):
            self._replay()
            self._event.record(self._stream)

    def finish(self) -> float:
        """Milliseconds since the step was started."""
        return (time.perf_counter() - self._started) * 1e3

    def close(self) -> None:
        """Learns how the steps went, then as `Worker`."""
        if self._steps is not None:
            self._steps.finish()
        super().close()


def drive(workers: Sequence[Worker], num_steps: int) -> list[float]:
    """Runs so many steps of each, from one thread that looks at them in turn. Returns milliseconds of every step."""
    left = [num_steps] * len(workers)
    for worker in workers:
        worker.start()
    milliseconds = []
    while any(left):
        for index, worker in enumerate(workers):
            if left[index] and worker.is_done():
                milliseconds.append(worker.finish())
                left[index] -= 1
                if left[index]:
                    worker.start()
    return milliseconds


def measure_load(
    load: Load,
    context_len: int,
    shape: ModelShape,
    server: Server,
    device: torch.device,
    timing: Any,
    is_resident: bool,
) -> dict[str, Any]:
    """Checks and times a load: a row of the table.

    Args:
        load: the sessions.
        context_len: tokens of every context before the first step.
        shape: of the caches.
        server: that has them.
        device: of the worker.
        timing: has `steps` and `warm_up` of each session in each of `rounds`.
        is_resident: whether steps are resident, or messages.

    Raises:
        WrongResult: attention is wrong.
    """
    batch = Batch(load.num_reqs, context_len, timing.warm_up + timing.steps + 1)
    rates, cpu_us, milliseconds = [], [], []
    with ExitStack() as stack:
        workers: list[Worker] = []
        for seed in range(load.num_sessions):
            worker = (ResidentWorker if is_resident else Worker)(server, batch, shape, device, seed)
            stack.callback(worker.close)
            workers.append(worker)
            if seed == 0:  # the others' kernels are the same
                warm_up(worker.cache, batch, shape, device.type == "cuda")
            worker.prepare()
        for _ in range(timing.rounds):
            for worker in workers:
                worker.restart()
            drive(workers, timing.warm_up)
            cpu_s, started = server.cpu_s(), time.perf_counter()
            milliseconds += drive(workers, timing.steps)
            seconds, num_steps = time.perf_counter() - started, timing.steps * load.num_sessions
            rates.append(num_steps * load.num_reqs / seconds)
            cpu_us.append((server.cpu_s() - cpu_s) * 1e6 / num_steps)
    return {
        "cell": str(load),
        "way": "resident" if is_resident else "cuda",
        "context": context_len,
        "tokens_per_s": statistics.median(rates),
        "least_tokens_per_s": min(rates),
        "most_tokens_per_s": max(rates),
        "step_p50_ms": statistics.median(milliseconds),
        "step_p99_ms": statistics.quantiles(milliseconds, n=100)[98],
        "server_cpu_us": statistics.median(cpu_us),
        "steps": len(milliseconds),
    }


def with_ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with tokens a second as a share of those of one session with the most requests."""
    whole: dict[str, tuple[int, float]] = {}
    for row in rows:
        num_sessions, num_reqs = map(int, row["cell"].split(" x "))
        if num_sessions == 1:
            whole[row["way"]] = max(whole.get(row["way"], (0, 0.0)), (num_reqs, row["tokens_per_s"]))
    return [
        {**row, "ratio": row["tokens_per_s"] / whole[row["way"]][1] if row["way"] in whole else None} for row in rows
    ]
