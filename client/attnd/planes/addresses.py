"""From an address to a transport: gRPC, or whatever a scheme of the entry point group `attnd.transports` names."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from attnd.credentials import NO_CREDENTIALS, Credentials
from attnd.errors import InvalidRequest, Unsupported
from attnd.extras import missing
from attnd.planes.grpc import GrpcTransport
from attnd.planes.grpc_options import KEEPALIVE_S
from attnd.planes.transport import Transport


def open_transport(address: str, credentials: Credentials | None = None, keepalive_s: float = KEEPALIVE_S) -> Transport:
    """The transport of an address, or of "scheme://" as an installed package defines it.

    Args:
        address: which; see `attnd.planes.targets`.
        credentials: for a server elsewhere; None: it is not encrypted, and nobody's.
        keepalive_s: for a server elsewhere: seconds in which one that vanished is noticed.

    Raises:
        InvalidRequest: nothing like that.
        Unsupported: the package that it needs is not installed.
    """
    entry = _entry(address)
    if entry is None:
        return GrpcTransport(address, credentials or NO_CREDENTIALS, keepalive_s)
    if credentials is not None:
        rule = "must be absent: there is no connection to protect, and nobody else to be told from"
        raise InvalidRequest(f"credentials are given for {address}, but {rule}", field="credentials")
    try:
        connect = entry.load()
    except ModuleNotFoundError as error:
        why = missing(error, "server")
        if why is None:
            raise
        raise Unsupported(f"{address} cannot be had: {why}", field="address") from None
    return connect()  # type: ignore[no-any-return]


def _entry(address: str) -> EntryPoint | None:
    """What an installed package connects with to an address of its own."""
    scheme, separator, rest = str(address).partition("://")
    if not separator or rest:
        return None
    return next((entry for entry in entry_points(group="attnd.transports") if entry.name == scheme), None)
