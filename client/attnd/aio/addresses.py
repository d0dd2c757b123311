"""From an address to a transport in asyncio: gRPC alone."""

from __future__ import annotations

from attnd.aio.transport import AsyncTransport
from attnd.credentials import NO_CREDENTIALS, Credentials
from attnd.errors import InvalidRequest
from attnd.planes.grpc_options import KEEPALIVE_S


def open_transport(
    address: str, credentials: Credentials | None = None, keepalive_s: float = KEEPALIVE_S
) -> AsyncTransport:
    """The transport of an address. Arguments as `attnd.planes.addresses.open_transport`.

    Raises:
        InvalidRequest: it is no address, or the sync client alone takes it.
    """
    if address == "inproc://":
        raise InvalidRequest(f"address is {address}, which the sync client alone takes", field="address")
    return AsyncTransport(address, credentials or NO_CREDENTIALS, keepalive_s)
