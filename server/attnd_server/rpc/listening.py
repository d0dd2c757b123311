"""Where a server listens, tried before gRPC does: gRPC says on several lines that it cannot, and not why."""

from __future__ import annotations

import errno
import socket

from attnd.planes.targets import join_host_port


def listen_address(host: str, port: int) -> str:
    """`HOST:PORT` for gRPC to listen on; port 0 lets the system pick.

    Raises:
        RuntimeError: nobody can listen there, and why.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:  # the name is nobody's
        raise RuntimeError(f"host is {host}, but must be an address of this machine: {error.strerror}") from None
    refusals = [why for family, *_, address in found if (why := _refusal(family, address))]
    for why in refusals:
        if why.errno == errno.EADDRINUSE:
            raise RuntimeError(
                f"port is {port}, but must be a free one: another process listens at {join_host_port(host, port)}"
            )
    if len(refusals) == len(found):  # of a name that has several addresses one is enough
        raise RuntimeError(f"{join_host_port(host, port)} cannot be listened on: {refusals[0].strerror}")
    return join_host_port(host, port)


def _refusal(family: int, address: tuple[object, ...]) -> OSError | None:
    """What keeps a socket from listening at an address."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC has it
            tried.bind(address)
            tried.listen()
    except OSError as error:
        return error
    return None
