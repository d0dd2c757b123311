"""gRPC's errors as ours, for the sync and the asyncio client."""

from __future__ import annotations

import grpc

from attnd.credentials import Credentials
from attnd.errors import AttndError, DeadlineExceeded, Disconnected, from_rpc
from attnd.planes.channels import telling
from attnd.planes.targets import Target


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


def explained(told: AttndError, error: grpc.RpcError, target: Target, credentials: Credentials) -> AttndError:
    """`told`, with what a call that did not wait for the server was told. It may take `WHY_S`."""
    if error.code() is not grpc.StatusCode.UNAVAILABLE:
        return told
    return Disconnected(f"{told}: {telling(error.details() or '', target, credentials)}")
