"""Asks a server's `grpc.health.v1` whether it serves: `python -m attnd_server.health_probe [HOST:PORT]`.

Exit code 0 if it does, else 1 with a line on standard error. A container runs this every few seconds, so it must not
import torch.
"""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

DEFAULT_ADDRESS = "localhost:7411"
TIMEOUT_S = 3.0


def failure(address: str, timeout_s: float = TIMEOUT_S) -> str | None:
    """None if the server at `address` serves, else why not, for people."""
    try:
        with grpc.insecure_channel(address) as channel:
            request = health_pb2.HealthCheckRequest()
            status = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s).status
    except grpc.RpcError as error:
        return f"{address} does not answer: {error.code().name}: {error.details()}"
    if status == health_pb2.HealthCheckResponse.SERVING:
        return None
    return f"{address} is {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}, but must be SERVING"


def main() -> int:
    """Probes the address of the command line. Returns the exit code."""
    reason = failure(sys.argv[1] if len(sys.argv) > 1 else DEFAULT_ADDRESS)
    if reason is not None:
        print(reason, file=sys.stderr)
    return int(reason is not None)


if __name__ == "__main__":
    sys.exit(main())
