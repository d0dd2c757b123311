"""A server whose device fails: nothing is answered any more, and the process ends for another to be started."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

import attnd
from attnd_server.device.faults import EXIT_CODE
from tests.faulty_server import BUG, FAULT
from tests.scrape import Scrape
from tests.servers import ServerProcess

GEOMETRY = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "num_pages": 8, "page_size": 4, "dtype": "float32"}
Q, K, V = torch.ones(1, 2, 16), torch.ones(1, 2, 16), torch.ones(1, 2, 16)
METADATA = attnd.StepMetadata([1], [0], [[0, 1]], [0], kind="decode")
NAIVE = attnd.AttentionOptions(backend="naive")


class FaultyServer(ServerProcess):
    module = "tests.faulty_server"


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[FaultyServer]:
    options = ("--device", "cpu", "--metrics", "0", "--socket-dir", str(tmp_path))
    with FaultyServer(tmp_path / "log", *options) as server:
        yield server


def fail(session: attnd.Session, scale: float) -> None:
    session.step(METADATA).attend(1, Q, K, V, attnd.AttentionOptions(scale=scale, backend="naive"))


@pytest.mark.parametrize("plane", ["inline", "shm"])
def test_a_failed_device_ends_the_server_and_answers_nobody(faulty: FaultyServer, tmp_path: Path, plane: str) -> None:
    seen: list[int] = []
    with grpc.insecure_channel(faulty.address) as channel, attnd.connect(faulty.address, timeout_s=10) as client:
        statuses = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())

        def watch() -> None:
            try:
                seen.extend(status.status for status in statuses)
            except grpc.RpcError:
                pass  # the server has gone

        watching = threading.Thread(target=watch)
        watching.start()
        cache, other = client.create_cache(**GEOMETRY), client.create_cache(**GEOMETRY)
        with cache.session(plane=plane) as session:
            assert torch.equal(session.step(METADATA).attend(0, Q, K, V, NAIVE), V)
            with pytest.raises(attnd.Disconnected, match="illegal memory access was encountered; its caches are lost"):
                fail(session, FAULT)
        metrics = re.search(r"metrics on (\S+)", faulty.banner)
        assert metrics is not None
        assert Scrape.of(metrics[1]).value("attnd_device_healthy") == 0
        for refused in (other.renew, client.list_caches, lambda: client.create_cache(**GEOMETRY)):
            with pytest.raises(attnd.Disconnected):
                refused()
        with pytest.raises(attnd.Disconnected):
            other.read_kv(0, [0], like=Q)
        assert faulty.wait() == EXIT_CODE
        watching.join(10)
        status = health_pb2.HealthCheckResponse
        assert seen == [status.SERVING, status.NOT_SERVING]
        assert faulty.log.count("the device failed") == 1
        if plane == "inline":
            with ServerProcess(tmp_path / "next", "--device", "cpu", port=faulty.port):
                client.capabilities()
                with pytest.raises(attnd.EpochMismatch):
                    other.renew()


def test_a_bug_is_no_fault_of_the_device_and_sigterm_does_not_save_one_that_failed(faulty: FaultyServer) -> None:
    with attnd.connect(faulty.address, timeout_s=10) as client, client.create_cache(**GEOMETRY) as cache:
        with cache.session() as session:
            with pytest.raises(attnd.ServerFault, match="internal error"):
                fail(session, BUG)
            assert torch.equal(session.step(METADATA).attend(0, Q, K, V, NAIVE), V)
            assert "the device failed" not in faulty.log
            with pytest.raises(attnd.Disconnected):
                fail(session, FAULT)
            faulty.terminate()
            assert faulty.wait() == EXIT_CODE
