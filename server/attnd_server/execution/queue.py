"""What waits for an executor: bounded, a queue for each cache; principals take turns, and so do the caches of each.

A cache's queue has its jobs in the order in which they came. Each turn takes one job, of the next principal's next
cache, so that a cache with a hundred calls makes another wait for one of them, and a principal with a hundred caches
makes another wait for one call of them, not for all. Who has the turn stands behind everybody who comes meanwhile.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from attnd.errors import Exhausted
from attnd_server.execution.step import Call
from attnd_server.execution.work import CacheWork, Done, Pieces, Work, WorkInPieces

# Stands for the cache of what belongs to none: the turns of warm-ups.
NO_CACHE = b""
# Seconds that a refused caller is told to wait at the least and at the most: what a sleeping thread can tell apart, and
# after which one looks again in any case.
MIN_RETRY_S, MAX_RETRY_S = 0.001, 10.0
_OF_CACHES = (Call, CacheWork, WorkInPieces)
# How much the last job counts in the time of a job.
_LAST_JOB_WEIGHT = 0.1


@dataclass(eq=False)
class Job:
    """A piece of work that waits.

    Attributes:
        work: what to do.
        done: gets its result or its error.
        deadline: `time.monotonic()` after which it is not started.
        submitted_at: `time.perf_counter()`.
        is_wanted: asked before it starts, and between its pieces: whether anybody still waits for it; raises
            AttndError: it may not go on. None: somebody does, and it may.
        rest: what is left of it, if it runs in pieces and was begun.
        ran_s: seconds for which it has had the device, if it runs in pieces.
        is_cancelled: whether it is to end before its next piece.
        cache_id: the cache in whose queue it waits.
        principal: whose it is; "" of what is nobody's.
    """

    work: Work
    done: Done
    deadline: float
    submitted_at: float
    is_wanted: Callable[[], bool] | None = None
    rest: Pieces | None = None
    ran_s: float = 0.0
    is_cancelled: bool = False
    cache_id: bytes = field(default=NO_CACHE, init=False)
    principal: str = field(default="", init=False)

    def __post_init__(self) -> None:
        """Asks its work, once."""
        if isinstance(self.work, _OF_CACHES):
            self.cache_id, self.principal = self.work.cache_id, self.work.principal


Joins = Callable[[Job], bool]
"""Asks whether a job joins those that are there, and adds it if so."""
IsWorthIt = Callable[[], bool]
"""Asks whether those that joined take less time together than each alone."""


# By cache, of a principal of whom nothing waits.
_NO_QUEUES: OrderedDict[bytes, deque[Job]] = OrderedDict()


class WorkQueue:
    """Jobs that wait. Any thread may put, one takes.

    Attributes:
        depth: jobs that wait.
        is_taken: whether one was taken that is not finished yet.
    """

    def __init__(self, max_depth: int, max_cache_depth: int, max_principal_depth: int | None = None) -> None:
        """Empty.

        Args:
            max_depth: jobs that may wait.
            max_cache_depth: jobs of one cache that may wait.
            max_principal_depth: jobs of one principal that may wait; None: as many as of all.
        """
        self._max_depth = max_depth
        self._max_principal_depth = max_depth if max_principal_depth is None else max_principal_depth
        self._max_cache_depth = min(max_cache_depth, max_depth)
        self._least_limit = min(self._max_cache_depth, self._max_principal_depth)
        # By principal, and by cache. None is empty; the next in turn is first.
        self._queues: OrderedDict[str, OrderedDict[bytes, deque[Job]]] = OrderedDict()
        self._turn: Job | None = None  # whose it is
        self.depth = 0
        self.is_taken = False
        self._lock = threading.Lock()
        # One for each job that was put; counts without Python's slow locks. More than there are jobs if some were
        # removed.
        self._tokens: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._job_s = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits, and whatever was taken is finished."""
        return not (self.depth or self.is_taken)

    def put(self, job: Job, *, always: bool = False) -> None:
        """Adds a job at the end of its cache's queue; with `always`, whatever the limits.

        Raises:
            Exhausted: it is full, or the queue of the job's cache is.
        """
        with self._lock:
            if self.depth >= self._least_limit and not always:  # below it nobody's queue is full
                self._refuse_if_full(job)
            self._jobs_beside(job).append(job)
            self.depth += 1
        self._tokens.put(None)

    def put_back(self, job: Job) -> None:
        """Puts back the rest of a job that was taken: first of its cache, whose turn comes after all others'."""
        with self._lock:
            self._jobs_beside(job).appendleft(job)
            self.depth += 1
        self._tokens.put(None)

    def take(self, timeout_s: float) -> Job | None:
        """The next job, to be `finished` then; None if none came within `timeout_s`, or for no reason: ask again."""
        try:
            self._tokens.get(timeout=timeout_s)
        except queue.Empty:
            return None
        with self._lock:
            if not self._queues:
                return None
            principal, caches = self._queues.popitem(last=False)
            cache_id, jobs = caches.popitem(last=False)
            job = jobs.popleft()
            self.depth -= 1
            self.is_taken, self._turn = True, job
            if jobs:
                caches[cache_id] = jobs  # behind all others
            if caches:
                self._queues[principal] = caches  # likewise
        return job

    def take_others(self, cache_id: bytes, joins: Joins, is_worth_it: IsWorthIt) -> list[Job]:
        """The first jobs of other caches that can join one that was taken. They are finished with it.

        Never two of a cache: the second may need what the first leaves.

        Args:
            cache_id: of the job that was taken.
            joins: asked about the first job of each other cache, in turn; adds it where it says yes.
            is_worth_it: asked afterwards: whether to take them all, or none.
        """
        with self._lock:
            first = [jobs[0] for caches in self._queues.values() for other, jobs in caches.items() if other != cache_id]
            joined = [job for job in first if joins(job)]
            if not is_worth_it():
                return []
            for job in joined:
                self._take_out(job)
                self._move_to_end(job)
        return joined

    def remove(self, job: Job) -> bool:
        """Takes a job out wherever it stands. Returns whether it was still there."""
        with self._lock:
            if job not in self._queues.get(job.principal, _NO_QUEUES).get(job.cache_id, ()):
                return False
            self._take_out(job)
        return True

    def wake(self) -> None:
        """Ends a `take` that waits."""
        self._tokens.put(None)

    def finished(self, seconds: float) -> None:
        """The job that was taken is over, and took so long. By the thread that takes."""
        self._job_s += (seconds - self._job_s) * (_LAST_JOB_WEIGHT if self._job_s else 1.0)
        self.is_taken, self._turn = False, None

    def _jobs_beside(self, job: Job) -> deque[Job]:
        """The queue of a job's cache, made if there is none."""
        caches = self._queues.setdefault(job.principal, OrderedDict())
        jobs = caches.setdefault(job.cache_id, deque())
        if not jobs and self._turn is not None:
            self._move_to_end(self._turn)
        return jobs

    def _move_to_end(self, job: Job) -> None:
        """Others have their turns before the principal of a job, and before its cache among that principal's."""
        caches = self._queues.get(job.principal)
        if caches is not None:
            self._queues.move_to_end(job.principal)
            if job.cache_id in caches:
                caches.move_to_end(job.cache_id)

    def _take_out(self, job: Job) -> None:
        """Leaves nothing that is empty."""
        caches = self._queues[job.principal]
        jobs = caches[job.cache_id]
        jobs.remove(job)
        self.depth -= 1
        if not jobs:
            del caches[job.cache_id]
        if not caches:
            del self._queues[job.principal]

    def _refuse_if_full(self, job: Job) -> None:
        caches = self._queues.get(job.principal, _NO_QUEUES)
        cache_depth = len(caches.get(job.cache_id, ()))
        if self.depth >= self._max_depth:
            waiting, use = self.depth, f"{self.depth} calls wait, but the queue's limit is {self._max_depth}"
        elif cache_depth >= self._max_cache_depth and job.cache_id != NO_CACHE:
            # Others' jobs come between these: one of each of its principal's caches, and then one of each principal.
            waiting = min(self.depth, cache_depth * len(caches) * len(self._queues))
            use = f"{cache_depth} calls of this cache wait, but the limit of one cache is {self._max_cache_depth}"
        elif job.principal and (depth := sum(map(len, caches.values()))) >= self._max_principal_depth:
            waiting = min(self.depth, depth * len(self._queues))
            use = f"{depth} calls of this principal wait, but a principal's limit is {self._max_principal_depth}"
        else:
            return
        retry_after_s = min(max(waiting * self._job_s, MIN_RETRY_S), MAX_RETRY_S)
        raise Exhausted(f"{use}; retry in {retry_after_s * 1e3:.0f} ms", retry_after_s=retry_after_s)

    def waiting(self) -> Counter[str]:
        """Jobs that wait, by principal."""
        waiting: Counter[str] = Counter()
        with self._lock:
            for principal, caches in self._queues.items():
                waiting[principal] += sum(map(len, caches.values()))
        return waiting


def others_among(jobs: Sequence[Job], joins: Joins, is_worth_it: IsWorthIt) -> list[Job]:
    """Those that join the first; see `WorkQueue.take_others`."""
    cache_ids, others = {jobs[0].cache_id}, []
    for job in jobs[1:]:
        if job.cache_id not in cache_ids and joins(job):
            others.append(job)
        cache_ids.add(job.cache_id)
    return others if is_worth_it() else []
