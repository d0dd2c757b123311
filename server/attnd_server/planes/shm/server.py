"""The server's end of shm and cuda planes: a socket that lets clients in, and a thread for each that is.

Not in gRPC's event loop: a thread that sleeps in the kernel until its client's bytes come answers in a fraction of the
time. Nobody spins. As soon as there are several shm planes, one thread answers what is short for all: see `shm_loop`.
"""

from __future__ import annotations

import logging
import mmap
import os
import socket
import threading
import time

from attnd.errors import AttndError, Exhausted, PermissionDenied
from attnd.protocol.regions import Region
from attnd.protocol.shm import sockets
from attnd.protocol.shm.sockets import set_timeouts
from attnd_server.planes.cuda.planes import CudaPlanes, cuda_planes
from attnd_server.planes.cuda.serve import serve_cuda
from attnd_server.planes.negotiation import Planes
from attnd_server.planes.open_planes import Plane, PlaneTable, end
from attnd_server.planes.shm.connection import AnswerSocket, Begun, ShmConnection
from attnd_server.planes.shm.pinning import Pinning, registrar_for
from attnd_server.planes.shm.shared_loop import LoopClient, SharedLoop
from attnd_server.planes.socket_folder import SocketFolder
from attnd_server.service.replies import RegionReplies
from attnd_server.service.service import AttentionService

log = logging.getLogger(__name__)

# Seconds that a client has to show its ticket.
HANDSHAKE_S = 5.0
# Seconds that a client has to take an answer: those that have not been read fit the socket's buffer many times over.
SEND_S = 5.0
# Connections beyond those of open planes that may be showing their tickets.
MAX_HANDSHAKES = 64


class ShmServer:
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
        self._pinning = Pinning(registrar_for(service.executor.device))
        self._loop = SharedLoop(service.executor)
        self._connections: dict[_Connection, None] = {}
        self._max_connections = config.max_planes + MAX_HANDSHAKES
        self._draining = False
        self._thread = threading.Thread(target=self._accept, name="shm-accept", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """Lets nobody in any more, and tells everybody who is; may take seconds with clients that do not read."""
        self._draining = True
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
        """Waits until all planes are closed, but not for longer; then ends those that are left."""
        deadline = time.monotonic() + timeout_s
        for connection in list(self._connections):
            connection.join(max(0.0, deadline - time.monotonic()))
        for connection in list(self._connections):
            connection.end()
        self._loop.close()

    def _accept(self) -> None:
        while not self._draining:
            try:
                accepted, _ = self._listener.accept()
            except OSError:  # the end; or too many open files, which pass
                time.sleep(0.05)
                continue
            try:
                self._let_in(accepted)
            except (AttndError, OSError, RuntimeError) as error:  # RuntimeError: there can be no more threads
                log.warning("refused a connection to the shm socket: %s", error)
                accepted.close()

    def _let_in(self, accepted: socket.socket) -> None:
        accepted.settimeout(HANDSHAKE_S)
        peer = sockets.peer_of(accepted)
        if peer.user not in self._users:
            rule = f"must be one of {', '.join(map(str, sorted(self._users)))}; see --socket-uids"
            refusal = PermissionDenied(f"the client's user is {peer.user}, but {rule}")
            sockets.send_refusal(accepted, refusal)
            raise refusal
        if len(self._connections) >= self._max_connections:
            raise Exhausted(f"{len(self._connections)} connections are open, which is the limit")
        connection = _Connection(
            self._service, self._planes, self._cuda, self._pinning, self._loop, accepted, self._connections
        )
        self._connections[connection] = None
        try:
            connection.start()
        except RuntimeError:
            del self._connections[connection]
            raise


class _Connection(threading.Thread):
    """One client, from its ticket to the end of its socket."""

    def __init__(
        self,
        service: AttentionService,
        planes: PlaneTable,
        cuda: CudaPlanes | str,
        pinning: Pinning,
        loop: SharedLoop,
        accepted: socket.socket,
        connections: dict[_Connection, None],
    ) -> None:
        super().__init__(name="shm-plane", daemon=True)
        self._service = service
        self._planes = planes
        self._cuda = cuda
        self._pinning = pinning
        self._loop = loop
        self._socket = accepted
        self._answers = AnswerSocket(accepted)
        self._connections = connections
        self._is_open = False  # whether it has its region

    def run(self) -> None:
        """The thread."""
        plane: Plane | None = None
        try:
            plane = self._planes.claim(sockets.receive_ticket(self._socket), self._socket)
            self._serve(plane)
        except PermissionDenied as error:
            log.warning("refused a connection to the shm socket: %s", error)
            self._refuse(error)
        except OSError as error:
            log.info("a shm plane broke: %s", error)
        except Exception as error:
            self._refuse(self._service.told(error))
        finally:
            if plane is not None:
                self._planes.forget(plane)
            self._connections.pop(self, None)
            self._socket.close()

    def tell_going_away(self) -> None:
        """Says that the server drains. From another thread."""
        if self._is_open:
            self._answers.going_away()

    def end(self) -> None:
        """Ends the connection, whatever its thread does. From another thread."""
        self._answers.end()

    def _refuse(self, error: AttndError) -> None:
        try:
            if not self._is_open:
                sockets.send_refusal(self._socket, error)
        except OSError:
            pass  # it has gone

    def _serve(self, plane: Plane) -> None:
        if plane.worker_gpu:
            assert not isinstance(self._cuda, str)  # or no ticket would be for one
            serve_cuda(self._service, self._cuda, plane, self._socket, self._let_in_cuda, self._answers.send)
            return
        memory = self._share()
        with self._pinning.pinned(memory):
            self._serve_region(plane, Region(plane.id, memory))

    def _serve_region(self, plane: Plane, region: Region) -> None:
        self._service.executor.prepare_thread()
        session = self._service.open_session(plane.principal, RegionReplies(region))
        line = ShmConnection(self._service, session, self._socket)
        seat = LoopClient(line, self._answers, self._socket.fileno())
        self._loop.enter()
        try:
            while (request := line.read()) is not None:
                begun: Begun | None = line.begin(request)
                while begun is not None:
                    self._answers.send(line.finish(begun))
                    begun = self._loop.serve(seat) if self._loop.is_shared else None
        finally:
            self._loop.leave()

    def _share(self) -> mmap.mmap:
        """Memory for the plane. Nobody else has its descriptor, so it ends with both mappings."""
        descriptor = sockets.sealed_memory(self._planes.num_bytes)
        try:
            sockets.send_memory(self._socket, descriptor)
            memory = sockets.map_memory(os.dup(descriptor), self._planes.num_bytes)
        finally:
            os.close(descriptor)
        self._opened()
        return memory

    def _let_in_cuda(self, descriptors: list[int]) -> None:
        try:
            sockets.send_memory(self._socket, *descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._opened()

    def _opened(self) -> None:
        self._socket.settimeout(None)
        set_timeouts(self._socket, send_s=SEND_S)
        self._is_open = True
