"""Who knocks at the socket of the planes: clients that have connected and not shown their ticket yet.

One thread reads from all of them, so that one who is slow costs a descriptor, for a while, and no thread.
"""

from __future__ import annotations

import logging
import select
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from attnd.errors import AttndError, DeadlineExceeded, Exhausted, PermissionDenied
from attnd.protocol.shm import sockets

log = logging.getLogger(__name__)

# Seconds from a client's connection to the last byte of its ticket. Clients send it at once.
TICKET_S = 5.0
# Clients that may be showing their tickets at one time.
MAX_ARRIVALS = 64
# Seconds to wait where the system has no descriptor or memory for one more.
PAUSE_S = 0.05
# Least seconds between two lines of the log about refusals.
LOG_PERIOD_S = 1.0


@dataclass(eq=False)
class _Arrival:
    """One that has connected.

    Attributes:
        connection: its socket.
        peer: who it is.
        deadline: until when its ticket must be here, `time.monotonic`.
        ticket: as much of it as is.
    """

    connection: socket.socket
    peer: sockets.Peer
    deadline: float
    ticket: bytes = b""


class Arrivals:
    """Takes connections until the listener ends, and lets those in that show a ticket."""

    def __init__(
        self,
        listener: socket.socket,
        check: Callable[[sockets.Peer], None],
        let_in: Callable[[bytes, socket.socket], None],
    ) -> None:
        """Nobody has come yet.

        Args:
            listener: whose connections it takes.
            check: raises PermissionDenied for those who may not even show a ticket.
            let_in: takes a ticket, or what came of it before the end, and its connection, which it owns from then on
                unless it raises AttndError or OSError. Does not wait for the client.
        """
        self._listener = listener
        self._check = check
        self._let_in = let_in
        self._waiting: dict[int, _Arrival] = {}  # by descriptor, the oldest first
        self._poll = select.poll()
        self._num_untold, self._told_at = 0, float("-inf")  # refusals since the last line of the log, and its time

    def run(self) -> None:
        """Until the listener has ended; then it closes what waits."""
        self._listener.setblocking(False)
        self._poll.register(self._listener, select.POLLIN)
        is_open = True
        while is_open:
            try:
                is_open = self._serve(self._poll.poll(self._patience_ms()))
            except Exception:  # the thread must live: nobody gets in without it
                log.exception("connections to the shm socket were not looked at")
                time.sleep(PAUSE_S)
        for arrival in list(self._waiting.values()):
            self._forget(arrival).close()

    def _serve(self, events: list[tuple[int, int]]) -> bool:
        """Does what is to be done after some events. Returns whether the listener is open."""
        is_open = True
        for descriptor, event in events:
            if descriptor in self._waiting:
                self._read(self._waiting[descriptor])
            elif descriptor == self._listener.fileno():
                is_open = not event & (select.POLLHUP | select.POLLERR | select.POLLNVAL)
                if is_open:
                    self._accept()
        self._end_late()
        return is_open

    def _patience_ms(self) -> float | None:
        """Until the oldest must have shown its ticket; None: nobody waits."""
        oldest = next(iter(self._waiting.values()), None)
        return None if oldest is None else max(0.0, oldest.deadline - time.monotonic()) * 1e3 + 1

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except BlockingIOError:
            return  # it has gone
        except OSError:  # the end; or too many open files, which pass
            if self._waiting:
                self._refuse(next(iter(self._waiting.values())), Exhausted("the server has no descriptor left"))
            time.sleep(PAUSE_S)
            return
        peer = sockets.peer_of(accepted)
        arrival = _Arrival(accepted, peer, time.monotonic() + TICKET_S)
        try:
            self._check(peer)
        except PermissionDenied as error:
            self._refuse(arrival, error)
            return
        if len(self._waiting) >= MAX_ARRIVALS:
            self._refuse(self._least_entitled(), Exhausted(f"{MAX_ARRIVALS} clients have not shown their tickets yet"))
        self._waiting[accepted.fileno()] = arrival
        self._poll.register(accepted, select.POLLIN)

    def _least_entitled(self) -> _Arrival:
        """The oldest of the process that has most connections here: others get in whatever that one does."""
        count = Counter(arrival.peer.process for arrival in self._waiting.values())
        most = max(count.values())
        return next(each for each in self._waiting.values() if count[each.peer.process] == most)

    def _read(self, arrival: _Arrival) -> None:
        missing = sockets.TICKET_BYTES - len(arrival.ticket)
        try:
            # Not recvmsg: descriptors that come along are closed by the system.
            data = arrival.connection.recv(missing, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        arrival.ticket += data
        if data and len(data) < missing:
            return
        self._forget(arrival)
        try:
            self._let_in(arrival.ticket, arrival.connection)
        except (AttndError, OSError) as error:
            self._refuse(arrival, error if isinstance(error, AttndError) else Exhausted(str(error)))

    def _end_late(self) -> None:
        now = time.monotonic()
        for arrival in list(self._waiting.values()):
            if now < arrival.deadline:
                break
            self._refuse(arrival, DeadlineExceeded(f"the ticket was not here within {TICKET_S:g} s"))

    def _refuse(self, arrival: _Arrival, error: AttndError) -> None:
        self._tell(arrival.peer, error)
        self._forget(arrival)
        try:
            sockets.send_refusal(arrival.connection, error)
        except OSError:
            pass  # it has gone
        arrival.connection.close()

    def _tell(self, peer: sockets.Peer, error: AttndError) -> None:
        """To the log, but not for each of a flood."""
        now = time.monotonic()
        self._num_untold += 1
        if now - self._told_at >= LOG_PERIOD_S:
            told = {"peer": peer.process, "num_refused": self._num_untold}
            log.warning("refused a connection to the shm socket: %s", error, extra=told)
            self._num_untold, self._told_at = 0, now

    def _forget(self, arrival: _Arrival) -> socket.socket:
        """Waits for it no more. Again does nothing."""
        if self._waiting.pop(arrival.connection.fileno(), None) is not None:
            self._poll.unregister(arrival.connection)
        return arrival.connection
