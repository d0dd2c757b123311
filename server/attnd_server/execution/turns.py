"""Turns of long work: it goes on a piece at a time, and others have the device between."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import nullcontext
from functools import partial

import torch

from attnd_server.attention.ops import TritonAttentionOps
from attnd_server.device.copy_timer import NO_COPIES
from attnd_server.execution.step import Call, Result, attend, store, stored_before
from attnd_server.execution.work import Job, Pieces

# Seconds of a turn. It ends after the piece that is running then.
TURN_S = 0.02
# Long calls that are begun and not over, of which no two are of one principal; others wait.
MAX_BEGUN = 2

Outcome = tuple[bytes | None, BaseException | None]
"""What is given to `Done`."""


class Turns:
    """Goes on with jobs that run in pieces. With the device."""

    def __init__(
        self,
        reason_against: Callable[[Job], Exception | None],
        begin: Callable[[Job], Pieces],
        told: Callable[[Exception], Exception],
    ) -> None:
        """Nothing is begun yet.

        Args:
            reason_against: why a job is not begun, or not gone on with; None: it may.
            begin: makes the pieces of a job.
            told: what an error is to whoever waits.
        """
        self._reason_against = reason_against
        self._begin = begin
        self._told = told
        self._begun: set[Job] = set()  # calls alone

    def turn(self, job: Job) -> Outcome | None:
        """Goes on with a job; None: something is left of it."""
        error = self._reason_against(job)
        if error is None and job.rest is None:
            if not self._may_begin(job):
                return None
            job.rest = self._begin(job)
        outcome = self._go_on(job) if error is None else (None, error)
        if outcome is not None:
            self._begun.discard(job)
            job.rest = None  # and what it holds
        return outcome

    def _may_begin(self, job: Job) -> bool:
        """Whether a call may begin: each that was begun holds its results and its scratch memory."""
        if not isinstance(job.work, Call):
            return True
        self._begun = {each for each in self._begun if not each.is_cancelled}
        if len(self._begun) >= MAX_BEGUN or any(each.principal == job.principal for each in self._begun):
            return False
        self._begun.add(job)
        return True

    def _go_on(self, job: Job) -> Outcome | None:
        assert job.rest is not None
        started = time.perf_counter()
        try:
            next(job.rest)
            while time.perf_counter() - started < TURN_S:
                next(job.rest)
        except StopIteration as end:
            return end.value, None
        except Exception as fault:
            return None, self._told(fault)
        job.ran_s += time.perf_counter() - started
        return None


def attend_in_pieces(call: Call, ops: TritonAttentionOps) -> Generator[None, None, Result]:
    """As `attend` on a processor, of a long call: stops between its pieces, and others' calls may run meanwhile."""
    step, layer, options, q, k, v, *_ = call
    step.cache.refuse_if_closed()
    plan = None if q is None else step.plan_for(options, ops)
    if q is None or plan is None or not plan.runs_in_pieces:
        return attend(call, ops)
    output = q.new_empty(*q.shape[:2], step.group.config.head_dim_v)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32) if options.return_lse else None
    stores_first = step.metadata.reads_stored
    with stored_before(call, k, v, ops) if stores_first else nullcontext():
        for _ in plan.kernel.pieces(plan.state, output, lse, q, k, v, step.group.layers[layer]):  # type: ignore[attr-defined]
            yield
            step.cache.refuse_if_closed()
    return Result(output, lse, plan.backend, NO_COPIES, None if stores_first else partial(store, call, k, v, ops))
