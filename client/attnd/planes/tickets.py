"""Going to the server's socket with a ticket, and coming back with memory: how every plane that shares some begins."""

from __future__ import annotations

import os
import socket
from typing import NamedTuple

from attnd.errors import Disconnected, Unsupported
from attnd.protocol.shm import sockets


class Admission(NamedTuple):
    """What a ticket was good for.

    Attributes:
        connection: blocking, with nothing under way.
        descriptors: of the memory that came over it; the caller closes them.
        path: of the socket, for errors.
    """

    connection: socket.socket
    descriptors: list[int]
    path: str


def show_ticket(ticket: bytes, socket_path: str, socket_dir: str, num_descriptors: int, timeout_s: float) -> Admission:
    """Connects to the server's socket and shows a ticket from OpenPlane.

    Args:
        ticket: good for one connection.
        socket_path: of the socket, as the server sees it.
        socket_dir: the folder of the server's sockets as this process sees it; "": as the server does.
        num_descriptors: that the server sends for it.
        timeout_s: how long the server may take, in seconds.

    Raises:
        Unsupported: this process cannot reach the socket, or does not trust who listens; the message says why.
        Disconnected: the server hung up.
        AttndError: what the server answered.
    """
    path = os.path.join(socket_dir, os.path.basename(socket_path)) if socket_dir else socket_path
    connection = socket.socket(socket.AF_UNIX)
    try:
        _connect(connection, path, timeout_s)
        connection.settimeout(timeout_s)
        try:
            connection.sendall(ticket)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before it was asked, and told why
        descriptors = sockets.receive_memories(connection, num_descriptors)
        connection.settimeout(None)
    except OSError as error:
        connection.close()
        raise Disconnected(f"the server at {path} hung up: {error}") from None
    except BaseException:
        connection.close()
        raise
    return Admission(connection, descriptors, path)


def _connect(connection: socket.socket, path: str, timeout_s: float) -> None:
    try:
        # The system's timeout, not Python's: with that, connecting fails at once where many wait to be accepted.
        sockets.set_timeouts(connection, send_s=timeout_s)
        connection.connect(path)
        sockets.set_timeouts(connection)
    except OSError as error:  # a path that is too long, too
        rule = "client and server must share the folder, which socket_dir names here if it lies elsewhere"
        raise Unsupported(f"socket {path} cannot be reached: {error}; {rule}", field="plane") from None
    user = sockets.peer_of(connection).user
    if user not in (os.geteuid(), 0):
        rule = f"must be this process' user {os.geteuid()} or root"
        raise Unsupported(f"user {user} listens at {path}, but {rule}", field="plane")
