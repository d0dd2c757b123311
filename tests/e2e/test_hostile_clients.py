"""Clients that are slow, silent, greedy or gone: the others are served meanwhile, and everything is free afterwards."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest
import torch

import attnd
from attnd.planes.grpc import SERVICE
from attnd.protocol import frames, requests
from attnd.v1 import attention_pb2
from attnd_server.identity.tokens import add_token
from tests import raw_http2
from tests.servers import ServerProcess, wait_for

GEOMETRY = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "num_pages": 8, "page_size": 4, "dtype": "float32"}
Q, K, V = torch.ones(1, 2, 16), torch.ones(1, 2, 16), torch.ones(1, 2, 16)
DECODE = attnd.StepMetadata([1], [0], [[0]], [0], kind="decode")
KEEPALIVE_S = 2.0


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[ServerProcess]:
    common = ["--device", "cpu", "--keepalive-s", str(KEEPALIVE_S), "--drain-s", "0"]
    with ServerProcess(folder / "log", *common, *options) as server:
        yield server
        log = server.log
    assert "internal error" not in log, log


@pytest.fixture(scope="module")
def hardened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for tests that leave nothing behind."""
    limits = ["--max-sessions", "900", "--max-step-reqs", "8192"]
    with serving(tmp_path_factory.mktemp("hardened"), *limits) as server:
        yield server


def num_descriptors(server: ServerProcess) -> int:
    return len(os.listdir(f"/proc/{server.pid}/fd"))


@contextmanager
def working(server: ServerProcess) -> Iterator[Callable[[], None]]:
    """A worker on an open stream; each call of what is given does a step and checks what comes of it."""
    with attnd.connect(server.address, plane="inline") as client, client.create_cache(**GEOMETRY) as cache:
        with cache.session() as session:

            def work() -> None:
                step = session.step(DECODE)
                for layer in range(2):
                    assert torch.equal(step.attend(layer, Q, K, V), V)

            work()
            yield work


@pytest.fixture
def many_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1_500:
        pytest.skip(f"this user may have {hard} descriptors only")
    if soft != resource.RLIM_INFINITY and soft < 1_500:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1_500, hard))


@pytest.mark.usefixtures("many_descriptors")
def test_a_thousand_connections_that_send_half_a_message(hardened: ServerProcess) -> None:
    """Some say nothing, some stop within the opening, within the headers or within a message. None answers pings."""
    opened = raw_http2.OPENING + raw_http2.request("Attend")
    beginnings = [
        b"",
        raw_http2.PREFACE[:10],
        raw_http2.OPENING,
        opened[:-20],
        opened,
        opened + raw_http2.HALF_A_MESSAGE,
        raw_http2.OPENING + raw_http2.request("CreateCache") + raw_http2.HALF_A_MESSAGE,
        raw_http2.OPENING + raw_http2.request("StoreKv") + raw_http2.HALF_A_MESSAGE,
    ]
    server = hardened
    with working(server) as work:
        before = num_descriptors(server)
        with ExitStack() as stack:
            connections = []
            for index in range(1_000):
                connection = raw_http2.connected(server.address, beginnings[index % len(beginnings)])
                connections.append(stack.enter_context(connection))
                if index % 100 == 0:
                    work()
            with working(server) as newcomer:
                newcomer()
            assert raw_http2.wait_for_end(connections, 15 * KEEPALIVE_S) == 0
            work()
        wait_for(lambda: num_descriptors(server) <= before + 2, "descriptors were not closed")
        work()


