"""What may be sent to a server: without a token some MiB, by a client messages in part, and whole ones without end."""

from __future__ import annotations

import gzip
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import attnd
from attnd.planes.grpc import SERVICE
from attnd.v1 import cache_pb2, capabilities_pb2
from attnd_server import health_probe
from attnd_server.identity.tokens import add_token
from attnd_server.rpc import arrivals
from tests import raw_http2
from tests.servers import ServerProcess

CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
SERVING = health_pb2.HealthCheckResponse.SERVING
# Of each RPC that is open and not read, a window of 512 KiB; and what malloc keeps.
MOST_BYTES = 150 << 20
# The largest message, 256 MiB, what comes beside it, and what comes until the server looks again.
MOST_OF_A_PRINCIPAL = 600 << 20


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, attnd.Credentials]]:
    """A server that asks for tokens, and whom it lets in."""
    folder = tmp_path_factory.mktemp("guarded")
    tokens = str(folder / "tokens")
    shown = attnd.Credentials(add_token(tokens, "alice"), tls=False)
    with ServerProcess(folder / "log", "--device", "cpu", "--drain-s", "0", "--tokens", tokens) as server:
        with attnd.connect(server.address, credentials=shown) as client:
            client.capabilities()
        yield server, shown
        assert "internal error" not in server.log


@contextmanager
def flooding(server: ServerProcess, *floods: raw_http2.Flood) -> Iterator[Callable[[], int]]:
    """Sends until nothing goes any more; the most memory that the server has taken since."""
    before = peak = server.resident_bytes
    with ExitStack() as stack:
        for flood in floods:
            stack.callback(flood.close)

        def push() -> int:
            nonlocal peak
            idle_since = deadline = time.monotonic()
            while time.monotonic() < min(idle_since + 1.0, deadline + 20.0):
                pushed = [flood.push() for flood in floods]
                if any(pushed):
                    idle_since = time.monotonic()
                else:
                    time.sleep(0.005)
                peak = max(peak, server.resident_bytes)
            return peak - before

        yield push


@pytest.mark.parametrize(
    ("methods", "headers"),
    [
        ([CHECK] * 40, ()),
        ([WATCH] * 40, ()),
        ([REFLECTION] * 40, ()),
        (["Prefill", "CreateCache", "Attend", "StoreKv", "ReadKv"] * 8, ()),
        (["Prefill", "Attend"] * 20, ((b"authorization", b"Bearer of nothing"),)),
        (["/nobody.knows/It", "Unknown", "/grpc.health.v1.Health/Unknown"] * 13, ()),
    ],
    ids=["Check", "Watch", "reflection", "ours", "wrong token", "unknown"],
)
def test_half_messages_of_nobody_cost_some_windows(
    guarded: tuple[ServerProcess, attnd.Credentials], methods: list[str], headers: tuple[tuple[bytes, bytes], ...]
) -> None:
    server, _ = guarded
    with flooding(server, raw_http2.Flood(server.address, methods, 100 << 20, *headers)) as push:
        assert push() < MOST_BYTES
        assert health_probe.failure(server.address) is None
        with grpc.insecure_channel(server.address) as channel:
            assert (
                health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20).status == SERVING
            )


def test_a_thousand_streams_on_each_of_several_connections_cost_no_more(
    guarded: tuple[ServerProcess, attnd.Credentials],
) -> None:
    server, shown = guarded
    floods = [raw_http2.Flood(server.address, [method] * 1_000, 100 << 20) for method in (CHECK, WATCH, REFLECTION)]
    with flooding(server, *floods) as push:
        assert push() < MOST_BYTES
        assert health_probe.failure(server.address) is None
        with attnd.connect(server.address, credentials=shown) as client:
            assert client.list_caches() == []


def test_probes_and_reflection_go_on_without_a_token(guarded: tuple[ServerProcess, attnd.Credentials]) -> None:
    server, _ = guarded
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "attnd.v1.AttentionService"):
            assert health.Check(health_pb2.HealthCheckRequest(service=name), timeout=20).status == SERVING
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=20)
        assert next(watch).status == SERVING
        watch.cancel()
        ask = reflection_pb2.ServerReflectionRequest
        asked = [ask(list_services=""), ask(file_containing_symbol="attnd.v1.AttentionService"), ask()]
        answers = list(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter(asked), timeout=20))
        assert len(answers[0].list_services_response.service) == 3
        assert answers[1].file_descriptor_response.file_descriptor_proto
        assert answers[2].error_response.error_code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        too_long = ask(file_by_filename="x" * 5_000)
        with pytest.raises(grpc.RpcError, match="must have at most 4096"):
            next(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([too_long]), timeout=20))


