"""A device that nobody has, which whoever has a short piece of work may take at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial

from attnd_server.device.faults import DeviceFaults
from attnd_server.device.kernels.launch import KernelMissing, let_wait
from attnd_server.execution.queue import WorkQueue, others_among
from attnd_server.execution.runner import Runner
from attnd_server.execution.work import NO_CACHE, Job, Work


class IdleDevice:
    """Runs work on its caller's thread while an executor has nothing to do.

    Attributes:
        lock: whoever has it has the device.
        began: when that began, `time.monotonic`; 0: nobody has it.
    """

    def __init__(self, queue: WorkQueue, runner: Runner, faults: DeviceFaults) -> None:
        """Nobody has it.

        Args:
            queue: of the executor: what waits there comes first.
            runner: runs what has the device.
            faults: of the device.
        """
        self.lock, self.began = threading.Lock(), 0.0
        self._queue, self._runner, self._faults = queue, runner, faults

    def run_now(self, work: Work) -> bytes | None:
        """Runs `work` on the caller's thread if the device is idle, which saves a lone caller two switches of thread.

        Returns:
            What `work` gives, or None: the device is busy or a kernel is not there yet, submit it instead. Raises what
            `work` raises.
        """
        if not self._take():
            return None
        try:
            if self._faults.reason:
                self._faults.refuse()
            if self._queue.holds(getattr(work, "cache_id", NO_CACHE)):
                return None
            return self._runner.perform(work, queue_us=0)
        except KernelMissing:
            return None
        except Exception as error:
            told = self._runner.told(error)
            if told is error:
                raise
            raise told from None
        finally:
            self._give_back()

    def settle_now(self, jobs: Sequence[Job]) -> Sequence[Job]:
        """Runs jobs on the caller's thread while the device is idle, those together that can share a launch.

        Args:
            jobs: of which those of one cache are in the order in which they must run.

        Returns:
            Those that did not run, because the device is busy or a kernel is not there yet: submit them instead.
        """
        left, lacking = list(jobs), set[bytes]()
        while left and self._take():
            try:
                ready = [job for job in left if not (job.cache_id in lacking or self._queue.holds(job.cache_id))]
                taken = ready[:1]
                if len(ready) > 1:
                    taken += self._runner.others_for(ready[0], partial(others_among, ready))
                outcomes = self._runner.outcomes(taken, time.perf_counter()) if taken else []
            finally:
                self._give_back()
            if not taken:
                break
            for job, outcome in zip(taken, outcomes, strict=True):
                if isinstance(outcome[1], KernelMissing):
                    lacking.add(job.cache_id)
                else:
                    left.remove(job)
                    job.done(*outcome)
        return left

    def _take(self) -> bool:
        """Takes the device for the calling thread, unless somebody has it or waits for it."""
        # What waits or is about to begin came before: it may be of the same cache.
        if self._queue.is_closed or self._queue.depth or self._queue.is_taken or not self.lock.acquire(blocking=False):
            return False
        self.began = time.monotonic()
        let_wait(False)
        return True

    def _give_back(self) -> None:
        let_wait(True)
        self.began = 0.0
        self.lock.release()
