"""A server that is killed, restarted, or asked to stop, seen from its client."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

import attnd
from tests.servers import ServerProcess, wait_for

GEOMETRY = {"num_layers": 4, "num_kv_heads": 2, "head_dim": 16, "num_pages": 8, "page_size": 4, "dtype": "float32"}
Q, K, V = torch.ones(1, 2, 16), torch.ones(1, 2, 16), torch.ones(1, 2, 16)


def decode_metadata(context_len: int) -> attnd.StepMetadata:
    return attnd.StepMetadata([1], [context_len], [[0, 1, 2, 3, 4, 5, 6, 7]], [context_len], kind="decode")


def test_killed_server_disconnects_and_a_new_one_refuses_the_old_epoch(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "log", "--device", "cpu")
    with attnd.connect(server.address, timeout_s=5) as client:
        cache = client.create_cache(**GEOMETRY)
        old_epoch = client.epoch
        session = cache.session()
        step = session.step(decode_metadata(0))
        step.attend(0, Q, K, V)
        server.kill()
        started = time.monotonic()
        with pytest.raises(attnd.Disconnected, match=server.address):  # noqa: PT012  # at which layer is gRPC's choice
            for layer in range(1, 4):
                step.attend(layer, Q, K, V)
        assert time.monotonic() - started < 5

        with ServerProcess(tmp_path / "log", "--device", "cpu", port=server.port):
            with client.create_cache(**GEOMETRY) as again, again.session() as new_session:
                new_step = new_session.step(decode_metadata(0))
                assert torch.equal(new_step.attend(0, Q, K, V), V)
            client.capabilities()
            assert client.epoch != old_epoch
            with pytest.raises(attnd.EpochMismatch, match=f"cache.epoch is {old_epoch}"):
                session.step(decode_metadata(1)).attend(0, Q, K, V)
            with pytest.raises(attnd.EpochMismatch):
                cache.renew()
    server.stop()


def test_sigterm_lets_the_open_step_finish_and_refuses_the_next(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", "--device", "cpu") as server, attnd.connect(server.address) as client:
        cache = client.create_cache(**GEOMETRY)
        session = cache.session()
        step = session.step(decode_metadata(0))
        step.attend(0, Q, K, V)
        server.terminate()
        wait_for(lambda: "draining" in server.log, "the server does not drain")
        for layer in range(1, 4):
            assert torch.equal(step.attend(layer, Q, K, V), V)
        with pytest.raises(attnd.Disconnected, match="drain"):
            session.step(decode_metadata(1)).attend(0, Q, K, V)
        session.close()
        assert server.wait() == 0
        assert "stopped" in server.log


def test_server_that_hangs_is_noticed_within_the_deadline(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", "--device", "cpu") as server, attnd.connect(server.address) as client:
        cache = client.create_cache(**GEOMETRY)
        with cache.session() as session:
            session.timeout_s = 1.0
            step = session.step(decode_metadata(0))
            step.attend(0, Q, K, V)
            server.freeze()
            try:
                started = time.monotonic()
                with pytest.raises(attnd.DeadlineExceeded, match="1 s"):
                    step.attend(1, Q, K, V)
                assert time.monotonic() - started < 3
            finally:
                os.kill(server.pid, signal.SIGCONT)
            with pytest.raises(attnd.Disconnected, match="open the step again"):
                step.attend(1, Q, K, V)
            assert torch.equal(session.step(decode_metadata(0)).attend(0, Q, K, V), V)


def test_client_that_dies_mid_step_leaves_the_server_serving(tmp_path: Path, server: ServerProcess) -> None:
    with attnd.connect(server.address) as client:
        with attnd.connect(server.address) as other:
            lost = other.create_cache(**GEOMETRY, ttl_s=1.0, name="lost")
            lost.session().step(decode_metadata(0)).attend(0, Q, K, V)
            other.renewal.remove(lost)  # as if its process had gone
        wait_for(
            lambda: "lost" not in [info.name for info in client.list_caches()], "a dead client's cache was never freed"
        )
        with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
            assert torch.equal(session.step(decode_metadata(0)).attend(0, Q, K, V), V)
