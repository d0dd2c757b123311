"""Batch after batch: written by some processes, taken by the GPU, and held against the host's rule by these again."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from types import TracebackType
from typing import Any

import torch

from attnd_server.service.validation import resident_step
from tests.hostile_metadata import CLASSES
from tests.soak.resident_metadata.rig import Rig
from tests.soak.resident_metadata.verdicts import Outcome, Plan, Rule, compare, written

# Batches that are made ahead, and that may wait to be looked at, for each process.
_AHEAD, _BEHIND = 2, 4


class Here(Executor):
    """Does at once, in this process, what it is asked for."""

    number = 1

    def submit(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        """The result is there."""
        future: Future[Any] = Future()
        future.set_result(function(*args, **named))
        return future


class Processes(ProcessPoolExecutor):
    """So many, none of which hears Ctrl-C. What they have not begun when the context ends is left."""

    def __init__(self, number: int) -> None:
        # Spawned, because a process that has used a GPU must not fork.
        self.number = number
        super().__init__(number, multiprocessing.get_context("spawn"), _initialise)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # they inherit it, before they can say so themselves
        try:
            for each in [self.submit(_initialise) for _ in range(number)]:
                each.result()
        finally:
            signal.signal(signal.SIGINT, before)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown(cancel_futures=True)


def _initialise() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def soak(
    plan: Plan,
    num_batches: int,
    device: str,
    processes: Here | Processes,
    outcome: Outcome,
    told: Callable[[], None] = lambda: None,
    rule: Rule = resident_step,
    take: Callable[..., None] | None = None,
) -> None:
    """Takes so many batches, up to the first block that the GPU and the host disagree on.

    Args:
        plan: which blocks there are.
        num_batches: batches.
        device: torch's name of it.
        processes: who writes blocks and asks the host's rule.
        outcome: written, also of a run that ends early.
        told: called after each batch that has been looked at.
        rule: the host's.
        take: what the GPU is to do instead of `take_step`.
    """
    rigs = dict[int, Rig]()
    ahead, behind = deque[Future[Any]](), deque[Future[Outcome]]()

    def look() -> None:
        outcome.add(behind.popleft().result())
        told()

    begun = 0
    for batch in range(num_batches):
        while begun < min(num_batches, batch + _AHEAD * processes.number + 1):
            ahead.append(processes.submit(written, plan, begun))
            begun += 1
        blocks = ahead.popleft().result()
        place = batch % len(CLASSES)
        if place not in rigs:
            rigs[place] = Rig(plan.sizes(batch), plan.num_blocks, device, take)
        try:
            run = rigs[place].run(batch, *blocks)
        except RuntimeError as error:  # whatever it is, the GPU has not survived this batch
            raise RuntimeError(f"batch {batch} of {plan} cannot be run") from error
        behind.append(processes.submit(compare, plan, run, rule))
        while behind and (len(behind) > _BEHIND * processes.number or behind[0].done()):
            look()
        if outcome.disagreement:
            break
    while behind and not outcome.disagreement:
        look()
