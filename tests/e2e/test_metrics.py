"""`attnd serve --metrics`: what Prometheus reads is what was done."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import psutil
import pytest
import torch

import attnd
from attnd.v1 import attention_pb2, cache_pb2, step_pb2
from tests.e2e.test_commands import attnd_command
from tests.scrape import Scrape
from tests.servers import ServerProcess, wait_for

GEOMETRY = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "num_pages": 8, "page_size": 4, "dtype": "float32"}
Q, K, V = torch.ones(5, 6, 16), torch.ones(5, 2, 16), torch.ones(5, 2, 16)
PREFILL = attnd.StepMetadata(query_lens=[5], context_lens=[0], page_tables=[[0, 1]], slot_mapping=[0, 1, 2, 3, 4])
DECODE = attnd.StepMetadata([1], [5], [[0, 1]], [5], kind="decode")
STORE = attnd.StepMetadata([5], [0], [[2, 3]], [8, 9, 10, 11, 12], store_only=True)
SERVICE = "attnd.v1.AttentionService"


class Measured(ServerProcess):
    """A server with metrics, on ports that the system picks."""

    @property
    def url(self) -> str:
        return re.search(r"metrics on (http://127\.0\.0\.1:\d+/metrics)$", self.banner)[1]

    def scrape(self) -> Scrape:
        return Scrape.of(self.url)


@pytest.fixture
def measured(tmp_path: Path) -> Iterator[Measured]:
    with Measured(tmp_path / "log", "--device", "cpu", "--metrics", "0", "--kv-bytes", "1MiB") as server:
        yield server
        log = server.log
    assert '"level": "error"' not in log, log


def scrape_when_all_ended(server: Measured) -> Scrape:
    """The first scrape in which no RPC is under way: a caller may know of its end before the server has counted it."""
    deadline = time.monotonic() + 10
    while True:
        scrape = server.scrape()
        if scrape.value("grpc_server_call_duration_seconds_count") == scrape.value("grpc_server_call_started_total"):
            return scrape
        assert time.monotonic() < deadline, scrape.text
        time.sleep(0.02)


def test_calls_of_each_kind(measured: Measured) -> None:
    with attnd.connect(measured.address) as client, client.create_cache(**GEOMETRY, ttl_s=600) as cache:
        with cache.session() as session:
            prefill = session.step(PREFILL)
            for layer in range(2):
                prefill.attend(layer, Q, K, V)
            decode = session.step(DECODE)
            decode.attend(0, Q[:1], K[:1], V[:1], attnd.AttentionOptions(backend="naive", return_lse=True))
            decode.attend(1, Q[:1], K[:1], V[:1], attnd.AttentionOptions(backend="naive"))
            session.step(STORE).attend(0, None, K, V)
            for _ in range(3):
                with pytest.raises(attnd.InvalidRequest):
                    prefill.attend(2, Q, K, V)
        client.prefill(cache, PREFILL, 0, Q, K, V)
        client.decode(cache, DECODE, 0, Q[:1], K[:1], V[:1])
        with pytest.raises(attnd.InvalidRequest):
            client.decode(cache, DECODE, 7, Q[:1], K[:1], V[:1])
        scrape = scrape_when_all_ended(measured)

    kinds = ("plane", "backend")
    token_in, token_out = (6 + 2 + 2) * 16 * 4, 6 * 16 * 4
    assert scrape.by("attnd_calls_total", *kinds) == {
        ("inline", "sdpa"): 4,
        ("inline", "naive"): 2,
        ("inline", "none"): 1,
    }
    assert scrape.by("attnd_call_received_bytes_total", *kinds) == {
        ("inline", "sdpa"): 16 * token_in,
        ("inline", "naive"): 2 * token_in,
        ("inline", "none"): K.nbytes + V.nbytes,
    }
    assert scrape.by("attnd_call_sent_bytes_total", *kinds) == {
        ("inline", "sdpa"): 16 * token_out,
        ("inline", "naive"): 2 * token_out + 6 * 4,
    }
    for phase in ("queue", "copy_in", "kernel", "copy_out"):
        assert scrape.value("attnd_call_phase_seconds_count", phase=phase, backend="sdpa") == 4
        assert scrape.value("attnd_call_phase_seconds_bucket", phase=phase, backend="sdpa", le="+Inf") == 4
    assert scrape.value("attnd_call_phase_seconds_sum", phase="kernel") > 0
    assert scrape.by("attnd_refusals_total", "reason") == {"InvalidRequest": 4}
    assert scrape.by("grpc_server_call_duration_seconds_count", "grpc_method", "grpc_status") == {
        (f"{SERVICE}/GetCapabilities", "OK"): 1,
        (f"{SERVICE}/CreateCache", "OK"): 1,
        # The client cancels a stream after its end: which of both the server sees first is chance.
        (f"{SERVICE}/Attend", attend_status(scrape)): 1,
        (f"{SERVICE}/Prefill", "OK"): 1,
        (f"{SERVICE}/Decode", "OK"): 1,
        (f"{SERVICE}/Decode", "INVALID_ARGUMENT"): 1,
    }


def attend_status(scrape: Scrape) -> str:
    counts = scrape.by("grpc_server_call_duration_seconds_count", "grpc_method", "grpc_status")
    (status,) = [status for method, status in counts if method == f"{SERVICE}/Attend"]
    assert status in ("OK", "CANCELLED")
    return status


def test_memory_and_the_other_requests(measured: Measured) -> None:
    with attnd.connect(measured.address) as client:
        cache = client.create_cache(**GEOMETRY, ttl_s=600)
        other = client.create_cache(**GEOMETRY, ttl_s=600)
        cache.store_kv(0, [0, 1, 4], K[:3], V[:3])
        cache.copy_pages([0, 1], [6, 7])
        cache.read_kv(0, [0, 1], like=K)
        cache.renew()
        client.list_caches()
        assert cache.warm_up(num_heads=6, max_reqs=1).num_graphs == 0
        with pytest.raises(attnd.Exhausted):
            client.create_cache(**{**GEOMETRY, "num_pages": 1_000_000})
        with pytest.raises(attnd.Unsupported):
            cache.warm_up(num_heads=6, max_reqs=1, options=attnd.AttentionOptions(backend="triton"))
        scrape = measured.scrape()
        assert scrape.value("attnd_caches") == 2
        assert scrape.value("attnd_pages") == 16
        assert scrape.value("attnd_pages_in_use") == 4
        assert scrape.value("attnd_kv_memory_bytes") == 2 * (8 * 4 * 2 * 2 * 2 * 16 * 4)
        assert scrape.value("attnd_kv_memory_limit_bytes") == 1 << 20
        assert scrape.value("attnd_graphs") == scrape.value("attnd_graph_memory_bytes") == 0
        assert scrape.value("attnd_queue_depth") == 0

        other.delete()
        with pytest.raises(attnd.CacheLost):
            other.renew()
        cache.delete()
        scrape = scrape_when_all_ended(measured)

    assert [scrape.value(f"attnd_{name}") for name in ("caches", "pages", "pages_in_use", "kv_memory_bytes")] == [0] * 4
    assert scrape.by("attnd_refusals_total", "reason") == {"Exhausted": 1, "Unsupported": 1, "CacheLost": 1}
    started = {
        **dict.fromkeys(("GetCapabilities", "StoreKv", "CopyPages", "ReadKv", "ListCaches"), 1),
        **dict.fromkeys(("RenewCache", "WarmUp", "DeleteCache"), 2),
        "CreateCache": 3,
    }
    assert scrape.by("grpc_server_call_started_total", "grpc_method") == {
        f"{SERVICE}/{method}": count for method, count in started.items()
    }
    statuses = scrape.by("grpc_server_call_duration_seconds_count", "grpc_method", "grpc_status")
    assert {key: count for key, count in statuses.items() if key[1] != "OK"} == {
        (f"{SERVICE}/RenewCache", "NOT_FOUND"): 1,
        (f"{SERVICE}/WarmUp", "UNIMPLEMENTED"): 1,
        (f"{SERVICE}/CreateCache", "RESOURCE_EXHAUSTED"): 1,
    }


def test_bytes_of_rpcs_are_those_on_the_wire(measured: Measured) -> None:
    config = cache_pb2.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, page_size=4, num_pages=4, dtype=1)
    with grpc.insecure_channel(measured.address) as channel:
        create = cache_pb2.CreateCacheRequest(config=config, ttl_s=600).SerializeToString()
        created = channel.unary_unary(f"/{SERVICE}/CreateCache")(create)
        ref = cache_pb2.CreateCacheResponse.FromString(created).cache.cache
        requests = [
            attention_pb2.AttendRequest(step=DECODE.to_message(1, ref)).SerializeToString(),
            attention_pb2.AttendRequest(call=step_pb2.Call(step_id=9)).SerializeToString(),
            b"no message",
        ]
        answers = list(channel.stream_stream(f"/{SERVICE}/Attend")(iter(requests)))
        for unknown in (f"/{SERVICE}/Steal", "/made.up.Service/Method"):
            with pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
                channel.unary_unary(unknown)(b"123")
        scrape = scrape_when_all_ended(measured)

    assert len(answers) == len(requests)
    method = ("grpc_method", "grpc_status")
    assert scrape.by("grpc_server_call_rcvd_total_compressed_message_size_bytes_sum", *method) == {
        (f"{SERVICE}/CreateCache", "OK"): len(create),
        (f"{SERVICE}/Attend", "OK"): sum(map(len, requests)),
    }
    assert scrape.by("grpc_server_call_sent_total_compressed_message_size_bytes_sum", *method) == {
        (f"{SERVICE}/CreateCache", "OK"): len(created),
        (f"{SERVICE}/Attend", "OK"): sum(map(len, answers)),
    }
    assert scrape.by("grpc_server_call_duration_seconds_count", *method)["other", "UNIMPLEMENTED"] == 2
    assert scrape.value("grpc_server_call_started_total", grpc_method="other") == 2


def test_nothing_says_who_called(measured: Measured) -> None:
    with attnd.connect(measured.address) as client:
        cache = client.create_cache(**GEOMETRY, ttl_s=600, name="aardvark-4711")
        with cache.session() as session:
            session.step(PREFILL).attend(0, Q, K, V)
            (connection,) = [
                each
                for each in psutil.Process(measured.pid).net_connections("tcp")
                if each.status == psutil.CONN_ESTABLISHED and each.laddr.port == measured.port
            ]
            with grpc.insecure_channel(measured.address) as channel, pytest.raises(grpc.RpcError):
                channel.unary_unary(f"/{SERVICE}/Aardvark")(b"")
            text = measured.scrape().text
        secrets = ["aardvark", cache.ref.id.hex(), str(cache.ref.epoch), f":{connection.raddr.port}", "127.0.0.1"]
        cache.delete()
    assert [secret for secret in secrets if secret in text.lower()] == []
    names = {label for found in Scrape.parse(text).samples.values() for labels, _ in found for label in labels}
    assert names == {"plane", "backend", "phase", "le", "reason", "grpc_method", "grpc_status"}


def test_metrics_are_there_until_the_server_has_drained(measured: Measured) -> None:
    with attnd.connect(measured.address) as client:
        session = client.create_cache(**GEOMETRY, ttl_s=600).session()
        step = session.step(PREFILL)
        step.attend(0, Q, K, V)
        measured.terminate()
        wait_for(lambda: "draining" in measured.log, "the server does not drain")
        step.attend(1, Q, K, V)
        assert measured.scrape().value("attnd_calls_total") == 2
        session.close()
    assert measured.wait() == 0
    with pytest.raises(OSError, match="refused"):
        measured.scrape()


@pytest.mark.parametrize("host", ["127.0.0.1:", ""])
def test_a_port_that_is_taken_is_told_in_one_line(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = attnd_command("attnd_server", "serve", "--port", "0", "--device", "cpu", "--metrics", f"{host}{port}")
    assert result.returncode == 1
    assert result.stdout == ""
    message = f"cannot serve: metrics is 127.0.0.1:{port}, but must be an address to listen on: Address already in use"
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_package_is_named_in_one_line() -> None:
    program = (
        "import sys\n"
        "sys.modules['prometheus_client'] = None\n"
        "sys.argv = ['attnd', 'serve', '--port', '0', '--device', 'cpu', '--metrics', '0']\n"
        "from attnd_server.__main__ import main\n"
        "sys.exit(main())"
    )
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60
    )
    assert (result.returncode, result.stdout) == (1, "")
    where = "which comes with attnd[server]; in a checkout: pip install '.[server]'"
    told = f"attnd: prometheus_client is not installed, {where}"
    assert result.stderr.splitlines()[-1] == told
    assert "Traceback" not in result.stderr


def test_without_metrics_no_other_port_is_open(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", "--device", "cpu") as server:
        connections = psutil.Process(server.pid).net_connections()
    listening = {each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN}
    assert listening == {server.port}
    assert "metrics on" not in server.banner


def test_silent_connections_take_neither_threads_nor_places(measured: Measured) -> None:
    """More than there are places, before Prometheus comes and while it does."""
    server = psutil.Process(measured.pid)
    threads, descriptors = server.num_threads(), server.num_fds()
    host, port = re.search(r"http://([^:]+):(\d+)/", measured.url).groups()
    with ExitStack() as stack:
        for index in range(100):
            connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=20))
            connection.sendall(b"GET /metrics HTTP/1.1\r\n"[: index % 20])
            if index % 20 == 0:
                measured.scrape()
        assert measured.scrape().value("process_open_fds") < descriptors + 60
        assert server.num_threads() < threads + 20
        with attnd.connect(measured.address) as client:
            assert client.list_caches() == []
