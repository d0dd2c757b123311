"""What this server does now, as the wire says it: the caller's own, and everybody's to operators."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from weakref import WeakKeyDictionary

from attnd._version import __version__
from attnd.v1 import error_pb2, plane_pb2, status_pb2
from attnd_server.config import ServerConfig
from attnd_server.device.kernels.states import KernelStates
from attnd_server.device.machine import process_bytes
from attnd_server.execution.executor import Executor
from attnd_server.identity.quota import Quota
from attnd_server.kv.cache import Cache
from attnd_server.kv.caches import CacheTable
from attnd_server.observe.callers import Callers, ServedCounts, SessionCounts
from attnd_server.service.capabilities import device_message

# Rows of an answer at the most, of principals and of sessions each: some 30 KB.
MAX_ROWS = 64
# Kernels that it names, and characters of the reason why one cannot be had.
MAX_KERNELS, MAX_REASON_CHARS = 64, 500
# Pages that are looked at for one answer, whether they were written to: numpy takes half a millisecond for them.
MAX_PAGES_LOOKED_AT = 1 << 24
_PLANES = {
    "inline": plane_pb2.PLANE_INLINE,
    "shm": plane_pb2.PLANE_SHM,
    "cuda": plane_pb2.PLANE_CUDA,
}


class Status:
    """Answers GetStatus, also while the server drains and after its device has failed: it touches no device.

    Attributes:
        is_draining: whether the server takes no new steps any more.
    """

    def __init__(
        self, config: ServerConfig, executor: Executor, caches: CacheTable, sessions: Quota, callers: Callers
    ) -> None:
        """Tells of all of these."""
        self._config = config
        self._executor = executor
        self._caches = caches
        self._sessions = sessions
        self._callers = callers
        self._began = time.monotonic()
        self._device = device_message(executor.device)
        self._written = WrittenPages()
        self.is_draining = False

    def get_status(self, data: bytes, principal: str) -> bytes:
        """GetStatus."""
        caches, known = self._caches.all(), self._callers.principals()
        message = status_pb2.GetStatusResponse(
            version=__version__,
            epoch=self._caches.epoch,
            uptime_s=time.monotonic() - self._began,
            draining=self.is_draining,
            device_failure=self._executor.faults.reason,
            devices=[self._device],
            queue_depth=self._executor.queue_depth,
            shows_everybody=not self._config.asks_who_calls or principal in self._config.operators,
        )
        message.devices[0].num_bytes_limit = self._caches.kv_bytes
        message.devices[0].num_bytes_used = sum(cache.num_bytes for cache in caches)
        sessions = self._callers.sessions()
        principals = [str(principal)]
        if message.shows_everybody:
            principals += sorted({*known, *(cache.principal for cache in caches)} - {principal})
            message.refusals.extend(_refusals(self._callers.all_refusals()))
            message.num_process_bytes = process_bytes()
            if self._executor.kernels is not None:
                message.kernels.CopyFrom(_kernels(self._executor.kernels.states()))
        else:
            sessions = [session for session in sessions if session.principal == principal]
        sessions.sort(key=lambda session: session.used_at, reverse=True)
        message.num_principals_left_out = max(0, len(principals) - MAX_ROWS)
        message.num_sessions_left_out = max(0, len(sessions) - MAX_ROWS)
        message.principals.extend(self._principals(principals[:MAX_ROWS], caches))
        message.sessions.extend(map(_session, sessions[:MAX_ROWS]))
        return message.SerializeToString()

    def _principals(self, principals: list[str], caches: list[Cache]) -> Iterator[status_pb2.PrincipalStatus]:
        owned: dict[str, list[Cache]] = {principal: [] for principal in principals}
        for cache in caches:
            if cache.principal in owned:
                owned[cache.principal].append(cache)
        self._written.begin()
        waiting, served = self._executor.waiting(), self._callers.served(principals)
        for principal, own in owned.items():
            yield status_pb2.PrincipalStatus(
                principal=principal,
                num_sessions=self._sessions.held_by(principal),
                served=_served(served[principal]),
                queue_depth=waiting[principal],
                num_caches=len(own),
                num_kv_bytes=sum(cache.num_bytes for cache in own),
                num_pages=sum(cache.shape.num_pages for cache in own),
                num_pages_written=sum(map(self._written.count, own)),
                refusals=_refusals(self._callers.refusals(principal)),
            )


class WrittenPages:
    """Counts the pages of caches that were written to, in a time that has a limit however many pages there are."""

    def __init__(self) -> None:
        """Nothing was counted."""
        self._last: WeakKeyDictionary[Cache, int] = WeakKeyDictionary()
        self._left = 0

    def begin(self) -> None:
        """Another answer begins."""
        self._left = MAX_PAGES_LOOKED_AT

    def count(self, cache: Cache) -> int:
        """Pages of `cache` that were written to: now; or, once this answer has looked at too many, when last looked."""
        num_pages = cache.shape.num_pages
        is_due = num_pages <= self._left or self._left == MAX_PAGES_LOOKED_AT  # the first, however large
        if is_due:
            self._left -= num_pages
            self._last[cache] = cache.num_pages_written
        return self._last.get(cache, 0)


def _session(session: SessionCounts) -> status_pb2.SessionStatus:
    now = time.monotonic()
    return status_pb2.SessionStatus(
        principal=session.principal,
        id=session.id,
        plane=_PLANES[session.plane],
        open_s=now - session.opened_at,
        idle_s=now - session.used_at,
        served=_served(session.served),
    )


def _kernels(states: KernelStates) -> status_pb2.KernelStatus:
    return status_pb2.KernelStatus(
        num_loaded=states.num_loaded,
        num_waiting=states.num_waiting,
        num_compiling=len(states.compiling),
        num_failed=len(states.failed),
        num_compiled=states.num_compiled,
        num_found=states.num_found,
        compiling=[
            status_pb2.CompilingKernel(name=name, seconds=seconds) for name, seconds in states.compiling[:MAX_KERNELS]
        ],
        failed=[
            status_pb2.FailedKernel(name=name, reason=reason[:MAX_REASON_CHARS])
            for name, reason in states.failed[:MAX_KERNELS]
        ],
    )


def _served(served: ServedCounts) -> status_pb2.ServedCounts:
    times = {phase: each.counts for phase, each in served.times.items() if any(each.counts)}
    return status_pb2.ServedCounts(
        steps=served.steps,
        tokens=served.tokens,
        calls=served.calls,
        times=status_pb2.PhaseTimes(**times),
    )


def _refusals(counts: Mapping[error_pb2.ErrorReason.ValueType, int]) -> list[status_pb2.RefusalCount]:
    return [status_pb2.RefusalCount(reason=reason, count=count) for reason, count in sorted(counts.items()) if count]