def test_a_client_that_only_answers_pings_holds_a_share_of_sessions_and_no_more(tmp_path: Path) -> None:
    """Streams on which nothing or a few bytes come: as many as one principal may have, and none of another's."""
    tokens = str(tmp_path / "tokens")
    credentials = {name: attnd.Credentials(add_token(tokens, name), tls=False) for name in ("slow", "worker")}
    with serving(tmp_path, "--tokens", tokens, "--max-sessions", "6") as server, ExitStack() as stack:
        channel = stack.enter_context(grpc.insecure_channel(server.address))
        metadata = credentials["slow"].metadata()
        release = threading.Event()

        def nothing() -> Iterator[bytes]:
            yield from ()
            release.wait(60)

        def open_stream(method: str) -> grpc.Call:
            call: grpc.Call = channel.stream_stream(SERVICE + method)(nothing(), metadata=metadata)
            return call

        slow = [open_stream(method) for method in ("Attend", "StoreKv", "Attend")]
        with attnd.connect(server.address, credentials=credentials["slow"]) as client:
            with client.create_cache(**GEOMETRY) as cache, cache.session(plane="inline") as session:
                wait_for(lambda: is_refused(session), "more sessions than the share were open")
        with attnd.connect(server.address, credentials=credentials["worker"], plane="inline") as client:
            limits = client.capabilities().limits
            assert (limits.max_sessions, limits.principal_sessions) == (6, 3)
            with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
                assert torch.equal(session.step(DECODE).attend(0, Q, K, V), V)
                for call in slow:
                    call.cancel()
                release.set()
                with attnd.connect(server.address, credentials=credentials["slow"], plane="inline") as freed:
                    with freed.create_cache(**GEOMETRY) as again, again.session() as theirs:
                        wait_for(lambda: not is_refused(theirs), "sessions that ended were not given back")


def is_refused(session: attnd.Session) -> bool:
    """Whether the server has no session left for it."""
    told = ""
    try:
        session.step(DECODE).attend(0, Q, K, V)
    except attnd.Exhausted as error:
        told = str(error)
        session.close()
    limit = "3 sessions of this principal are open, but a principal's limit is 3; 0 are free: close one"
    assert told == "" or told.startswith(limit)
    return told != ""


def test_a_client_that_does_not_read_costs_a_few_answers_of_memory(hardened: ServerProcess) -> None:
    """It sends 400 calls of 1 MiB and takes no answer: gRPC holds it up, and the server reads a few calls ahead."""
    num_tokens, num_calls = 8_192, 400
    geometry = {**GEOMETRY, "num_pages": 1, "num_layers": 1}
    tensors = [torch.ones(num_tokens, 2, 16) for _ in range(3)]
    metadata = attnd.StepMetadata([1] * num_tokens, [0] * num_tokens, [[-1]] * num_tokens, kind="decode")
    server = hardened
    with working(server) as work:
        with attnd.connect(server.address) as client, client.create_cache(**geometry) as cache:
            message = metadata.to_message(1, cache.ref)
            call = requests.attend_call(1, 0, *tensors, requests.DEFAULT_OPTIONS)
            sent = 0

            def flood() -> Iterator[bytes]:
                nonlocal sent
                yield frames.step_request(message)
                while sent < num_calls:
                    sent += 1
                    yield call

            with grpc.insecure_channel(server.address, [("grpc.max_receive_message_length", -1)]) as channel:
                stream = channel.stream_stream(SERVICE + "Attend")(flood())
                assert attention_pb2.AttendResponse.FromString(next(stream)).HasField("step")
                before = server.resident_bytes
                last = -1
                while last != sent:  # until it can send no more
                    last = sent
                    for _ in range(20):
                        work()
                        time.sleep(0.02)
                assert 1 <= sent < num_calls
                assert server.resident_bytes - before < 100 << 20
                stream.cancel()
        work()


def test_without_descriptors_the_server_serves_whom_it_has_and_recovers(tmp_path: Path) -> None:
    with serving(tmp_path, "--socket-dir", str(tmp_path)) as server, working(server) as work, ExitStack() as stack:
        _, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        num_free = 12
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (num_descriptors(server) + num_free, hard))
        connections = [stack.enter_context(raw_http2.connected(server.address)) for _ in range(3 * num_free)]
        wait_for(lambda: has_none_left(server), "descriptors are left")
        for _ in range(20):
            work()
        for connection in connections:
            connection.close()
        with working(server) as newcomer:  # which waits for its connection
            newcomer()
        with attnd.connect(server.address, plane="shm") as client, client.create_cache(**GEOMETRY) as cache:
            with cache.session() as session:
                assert torch.equal(session.step(DECODE).attend(0, Q, K, V), V)


