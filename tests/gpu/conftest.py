"""A server on the first GPU and a client with the worker's, for modules that have no others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import attnd
from tests.gpu import devices
from tests.servers import ServerProcess

# Seconds: longer than any call should take.
TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("served")
    options = ("--device", "cuda:0", "--socket-dir", str(folder / "sockets"), "--kv-bytes", "4GiB")
    with ServerProcess(folder / "log", *options) as process:
        yield process
        log = process.log
    assert "internal error" not in log, log


@pytest.fixture
def client(server: ServerProcess) -> Iterator[attnd.Client]:
    with torch.cuda.device(devices.WORKER), attnd.connect(server.address, timeout_s=TIMEOUT_S) as client:
        yield client
