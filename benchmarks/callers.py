"""Several client processes with small batches beside one with a large batch: tokens per second of a server."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import many_echoes
from benchmarks.servers import Child, started
from benchmarks.workload import LLAMA_8B, DecodeStep

SMALL_BATCH, LARGE_BATCH = 4, 64
ROUNDS = 3
# Of a caller's cache on a processor, so that many fit.
CPU_KV_BYTES = 32 << 20
# On a GPU: room for 32 layers of 64 requests where what a step costs is shared by its layers, and else for a few layers
# of a request: those of all callers are far more than the GPU's cache holds.
GPU_KV_BYTES, GPU_KV_BYTES_OF_REQUEST, GPU_CONTEXT_LEN = 18 << 30, 36 << 20, 2048
# Seconds until a caller is ready, when all start at once and the server compiles for each.
READY_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Group:
    """Processes that call at the same time.

    Attributes:
        num_callers: processes.
        batch: tokens of a step of each.
        is_echo: whether a bare process attends for them, and no server.
    """

    num_callers: int
    batch: int
    is_echo: bool = False

    def __str__(self) -> str:
        return f"{self.num_callers} x batch {self.batch}{', echo' if self.is_echo else ''}"


ONE_LARGE = Group(1, LARGE_BATCH)


def benchmark(
    address: str,
    plane: str,
    callers: Sequence[int],
    *,
    device: torch.device,
    context_len: int,
    num_threads: int,
    seconds: float,
    tick: Callable[[float], None],
) -> list[dict[str, Any]]:
    """Starts all processes, then lets each group of them run in turn, in some rounds.

    Args:
        address: of the server.
        plane: that they use.
        callers: how many have small batches, one group each.
        device: of attention.
        context_len: tokens of each request.
        num_threads: of what a client computes on a processor.
        seconds: of each group, in all rounds together.
        tick: told how much is done, from 0 to 1.

    Raises:
        RuntimeError: a process ended; the message has its last words.
    """
    groups = [*(Group(num_callers, SMALL_BATCH) for num_callers in callers), ONE_LARGE]
    has_echo = plane == "shm" and device.type == "cpu"
    groups += [Group(num_callers, SMALL_BATCH, is_echo=True) for num_callers in callers] * has_echo
    rates: dict[Group, list[float]] = {group: [] for group in groups}
    with ExitStack() as stack:
        children: list[Child] = []
        # One after the other: a server may have no more planes than the largest group takes.
        for batch, num_callers in ((SMALL_BATCH, max(callers)), (LARGE_BATCH, 1)):
            module, *arguments = command(address, plane, device, batch, context_len, num_threads)
            new = [stack.enter_context(started(module, *arguments)) for _ in range(num_callers)]
            for child in new:
                child.read(rb"^ready", READY_TIMEOUT_S)
            children += new
        echo = DecodeStep(SMALL_BATCH, context_len, torch.float32, LLAMA_8B, kv_bytes=CPU_KV_BYTES)
        echoes = stack.enter_context(many_echoes.callers(echo, max(callers), num_threads)) if has_echo else []
        order, rng = groups * ROUNDS, random.Random(0)
        rng.shuffle(order)
        for index, group in enumerate(order):
            small = echoes if group.is_echo else children
            running = children[-1:] if group == ONE_LARGE else small[: group.num_callers]
            rates[group].append(_tokens_per_second(running, group.batch, seconds / ROUNDS))
            tick((index + 1) / len(order))
    return rows(plane, rates)


def command(
    address: str, plane: str, device: torch.device, batch: int, context_len: int, num_threads: int
) -> list[str]:
    """The module and arguments of a caller. Only where tensors lie on a GPU does it load torch, as its worker would."""
    on_gpu = device.type == "cuda"
    common = [address, "--plane", plane, "--tokens", str(batch), "--context", str(context_len)]
    if plane == "cuda":
        more = ["--device", str(device), "--model", LLAMA_8B.name, "--threads", str(num_threads)]
        return ["benchmarks.caller", *common, *more, "--kv-bytes", str(GPU_KV_BYTES)]
    heads, dtype = [str(each) for each in LLAMA_8B[1:]], "float16" if on_gpu else "float32"
    kv_bytes = batch * GPU_KV_BYTES_OF_REQUEST if on_gpu else CPU_KV_BYTES
    more = ["--heads", *heads, "--dtype", dtype, "--kv-bytes", str(kv_bytes), *["--warm-up"] * on_gpu]
    return ["benchmarks.light_caller", *common, *more]


def _tokens_per_second(children: Sequence[Child], batch: int, seconds: float) -> float:
    for child in children:
        child.write(f"{seconds:g}")
    # The answer comes after the seconds and a last step.
    answers = [json.loads(child.read(rb"^{", READY_TIMEOUT_S + seconds).string) for child in children]
    return sum(float(answer["steps"] * batch / answer["seconds"]) for answer in answers)


def rows(plane: str, rates: Mapping[Group, Sequence[float]]) -> list[dict[str, Any]]:
    """A row of the report for each group: median tokens per second, and as a share of one caller's with a large batch.

    `to_echo` is the share of what as many callers of a bare process get that attends for them, where that was timed.

    Args:
        plane: that they used.
        rates: tokens per second of each round, by group; `ONE_LARGE` is one.
    """
    medians = {group: statistics.median(each) for group, each in rates.items()}
    return [
        {
            "plane": plane,
            "callers": str(group),
            "num_callers": group.num_callers,
            "batch": group.batch,
            "tokens_per_s": rate,
            "least_tokens_per_s": min(rates[group]),
            "most_tokens_per_s": max(rates[group]),
            "ratio": rate / medians[ONE_LARGE],
            "to_echo": rate / echo
            if (echo := medians.get(replace(group, is_echo=True))) and not group.is_echo
            else None,
        }
        for group, rate in medians.items()
    ]
