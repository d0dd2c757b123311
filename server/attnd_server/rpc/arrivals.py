"""What has come on connections of messages that are not whole yet: gRPC keeps it, and does not say how much it is.

gRPC collects a message that was asked for until it is whole, and every stream that waits has asked for its next one. So
many streams, each with a part of a large message, could hold many times the largest message. The kernel counts the
bytes of each connection. What has come, less the messages that were handed over, is what gRPC holds. RPCs that wait for
a message on the connections with the most of it end when a principal's are beyond a limit.

Sizes are looked at when the process has grown, and every other second. Only Linux has the counters; elsewhere nothing
ends here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import struct
import sys
import threading
import time
from collections import defaultdict
from contextlib import suppress
from functools import lru_cache
from types import TracebackType
from typing import Any
from urllib.parse import unquote

from attnd.errors import Exhausted
from attnd_server.identity import is_revoked, refuse_if_revoked

log = logging.getLogger(__name__)

# Who has shown no token, and bytes of messages of all of these.
NOBODY, NOBODYS_BYTES = "", 4 << 20
# Beyond the largest message, for those that come beside it.
MORE_BYTES = 32 << 20
# Seconds between two looks at the process' size, bytes of growth after which connections are looked at, and seconds
# after which they are anyway.
LOOK_S, GROWTH_BYTES, ANYWAY_S = 0.05, 16 << 20, 2.0
# Of a message: HTTP/2's and TLS' frames around each 16 KiB take under 1/64, and headers and pings what else there is.
_OVERHEAD, _OVERHEAD_BYTES = 64, 1 << 10
_PAGE_BYTES = resource.getpagesize()
# Where the kernel's `struct tcp_info` has `tcpi_bytes_received` (include/uapi/linux/tcp.h).
_RECEIVED = struct.Struct("=128xQ")


class Handed:
    """What was handed over of a connection's messages since it was made.

    Attributes:
        num_bytes: of these messages.
        num_messages: how many they are.
    """

    def __init__(self) -> None:
        self.num_bytes = self.num_messages = 0

    def on_the_wire(self) -> int:
        """Bytes that they can have had there."""
        return self.num_bytes + self.num_bytes // _OVERHEAD + self.num_messages * _OVERHEAD_BYTES


class Reader:
    """An RPC that reads.

    Attributes:
        is_waiting: whether it waits for a message now.
        was_ended: whether it ends because its principal's messages are too many.
        handed: who reads a message by itself counts it here.
    """

    def __init__(self, arrivals: Arrivals, peer: str, handed: Handed, principal: str, once: bool) -> None:
        """On the connection from `peer`; for the task that makes it. See `Arrivals.reading`."""
        self._arrivals = arrivals
        self.peer = peer
        self.handed = handed
        self.principal = principal
        self._once = once
        self.is_waiting = self.was_ended = False
        self._task = asyncio.current_task()

    def __enter__(self) -> Reader:
        """It is counted from now on."""
        self._arrivals.begin(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """It is counted no more.

        Raises:
            Exhausted: it was ended, because too much has come and is not whole.
            Unauthenticated: likewise, because the principal's token has gone.
        """
        self._arrivals.finish(self)
        if self.was_ended and isinstance(error, asyncio.CancelledError):
            refuse_if_revoked(self.principal)
            raise self._arrivals.refusal(self.principal) from None

    async def read(self, context: Any) -> Any:
        """The next message of an RPC, or gRPC's EOF."""
        self.is_waiting = True
        data = await context.read()
        self.is_waiting = False
        if isinstance(data, bytes):
            self.handed.num_bytes += len(data)
            self.handed.num_messages += 1
        return data

    def end_if_revoked(self) -> None:
        """Ends an RPC that waits for its only message, if its principal's token has gone."""
        if self._once and is_revoked(self.principal):
            self.end()

    def end(self) -> None:
        """Ends the RPC where it waits."""
        if self.is_waiting and self._task is not None:
            self.was_ended = True
            self._task.cancel()


class _Connection:
    """A connection at the last look.

    Attributes:
        received: bytes that had come.
        handed: bytes that the messages which were handed over can have had on the wire.
        pending: bytes that had come, of messages that nobody was handed.
    """

    def __init__(self) -> None:
        self.received = self.handed = self.pending = 0


