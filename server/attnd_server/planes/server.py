"""The socket of shm and cuda planes: it lets clients in, and each that is in has a thread.

Not in gRPC's event loop: a thread that sleeps in the kernel until its client's bytes come answers in a fraction of the
time. Nobody spins. As soon as there are several shm planes, one thread answers what is short for all: see
`shm.shared_loop`.
"""

from __future__ import annotations

import os
import socket
import threading
import time

from attnd.errors import Exhausted, PermissionDenied
from attnd.protocol.shm import sockets
from attnd_server.planes.arrivals import Arrivals
from attnd_server.planes.connection import PlaneConnection
from attnd_server.planes.cuda.planes import cuda_planes
from attnd_server.planes.negotiation import Planes
from attnd_server.planes.open_planes import PlaneTable
from attnd_server.planes.shm.pinning import Pinning, registrar_for
from attnd_server.planes.shm.shared_loop import SharedLoop
from attnd_server.planes.socket_ends import end
from attnd_server.planes.socket_folder import SocketFolder
from attnd_server.service.service import AttentionService

# Seconds that a client has to take the memory of its plane.
HANDSHAKE_S = 5.0
# How often a drain looks for planes with nothing under way, in seconds.
PERIOD_S = 0.02


class PlaneServer:
    """Listens in `config.socket_dir` and serves planes until `stop`."""

    def __init__(self, service: AttentionService, planes: Planes) -> None:
        """Starts to listen, and offers its planes among `planes`.

        Raises:
            OSError: there can be no socket in the folder.
        """
        config = service.config
        self._service = service
        self._users = {os.geteuid(), *config.socket_uids}
        self._listener = SocketFolder(config.socket_dir).listen(for_others=bool(config.socket_uids))
        self._path: str = self._listener.getsockname()
        self._planes = PlaneTable(
            self._path, config.region_bytes, config.max_planes, config.max_cuda_planes, service.sessions
        )
        self._cuda = cuda_planes(service.executor.device, config.cuda_region_bytes, config.max_cuda_planes)
        planes.offer(self._planes, self._cuda)
        self._pinning = Pinning(registrar_for(service.executor.device), service.executor.quiet)
        self._loop = SharedLoop(service.executor)
        self._connections: dict[PlaneConnection, None] = {}
        self._arrivals = Arrivals(self._listener, self._check, self._let_in)
        self._thread = threading.Thread(target=self._arrivals.run, name="shm-accept", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """Lets nobody in any more, and tells everybody who is; may take seconds with clients that do not read."""
        end(self._listener)
        self._thread.join()
        self._listener.close()
        try:
            os.unlink(self._path)
        except OSError:
            pass  # the folder has gone
        for connection in list(self._connections):
            connection.tell_going_away()

    def stop(self, timeout_s: float) -> None:
        """Ends planes as soon as nothing is under way on them, and all that are left after so many seconds."""
        deadline = time.monotonic() + timeout_s
        while (left := list(self._connections)) and time.monotonic() < deadline:
            for connection in left:
                if not connection.is_under_way:
                    connection.end()
            left[0].join(PERIOD_S)
        for connection in list(self._connections):
            connection.end()
        self._loop.close()

    def _check(self, peer: sockets.Peer) -> None:
        if peer.user not in self._users:
            rule = f"must be one of {', '.join(map(str, sorted(self._users)))}; see --socket-uids"
            raise PermissionDenied(f"the client's user is {peer.user}, but {rule}")

    def _let_in(self, ticket: bytes, accepted: socket.socket) -> None:
        """Opens the plane of a ticket, on a thread of its own. There are no more threads than planes."""
        plane = self._planes.claim(ticket, accepted)
        accepted.settimeout(HANDSHAKE_S)
        connection = PlaneConnection(
            self._service, self._planes, self._cuda, self._pinning, self._loop, plane, accepted, self._connections
        )
        self._connections[connection] = None
        try:
            connection.start()
        except RuntimeError as error:  # there can be no more threads
            del self._connections[connection]
            self._planes.forget(plane)
            raise Exhausted(f"the plane can have no thread: {error}") from None
