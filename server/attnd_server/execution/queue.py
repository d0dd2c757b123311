"""What waits for an executor: bounded, a queue for each cache; principals take turns, and so do the caches of each.

A cache's queue has its jobs in the order in which they came. Each turn takes one job, of the next principal's next
cache, so that a cache with a hundred calls makes another wait for one of them, and a principal with a hundred caches
makes another wait for one call of them, not for all. Who has the turn stands behind everybody who comes meanwhile.

A job whose kernel is not on the device yet is held until it is, and the queue of its cache with it.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from attnd.errors import Exhausted
from attnd_server.execution.held import HeldJobs
from attnd_server.execution.work import NO_CACHE, Job

# Seconds that a refused caller is told to wait at the least and at the most: what a sleeping thread can tell apart, and
# after which one looks again in any case.
MIN_RETRY_S, MAX_RETRY_S = 0.001, 10.0
# How much the last job counts in the time of a job.
_LAST_JOB_WEIGHT = 0.1


Joins = Callable[[Job], bool]
"""Asks whether a job joins those that are there, and adds it if so."""
IsWorthIt = Callable[[], bool]
"""Asks whether those that joined take less time together than each alone."""


# By cache, of a principal of whom nothing waits.
_NO_QUEUES: OrderedDict[bytes, deque[Job]] = OrderedDict()


class WorkQueue:
    """Jobs that wait. Any thread may put, one takes.

    Attributes:
        depth: jobs that wait for their turn.
        is_taken: whether one was taken that is not finished yet.
        is_closed: whether nothing is to be put any more.
        held: by cache whose queue is held, the job that waits for a kernel.
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
        self._held = HeldJobs()
        self.held = self._held.firsts
        self._turn: Job | None = None  # whose it is
        self.depth = 0
        self.is_taken = self.is_closed = False
        self._lock = threading.Lock()
        # One for each job that was put; counts without Python's slow locks. More than there are jobs if some were
        # removed.
        self._tokens: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._job_s = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits, and whatever was taken is finished."""
        return not (self.depth or self.is_taken)

    @property
    def num_waiting(self) -> int:
        """Jobs that wait: for their turn, and those that are held."""
        return self.depth + self._held.depth

    def put(self, job: Job, *, always: bool = False) -> None:
        """Adds a job at the end of its cache's queue; with `always`, whatever the limits.

        Raises:
            Exhausted: it is full, or the queue of the job's cache is.
        """
        with self._lock:
            if self.num_waiting >= self._least_limit and not always:  # below it nobody's queue is full
                self._refuse_if_full(job)
            if self._held.put(job):
                return
            self._jobs_beside(job).append(job)
            self.depth += 1
        self._tokens.put(None)

    def put_back(self, job: Job) -> None:
        """Puts back the rest of a job that was taken: first of its cache, whose turn comes after all others'."""
        with self._lock:
            self._jobs_beside(job).appendleft(job)
            self.depth += 1
        self._tokens.put(None)

    def hold(self, job: Job, ready: Future[None]) -> None:
        """Holds a job that was taken, and all of its cache behind it, until `ready` is done: then they are first."""
        with self._lock:
            caches = self._queues.get(job.principal, _NO_QUEUES)
            behind = caches.pop(job.cache_id, ()) if job.cache_id != NO_CACHE else ()
            if not caches:
                self._queues.pop(job.principal, None)
            self.depth -= len(behind)
            self._held.add(job, behind)
        ready.add_done_callback(lambda _: self.release(job))

    def release(self, *jobs: Job) -> None:
        """Lets jobs that are held, or all, have their turns."""
        with self._lock:
            for job in jobs or self._held.all_firsts():
                self._put_first(self._held.pop(job))

    def _put_first(self, jobs: Sequence[Job]) -> None:
        """Puts jobs of one cache before all others."""
        for job in reversed(jobs):
            caches = self._queues.setdefault(job.principal, OrderedDict())
            caches.setdefault(job.cache_id, deque()).appendleft(job)
            caches.move_to_end(job.cache_id, last=False)
            self._queues.move_to_end(job.principal, last=False)
            self.depth += 1
            self._tokens.put(None)

    def give_up_held(self, reason_against: Callable[[Job], Exception | None], closed: Exception) -> None:
        """Answers jobs that are held and may not wait on, or need not, with the reason; once closed, all of them."""
        with self._lock:
            held = self._held.all()
        for job in held:
            error = reason_against(job) or (closed if self.is_closed else None)
            if error is not None and self.remove(job):
                job.done(None, error)

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
            if job in self._queues.get(job.principal, _NO_QUEUES).get(job.cache_id, ()):
                self._take_out(job)
                return True
            behind = self._held.remove(job)
            self._put_first(behind or ())
        return behind is not None

    def close(self) -> None:
        """Nothing is to be put any more. Ends a `take` that waits."""
        self.is_closed = True
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
        cache_depth = len(caches.get(job.cache_id, ())) + len(self._held.of(job.cache_id))
        if self.num_waiting >= self._max_depth:
            waiting = self.num_waiting
            use = f"{waiting} calls wait, but the queue's limit is {self._max_depth}"
        elif cache_depth >= self._max_cache_depth and job.cache_id != NO_CACHE:
            # Others' jobs come between these: one of each of its principal's caches, and then one of each principal.
            waiting = min(self.num_waiting, cache_depth * max(1, len(caches)) * max(1, len(self._queues)))
            use = f"{cache_depth} calls of this cache wait, but the limit of one cache is {self._max_cache_depth}"
        elif job.principal and (depth := self._depth_of(job.principal)) >= self._max_principal_depth:
            waiting = min(self.num_waiting, depth * max(1, len(self._queues)))
            use = f"{depth} calls of this principal wait, but a principal's limit is {self._max_principal_depth}"
        else:
            return
        retry_after_s = min(max(waiting * self._job_s, MIN_RETRY_S), MAX_RETRY_S)
        raise Exhausted(f"{use}; retry in {retry_after_s * 1e3:.0f} ms", retry_after_s=retry_after_s)

    def _depth_of(self, principal: str) -> int:
        """Jobs of a principal that wait."""
        caches = self._queues.get(principal, _NO_QUEUES)
        return sum(map(len, caches.values())) + self._held.by_principal()[principal]

    def waiting(self) -> Counter[str]:
        """Jobs that wait, by principal."""
        with self._lock:
            waiting = self._held.by_principal()
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
