"""Who connects to the socket of the planes and is slow: it has one deadline, and keeps nobody else out."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import torch

import attnd
from attnd.protocol import frames, requests
from attnd.protocol.shm import framing, sockets
from attnd.v1 import plane_pb2
from tests.raw_shm import AGAIN, RawClient
from tests.servers import ServerProcess, mapped, wait_for

GEOMETRY = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 16, "num_pages": 8, "page_size": 4, "dtype": "float32"}
ONE = torch.ones(1, 2, 16)
DECODE = attnd.StepMetadata([1], [0], [[0]], [0], kind="decode")
MAX_PLANES = 16


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("slow")
    options = ["--device", "cpu", "--socket-dir", str(folder / "sockets"), "--max-planes", str(MAX_PLANES)]
    with ServerProcess(folder / "log", *options, "--drain-s", "1") as running:
        yield running
        assert "internal error" not in running.log, running.log


def num_descriptors(server: ServerProcess) -> int:
    return len(os.listdir(f"/proc/{server.pid}/fd"))


def num_threads(server: ServerProcess) -> int:
    return len(os.listdir(f"/proc/{server.pid}/task"))


def opened(client: attnd.Client) -> plane_pb2.OpenPlaneResponse:
    return plane_pb2.OpenPlaneResponse.FromString(client.transport.unary("OpenPlane", b"", 10))


def connected(path: str, data: bytes = b"") -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)  # waits where many do
    connection.settimeout(20)
    connection.sendall(data)
    return connection


def attend(cache: attnd.Cache) -> None:
    with cache.session(plane="shm") as session:
        assert torch.equal(session.step(DECODE).attend(0, ONE, ONE, ONE), ONE)
        assert session.plane == "shm"


@pytest.mark.slow
def test_a_ticket_that_comes_byte_by_byte_has_one_deadline_for_all_of_it(server: ServerProcess) -> None:
    with attnd.connect(server.address) as client:
        path = opened(client).shm.socket_path
        with connected(path) as connection:
            sent = 0
            try:
                while sent < sockets.TICKET_BYTES - 1:  # half a minute
                    connection.sendall(b"x")
                    sent += 1
                    time.sleep(1)
            except (BrokenPipeError, ConnectionResetError):
                pass
            assert sent < 20
            with pytest.raises(attnd.DeadlineExceeded, match="was not here within 5 s"):
                sockets.receive_memories(connection, 1)


def test_others_get_in_past_any_number_who_show_nothing(server: ServerProcess) -> None:
    """More than there are places; some say nothing, some a part, all of one process, and all before this client."""
    threads, descriptors = num_threads(server), num_descriptors(server)
    with attnd.connect(server.address) as client, client.create_cache(**GEOMETRY) as cache, ExitStack() as stack:
        path = opened(client).shm.socket_path
        for index in range(300):
            stack.enter_context(connected(path, b"x" * (index % sockets.TICKET_BYTES)))
        for _ in range(3):
            attend(cache)
        assert num_threads(server) <= threads + 30
        assert num_descriptors(server) <= descriptors + 100


def test_descriptors_that_come_unasked_are_closed(server: ServerProcess) -> None:
    with attnd.connect(server.address) as client, client.create_cache(**GEOMETRY) as cache:
        with closing(RawClient(client, cache)) as raw:
            before = num_descriptors(server)
            plane = opened(client)
            with connected(plane.shm.socket_path) as knocking, (Path(os.devnull)).open() as file:
                for _ in range(20):
                    socket.send_fds(raw.socket, [AGAIN], [file.fileno()] * 50)
                    assert raw.answer() == "call"
                for byte in plane.shm.ticket:
                    socket.send_fds(knocking, [bytes([byte])], [file.fileno()] * 50)
                (memory,) = sockets.receive_memories(knocking, 1)
                os.close(memory)
                assert num_descriptors(server) <= before + 10


@pytest.mark.slow
@pytest.mark.parametrize("num_bytes", [10, 20, 5_000])
def test_a_message_that_does_not_end_ends_the_plane(server: ServerProcess, num_bytes: int) -> None:
    """Its bytes come one a second, each long before a wait would be too long."""
    before = mapped(server.pid)
    with attnd.connect(server.address) as client, client.create_cache(**GEOMETRY) as cache:
        with closing(RawClient(client, cache)) as raw:
            message = framing.request_bytes(bytes(10_000))
            raw.socket.sendall(message[:num_bytes])
            ended = time.monotonic() + 60
            with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012  # as many as it takes
                for byte in message[num_bytes:]:
                    raw.socket.sendall(bytes([byte]))
                    time.sleep(0.5)
                    assert time.monotonic() < ended
        attend(cache)
    wait_for(lambda: mapped(server.pid) <= before, "the region of a plane that was ended is left")


def test_a_length_beyond_any_step_is_refused_before_a_byte_of_it_came(server: ServerProcess) -> None:
    with attnd.connect(server.address) as client, client.create_cache(**GEOMETRY) as cache:
        with closing(RawClient(client, cache)) as raw:
            raw.socket.sendall(struct.pack("<IIQI", 250 << 20, 0, 0, 0))
            assert raw.replies.receive() is None
        attend(cache)


def test_calls_with_large_tensors_in_their_messages_are_not_kept(server: ServerProcess) -> None:
    """A lane may say "again" of what lies in the region; of 4 MiB beside it, no."""
    with attnd.connect(server.address) as client, client.create_cache(**GEOMETRY) as cache:
        with closing(RawClient(client, cache)) as raw:
            num_tokens = 4_000
            many = torch.ones(num_tokens, 2, 16)
            metadata = attnd.StepMetadata([1] * num_tokens, [0] * num_tokens, [[-1]] * num_tokens, kind="decode")
            step = frames.step_request(metadata.to_message(2, cache.ref))
            call = requests.attend_call(2, 0, many, many, many, attnd.AttentionOptions())
            for kind, message in (("step", step), ("call", call)):
                raw.socket.sendall(framing.request_bytes(message))
                assert raw.answer() == kind
            raw.socket.sendall(framing.repeated_call(0, 2, 0))
            reply = raw.replies.receive()
            assert reply is not None
            assert b"there was no call in lane 0, of at most 262144 bytes, that is meant again" in reply.message
