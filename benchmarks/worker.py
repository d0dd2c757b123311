"""Whole workers: decode steps of a model of 8B, with attention from a server on another GPU, and with their own.

`python -m benchmarks.worker --help`. Of the table `worker` each way is a worker whose step is one CUDA graph, with the
model's projections, norms and sampling inside: `none` has no attention, `local` FlashAttention-3 on its own GPU,
`resident` resident steps whose metadata the graph advances, `steps` those that a session takes as resident ones by
itself, `cuda` and `ahead` steps by message, `shm` host memory and no graph. The table `sessions` has no model, and many
sessions. The table `halves` has a batch that is split over two sessions.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import attnd
from benchmarks import report
from benchmarks.kernel_runs import as_command, release, write_wanted
from benchmarks.worker_checks import first_tokens, refuse_wrong_in_place, refuse_wrong_way
from benchmarks.worker_contexts import Batch, Contexts
from benchmarks.worker_halves import measure_halves
from benchmarks.worker_kernels import refuse_wrong_kernels
from benchmarks.worker_local import FlashAttention3, LocalAttention, PlainAttention
from benchmarks.worker_model import LLAMA_8B, TINY, Model, ModelShape
from benchmarks.worker_options import READ_BYTES_PER_US, CellSize, parse
from benchmarks.worker_server import Server, serving, warm_up
from benchmarks.worker_sessions import measure_load, with_ratios
from benchmarks.worker_ways import WAYS, Cell, RemoteSession, Way

COLUMNS = {
    "cell": "cell",
    "way": "way",
    "step_ms": "step ms",
    "p99_ms": "p99",
    "ratio": "ratio",
    "attention_us": "attention us",
    "tokens_per_s": "tokens/s",
    "read_ms": "read ms",
}
CAPTION = """step: median, to the token on the host. ratio: local's step to this one. attention: of a layer, beside
none. read: weights and, but for none, KV, one behind the other at 4.56 TB/s."""
SESSION_COLUMNS = {
    "context": "context",
    "cell": "sessions x requests",
    "way": "way",
    "tokens_per_s": "tokens/s",
    "ratio": "ratio",
    "step_p50_ms": "step p50 ms",
    "step_p99_ms": "p99",
    "server_cpu_us": "server's CPU us",
}
SESSION_CAPTION = """Attention of all layers, no model. ratio: to one session with the most requests. step: from its
message to its answer, while others are under way. CPU: of the server's process, a step."""


HALVES_COLUMNS = {
    "cell": "cell",
    "way": "way",
    "step_ms": "step ms",
    "tokens_per_s": "tokens/s",
    "tokens_per_s_gpu": "tokens/s a GPU",
}
HALVES_CAPTION = """local: the whole batch, its KV on the worker's GPU. halves: each has a session, a stream and a
graph, and is begun again as soon as its tokens are on the host; step: of both."""


