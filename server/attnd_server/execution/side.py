"""The thread of work that takes seconds and leaves the device to others."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from attnd.errors import Disconnected
from attnd_server.config import ServerConfig
from attnd_server.execution.runner import Runner
from attnd_server.execution.work import Job
from attnd_server.identity.quota import Quota

# SideWork that runs or waits.
MAX_SIDE_WORK = 64
# How often SideWork that waits for a turn looks whether there will be one, in seconds.
LOOK_S = 1.0


class SideThread:
    """Runs SideWork, one piece at a time."""

    def __init__(
        self, device: torch.device, config: ServerConfig, runner: Runner, prepare_thread: Callable[[], None]
    ) -> None:
        """Has nothing to do yet.

        Args:
            device: that the thread is named by.
            config: says whether callers are told apart: then none of them takes all places.
            runner: makes outcomes of jobs.
            prepare_thread: called on the thread.
        """
        self._runner = runner
        self._thread = ThreadPoolExecutor(1, f"side-work-{device}", prepare_thread)
        of_one = MAX_SIDE_WORK // 2 if config.asks_who_calls else MAX_SIDE_WORK
        self._places = Quota("warm-ups", "wait", MAX_SIDE_WORK, of_one, "retry in a moment")

    def submit(self, job: Job, principal: str) -> None:
        """Lets a job of a principal wait. Raises Exhausted: too many do."""
        self._places.take(principal)
        self._thread.submit(self._settle, job, principal)

    def close(self) -> None:
        """Gives up what waits."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _settle(self, job: Job, principal: str) -> None:
        outcome = self._runner.outcome(job)
        self._places.give_back(principal)
        job.done(*outcome)


def take_turn(put: Callable[[Job], None], is_alive: Callable[[], bool], work: Callable[[], None]) -> None:
    """Lets an executor's thread do a piece of SideWork, and waits until it is done.

    Args:
        put: puts a job into the executor's queue.
        is_alive: whether its thread is.
        work: the piece.

    Raises:
        Disconnected: the executor was closed. Else what `work` raises.
    """
    answers: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def piece() -> bytes:
        work()
        return b""

    put(Job(piece, lambda _, error: answers.put(error), float("inf"), time.perf_counter()))
    while True:
        try:
            error = answers.get(timeout=LOOK_S)
        except queue.Empty:
            if not is_alive():
                raise Disconnected("the server is shutting down") from None
            continue
        if error is not None:
            raise error
        return
