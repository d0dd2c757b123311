"""When a connection ends: how one side sees it, and how it does it."""

from __future__ import annotations

import select
import socket


def has_ended(*connections: socket.socket, timeout_s: float = 0) -> bool:
    """Whether the other side of one has closed, or is gone; what it sent before may still be unread.

    Args:
        connections: that this side may have closed, too.
        timeout_s: seconds to wait for that.
    """
    poll = select.poll()
    for connection in connections:
        try:
            poll.register(connection, select.POLLRDHUP)
        except (OSError, ValueError):  # closed on this side
            return True
    return bool(poll.poll(timeout_s * 1e3))


def end(connection: socket.socket) -> None:
    """Ends both directions, whichever thread is reading or writing."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # ended already
