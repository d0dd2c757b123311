"""The server's end of shm planes, in this process: who is let in, and when it ends."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import attnd
from attnd.protocol.shm import sockets
from attnd.v1 import plane_pb2
from attnd_server.build import build_service
from attnd_server.config import ServerConfig
from attnd_server.device.copy_timer import Copies
from attnd_server.inproc import InprocTransport
from attnd_server.planes.negotiation import Planes
from attnd_server.planes.server import PlaneServer

GEOMETRY = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "num_pages": 8, "page_size": 4, "dtype": "float32"}


@contextmanager
def serving(folder: Path, **limits: int) -> Iterator[tuple[PlaneServer, attnd.Client]]:
    """A server whose messages come in-process, and whose planes come over its socket."""
    config, planes = ServerConfig(device="cpu", socket_dir=str(folder), region_bytes=1 << 20, **limits), Planes()
    service = build_service(config, planes=planes)
    server = PlaneServer(service, planes)
    try:
        with attnd.Client(InprocTransport(service), plane="shm", timeout_s=10) as client:
            yield server, client
    finally:
        server.drain()
        server.stop(0)


def attend(session: attnd.Session) -> torch.Tensor:
    step = session.step(attnd.StepMetadata([1], [0], [[0]], [0], kind="decode"))
    output: torch.Tensor = step.attend(0, torch.ones(1, 2, 16), torch.ones(1, 2, 16), torch.ones(1, 2, 16))
    return output


def test_other_users_are_told_why_they_stay_outside(tmp_path: Path) -> None:
    with serving(tmp_path) as (server, client), client.create_cache(**GEOMETRY) as cache:
        server._users = {12345}
        with pytest.raises(attnd.PermissionDenied, match=r"the client's user is \d+, but must be one of 12345"):
            attend(cache.session())
        with cache.session(plane="auto") as session:
            assert torch.equal(attend(session), torch.ones(1, 2, 16))
            assert session.plane == "inline"
            assert "must be one of 12345" in session.refusals["shm"]


def test_a_client_does_not_trust_another_users_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path) as (_, client), client.create_cache(**GEOMETRY) as cache:
        monkeypatch.setattr(sockets, "peer_of", lambda connection: sockets.Peer(1, 12345))
        with pytest.raises(attnd.Unsupported, match=r"user 12345 listens at .*, but must be this process' user"):
            attend(cache.session())


def test_a_client_on_another_system_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path) as (_, client), client.create_cache(**GEOMETRY) as cache:
        monkeypatch.setattr("attnd.planes.choice.sys.platform", "darwin")
        with pytest.raises(attnd.Unsupported, match="this process runs on darwin"):
            attend(cache.session())


def test_planes_are_limited_and_auto_says_so(tmp_path: Path) -> None:
    with serving(tmp_path, max_planes=1) as (_, client), client.create_cache(**GEOMETRY) as cache:
        with cache.session() as first, cache.session() as second, cache.session(plane="auto") as third:
            attend(first)
            with pytest.raises(attnd.Exhausted, match="1 shm planes are open, which is the limit"):
                attend(second)
            attend(third)
            assert third.plane == "inline"
            assert "which is the limit" in third.refusals["shm"]
            answer = plane_pb2.OpenPlaneResponse.FromString(client.transport.unary("OpenPlane", b"", 10))
            reasons = {refusal.plane: refusal.reason for refusal in answer.refusals}
            assert answer.plane == plane_pb2.PLANE_INLINE
            assert "which is the limit" in reasons[plane_pb2.PLANE_SHM]
            first.close()
            deadline = time.monotonic() + 10
            while second.plane != "shm":
                try:
                    attend(second)
                except attnd.Exhausted:
                    assert time.monotonic() < deadline, "the closed session's plane was never freed"


def test_many_sessions_at_once_give_what_each_asked_for(tmp_path: Path) -> None:
    with serving(tmp_path) as (_, client):
        wrong: list[object] = []

        def work(seed: int) -> None:
            generator = torch.Generator().manual_seed(seed)
            with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
                for position in range(20):
                    step = session.step(attnd.StepMetadata([1], [0], [[0]], [0], kind="decode"))
                    q, k, v = torch.randn(3, 1, 2, 16, generator=generator)
                    if not torch.equal(step.attend(position % 2, q, k, v), v):
                        wrong.append((seed, position))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


@pytest.mark.parametrize("plane", ["inline", "shm"])
def test_what_copies_took_comes_with_every_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plane: str) -> None:
    monkeypatch.setattr("attnd_server.execution.step.NO_COPIES", Copies(20, 30))
    with serving(tmp_path) as (_, client), client.create_cache(**GEOMETRY) as cache:
        with cache.session(plane=plane) as session:
            for number in (1, 2, 3):  # on the shm plane the second says what is new, and no more
                attend(session)
                assert session.timings().copy_in_us == 20 * number
                assert session.timings().copy_out_us == 30 * number


def test_a_folder_that_cannot_be_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    service = build_service(ServerConfig(device="cpu", socket_dir=str(tmp_path / "file")))
    with pytest.raises(OSError, match="file"):
        PlaneServer(service, Planes())
    service.executor.close()


def test_timeouts_of_a_socket_are_kept_by_the_kernel() -> None:
    one, other = socket.socketpair()
    with one, other:
        sockets.set_timeouts(one, receive_s=0.02, send_s=0.02)
        with pytest.raises(BlockingIOError):
            one.recv(1)
        with pytest.raises(BlockingIOError):
            one.sendall(bytes(64 << 20))
        other.close()