def time_ways(ways: Sequence[Way], options: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds of each step, by way. The ways take turns in rounds, each from the contexts on."""
    samples: dict[str, list[float]] = {way.name: [] for way in ways}
    total = options.warm_up + options.steps
    for turn in range(options.rounds):
        for way in [*ways[turn % len(ways) :], *ways[: turn % len(ways)]]:
            way.restart(first_tokens(way)[0])
            for index in range(total):
                started = time.perf_counter()
                way.step(more=index + 1 < total)
                if index >= options.warm_up:
                    samples[way.name].append((time.perf_counter() - started) * 1e3)
    return samples


def rows_of(cell: Cell, size: CellSize, samples: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """The table's rows of a cell."""
    shape, batch = cell.contexts.shape, cell.batch
    step_ms = {way: statistics.median(values) for way, values in samples.items()}
    none_ms, local_ms = step_ms.get("none"), step_ms.get("local")
    kv_bytes = 2 * shape.num_layers * batch.num_reqs * batch.context_len * shape.num_kv_heads * shape.head_dim
    rows = []
    for way, values in samples.items():
        num_bytes = cell.model.num_bytes + (0 if way == "none" else kv_bytes * shape.dtype.itemsize)
        ms = step_ms[way]
        rows.append(
            {
                "table": "worker",
                "cell": str(size),
                "way": way,
                "step_ms": ms,
                "p99_ms": statistics.quantiles(values, n=100)[98],
                "ratio": local_ms / ms if local_ms else None,
                "attention_us": (ms - none_ms) * 1e3 / shape.num_layers if none_ms and way != "none" else None,
                "tokens_per_s": batch.num_reqs / ms * 1e3,
                "read_ms": num_bytes / READ_BYTES_PER_US / 1e3,
                "steps": len(values),
            }
        )
    return rows


class Run:
    """What a run has come to.

    Attributes:
        rows: of all tables.
        failures: what was not timed, and why: of a way, a cell, or a load of sessions.
    """

    def __init__(self, err: Console) -> None:
        self.rows: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self._err, self._began = err, time.perf_counter()

    def tell(self, what: str) -> None:
        """Shows how far it is: a machine may be taken away before the end."""
        self._err.print(f"{time.perf_counter() - self._began:7.1f} s  {what}", markup=False, highlight=False)

    @contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """Notes what is raised inside, so that the rest is timed all the same."""
        try:
            yield
        except (report.WrongResult, attnd.AttndError, RuntimeError) as error:
            kind = "wrong result" if isinstance(error, report.WrongResult) else type(error).__name__
            self.failures.append(f"{what} was not timed: {kind}: {error}")
            self.tell(self.failures[-1])


def measure_cell(
    size: CellSize, model: Model, local: LocalAttention, server: Server, options: argparse.Namespace, results: Run
) -> None:
    """Fills, prepares, checks and times the workers of a cell. Who fails, or computes something else, is not timed."""
    shape, on_gpu, tell = model.shape, model.device.type == "cuda", results.tell
    batch = Batch(*size, num_steps=options.warm_up + options.steps + 1)
    contexts = Contexts(batch, shape, model.device)
    with ExitStack() as stack:
        cache = stack.enter_context(server.create_cache(batch, shape))
        warm_up(cache, batch, shape, on_gpu)
        tell(f"{size}: the server is warm")
        filling = RemoteSession(cache, "cuda" if on_gpu else "shm", shape.num_heads)
        stack.callback(filling.close)
        contexts.fill(filling)
        filling.close()
        tell(f"{size}: filled")
        cell = Cell(model, contexts, cache, local, has_cuda_plane=on_gpu)
        ways, expected = [], None
        # What the others are compared with comes first.
        for name in sorted(options.ways, key=lambda name: name != "local"):
            with results.noting(f"{size} {name}"):
                way = WAYS[name](cell)
                stack.callback(way.close)
                way.prepare()
                hidden = refuse_wrong_way(way, expected)
                refuse_wrong_in_place(way, hidden)
                expected = expected or (hidden if way.attends else None)
                ways.append(way)
                tell(f"{size}: {name} is right")
        if ways:
            samples = time_ways(sorted(ways, key=lambda way: list(WAYS).index(way.name)), options)
            tell(f"{size}: timed")
            results.rows += rows_of(cell, size, samples)


def measure(options: argparse.Namespace, results: Run, err: Console) -> None:
    """Measures everything that is asked for into `results`. What is there when this raises is good."""
    shape = TINY if options.dry_run else LLAMA_8B
    device = torch.device("cpu") if options.dry_run else torch.device("cuda", 0)
    server_device = "cuda:0" if options.one_gpu else "cuda:1"
    server_options = ["--kv-bytes", f"{options.kv_gib}GiB", "--cuda-region-bytes", "128MiB"]
    if options.dry_run:
        attnd.tune_process()
        server_device, server_options = "cpu", ["--threads", "1"]
    else:
        # As the server sets it for itself, before there is a context: else streams that wait share queues with others.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        torch.cuda.set_device(device)
    kv_split = attnd.KVSplit(batch_invariant=False) if options.cut_by_batch else None
    with serving(server_device, server_options, err, kv_split) as server:
        results.tell("the server listens")
        if options.table != "sessions":
            measure_workers(shape, device, server, options, results)
        if options.table in ("sessions", "all"):
            measure_sessions(shape, device, server, options, results)


def measure_workers(
    shape: ModelShape, device: torch.device, server: Server, options: argparse.Namespace, results: Run
) -> None:
    """The rows of all cells."""
    if device.type == "cuda":
        refuse_wrong_kernels(shape.dtype, device)
    local: LocalAttention = PlainAttention() if options.peers is None else FlashAttention3(options.peers)
    longest = max(size.context_len for size in options.cells) + options.warm_up + options.steps + 1
    model = Model(shape, longest, device)
    results.tell("the model is there")
    for size in options.cells:
        with results.noting(str(size)):
            if options.table == "halves":
                results.rows += measure_halves(size, model, local, server, options)
                results.tell(f"{size}: timed")
            else:
                measure_cell(size, model, local, server, options, results)
        release(device)


def measure_sessions(
    shape: ModelShape, device: torch.device, server: Server, options: argparse.Namespace, results: Run
) -> None:
    """The rows of all loads."""
    rows = []
    ways = ["cuda"] if options.dry_run else [way for way in ("resident", "cuda") if way in options.ways]
    for load, way in [(load, way) for load in options.sessions for way in ways]:
        with results.noting(f"sessions {load} {way}"):
            is_resident = way == "resident"
            rows.append(measure_load(load, options.session_context, shape, server, device, options, is_resident))
            results.tell(f"sessions {load} {way}: timed")
        release(device)
    results.rows += [{"table": "sessions", **row} for row in with_ratios(rows)]


def draw(path: Path, title: str, rows: Sequence[report.Row]) -> None:
    """Steps beside those without attention; sessions beside the single one with the most requests."""
    panels: dict[str, list[report.Bar]] = {}
    none_ms = {row["cell"]: row["step_ms"] for row in rows if row.get("way") == "none"}
    for row in rows:
        if row["table"] == "worker" and row["way"] != "none" and row["cell"] in none_ms:
            bar = report.Bar(row["way"], row["step_ms"], {"no attention": none_ms[row["cell"]]})
            panels.setdefault(row["cell"], []).append(bar)
        elif row["table"] == "sessions" and row["ratio"]:
            whole = {"one session": row["tokens_per_s"] / row["ratio"]}
            panels.setdefault("sessions, tokens/s", []).append(report.Bar(row["cell"], row["tokens_per_s"], whole))
    report.plot(path, title, "ms of a step", panels)


def title_of(options: argparse.Namespace) -> str:
    """Above the tables."""
    if options.dry_run:
        return f"worker: {TINY.name}, CPU, a dry run; cuda and ahead go over shm"
    dtype = str(LLAMA_8B.dtype).removeprefix("torch.") + (", cut by the batch" if options.cut_by_batch else "")
    where = "the same, under MPS" if options.one_gpu else "another"
    return f"worker: {LLAMA_8B.name}, {dtype}, the worker on {torch.cuda.get_device_name(0)}, the server on {where}"


def show_and_write(options: argparse.Namespace, results: Run, out: Console, err: Console) -> None:
    """The tables, JSON and the plot, of what there is."""
    title, rows = title_of(options), results.rows
    kinds = {
        "worker": (CAPTION, COLUMNS),
        "sessions": (SESSION_CAPTION, SESSION_COLUMNS),
        "halves": (HALVES_CAPTION, HALVES_COLUMNS),
    }
    for name, (caption, columns) in kinds.items():
        of_kind = [row for row in rows if row["table"] == name]
        if of_kind:
            out.print(report.table(title, caption, of_kind, columns))
    parameters = {key: value for key, value in vars(options).items() if key not in ("json", "plot", "peers")}
    parameters |= {key: [str(size) for size in parameters[key]] for key in ("cells", "sessions")}
    parameters["not_timed"] = results.failures
    write_wanted(options, "worker", parameters, rows, err, lambda path: draw(path, title, rows))


@torch.inference_mode()
def run(options: argparse.Namespace, out: Console, err: Console) -> int:
    """Measures, prints and writes, also what there is when something ends it early. Returns the exit code."""
    results = Run(err)
    try:
        measure(options, results, err)
    finally:
        if results.rows:
            show_and_write(options, results, out, err)
        for line in results.failures:
            out.print(line, markup=False, highlight=False, soft_wrap=True)
    return 1 if results.failures else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 1 if something fails, or computes something else."""
    return as_command(lambda out, err: run(parse(arguments), out, err))


if __name__ == "__main__":
    sys.exit(main())
