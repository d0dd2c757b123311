"""The server's end of shm planes: calls come over the socket, and their tensors lie in the plane's region."""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Callable

from attnd.protocol.regions import Region
from attnd.protocol.shm import sockets
from attnd_server.planes.answer_socket import AnswerSocket
from attnd_server.planes.open_planes import Plane
from attnd_server.planes.shm.connection import Begun, ShmConnection
from attnd_server.planes.shm.loop_clients import LoopClient
from attnd_server.planes.shm.pinning import Pinning, reach_of
from attnd_server.planes.shm.shared_loop import SharedLoop
from attnd_server.service.replies import RegionReplies
from attnd_server.service.service import AttentionService
from attnd_server.service.session import AttendSession


def serve_shm(
    service: AttentionService,
    plane: Plane,
    num_bytes: int,
    connection: socket.socket,
    let_in: Callable[[list[int]], None],
    answers: AnswerSocket,
    serves: Callable[[AttendSession], None],
    pinning: Pinning,
    loop: SharedLoop,
) -> None:
    """Serves a shm plane until its socket ends.

    Args:
        service: what it serves.
        plane: that was claimed.
        num_bytes: of its region.
        connection: its socket.
        let_in: sends the descriptors of its memory, and closes them.
        answers: the sending side of the socket.
        serves: told whose steps these are.
        pinning: pins the region.
        loop: answers short requests of this client and others, once there are several.
    """
    memory = _shared(num_bytes, let_in)
    with pinning.pinned(memory) as is_pinned:
        service.executor.prepare_thread()
        reach = reach_of(memory, service.executor.device) if is_pinned else range(0)
        session = service.open_session(plane.principal, RegionReplies(Region(plane.id, memory), reach))
        serves(session)
        try:
            _serve(ShmConnection(service, session, connection), answers, connection.fileno(), loop)
        finally:
            session.close()


def _serve(connection: ShmConnection, answers: AnswerSocket, descriptor: int, loop: SharedLoop) -> None:
    """Answers requests on this thread, or leaves them to the loop while there are other clients."""
    client = LoopClient(connection, answers, descriptor)
    loop.clients.enter()
    try:
        while (request := connection.read()) is not None:
            answers.expect()
            begun: Begun | None = connection.begin(request)
            while begun is not None:
                answers.send(connection.finish(begun))
                begun = loop.clients.serve(client) if loop.clients.are_several else None
    finally:
        loop.clients.leave()


def _shared(num_bytes: int, let_in: Callable[[list[int]], None]) -> mmap.mmap:
    """Memory for the plane. Nobody but the client has its descriptor, so it ends with both mappings."""
    descriptor = sockets.sealed_memory(num_bytes)
    try:
        memory = sockets.map_memory(os.dup(descriptor), num_bytes)
    except BaseException:
        os.close(descriptor)
        raise
    let_in([descriptor])
    return memory
