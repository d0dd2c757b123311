"""The shm plane when somebody is killed, hangs or has no right to it: told at once, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import attnd
from attnd.protocol.shm import framing, sockets
from attnd.v1 import attention_pb2, plane_pb2, step_pb2
from tests.servers import ServerProcess, mapped, wait_for

GEOMETRY = {"num_layers": 4, "num_kv_heads": 2, "head_dim": 16, "num_pages": 8, "page_size": 4, "dtype": "float32"}
Q, K, V = torch.ones(1, 2, 16), torch.ones(1, 2, 16), torch.ones(1, 2, 16)

# Calls attention without end, over memory of a few MiB.
WORKER = """
import sys, torch, attnd
client = attnd.connect(sys.argv[1], plane="shm")
cache = client.create_cache(num_layers=1, num_kv_heads=1, head_dim=64, num_pages=256, dtype="float32", ttl_s=1)
session = cache.session()
q, k, v = torch.randn(2048, 4, 64), torch.randn(2048, 1, 64), torch.randn(2048, 1, 64)
step = session.step(attnd.StepMetadata([2048], [0], [list(range(256))]))
while True:
    step.attend(0, q, k, v)
    print("called", flush=True)
"""


@pytest.fixture
def shm_server(tmp_path: Path) -> Iterator[ServerProcess]:
    with serve(tmp_path) as process:
        yield process
        log = process.log
    assert "internal error" not in log, log


def serve(folder: Path, port: int = 0) -> ServerProcess:
    return ServerProcess(folder / "log", "--device", "cpu", "--socket-dir", str(folder / "sockets"), port=port)


def decode_metadata(context_len: int) -> attnd.StepMetadata:
    return attnd.StepMetadata([1], [context_len], [[0, 1, 2, 3, 4, 5, 6, 7]], [context_len], kind="decode")


def test_killed_clients_leave_nothing_with_the_server(shm_server: ServerProcess) -> None:
    for _ in range(3):
        command = [sys.executable, "-c", WORKER, shm_server.address]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as worker:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "called\n"  # and so the next is under way
            assert mapped(shm_server.pid) > 0
            worker.kill()
        wait_for(lambda: mapped(shm_server.pid) == 0, "the server kept a dead client's region")
    with attnd.connect(shm_server.address, plane="shm") as client, client.create_cache(**GEOMETRY) as cache:
        with cache.session() as session:
            assert torch.equal(session.step(decode_metadata(0)).attend(0, Q, K, V), V)
        wait_for(lambda: mapped(shm_server.pid) == 0, "the server kept a closed session's region")
        assert mapped(os.getpid()) == 0


def in_another_container() -> list[str]:
    """What runs a command with processes, shared memory and mounts of its own, but the same network and files."""
    own = ["unshare", "--fork", "--kill-child", "--pid", "--ipc", "--mount", "--mount-proc"]
    return [*own, "sh", "-c", 'mount -t tmpfs none /dev/shm && exec "$@"', "sh"]


def may_make_containers() -> bool:
    try:
        return subprocess.run([*in_another_container(), "true"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not may_make_containers(), reason="may not make namespaces here")
def test_a_worker_in_another_container_needs_the_folder_alone(shm_server: ServerProcess) -> None:
    command = [*in_another_container(), sys.executable, "-c", WORKER, shm_server.address]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "called\n"
        worker.kill()
    wait_for(lambda: mapped(shm_server.pid) == 0, "the server kept a dead client's region")


def test_killed_server_disconnects_and_the_next_one_removes_its_socket(tmp_path: Path) -> None:
    server = serve(tmp_path)
    with attnd.connect(server.address, timeout_s=5, plane="shm") as client:
        cache = client.create_cache(**GEOMETRY)
        session = cache.session()
        step = session.step(decode_metadata(0))
        step.attend(0, Q, K, V)
        # Stopped first, so that it is in the middle of the call when it is killed.
        server.freeze()
        killer = threading.Timer(0.3, server.kill)
        killer.start()
        started = time.monotonic()
        with pytest.raises(attnd.Disconnected, match="no connection to the server at"):
            step.attend(1, Q, K, V)
        assert time.monotonic() - started < 4
        killer.join()
        assert mapped(os.getpid()) == 0
        (left,) = (tmp_path / "sockets").iterdir()

        with serve(tmp_path, port=server.port):
            assert left.name not in [path.name for path in (tmp_path / "sockets").iterdir()]
            with pytest.raises(attnd.Disconnected, match="open the step again"):
                step.attend(1, Q, K, V)
            with client.create_cache(**GEOMETRY) as again, again.session() as new_session:
                assert torch.equal(new_session.step(decode_metadata(0)).attend(0, Q, K, V), V)
                assert new_session.plane == "shm"
            with pytest.raises(attnd.EpochMismatch):
                session.step(decode_metadata(1)).attend(0, Q, K, V)
            session.close()
        assert list((tmp_path / "sockets").iterdir()) == []
    server.stop()


def test_server_that_hangs_is_noticed_within_the_deadline(shm_server: ServerProcess) -> None:
    with attnd.connect(shm_server.address, plane="shm") as client:
        cache = client.create_cache(**GEOMETRY)
        with cache.session() as session:
            session.timeout_s = 1.0
            step = session.step(decode_metadata(0))
            step.attend(0, Q, K, V)
            shm_server.freeze()
            try:
                started = time.monotonic()
                with pytest.raises(attnd.DeadlineExceeded, match="no answer within 1 s"):
                    step.attend(1, Q, K, V)
                assert time.monotonic() - started < 3
            finally:
                os.kill(shm_server.pid, signal.SIGCONT)
            assert torch.equal(session.step(decode_metadata(0)).attend(0, Q, K, V), V)


def test_sigterm_lets_the_open_step_finish_and_refuses_the_next(tmp_path: Path) -> None:
    with serve(tmp_path) as server, attnd.connect(server.address, plane="shm") as client:
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


def test_a_session_that_learns_of_the_end_when_it_sends_says_why(tmp_path: Path) -> None:
    with serve(tmp_path) as server, attnd.connect(server.address, plane="shm") as client:
        session = client.create_cache(**GEOMETRY).session()
        step = session.step(decode_metadata(0))
        for layer in range(4):
            step.attend(layer, Q, K, V)
        server.terminate()
        assert server.wait(20) == 0
        with pytest.raises(attnd.Disconnected, match="the server is draining; the next step reconnects"):
            session.step(decode_metadata(1))
        session.close()


def test_a_session_that_nobody_closes_does_not_hold_up_the_end(tmp_path: Path) -> None:
    options = ("--device", "cpu", "--socket-dir", str(tmp_path / "sockets"), "--drain-s", "1")
    with ServerProcess(tmp_path / "log", *options) as server, attnd.connect(server.address, plane="shm") as client:
        session = client.create_cache(**GEOMETRY).session()
        session.step(decode_metadata(0)).attend(0, Q, K, V)
        server.terminate()
        assert server.wait(20) == 0
        session.close()


def test_a_server_that_cannot_have_its_port_leaves_no_socket(shm_server: ServerProcess, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="did not start"):
        ServerProcess(tmp_path / "other", "--socket-dir", str(tmp_path / "sockets"), port=shm_server.port)
    assert len(list((tmp_path / "sockets").iterdir())) == 1  # that of the one that serves


def knock(plane: plane_pb2.OpenPlaneResponse, ticket: bytes) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(10)
    connection.connect(plane.shm.socket_path)
    connection.sendall(ticket)
    return connection


def test_only_a_fresh_ticket_opens_the_door_and_garbage_ends_the_plane(shm_server: ServerProcess) -> None:
    with attnd.connect(shm_server.address) as client:
        plane = plane_pb2.OpenPlaneResponse.FromString(client.transport.unary("OpenPlane", b"", 10))
        assert plane.shm.num_bytes == 512 << 20
        with knock(plane, bytes(32)) as stranger:
            with pytest.raises(attnd.PermissionDenied, match="the ticket is unknown, used or older than 10 s"):
                sockets.receive_memories(stranger, 1)[0]
        with knock(plane, plane.shm.ticket[:31]) as impatient:
            impatient.shutdown(socket.SHUT_WR)
            with pytest.raises(attnd.PermissionDenied):
                sockets.receive_memories(impatient, 1)[0]
        with knock(plane, plane.shm.ticket) as connection:
            memory = sockets.map_memory(sockets.receive_memories(connection, 1)[0], plane.shm.num_bytes)
            with knock(plane, plane.shm.ticket) as second, pytest.raises(attnd.PermissionDenied):
                sockets.receive_memories(second, 1)[0]
            replies = framing.Replies(connection)
            for request, field in (
                (framing.repeated_call(0, 1, 0), ""),
                (framing.repeated_call(0, 1, 1 << 31), ""),
                (framing.request_bytes(b"\xff" * 40), ""),
            ):
                connection.sendall(request)
                reply = replies.receive()
                assert reply is not None
                assert b"message" in reply.message, field
            call = attention_pb2.AttendRequest(call=step_pb2.Call()).SerializeToString()
            connection.sendall(framing.request_bytes(call, 4))
            reply = replies.receive()
            assert reply is not None
            assert b"lane is 4, but must be in 0..3" in reply.message
            connection.sendall(b"\xff" * 20)  # a length beyond every limit
            assert replies.receive() is None
            del memory
        wait_for(lambda: mapped(shm_server.pid) == 0, "the server kept the region")


def test_closing_the_plane_by_its_id_ends_it(shm_server: ServerProcess) -> None:
    with attnd.connect(shm_server.address, plane="shm") as client, client.create_cache(**GEOMETRY) as cache:
        session = cache.session()
        step = session.step(decode_metadata(0))
        step.attend(0, Q, K, V)
        client.transport.unary("ClosePlane", plane_pb2.ClosePlaneRequest(id=1).SerializeToString(), 10)
        with pytest.raises(attnd.Disconnected):
            step.attend(1, Q, K, V)
        wait_for(lambda: mapped(shm_server.pid) == 0, "the server kept the region")
        with pytest.raises(attnd.InvalidRequest, match="id is 1, but no such plane is open"):
            client.transport.unary("ClosePlane", plane_pb2.ClosePlaneRequest(id=1).SerializeToString(), 10)
