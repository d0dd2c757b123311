"""What this server does now, as the wire says it: the caller's own, and everybody's to operators."""

from __future__ import annotations

import os
import time

from attnd._version import __version__
from attnd.v1 import status_pb2
from attnd_server.config import ServerConfig
from attnd_server.execution.executor import Executor
from attnd_server.identity.quota import Quota
from attnd_server.kv.cache import Cache
from attnd_server.kv.caches import CacheTable
from attnd_server.service.capabilities import device_message

# Rows of an answer at the most, of principals and of sessions each: some 30 KB.
MAX_ROWS = 64


class Status:
    """Answers GetStatus, also while the server drains and after its device has failed: it touches no device."""

    def __init__(self, config: ServerConfig, executor: Executor, caches: CacheTable, sessions: Quota) -> None:
        """Tells of all of these."""
        self._config = config
        self._executor = executor
        self._caches = caches
        self._sessions = sessions
        self._began = time.monotonic()
        self._device = device_message(executor.device)
        self.is_draining = False

    def get_status(self, data: bytes, principal: str) -> bytes:
        """GetStatus."""
        caches = self._caches.all()
        device = status_pb2.GetStatusResponse().devices.add()
        device.CopyFrom(self._device)
        device.num_bytes_limit = self._caches.kv_bytes
        device.num_bytes_used = sum(cache.num_bytes for cache in caches)
        shows_everybody = self._shows_everybody(principal)
        shown = [principal]
        if shows_everybody:
            shown += sorted({cache.principal for cache in caches} - {principal})
        message = status_pb2.GetStatusResponse(
            version=__version__,
            epoch=self._caches.epoch,
            uptime_s=time.monotonic() - self._began,
            draining=self.is_draining,
            device_failure=self._executor.faults.reason,
            devices=[device],
            queue_depth=self._executor.queue_depth,
            shows_everybody=shows_everybody,
            principals=[self._row(each, caches) for each in shown[:MAX_ROWS]],
            num_principals_left_out=max(0, len(shown) - MAX_ROWS),
            num_process_bytes=_process_bytes() if shows_everybody else 0,
        )
        return message.SerializeToString()

    def _shows_everybody(self, principal: str) -> bool:
        return not self._config.asks_who_calls or principal in self._config.operators

    def _row(self, principal: str, caches: list[Cache]) -> status_pb2.PrincipalStatus:
        own = [cache for cache in caches if cache.principal == principal]
        return status_pb2.PrincipalStatus(
            principal=principal,
            num_sessions=self._sessions.held_by(principal),
            num_caches=len(own),
            num_kv_bytes=sum(cache.num_bytes for cache in own),
            num_pages=sum(cache.config.num_pages for cache in own),
            num_pages_written=sum(cache.num_pages_written for cache in own),
        )


def _process_bytes() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
