"""What runs for a whole benchmark: the server, a server in this process, and the bare echoes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import attnd
from attnd_server.config import ServerConfig
from attnd_server.inproc import connect as connect_inproc
from benchmarks import echo
from benchmarks.doorbell_echo import DoorbellEcho
from benchmarks.servers import running

# Seconds: a layer with long contexts is gigabytes to be stored.
TIMEOUT_S = 300.0
# Of a session's region: more than a call here has. A server with a GPU pins them all, and many callers have many.
REGION_BYTES = "64MiB"


@dataclass(frozen=True)
class Endpoints:
    """All of them.

    Attributes:
        device: of what computes in this process.
        server_device: of the server.
        address: of the server.
        client: to the server.
        inproc: to the server in this process.
        channel: to the echo.
        doorbell: the way to the other echo.
    """

    device: torch.device
    server_device: torch.device
    address: str
    client: attnd.Client
    inproc: attnd.Client
    channel: Any
    doorbell: DoorbellEcho


@contextmanager
def endpoints(device: torch.device, server_device: torch.device, num_threads: int) -> Iterator[Endpoints]:
    """Starts the servers and connects to them; ends them with the block.

    Args:
        device: of what computes in this process.
        server_device: of the server: the same, or another GPU of the same kind.
        num_threads: of a call on a processor; with a GPU, a server's own default.
    """
    num_threads = num_threads if server_device.type == "cpu" else 0
    config = ServerConfig(device=str(device), threads=num_threads)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="attnd-"))
        options = ["--port", "0", "--device", str(server_device), "--threads", str(num_threads), "--socket-dir", folder]
        options += ["--region-bytes", REGION_BYTES]
        address = stack.enter_context(running("attnd_server", "serve", *options))
        echo_address = stack.enter_context(running("benchmarks.echo"))
        yield Endpoints(
            device,
            server_device,
            address,
            stack.enter_context(attnd.connect(address, timeout_s=TIMEOUT_S)),
            stack.enter_context(attnd.Client(connect_inproc(config), timeout_s=TIMEOUT_S)),
            stack.enter_context(echo.connect(echo_address)),
            stack.enter_context(DoorbellEcho()),
        )
