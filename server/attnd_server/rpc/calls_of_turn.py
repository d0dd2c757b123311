"""Short calls that streams bring in one turn of the event loop, which run together on its thread."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import zip_longest

from attnd_server.execution.executor import Executor
from attnd_server.execution.step import Call
from attnd_server.execution.work import Job, Work
from attnd_server.rpc.running import settle, start_on

# Seconds for which launches are begun in a turn. What is left waits in the executor's queue, where principals take
# turns, and the event loop serves others.
MOST_S = 0.002

Answer = bytes | asyncio.Future[bytes]


class CallsOfTurn:
    """Those that have come since the event loop last had nothing else to do first."""

    def __init__(self, executor: Executor) -> None:
        """None yet."""
        self._executor = executor
        self._jobs: dict[Job, asyncio.Future[Answer]] = {}

    async def answer(self, work: Work, timeout_s: float | None, is_wanted: Callable[[], bool] | None) -> Answer:
        """Runs a short call with those of other streams that have come by now; leaves other work to the executor.

        Args:
            work: the call, or else.
            timeout_s: seconds within which it must have started; None is forever.
            is_wanted: see `Executor.submit`.

        Returns:
            Its answer; or what will be it, if it waits for the executor.

        Raises:
            Exception: what a call raised that was run, and what `Executor.submit` raises.
        """
        if not (isinstance(work, Call) and work.is_small):
            return start_on(self._executor, work, timeout_s, is_wanted)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        job = Job(work, partial(settle, future), deadline, time.perf_counter(), is_wanted)
        if not self._jobs:
            loop.call_soon(self._run)  # behind the streams that this turn has woken
        self._jobs[job] = future
        try:
            return await future
        except asyncio.CancelledError:
            is_answered = future.done() and not future.cancelled() and future.exception() is None
            if is_answered and isinstance(later := future.result(), asyncio.Future):
                later.cancel()
            raise

    def _run(self) -> None:
        futures, self._jobs = self._jobs, {}
        try:
            self._settle_all(futures)
        except Exception as error:  # whatever it was, nobody is to wait for ever
            for future in futures.values():
                settle(future, None, error)

    def _settle_all(self, futures: Mapping[Job, asyncio.Future[Answer]]) -> None:
        jobs = [job for job, future in futures.items() if not future.done()]  # others' streams have gone
        for job in self._executor.settle_now(in_turns(jobs), MOST_S):
            timeout_s = None if job.deadline == math.inf else max(0.0, job.deadline - time.monotonic())
            try:
                later = start_on(self._executor, job.work, timeout_s, job.is_wanted)
            except Exception as error:
                settle(futures[job], None, error)
            else:
                futures[job].set_result(later)


def in_turns(jobs: Iterable[Job]) -> list[Job]:
    """Jobs in an order in which principals take turns; those of each stay in their order."""
    by_principal: dict[str, list[Job]] = {}
    for job in jobs:
        by_principal.setdefault(job.principal, []).append(job)
    turns = zip_longest(*by_principal.values())
    return [job for turn in turns for job in turn if job is not None]