class Arrivals:
    """The RPCs that read, and what has come for them. For one event loop, which is not left behind before `stop`."""

    def __init__(self, max_message_bytes: int) -> None:
        """Nothing has come.

        Args:
            max_message_bytes: the largest message.
        """
        self._limit = max_message_bytes + MORE_BYTES
        self._readers: set[Reader] = set()
        self._connections: dict[str, _Connection] = {}
        self._handed: dict[str, Handed] = {}
        self._is_looking = True
        self._stopped = threading.Event()
        self._watching: threading.Thread | None = None

    def reading(self, context: Any, principal: str, once: bool = False) -> Reader:
        """An RPC that reads, for as long as what is returned is a context, on the task that asks for it.

        Args:
            context: gRPC's.
            principal: whose messages they are.
            once: whether it reads one message, and waits no longer for it once the principal's token has gone.
        """
        peer = _key(context.peer())
        handed = self._handed.setdefault(peer, Handed()) if self._is_looking else Handed()
        return Reader(self, peer, handed, principal, once)

    def begin(self, reader: Reader) -> None:
        """It reads from now on."""
        self._readers.add(reader)

    def finish(self, reader: Reader) -> None:
        """It reads no more."""
        self._readers.discard(reader)

    def handed(self) -> dict[str, int]:
        """By connection, bytes on the wire of what was handed over until now; on any thread."""
        return {peer: handed.on_the_wire() for peer, handed in self._handed.copy().items()}

    def refusal(self, principal: str) -> Exhausted:
        """Why what reads for a principal ends."""
        limit = NOBODYS_BYTES if principal == NOBODY else self._limit
        told = f"messages that have come in part hold more than {limit} bytes: send fewer at one time"
        return Exhausted(told, retry_after_s=1.0)

    def start(self) -> None:
        """Looks again and again, where there are counters, on a thread of its own: the event loop is for calls."""
        if sys.platform != "linux":
            log.warning("messages that come in part are not bounded beyond the size of each: it needs Linux")
            self._is_looking = False
            return
        loop = asyncio.get_running_loop()
        self._watching = threading.Thread(target=self._watch, args=(loop,), name="arrivals", daemon=True)
        self._watching.start()

    def stop(self) -> None:
        """Looks no more."""
        self._stopped.set()
        if self._watching is not None:
            self._watching.join()

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        with open("/proc/self/statm", "rb") as sizes:  # once: there may be no free descriptor later
            calm, looked_at = 0, 0.0
            while not self._stopped.wait(LOOK_S):
                size, now = int(os.pread(sizes.fileno(), 128, 0).split()[1]) * _PAGE_BYTES, time.monotonic()
                if size > calm + GROWTH_BYTES or now > looked_at + ANYWAY_S:
                    handed = self.handed()
                    with suppress(OSError):
                        loop.call_soon_threadsafe(self.look, handed, _received())
                    calm, looked_at = size, now
                calm = min(calm, size)

    def look(self, handed: dict[str, int], received: dict[str, int]) -> None:
        """Ends what is beyond the limit.

        Args:
            handed: what `handed` gave before `received` was read, so that all of it had come by then.
            received: by connection, bytes that had come since it was made.
        """
        waiting: dict[str, list[Reader]] = defaultdict(list)
        for reader in self._readers:
            reader.end_if_revoked()
            if reader.is_waiting:
                waiting[reader.peer].append(reader)
        for peer in handed.keys() - received.keys() - {reader.peer for reader in self._readers}:  # gone
            self._handed.pop(peer, None)
        self._connections = {peer: self._connections.get(peer) or _Connection() for peer in received}
        for peer, connection in self._connections.items():
            came, had = received[peer] - connection.received, handed.get(peer, 0) - connection.handed
            # Never less than nothing: frames take less than what was counted for them.
            connection.pending = max(0, connection.pending + came - had) if peer in waiting else 0
            connection.received, connection.handed = received[peer], handed.get(peer, 0)
        self._end_beyond(waiting)

    def _pending(self, peer: str) -> int:
        """Bytes that had come at the last look and are in no message that was handed over until now."""
        connection, handed = self._connections[peer], self._handed[peer]
        return max(0, connection.pending - (handed.on_the_wire() - connection.handed))

    def _end_beyond(self, waiting: dict[str, list[Reader]]) -> None:
        """Ends those that wait on the connections with the most, until a principal's others are within the limit."""
        peers: dict[str, set[str]] = defaultdict(set)
        for peer, readers in waiting.items():
            for reader in readers:
                peers[reader.principal].add(peer)
        for principal, its in peers.items():
            pending = {peer: self._pending(peer) for peer in its if peer in self._connections}
            over = sum(pending.values()) - (NOBODYS_BYTES if principal == NOBODY else self._limit)
            for peer in sorted(pending, key=pending.__getitem__, reverse=True):
                if over <= 0:
                    break
                over -= pending[peer]
                log.warning("messages that came in part are given up", extra={"num_bytes": pending[peer]})
                for reader in waiting[peer]:
                    if reader.principal == principal:
                        reader.end()


def _received() -> dict[str, int]:
    """By peer, bytes that have come on each TCP connection of this process."""
    received = {}
    for name in os.listdir("/proc/self/fd"):
        # No descriptor of ours: `detach` leaves it open. It may be closed by now, or be something else.
        try:
            peeked = socket.socket(fileno=int(name))
        except OSError:
            continue  # no socket
        try:
            host, port, *_ = peeked.getpeername()
            info = peeked.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RECEIVED.size)
            received[f"{host.removeprefix('::ffff:')}:{port}"] = _RECEIVED.unpack(info)[0]
        except (OSError, ValueError, AttributeError, struct.error):
            continue  # no TCP connection
        finally:
            peeked.detach()
    return received


@lru_cache(4_096)
def _key(peer: str) -> str:
    """The peer of gRPC's context, "ipv4:127.0.0.1:5" or "ipv6:%5B::1%5D:5", as `_received` names it."""
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    return f"{host.strip('[]').removeprefix('::ffff:')}:{port}"
