"""The end of a cuda plane on the server, which comes after that of the worker's."""

from __future__ import annotations

import socket
import time

from attnd.errors import AttndError
from attnd.planes.transport import Transport
from attnd.v1 import plane_pb2

# Seconds between two looks.
PERIOD_S = 0.002


def await_end(transport: Transport, plane_id: int, timeout_s: float) -> None:
    """Waits until the server has done with a plane whose socket has ended, or cannot be asked.

    Until then layers that were let go may store what lies in the region, over what is stored next into those slots.

    Args:
        transport: to the server.
        plane_id: of the plane.
        timeout_s: how long to wait at the most, in seconds; the server's own watchdog is sooner.
    """
    request = plane_pb2.ClosePlaneRequest(id=plane_id).SerializeToString()
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            transport.unary("ClosePlane", request, timeout_s)
        except AttndError:  # there is no such plane any more, or no server
            return
        time.sleep(PERIOD_S)


def end_socket(connection: socket.socket) -> None:
    """Ends both directions, whoever reads."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # ended already
