"""Jobs that wait for a kernel, each with what stands behind it in the queue of its cache."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from attnd_server.execution.work import NO_CACHE, Job


class HeldJobs:
    """The queues that are held. For whoever has the lock of the `WorkQueue` that holds them.

    Attributes:
        depth: jobs in them.
        firsts: by cache, the job that waits for a kernel.
    """

    def __init__(self) -> None:
        """None is."""
        self.depth = 0
        self._queues: dict[Job, deque[Job]] = {}  # by the first job of each, which is the one that waits for a kernel
        self.firsts: dict[bytes, Job] = {}

    def add(self, first: Job, behind: Iterable[Job]) -> None:
        """Holds a job and what is behind it. What belongs to no cache holds up nothing else."""
        jobs = self._queues[first] = deque([first, *behind])
        if first.cache_id != NO_CACHE:
            self.firsts[first.cache_id] = first
        self.depth += len(jobs)

    def put(self, job: Job) -> bool:
        """Adds a job at the end of the queue of its cache, if that is held. Returns whether it is."""
        if job.cache_id not in self.firsts:
            return False
        self._queues[self.firsts[job.cache_id]].append(job)
        self.depth += 1
        return True

    def pop(self, first: Job) -> deque[Job]:
        """Holds a job and what is behind it no more, and returns them; nothing, if it was not held."""
        jobs = self._queues.pop(first, None)
        if jobs is None:
            return deque()
        self.firsts.pop(first.cache_id, None)
        self.depth -= len(jobs)
        return jobs

    def remove(self, job: Job) -> deque[Job] | None:
        """Takes one job out.

        Returns:
            What waits for a kernel no more, because the job was the first of it; None: the job was not held.
        """
        if job in self._queues:
            jobs = self.pop(job)
            jobs.popleft()
            return jobs
        jobs = self.of(job.cache_id)
        if job not in jobs:
            return None
        jobs.remove(job)
        self.depth -= 1
        return deque()

    def of(self, cache_id: bytes) -> deque[Job]:
        """What is held of a cache, in its order."""
        return self._queues[self.firsts[cache_id]] if cache_id in self.firsts else deque()

    def all_firsts(self) -> list[Job]:
        """Those that wait for a kernel, those that belong to no cache included."""
        return list(self._queues)

    def all(self) -> list[Job]:
        """Those that are held."""
        return [job for jobs in self._queues.values() for job in jobs]

    def by_principal(self) -> Counter[str]:
        """How many are held, by principal."""
        return Counter(job.principal for jobs in self._queues.values() for job in jobs)
