"""The server's end of shm and cuda planes: a socket that lets clients in, and a thread for each that is.

Not in gRPC's event loop: a thread that sleeps in the kernel until its client's bytes come answers in a fraction of the
time. Nobody spins.
"""

from __future__ import annotations

import logging
import mmap
import os
import queue
import select
import socket
import threading
import time

from attnd.errors import AttndError, Exhausted, PermissionDenied
from attnd.planes import doorbell, sockets
from attnd.planes.sockets import set_timeouts
from attnd.regions import Region
from attnd.v1 import attention_pb2
from attnd_server.attend_session import AttendSession, CallWork
from attnd_server.cuda_server import cuda_planes, serve_cuda
from attnd_server.planes import Pinning, Plane, PlaneTable, SocketFolder, registrar_for
from attnd_server.planes.table import end
from attnd_server.replies import RegionReplies
from attnd_server.service import AttentionService, error_response
from attnd_server.work import Cancelled, Work

log = logging.getLogger(__name__)

# Seconds that a client has to show its ticket.
HANDSHAKE_S = 5.0
# Seconds that a client has to take an answer: those that have not been read fit the socket's buffer many times over.
SEND_S = 5.0
# Connections beyond those of open planes that may be showing their tickets.
MAX_HANDSHAKES = 64


class ShmServer:
    """Listens in `config.socket_dir` and serves planes until `stop`."""

    def __init__(self, service: AttentionService) -> None:
        """Starts to listen; from now on OpenPlane gives planes.

        Raises:
            OSError: there can be no socket in the folder.
        """
        config = service.config
        self._service = service
        self._users = {os.geteuid(), *config.socket_uids}
        self._listener = SocketFolder(config.socket_dir).listen(for_others=bool(config.socket_uids))
        self._path: str = self._listener.getsockname()
        self._planes = service.planes = PlaneTable(
            self._path, config.region_bytes, config.max_planes, config.max_cuda_planes, service.sessions
        )
        service.cuda = cuda_planes(service.executor.device, config.cuda_region_bytes, config.max_cuda_planes)
        self._pinning = Pinning(registrar_for(service.executor.device))
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
        connection = _Connection(self._service, self._planes, self._pinning, accepted, self._connections)
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
        pinning: Pinning,
        accepted: socket.socket,
        connections: dict[_Connection, None],
    ) -> None:
        super().__init__(name="shm-plane", daemon=True)
        self._service = service
        self._planes = planes
        self._pinning = pinning
        self._socket = accepted
        self._connections = connections
        self._sending = threading.Lock()
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
        message = attention_pb2.AttendResponse(going_away=attention_pb2.GoingAway(reason="the server is draining"))
        if self._is_open:
            try:
                self._send(doorbell.reply_bytes(message.SerializeToString()))
            except OSError:
                pass  # its own thread learns it too

    def end(self) -> None:
        """Ends the connection, whatever its thread does. From another thread."""
        end(self._socket)

    def _refuse(self, error: AttndError) -> None:
        try:
            if not self._is_open:
                sockets.send_refusal(self._socket, error)
        except OSError:
            pass  # it has gone

    def _serve(self, plane: Plane) -> None:
        if plane.worker_gpu:
            serve_cuda(self._service, plane, self._socket, self._let_in_cuda, self._send)
            return
        memory = self._share()
        with self._pinning.pinned(memory):
            self._serve_region(plane, Region(plane.id, memory))

    def _serve_region(self, plane: Plane, region: Region) -> None:
        session = self._service.open_session(plane.principal, RegionReplies(region))
        self._service.executor.prepare_thread()
        requests = doorbell.Requests(self._socket)
        # One after the other, also where several calls are under way. Their tensors lie in the region by then and their
        # requests in the socket, so the next call is found without a sleep; and all that the client does, copies in and
        # out included, overlaps with the call that runs. To read ahead would hide the next call's check too, a few
        # microseconds, but then no call could run on this thread, which saves small ones two switches.
        while (request := requests.receive()) is not None:
            self._send(self._answer(session, request))

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

    def _answer(self, session: AttendSession, request: doorbell.Request) -> bytes:
        try:
            if request.message:
                answer = session.request(request.message, request.lane)
            else:
                answer = session.repeat(request.layer, request.step_id, request.lane)
            # A step is a message yet, a call is already what goes to the socket.
            return doorbell.reply_bytes(answer) if isinstance(answer, bytes) else self._run(answer)
        except Cancelled:
            return b""  # nobody reads it, and the socket's end is what comes next
        except Exception as error:
            return doorbell.reply_bytes(error_response(attention_pb2.AttendResponse, self._service.told(error)))

    def _run(self, work: Work) -> bytes:
        executor = self._service.executor
        timeout_s = None
        if isinstance(work, CallWork):
            result = executor.run_now(work) if work.is_small else None
            if result is not None:
                return result
            timeout_s = work.timeout_s
        results: queue.SimpleQueue[tuple[bytes | None, BaseException | None]] = queue.SimpleQueue()
        executor.submit(work, lambda *settled: results.put(settled), timeout_s, is_wanted=self._peer_is_there)
        result, error = results.get()
        if error is not None:
            raise error
        return result or b""

    def _peer_is_there(self) -> bool:
        """Whether the client's end of the socket is open, whatever it has sent. From any thread."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return not poll.poll(0)

    def _send(self, data: bytes) -> None:
        with self._sending:
            self._socket.sendall(data)
