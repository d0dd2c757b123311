"""The connection of one client of a shm or cuda plane, from its admission to the end of its socket."""

from __future__ import annotations

import logging
import os
import socket
import threading

from attnd.errors import AttndError
from attnd.protocol.shm import sockets
from attnd.protocol.shm.sockets import set_timeouts
from attnd_server.planes.answer_socket import AnswerSocket
from attnd_server.planes.cuda.planes import CudaPlanes
from attnd_server.planes.cuda.serve import serve_cuda
from attnd_server.planes.open_planes import Plane, PlaneTable
from attnd_server.planes.shm.pinning import Pinning
from attnd_server.planes.shm.serve import serve_shm
from attnd_server.planes.shm.shared_loop import SharedLoop
from attnd_server.service.service import AttentionService
from attnd_server.service.session import AttendSession

log = logging.getLogger(__name__)

# Seconds that a client has to take an answer: those that have not been read fit the socket's buffer many times over.
SEND_S = 5.0


class PlaneConnection(threading.Thread):
    """One client, from its admission to the end of its socket."""

    def __init__(
        self,
        service: AttentionService,
        planes: PlaneTable,
        cuda: CudaPlanes | str,
        pinning: Pinning,
        loop: SharedLoop,
        plane: Plane,
        accepted: socket.socket,
        connections: dict[PlaneConnection, None],
    ) -> None:
        super().__init__(name="shm-plane", daemon=True)
        self._service = service
        self._planes = planes
        self._cuda = cuda
        self._pinning = pinning
        self._loop = loop
        self._plane = plane
        self._socket = accepted
        self._answers = AnswerSocket(accepted)
        self._connections = connections
        self._is_open = False  # whether it has its region
        self._session: AttendSession | None = None  # of a shm plane; a step of a cuda plane is one request

    def run(self) -> None:
        """The thread."""
        try:
            with self._service.opened.held(self._plane.principal, self.end):
                self._serve(self._plane)
        except OSError as error:
            log.info("a shm plane broke: %s", error)
        except Exception as error:
            self._refuse(self._service.told(error, self._plane.principal))
        finally:
            self._planes.forget(self._plane)
            self._connections.pop(self, None)
            self._session = None  # its region lies in memory that is to go now
            self._socket.close()

    @property
    def is_under_way(self) -> bool:
        """Whether a step is, or an answer is to be sent: whether a drain waits for it. From any thread."""
        session, answers = self._session, self._answers
        return answers.num_due > 0 or answers.is_under_way() or (session is not None and session.is_under_way())

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
        if plane.worker is not None:
            assert not isinstance(self._cuda, str)  # or no ticket would be for one
            serve_cuda(self._service, self._cuda, plane, self._socket, self._let_in, self._answers)
        else:
            num_bytes = self._planes.num_bytes
            serve_shm(
                self._service,
                plane,
                num_bytes,
                self._socket,
                self._let_in,
                self._answers,
                self._serves,
                self._pinning,
                self._loop,
            )

    def _serves(self, session: AttendSession) -> None:
        self._session = session

    def _let_in(self, descriptors: list[int]) -> None:
        """Sends the descriptors of the plane's memory, and closes them."""
        try:
            sockets.send_memory(self._socket, *descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._socket.settimeout(None)
        set_timeouts(self._socket, send_s=SEND_S)
        self._is_open = True
