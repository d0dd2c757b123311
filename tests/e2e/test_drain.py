"""A server that is asked to end: its clients are idle, in the middle of something, or at a call that takes long."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import attnd
from attnd.planes.grpc import SERVICE
from attnd.protocol import requests
from attnd.v1 import attention_pb2
from attnd_server.identity.tokens import add_token
from tests import raw_http2
from tests.servers import ROOT, ServerProcess, wait_for

GEOMETRY: dict[str, Any] = {
    "num_layers": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "num_pages": 8,
    "page_size": 4,
    "dtype": "float32",
}
Q = K = V = torch.ones(1, 2, 16)
DECODE = attnd.StepMetadata([1], [0], [[0]], [0], kind="decode")
# A drain that nobody waits for, and seconds within which a server has ended that does not.
DRAIN = ["--drain-s", "900"]
SOON_S = 120
# Attention of one call that takes minutes on a few cores: 256 tokens x 512 heads over one page named 65,536 times.
LONG_CONTEXT, LONG_PAGE = 1 << 20, 16


def serving(folder: Path, *options: str) -> ServerProcess:
    return ServerProcess(folder / "log", "--device", "cpu", *options)


def whole_step(session: attnd.Session) -> None:
    step = session.step(DECODE)
    for layer in range(GEOMETRY["num_layers"]):
        assert torch.equal(step.attend(layer, Q, K, V), V)


@contextmanager
def idle_sessions(server: ServerProcess, plane: str, number: int) -> Iterator[None]:
    with ExitStack() as stack:
        client = stack.enter_context(attnd.connect(server.address, plane=plane))
        for _ in range(number):
            session = stack.enter_context(stack.enter_context(client.create_cache(**GEOMETRY)).session())
            whole_step(session)
            assert session.plane == plane
        yield


@contextmanager
def abandoned_step(server: ServerProcess, plane: str) -> Iterator[None]:
    """Its first layer was called, and nobody will ever call the second."""
    with attnd.connect(server.address, plane=plane) as client, client.create_cache(**GEOMETRY) as cache:
        with cache.session() as session:
            session.step(DECODE).attend(0, Q, K, V)
            yield


@contextmanager
def idle_store_kv(server: ServerProcess) -> Iterator[None]:
    """A stream of one chunk that was stored, and no end."""
    with attnd.connect(server.address) as client, client.create_cache(**GEOMETRY) as cache:
        chunk = next(iter(requests.store_kv(cache.ref, 0, torch.arange(1, dtype=torch.int32), K, V)))
        more = threading.Event()

        def chunks() -> Iterator[bytes]:
            yield chunk
            more.wait()

        with grpc.insecure_channel(server.address) as channel:
            answers = channel.stream_stream(f"{SERVICE}StoreKv")(chunks())
            assert not attention_pb2.StoreKvResponse.FromString(next(answers)).HasField("error")
            yield
            more.set()


@contextmanager
def watched_health(server: ServerProcess) -> Iterator[None]:
    with grpc.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        yield


@contextmanager
def open_reflection(server: ServerProcess) -> Iterator[None]:
    more = threading.Event()

    def asked() -> Iterator[Any]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        more.wait()

    with grpc.insecure_channel(server.address) as channel:
        answers = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(asked())
        assert next(answers).list_services_response.service
        yield
        more.set()


@contextmanager
def half_sent(server: ServerProcess) -> Iterator[None]:
    data = raw_http2.OPENING + raw_http2.request("ListCaches") + raw_http2.HALF_A_MESSAGE
    with raw_http2.connected(server.address, data):
        yield


@contextmanager
def nothing_read(server: ServerProcess) -> Iterator[None]:
    """A ReadKv of more than the connection holds, whose client reads its first chunk and no more."""
    geometry = GEOMETRY | {"head_dim": 256, "num_pages": 4096, "page_size": 16}
    with attnd.connect(server.address) as client, client.create_cache(**geometry) as cache:
        request = requests.read_kv(cache.ref, 0, torch.arange(4096 * 16, dtype=torch.int32))
        options = [("grpc.max_receive_message_length", 16 << 20)]
        with grpc.insecure_channel(server.address, options) as channel:
            answers = channel.unary_stream(f"{SERVICE}ReadKv")(request)
            next(answers)
            yield
            answers.cancel()


IDLE: dict[str, Callable[[ServerProcess], Any]] = {
    "inline": lambda server: idle_sessions(server, "inline", 1),
    "several_inline": lambda server: idle_sessions(server, "inline", 3),
    "shm": lambda server: idle_sessions(server, "shm", 1),
    "several_shm": lambda server: idle_sessions(server, "shm", 3),
    "abandoned_inline": lambda server: abandoned_step(server, "inline"),
    "abandoned_shm": lambda server: abandoned_step(server, "shm"),
    "store_kv": idle_store_kv,
    "read_kv": nothing_read,
    "health": watched_health,
    "reflection": open_reflection,
    "half_sent": half_sent,
}


@pytest.mark.parametrize("kind", IDLE)
def test_what_is_idle_does_not_hold_up_the_end(kind: str, tmp_path: Path) -> None:
    with serving(tmp_path, "--socket-dir", str(tmp_path / "sockets"), *DRAIN) as server:
        try:
            with IDLE[kind](server):
                server.terminate()
                assert server.wait(SOON_S) == 0, server.log
        finally:
            server.kill()
        assert "stopped" in server.log
        assert "Traceback" not in server.log
    assert list((tmp_path / "sockets").iterdir()) == []


@pytest.mark.parametrize("plane", ["inline", "shm"])
def test_an_open_step_finishes_while_an_idle_stream_ends(plane: str, tmp_path: Path) -> None:
    with serving(tmp_path, "--socket-dir", str(tmp_path / "sockets"), *DRAIN) as server:
        try:
            with attnd.connect(server.address, plane=plane) as client, client.create_cache(**GEOMETRY) as cache:
                with cache.session() as session, grpc.insecure_channel(server.address) as channel:
                    whole_step(session)
                    asked: queue.SimpleQueue[bytes] = queue.SimpleQueue()
                    idle = channel.stream_stream(f"{SERVICE}Attend")(iter(asked.get, None))
                    asked.put(b"")
                    assert attention_pb2.AttendResponse.FromString(next(idle)).HasField("error")
                    opened = session.step(DECODE)
                    opened.attend(0, Q, K, V)
                    server.terminate()
                    message = attention_pb2.AttendResponse.FromString(next(idle))
                    assert message.WhichOneof("message") == "going_away"
                    ended = threading.Event()
                    threading.Thread(target=lambda: (list_until_end(idle), ended.set()), daemon=True).start()
                    while not ended.is_set():  # a step is under way for as long as its calls come
                        assert torch.equal(opened.attend(0, Q, K, V), V)
                    assert torch.equal(opened.attend(1, Q, K, V), V)
                    assert idle.code() is grpc.StatusCode.UNAVAILABLE
                    assert server.wait(SOON_S) == 0
        finally:
            server.kill()


def list_until_end(stream: Any) -> None:
    try:
        for _ in stream:
            pass
    except grpc.RpcError:
        pass


@pytest.mark.parametrize("plane", ["inline", "shm"])
def test_idle_clients_reconnect_to_the_next_server(plane: str, tmp_path: Path) -> None:
    options = ["--socket-dir", str(tmp_path / "sockets"), *DRAIN]
    first = serving(tmp_path, *options)

    async def first_layer(session: attnd.aio.AsyncSession) -> None:
        await (await session.step(DECODE)).attend(0, Q, K, V)

    async def goes_on() -> None:
        async with await attnd.aio.connect(first.address, plane=plane) as client:
            cache = await client.create_cache(**GEOMETRY)
            async with cache.session() as session:
                step = await session.step(DECODE)
                for layer in range(2):
                    await step.attend(layer, Q, K, V)
                first.terminate()
                await asyncio.to_thread(first.wait, SOON_S)
                with await asyncio.to_thread(
                    ServerProcess, first.log_path, "--device", "cpu", *options, port=first.port
                ):
                    with pytest.raises(attnd.Disconnected):
                        await first_layer(session)
                    with pytest.raises(attnd.EpochMismatch):
                        await first_layer(session)

    asyncio.run(goes_on())
    first.stop()

    first = serving(tmp_path, *options)
    with attnd.connect(first.address, plane=plane, connect_timeout_s=60) as client:
        cache = client.create_cache(**GEOMETRY)
        session = cache.session()
        whole_step(session)
        first.terminate()
        first.wait(SOON_S)
        with ServerProcess(first.log_path, "--device", "cpu", *options, port=first.port):
            with pytest.raises(attnd.Disconnected):
                whole_step(session)
            with pytest.raises(attnd.EpochMismatch):  # the next one reconnects, whatever was read of the first stream
                whole_step(session)
            session.close()
    first.stop()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("saves", [False, True])
def test_a_second_signal_ends_the_process(second: signal.Signals, saves: bool, tmp_path: Path) -> None:
    options = ["--snapshot-dir", str(tmp_path / "snapshots")] if saves else []
    with serving(tmp_path, *DRAIN, *options) as server, attnd.connect(server.address) as client:
        cache = client.create_cache(**GEOMETRY)
        step = cache.session().step(DECODE)
        step.attend(0, Q, K, V)
        ended = threading.Event()

        def go_on() -> None:
            while not ended.is_set():
                try:
                    step.attend(0, Q, K, V)
                except attnd.AttndError:
                    return

        worker = threading.Thread(target=go_on)
        worker.start()
        try:
            server.signal(signal.SIGINT if second is signal.SIGTERM else signal.SIGTERM)
            wait_for(lambda: "draining" in server.log, "it does not drain")
            server.signal(second)
            assert server.wait(SOON_S) == (3 if saves else 0)
        finally:
            ended.set()
            server.kill()
            worker.join()
        assert "ended by a second signal" in server.log


def test_signals_at_any_moment_leave_whole_snapshots(tmp_path: Path) -> None:
    options = ["--snapshot-dir", str(tmp_path / "snapshots"), "--restore", *DRAIN]
    for pause_s in (0, 0.05, 0.2):
        with serving(tmp_path, *options) as server, attnd.connect(server.address) as client:
            held = len(client.list_caches())
            for number in range(8):
                cache = client.create_cache(**GEOMETRY | {"num_pages": 1024}, name=f"cache {number}", renew=False)
                cache.store_kv(0, torch.arange(4096, dtype=torch.int32), K.expand(4096, -1, -1), V.expand(4096, -1, -1))
            server.terminate()
            wait_for(lambda: "draining" in server.log, "it does not drain")
            threading.Event().wait(pause_s)
            server.terminate()
            code = server.wait(SOON_S)
        written = [path for path in (tmp_path / "snapshots").iterdir() if not path.name.startswith(".")]
        assert code == (0 if len(written) == held + 8 else 3)


@pytest.mark.slow
def test_a_stop_before_it_serves_leaves_the_snapshots(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots"
    options = ["--snapshot-dir", str(folder), "--restore"]
    with serving(tmp_path, *options) as server, attnd.connect(server.address) as client:
        cache = client.create_cache(**GEOMETRY | {"num_pages": 32768}, renew=False)
        slots = torch.arange(131072, dtype=torch.int32)
        cache.store_kv(0, slots, K.expand(len(slots), -1, -1), V.expand(len(slots), -1, -1))
        server.terminate()
        assert server.wait(SOON_S) == 0
    (snapshot,) = folder.iterdir()
    for pause_s in (0, 0.1, 0.3, 0.6, 1.0):
        command = [sys.executable, "-m", "attnd_server", "serve", "--port", "0", "--device", "cpu", *options]
        with (tmp_path / "log").open("wb") as log:
            starting = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, env=ServerProcess.environment()
            )
        wait_for(lambda: "starting" in server.log, "it does not start")
        threading.Event().wait(pause_s)
        starting.send_signal(signal.SIGTERM)
        starting.communicate(timeout=SOON_S)
        # -15: before anybody listened to the signal.
        assert starting.returncode in (0, -signal.SIGTERM)
        assert [path.name[:32] for path in folder.iterdir()] == [snapshot.name[:32]]


def seconds_of_work(server: ServerProcess) -> float:
    """That all its threads have had a core."""
    times = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")


def long_call(cache: attnd.Cache) -> None:
    """A call that nobody can wait for."""
    num_pages = LONG_CONTEXT // LONG_PAGE
    step = attnd.StepMetadata([256], [LONG_CONTEXT], [[0] * num_pages], None, cache_only=True)
    try:
        cache.session().step(step).attend(0, torch.ones(256, 512, 8), None, None)
    except attnd.AttndError:
        pass


def test_a_call_that_takes_long_costs_nobody_else_a_cache(tmp_path: Path) -> None:
    folder, tokens = tmp_path / "snapshots", tmp_path / "tokens"
    alices, mallorys = (attnd.Credentials(add_token(str(tokens), name), tls=False) for name in ("alice", "mallory"))
    options = ["--snapshot-dir", str(folder), "--drain-s", "1", "--tokens", str(tokens)]
    with serving(tmp_path, *options) as server:
        with attnd.connect(server.address, credentials=mallorys) as mallory:
            with attnd.connect(server.address, credentials=alices) as alice:
                kept = [alice.create_cache(**GEOMETRY, name=f"kept {number}") for number in range(3)]
                for each in kept:
                    with each.session() as session:
                        whole_step(session)
                geometry = GEOMETRY | {"num_kv_heads": 512, "head_dim": 8, "page_size": LONG_PAGE, "num_pages": 2}
                own = mallory.create_cache(**geometry)
                own.store_kv(0, torch.arange(16, dtype=torch.int32), *[torch.ones(16, 512, 8)] * 2)
                idle_s = seconds_of_work(server)
                caller = threading.Thread(target=long_call, args=(own,), daemon=True)
                caller.start()
                wait_for(lambda: seconds_of_work(server) > idle_s + 2, "the call does not run")
                server.terminate()
                code = server.wait(SOON_S)
                caller.join()
        written = {path.name[:32] for path in folder.iterdir()}
        assert {each.ref.id.hex() for each in kept} <= written
        if own.ref.id.hex() in written:
            assert code == 0
        else:
            assert code == 3
            assert "cache lost: a call of it still runs" in server.log
            assert own.ref.id.hex() in server.log


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_a_backlog_of_the_verifier_does_not_spoil_the_end(number: int, tmp_path: Path) -> None:
    options = ["--verify", "1", "--drain-s", "5"]
    geometry = GEOMETRY | {"head_dim": 128, "num_kv_heads": 8, "num_pages": 256, "page_size": 16}
    with serving(tmp_path, *options) as server, attnd.connect(server.address) as client:
        q = torch.randn(1024, 8, 128)
        step = attnd.StepMetadata([1024], [0], [list(range(64))], list(range(1024)))
        with client.create_cache(**geometry) as cache, cache.session() as session:
            for layer in range(8):
                session.step(step).attend(layer % 2, q, q, q)
        server.terminate()
        assert server.wait(SOON_S) == 0
    assert "stopped" in server.log


def test_a_process_with_an_inproc_server_ends_while_a_call_runs() -> None:
    program = f"""
import torch, attnd
client = attnd.connect("inproc://")
cache = client.create_cache(num_layers=1, num_kv_heads=64, head_dim=8, num_pages=2, page_size=16, dtype="float32")
step = attnd.StepMetadata([256], [{1 << 18}], [[0] * {(1 << 18) // 16}], None, cache_only=True)
session = cache.session()
session.timeout_s = 0.5
try:
    session.step(step).attend(0, torch.ones(256, 64, 8), None, None)
except attnd.DeadlineExceeded:
    print("gave up")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=SOON_S, check=False)
    assert (ended.returncode, ended.stdout) == (0, "gave up\n"), ended.stderr
