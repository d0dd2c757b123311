"""gRPC's errors as ours, for the sync and the asyncio client."""

from __future__ import annotations

import grpc

from attnd.errors import AttndError, DeadlineExceeded, Disconnected, from_rpc

# Seconds for asking why there is no connection.
WHY_S = 0.5


def translate(error: grpc.RpcError, address: str, waited_s: float = 0) -> AttndError:
    """Our exception for gRPC's, with the address where that helps.

    Args:
        error: what gRPC raised.
        address: of the server.
        waited_s: seconds that the call waited for a server that may not be there; 0: it did not wait.
    """
    told = from_rpc(error)
    if isinstance(told, Disconnected):
        return Disconnected(f"no connection to {address}: {told}")
    if waited_s and isinstance(told, DeadlineExceeded):
        return Disconnected(f"no answer from {address} within {waited_s:g} s")
    return told


def explained(told: AttndError, error: grpc.RpcError) -> AttndError:
    """`told`, with what a call that did not wait for the server was told."""
    return Disconnected(f"{told}: {error.details()}") if error.code() is grpc.StatusCode.UNAVAILABLE else told
