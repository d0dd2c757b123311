"""From an address to a transport: gRPC, or whatever a scheme of the entry point group `attnd.transports` names."""

from __future__ import annotations

from importlib.metadata import entry_points

from attnd.credentials import NO_CREDENTIALS, Credentials
from attnd.errors import InvalidRequest, Unsupported
from attnd.planes.grpc import GrpcTransport
from attnd.planes.grpc_options import KEEPALIVE_S
from attnd.planes.transport import Transport


def open_transport(address: str, credentials: Credentials | None = None, keepalive_s: float = KEEPALIVE_S) -> Transport:
    """The transport of "host:port", or of "scheme://" as an installed package defines it.

    Args:
        address: which.
        credentials: for "host:port"; None: it is not encrypted, and nobody's.
        keepalive_s: for "host:port": seconds in which a server that vanished is noticed.

    Raises:
        InvalidRequest: nothing like that.
        Unsupported: the package that it needs is not installed.
    """
    scheme, separator, _ = address.partition("://")
    if not separator:
        return GrpcTransport(address, credentials or NO_CREDENTIALS, keepalive_s)
    if credentials is not None:
        rule = "must be absent: there is no connection to protect, and nobody else to be told from"
        raise InvalidRequest(f"credentials are given for {address}, but {rule}", field="credentials")
    for entry in entry_points(group="attnd.transports"):
        if entry.name == scheme:
            try:
                connect = entry.load()
            except ModuleNotFoundError as error:
                raise Unsupported(f"{address} needs the package {error.name}: pip install 'attnd[server]'") from None
            return connect()  # type: ignore[no-any-return]
    raise InvalidRequest(
        f'address is {address}, but must be "host:port", or "inproc://" where attnd[server] is installed',
        field="address",
    )
