"""The thread of work that takes seconds and leaves the device to others."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from attnd_server.config import ServerConfig
from attnd_server.execution.queue import Job
from attnd_server.execution.runner import Runner
from attnd_server.identity.quota import Quota

# SideWork that runs or waits.
MAX_SIDE_WORK = 64


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
