"""The planes of a server that were asked for or are open, and the tickets that open them."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from dataclasses import dataclass

from attnd.errors import Exhausted, InvalidRequest, PermissionDenied
from attnd.protocol.shm.sockets import TICKET_BYTES
from attnd_server.identity import refuse_if_revoked
from attnd_server.identity.quota import Quota
from attnd_server.planes.socket_ends import end, has_ended
from attnd_server.planes.worker import Worker


@dataclass(eq=False)
class Plane:
    """One plane with a socket.

    Attributes:
        id: names it and its region; no other plane of this server ever has it.
        principal: who asked for it.
        ticket: opens it once.
        expires_at: `time.monotonic` when the ticket is no longer good.
        worker: of a cuda plane; None of a shm plane.
        connection: the socket, once it is open.
    """

    id: int
    principal: str
    ticket: bytes
    expires_at: float
    worker: Worker | None = None
    connection: socket.socket | None = None


class PlaneTable:
    """All planes with a socket. Any thread may use it.

    Attributes:
        socket_path: where to bring the ticket.
        num_bytes: of each shm plane's region.
    """

    # Seconds from OpenPlane to the connection; clients connect at once.
    TICKET_S = 10.0
    # Seconds after which to ask again where a plane is on its way out.
    RETRY_S = 0.01

    def __init__(
        self,
        socket_path: str,
        num_bytes: int,
        max_planes: int,
        max_cuda_planes: int = 0,
        sessions: Quota | None = None,
    ) -> None:
        """Starts empty. `sessions` counts planes among others; None: nobody does."""
        self.socket_path = socket_path
        self.num_bytes = num_bytes
        self._max_planes = max_planes
        self._max_cuda_planes = max_cuda_planes
        self._sessions = sessions
        self._planes: dict[int, Plane] = {}
        self._last_id = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Planes that are open, or have a ticket that is still good."""
        with self._lock:
            self._expire()
            return len(self._planes)

    def open(self, principal: str, worker: Worker | None = None, most_beside: int | None = None) -> Plane:
        """A new plane with its ticket.

        Args:
            principal: who asks for it.
            worker: for a cuda plane.
            most_beside: planes of workers with its GPU that may be open, this one included; None: as many as of others.

        Raises:
            Exhausted: there are as many as there may be, or as the principal may have sessions.
        """
        with self._lock:
            self._expire()
            self._refuse_if_full(is_cuda=worker is not None)
            if worker is not None and most_beside is not None:
                self._refuse_if_crowded(worker.gpu_uuid, most_beside)
            if self._sessions is not None:
                self._sessions.take(principal)
            self._last_id += 1
            expires_at = time.monotonic() + self.TICKET_S
            plane = Plane(self._last_id, principal, secrets.token_bytes(TICKET_BYTES), expires_at, worker)
            self._planes[plane.id] = plane
            return plane

    def claim(self, ticket: bytes, connection: socket.socket) -> Plane:
        """The plane of a ticket, which is worth nothing from now on.

        Raises:
            PermissionDenied: no such ticket, or not any more.
            Unauthenticated: the token with which it was asked for has gone.
        """
        with self._lock:
            self._expire()
            for plane in self._planes.values():
                if plane.connection is None and secrets.compare_digest(plane.ticket, ticket):
                    refuse_if_revoked(plane.principal)
                    plane.connection = connection
                    return plane
        raise PermissionDenied(
            f"the ticket is unknown, used or older than {self.TICKET_S:g} s; ask OpenPlane for another"
        )

    def close(self, plane_id: int, principal: str) -> None:
        """Ends a plane from the side: whoever serves its connection sees the end of it.

        Raises:
            InvalidRequest: the principal has no such plane.
        """
        with self._lock:
            self._expire()
            plane = self._planes.get(plane_id)
            if plane is None or plane.principal != principal:
                raise InvalidRequest(f"id is {plane_id}, but no such plane is open", field="id")
            if plane.connection is None:
                self._remove(plane)
            else:
                end(plane.connection)

    def forget(self, plane: Plane) -> None:
        """Its connection has ended."""
        with self._lock:
            self._remove(plane)

    def _refuse_if_full(self, is_cuda: bool) -> None:
        planes = [plane for plane in self._planes.values() if (plane.worker is not None) == is_cuda]
        count = len(planes)
        if is_cuda and count >= self._max_cuda_planes:
            # Who has closed one session and opens the next need not know that the server is still cleaning up.
            is_leaving = any(plane.connection is not None and has_ended(plane.connection) for plane in planes)
            # A stream that waits holds up whatever shares its hardware queue, of which a process has 32.
            raise Exhausted(
                f"{count} cuda planes are open, which is the limit: each has a stream that waits for its worker, and a "
                "GPU has few hardware queues for streams; close a session, or wait, or see --max-cuda-planes",
                retry_after_s=self.RETRY_S if is_leaving else None,
            )
        if not is_cuda and count >= self._max_planes:
            raise Exhausted(f"{count} shm planes are open, which is the limit; close a session, or wait")

    def _refuse_if_crowded(self, gpu_uuid: str, most: int) -> None:
        count = sum(plane.worker is not None and plane.worker.gpu_uuid == gpu_uuid for plane in self._planes.values())
        if count >= most:
            raise Exhausted(
                f"{count} cuda planes of workers on the server's GPU are open, which is the limit under CUDA's "
                "Multi-Process Service: more of them may hold each other up; close a session, or use another GPU or shm"
            )

    def _expire(self) -> None:
        now = time.monotonic()
        for plane in list(self._planes.values()):
            if plane.connection is None and now > plane.expires_at:
                self._remove(plane)

    def _remove(self, plane: Plane) -> None:
        """Forgets a plane, once. With the lock."""
        if self._planes.pop(plane.id, None) is not None and self._sessions is not None:
            self._sessions.give_back(plane.principal)