def has_none_left(server: ServerProcess) -> bool:
    """Whether the highest number is taken. (A thread in accept holds one that cannot be seen.)"""
    soft, _ = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    return max(int(name) for name in os.listdir(f"/proc/{server.pid}/fd")) == soft - 1


FROZEN = """
import sys, time, attnd, torch
client = attnd.connect(sys.argv[1], plane="inline")
cache = client.create_cache(num_layers=1, num_kv_heads=2, head_dim=16, num_pages=8, dtype="float32", ttl_s=2)
session = cache.session()
ones = torch.ones(1, 2, 16)
session.step(attnd.StepMetadata([1], [0], [[0]], [0], kind="decode")).attend(0, ones, ones, ones)
print("works", flush=True)
time.sleep(600)
"""


def test_a_client_that_is_frozen_loses_its_session_and_then_its_cache(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with serving(tmp_path, "--max-sessions", "1") as server:
        command = [sys.executable, "-c", FROZEN, server.address]
        frozen = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
        try:
            assert frozen.stdout is not None
            assert frozen.stdout.readline() == "works\n"
            with attnd.connect(server.address, plane="inline") as client, client.create_cache(**GEOMETRY) as cache:
                with cache.session() as session:
                    with pytest.raises(attnd.Exhausted, match="1 sessions are open, but the server's limit is 1"):
                        session.step(DECODE).attend(0, Q, K, V)
                assert len(client.list_caches()) == 2
                frozen.send_signal(signal.SIGSTOP)

                def has_room() -> bool:
                    try:
                        with cache.session() as session:
                            return torch.equal(session.step(DECODE).attend(0, Q, K, V), V)
                    except attnd.Exhausted:
                        return False

                wait_for(has_room, "the session of a client that is away was never ended")
                wait_for(lambda: len(client.list_caches()) == 1, "its cache was never freed")
        finally:
            frozen.kill()
            frozen.wait()
            assert frozen.stdout is not None
            frozen.stdout.close()


def test_a_server_that_is_frozen_is_noticed_long_before_the_timeout(hardened: ServerProcess) -> None:
    server = hardened
    with (
        attnd.connect(server.address, timeout_s=300, keepalive_s=KEEPALIVE_S, plane="inline") as client,
        client.create_cache(**GEOMETRY) as cache,
        cache.session() as session,
    ):
        step = session.step(DECODE)
        assert torch.equal(step.attend(0, Q, K, V), V)
        server.freeze()
        try:
            with pytest.raises(attnd.Disconnected, match="ping timeout"):
                step.attend(1, Q, K, V)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert torch.equal(session.step(DECODE).attend(1, Q, K, V), V)


def test_a_keepalive_that_the_server_would_take_for_an_attack_is_refused() -> None:
    with pytest.raises(attnd.InvalidRequest, match=r"keepalive_s is 0\.5, but must be at least 1 seconds"):
        attnd.connect("localhost:1", keepalive_s=0.5)


def test_a_message_beyond_the_limit_is_refused_with_limit_and_size(tmp_path: Path) -> None:
    with serving(tmp_path, "--max-message-bytes", "1MiB") as server, working(server) as work:
        with attnd.connect(server.address, plane="inline") as client, client.create_cache(**GEOMETRY) as cache:
            assert client.capabilities().limits.max_message_bytes == 1 << 20
            many = torch.ones(10_000, 2, 16)
            metadata = attnd.StepMetadata([10_000], [0], [[]], None)
            with pytest.raises(attnd.Exhausted, match=r"larger than max \(\d+ vs\. 1048576\)"):
                client.prefill(cache, metadata, 0, many, many, many)
        work()