def test_watches_are_few_and_a_probe_is_answered_beside_them(guarded: tuple[ServerProcess, attnd.Credentials]) -> None:
    server, _ = guarded
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watches = [health.Watch(health_pb2.HealthCheckRequest(), timeout=60) for _ in range(80)]
        outcomes = []
        for watch in watches:
            try:
                outcomes.append(next(watch).status)
            except grpc.RpcError as error:
                outcomes.append(error.code())
        assert 1 <= outcomes.count(SERVING) <= 64  # some of others may not have ended yet
        assert {SERVING, grpc.StatusCode.RESOURCE_EXHAUSTED} == set(outcomes)
        assert health_probe.failure(server.address) is None
        for watch in watches:
            watch.cancel()


@pytest.mark.parametrize("method", ["GetCapabilities", "Prefill", "Attend", "StoreKv", CHECK, REFLECTION])
def test_a_compressed_message_is_not_unfolded(guarded: tuple[ServerProcess, attnd.Credentials], method: str) -> None:
    """256 KiB that would be 256 MiB, from somebody with a token."""
    server, shown = guarded
    bomb = gzip.compress(bytes(200 << 20))
    stream = raw_http2.request(
        method, (b"grpc-encoding", b"gzip"), *((key.encode(), value.encode()) for key, value in shown.metadata() or ())
    )
    message = b"\x01" + len(bomb).to_bytes(4, "big") + bomb
    before = server.resident_bytes
    data = b"".join(raw_http2.frame(0, 0, 1, message[at : at + (1 << 14)]) for at in range(0, 60_000, 1 << 14))
    with raw_http2.connected(server.address, raw_http2.OPENING + stream + data):
        time.sleep(1.0)
    with grpc.insecure_channel(server.address, compression=grpc.Compression.Gzip) as channel:
        name = method if method.startswith("/") else SERVICE + method
        call = channel.stream_stream(name)(iter([bytes(64 << 20)]), metadata=shown.metadata(), timeout=20)
        with pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
            list(call)
    assert server.resident_bytes - before < MOST_BYTES


def test_a_unary_method_takes_one_message(guarded: tuple[ServerProcess, attnd.Credentials]) -> None:
    server, shown = guarded
    request = capabilities_pb2.GetCapabilitiesRequest().SerializeToString()
    with grpc.insecure_channel(server.address) as channel:
        for name in ("GetCapabilities", "ListCaches", "ReadKv"):
            method = channel.stream_stream(SERVICE + name)
            with pytest.raises(grpc.RpcError, match="the RPC has no message, but must have one") as raised:
                list(method(iter([]), metadata=shown.metadata(), timeout=20))
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        (answer,) = channel.stream_stream(SERVICE + "ListCaches")(
            iter([request, request]), metadata=shown.metadata(), timeout=20
        )
        assert not cache_pb2.ListCachesResponse.FromString(answer).caches


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's counters")
@pytest.mark.parametrize("method", ["Attend", "StoreKv", "Prefill", "RenewCache", "ReadKv"])
def test_half_messages_of_a_principal_hold_the_largest_message_and_little_more(
    guarded: tuple[ServerProcess, attnd.Credentials], method: str
) -> None:
    """Forty of 200 MiB, on four connections: of 8 GB the server takes what one message may have."""
    server, shown = guarded
    headers = [(key.encode(), value.encode()) for key, value in shown.metadata() or ()]
    floods = [raw_http2.Flood(server.address, [method] * 10, 200 << 20, *headers) for _ in range(4)]
    with flooding(server, *floods) as push:
        assert push() < MOST_OF_A_PRINCIPAL
        with attnd.connect(server.address, credentials=shown, plane="inline") as client:
            assert client.list_caches() == []


def test_a_new_client_may_send_any_number_of_whole_messages_one_after_the_other(tmp_path: Path) -> None:
    """The server looks at what has come every other second, whenever it last did: at a new connection for the first
    time when several times the most that may come in part has come and has been handed over."""
    geometry = {"num_layers": 1, "num_kv_heads": 8, "head_dim": 64, "num_pages": 1, "page_size": 64, "dtype": "float32"}
    k = v = torch.ones(64, 8, 64)
    options = ("--device", "cpu", "--drain-s", "0", "--max-message-bytes", "1MiB")
    with ServerProcess(tmp_path / "log", *options) as server:
        for _ in range(3):  # the first one lets the process grow, upon which the server looks at once
            with attnd.connect(server.address) as client, client.create_cache(**geometry) as cache:
                started, num_bytes = time.monotonic(), 0
                while time.monotonic() < started + arrivals.ANYWAY_S + 0.5 or num_bytes < 4 * arrivals.MORE_BYTES:
                    num_bytes += cache.store_kv(0, range(64), k, v) * 2 * k[0].nbytes
    assert "given up" not in server.log
