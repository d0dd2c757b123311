"""Asks a server's `grpc.health.v1` whether it serves: `python -m attnd_server.health_probe [OPTIONS] [HOST:PORT]`.

Exit code 0 if it does, else 1 with a line on standard error. A container runs this every few seconds, so it must not
import torch. Health needs no token, only TLS where the server has it: the options are those of `attnd info`, and read
the same environment variables.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from attnd_server.cli.credentials import CREDENTIAL_OPTIONS, credentials

if TYPE_CHECKING:
    from attnd.credentials import Credentials

DEFAULT_ADDRESS = "localhost:7411"
TIMEOUT_S = 3.0


def failure(address: str, timeout_s: float = TIMEOUT_S, shown: Credentials | None = None) -> str | None:
    """None if the server at `address`, which is shown `shown`, serves; else why not, for people."""
    try:
        with _channel(address, shown) as channel:
            request = health_pb2.HealthCheckRequest()
            status = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s).status
    except grpc.RpcError as error:
        return f"{address} does not answer: {error.code().name}: {error.details()}"
    if status == health_pb2.HealthCheckResponse.SERVING:
        return None
    return f"{address} is {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}, but must be SERVING"


def _channel(address: str, shown: Credentials | None) -> grpc.Channel:
    if shown is None or not shown.tls:
        return grpc.insecure_channel(address)
    return grpc.secure_channel(address, shown.channel_credentials(), options=shown.channel_options())


def main() -> int:
    """Probes the address of the command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="attnd_server.health_probe", description="Asks a server whether it serves.")
    parser.add_argument("address", metavar="HOST:PORT", nargs="?", default=DEFAULT_ADDRESS)
    for name, option in CREDENTIAL_OPTIONS.items():
        default = os.environ.get(option.envvar, "")
        parser.add_argument(f"--{name.replace('_', '-')}", metavar=option.metavar, default=default, help=option.text)
    arguments = vars(parser.parse_args())
    address = arguments["address"]
    try:
        reason = failure(address, shown=credentials(arguments))
    except ValueError as error:  # InvalidRequest: the options
        reason = f"{address} was not asked: {error}"
    if reason is not None:
        print(reason, file=sys.stderr)
    return int(reason is not None)


if __name__ == "__main__":
    sys.exit(main())
