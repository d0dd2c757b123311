"""Asks a server's `grpc.health.v1` whether it serves: `python -m attnd_server.health_probe [OPTIONS] [HOST:PORT]`.

Exit code 0 if it does, else 1 with a line on standard error. A container runs this every few seconds, so it must not
import torch. Health needs no token, only TLS where the server has it: the options are those of `attnd info`, and read
the same environment variables.
"""

from __future__ import annotations

import argparse
import os
import sys

import grpc

from attnd.credentials import NO_CREDENTIALS, Credentials
from attnd.extras import missing
from attnd.planes.channels import open_channel, telling
from attnd.planes.targets import DEFAULT_ADDRESS, parse_target
from attnd.protocol.printable import printable
from attnd_server.cli.credentials import CREDENTIAL_OPTIONS, credentials
from attnd_server.cli.streams import guarded

TIMEOUT_S = 3.0


def failure(address: str, timeout_s: float = TIMEOUT_S, shown: Credentials | None = None) -> str | None:
    """None if the server at `address`, which is shown `shown`, serves; else why not, for people."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # of the extra `server`

    target = parse_target(address)
    try:
        with open_channel(grpc, target, shown or NO_CREDENTIALS) as channel:
            request = health_pb2.HealthCheckRequest()
            status = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s).status
    except grpc.RpcError as error:
        details = telling(error.details() or "", target, shown or NO_CREDENTIALS)
        return f"{target.shown} does not answer: {error.code().name}: {printable(details)}"
    if status == health_pb2.HealthCheckResponse.SERVING:
        return None
    return f"{target.shown} is {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}, but must be SERVING"


def main() -> int:
    """Probes the address of the command line. Returns the exit code."""
    return guarded(_probe, "health probe")


def _probe() -> int:
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
        reason = f"{printable(address)} was not asked: {error}"
    except ModuleNotFoundError as error:
        reason = missing(error)
        if reason is None:
            raise
    if reason is not None:
        print(reason, file=sys.stderr)
    return int(reason is not None)


if __name__ == "__main__":
    sys.exit(main())
