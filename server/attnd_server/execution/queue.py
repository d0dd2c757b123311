"""What waits for an executor: bounded, in lanes that take turns.

A lane is what one cache has waiting, in the order in which it came. Each turn takes one job of the next lane, so that a
cache with a hundred calls makes another wait for one of them, not for all.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from attnd.errors import Exhausted
from attnd_server.execution.work import CacheWork, Done, Group, Work

# The lane of what belongs to no cache: the turns of warm-ups.
NO_CACHE = b""
# Seconds that a refused caller is told to wait at the least and at the most: what a sleeping thread can tell apart, and
# after which one looks again in any case.
MIN_RETRY_S, MAX_RETRY_S = 0.001, 10.0
# How much the last job counts in the time of a job.
_LAST_JOB_WEIGHT = 0.1


@dataclass(frozen=True, eq=False)
class Job:
    """A piece of work that waits.

    Attributes:
        work: what to do.
        done: gets its result or its error.
        deadline: `time.monotonic()` after which it is not started.
        submitted_at: `time.perf_counter()`.
        is_wanted: asked before it starts: whether anybody still waits for it; None: somebody does.
    """

    work: Work
    done: Done
    deadline: float
    submitted_at: float
    is_wanted: Callable[[], bool] | None = None

    @property
    def lane(self) -> bytes:
        """The lane that it waits in."""
        return self.work.cache_id() if isinstance(self.work, CacheWork) else NO_CACHE

    @property
    def principal(self) -> str:
        """Whose it is; "" of what is nobody's."""
        return self.work.principal() if isinstance(self.work, CacheWork) else ""


class WorkQueue:
    """Jobs that wait. Any thread may put, one takes."""

    def __init__(self, max_depth: int, max_lane_depth: int, max_principal_depth: int | None = None) -> None:
        """Empty.

        Args:
            max_depth: jobs that may wait.
            max_lane_depth: jobs of one cache that may wait.
            max_principal_depth: jobs of one principal that may wait; None: as many as of all.
        """
        self._max_depth = max_depth
        self._max_principal_depth = max_depth if max_principal_depth is None else max_principal_depth
        self._max_lane_depth = min(max_lane_depth, max_depth)
        self._lanes: OrderedDict[bytes, deque[Job]] = OrderedDict()  # none is empty; the next in turn is first
        self._depth = 0
        self._is_taken = False
        self._lock = threading.Lock()
        # One for each job that was put; counts without Python's slow locks. More than there are jobs if some were
        # removed.
        self._tokens: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._job_s = 0.0

    @property
    def depth(self) -> int:
        """Jobs that wait."""
        return self._depth

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits, and whatever was taken is finished."""
        return not (self._depth or self._is_taken)

    def put(self, job: Job, *, always: bool = False) -> None:
        """Adds a job at the end of its lane; with `always`, whatever the limits.

        Raises:
            Exhausted: it is full, or the job's lane is.
        """
        name = job.lane
        with self._lock:
            lane = self._lanes.get(name)
            if not always:
                self._refuse_if_full(job, len(lane or ()))
            if lane is None:
                lane = self._lanes[name] = deque()
            lane.append(job)
            self._depth += 1
        self._tokens.put(None)

    def take(self, timeout_s: float) -> Job | None:
        """The next job, to be `finished` then; None if none came within `timeout_s`, or for no reason: ask again."""
        try:
            self._tokens.get(timeout=timeout_s)
        except queue.Empty:
            return None
        with self._lock:
            if not self._lanes:
                return None
            name, lane = self._lanes.popitem(last=False)
            job = lane.popleft()
            self._depth -= 1
            self._is_taken = True
            if lane:
                self._lanes[name] = lane  # behind all others
        return job

    def take_others(self, lane: bytes, group: Group) -> list[Job]:
        """The first jobs of other lanes that a group takes, if they make it worth it. Finished with the job in it.

        Never two of a lane: the second may need what the first leaves.

        Args:
            lane: of the job that was taken.
            group: with that job; asked about the first of each other lane, in turn.
        """
        with self._lock:
            names = [name for name, jobs in self._lanes.items() if name != lane and group.takes(jobs[0].work)]
            if not group.is_worth_it:
                return []
            taken = []
            for name in names:
                jobs = self._lanes.pop(name)
                taken.append(jobs.popleft())
                self._depth -= 1
                if jobs:
                    self._lanes[name] = jobs
        return taken

    def remove(self, job: Job) -> bool:
        """Takes a job out wherever it stands. Returns whether it was still there."""
        name = job.lane
        with self._lock:
            lane = self._lanes.get(name)
            if lane is None or job not in lane:
                return False
            lane.remove(job)
            self._depth -= 1
            if not lane:
                del self._lanes[name]
        return True

    def wake(self) -> None:
        """Ends a `take` that waits."""
        self._tokens.put(None)

    def finished(self, seconds: float) -> None:
        """The job that was taken is over, and took so long. By the thread that takes."""
        self._job_s += (seconds - self._job_s) * (_LAST_JOB_WEIGHT if self._job_s else 1.0)
        self._is_taken = False

    def _refuse_if_full(self, job: Job, lane_depth: int) -> None:
        if self._depth >= self._max_depth:
            waiting, use = self._depth, f"{self._depth} calls wait, but the queue's limit is {self._max_depth}"
        elif lane_depth >= self._max_lane_depth and job.lane != NO_CACHE:
            # Others' jobs come between these: one of each lane for each of this one, if they have as many.
            waiting = min(self._depth, lane_depth * len(self._lanes))
            use = f"{lane_depth} calls of this cache wait, but the limit of one cache is {self._max_lane_depth}"
        elif self._depth >= self._max_principal_depth and (depth := self._depth_of(job.principal)) >= (
            self._max_principal_depth
        ):
            waiting = depth
            use = f"{depth} calls of this principal wait, but a principal's limit is {self._max_principal_depth}"
        else:
            return
        retry_after_s = min(max(waiting * self._job_s, MIN_RETRY_S), MAX_RETRY_S)
        raise Exhausted(f"{use}; retry in {retry_after_s * 1e3:.0f} ms", retry_after_s=retry_after_s)

    def _depth_of(self, principal: str) -> int:
        """Jobs of a principal that wait. Looks at every lane, which takes some 10 us where there are a hundred."""
        return sum(len(lane) for lane in self._lanes.values() if principal and lane[0].principal == principal)
