"""Calls that come together while nobody has the device: whoever has them may run them at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from attnd_server.device.kernels.launch import KernelMissing
from attnd_server.execution.joined.repeat import Repeat, Repeated
from attnd_server.execution.queue import WorkQueue, others_among
from attnd_server.execution.runner import Runner
from attnd_server.execution.work import Job


def settle_together(
    jobs: Sequence[Job],
    runner: Runner,
    queue: WorkQueue,
    take: Callable[[], bool],
    give_back: Callable[[], None],
    most_s: float,
) -> Sequence[Job]:
    """Runs jobs on the caller's thread while the device is idle, those together that can share a launch.

    Args:
        jobs: of which those of one cache are in the order in which they must run.
        runner: runs them.
        queue: of the executor: what is held there comes first.
        take: takes the device, if it is idle.
        give_back: gives it back.
        most_s: seconds after which no launch is begun but the first: the caller's thread has others to serve.

    Returns:
        Those that did not run, because the device is busy, a kernel is not there yet or the time is up: submit them
        instead.
    """
    left, lacking = list(jobs), set[bytes]()
    until = time.monotonic() + most_s
    while left and (len(left) == len(jobs) or time.monotonic() < until) and take():
        try:
            ready = [job for job in left if not (job.cache_id in lacking or job.cache_id in queue.held)]
            taken = ready[:1]
            if len(ready) > 1:
                taken += runner.others_for(ready[0], partial(others_among, ready))
            outcomes = runner.outcomes(taken, time.perf_counter()) if taken else []
        finally:
            give_back()
        if not taken:
            break
        for job, outcome in zip(taken, outcomes, strict=True):
            if isinstance(outcome[1], KernelMissing):
                lacking.add(job.cache_id)
            else:
                left.remove(job)
                job.done(*outcome)
    return left


def repeat_together(
    repeats: Sequence[Repeat], runner: Runner, queue: WorkQueue, take: Callable[[], bool], give_back: Callable[[], None]
) -> Repeated | None:
    """Runs repeats of several callers on the caller's thread while the device is idle.

    Args:
        repeats: of different caches.
        runner: runs them.
        queue: of the executor: what is held there comes first.
        take: takes the device, if it is idle.
        give_back: gives it back.

    Returns:
        What came of them; None: none was begun, give them to `settle_together` as calls.
    """
    if runner.ended or not take():
        return None
    try:
        if queue.held and any(each.of.call.cache_id in queue.held for each in repeats):
            return None
        return runner.repeats.run(repeats)
    finally:
        give_back()
