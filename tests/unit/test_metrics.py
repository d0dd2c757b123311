"""What is counted, and how Prometheus is told; see tests/e2e/test_metrics.py for a real server."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import types

import grpc
import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest

from attnd import errors
from attnd_server.attention.config import AttentionBackend
from attnd_server.config import ServerConfig
from attnd_server.device.copy_timer import Copies
from attnd_server.device.faults import DeviceFaults
from attnd_server.device.kernels.states import KernelStates
from attnd_server.execution.step import Call, Result
from attnd_server.observe.counts import Metrics
from attnd_server.observe.endpoint import MetricsEndpoint
from attnd_server.observe.histogram import Histogram
from attnd_server.observe.prometheus import ServerCollector
from attnd_server.observe.rpc_counts import RpcCounter
from attnd_server.observe.tallies import BYTES_BOUNDS, PHASE_BOUNDS_US, SECONDS_BOUNDS, PhaseHistogram
from tests.scrape import Scrape

Q, K, V = torch.ones(5, 6, 16), torch.ones(5, 2, 16), torch.ones(5, 2, 8, dtype=torch.float16)
CALL = Call(None, 0, None, Q, K, V)
RESULT = Result(torch.ones(5, 6, 8), torch.ones(5, 6), AttentionBackend.SDPA, Copies(20, 30))


def collector(metrics, caches=(), queue_depth=0, faults=None, verifier=None, kernels=None):
    table = types.SimpleNamespace(all=lambda: list(caches), kv_bytes=1 << 30)
    executor = types.SimpleNamespace(
        queue_depth=queue_depth,
        faults=faults or DeviceFaults(torch.device("cpu")),
        kernels=None if kernels is None else types.SimpleNamespace(states=lambda: kernels),
        graphs=types.SimpleNamespace(all=lambda: [graphs for cache in caches for graphs in cache.graphs]),
    )
    return ServerCollector(metrics, executor, table, ServerConfig(max_caches=9), verifier)


def scraped(*arguments, **options):
    registry = CollectorRegistry()
    registry.register(collector(*arguments, **options))
    return Scrape.parse(generate_latest(registry).decode())


def test_a_bound_belongs_to_its_bucket():
    histogram = Histogram((1, 2, 5))
    for value in (0, 1, 1.5, 2, 5, 5.1, 1000):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1, 2]
    assert histogram.sum == 1014.6


def test_a_phase_is_in_the_first_bucket_that_is_longer():
    for microseconds in (0, 1, 2, 3, 4, 1023, 1024, (1 << 23) - 1, 1 << 23, 1 << 40):
        histogram = PhaseHistogram()
        histogram.observe(microseconds)
        (bucket,) = [number for number, count in enumerate(histogram.counts) if count]
        longer = [number for number, bound in enumerate(PHASE_BOUNDS_US) if bound > microseconds]
        assert bucket == (longer or [len(PHASE_BOUNDS_US)])[0]
        assert histogram.sum == microseconds


@pytest.mark.parametrize("bounds", [PHASE_BOUNDS_US, SECONDS_BOUNDS, BYTES_BOUNDS])
def test_bounds_rise(bounds):
    assert list(bounds) == sorted(set(bounds))


def test_the_bounds_of_rpcs_are_those_of_the_proposal():
    assert (len(SECONDS_BOUNDS), SECONDS_BOUNDS[1], SECONDS_BOUNDS[20], SECONDS_BOUNDS[-1]) == (41, 1e-5, 0.04, 100)
    assert (0, *(1 << n for n in (10, 11, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32))) == BYTES_BOUNDS


def test_calls_are_counted_by_plane_and_backend():
    metrics = Metrics()
    metrics.call_served("inline", CALL, RESULT, 3, 900)
    metrics.call_served("inline", CALL, RESULT, 0, 7_000_000)
    metrics.call_served("shm", CALL._replace(q=None), Result(None, None, None), 1, 1)
    scrape = scraped(metrics)
    labels = ("plane", "backend")
    inputs = Q.nbytes + K.nbytes + V.nbytes
    assert scrape.by("attnd_calls_total", *labels) == {("inline", "sdpa"): 2, ("shm", "none"): 1}
    assert scrape.by("attnd_call_received_bytes_total", *labels) == {
        ("inline", "sdpa"): 2 * inputs,
        ("shm", "none"): K.nbytes + V.nbytes,
    }
    assert scrape.by("attnd_call_sent_bytes_total", *labels) == {("inline", "sdpa"): 2 * (5 * 6 * 8 * 4 + 5 * 6 * 4)}


def test_a_step_counts_as_its_calls():
    metrics = Metrics()
    for _ in range(2):
        metrics.step_served("cuda", AttentionBackend.TRITON, 32, (3200, 640), queue_us=7, step_us=32 * 100 + 31)
    metrics.step_served("cuda", None, 1, (100, 0), queue_us=0, step_us=5)
    scrape = scraped(metrics)
    labels = ("plane", "backend")
    assert scrape.by("attnd_calls_total", *labels) == {("cuda", "triton"): 64, ("cuda", "none"): 1}
    assert scrape.by("attnd_call_received_bytes_total", *labels) == {("cuda", "triton"): 6400, ("cuda", "none"): 100}
    assert scrape.by("attnd_call_sent_bytes_total", *labels) == {("cuda", "triton"): 1280}
    for phase, total_us, in_first_bucket in (("queue", 14, 62), ("kernel", 6400, 0), ("copy_in", 0, 64)):
        where = {"plane": "cuda", "backend": "triton", "phase": phase}
        assert scrape.value("attnd_call_phase_seconds_count", **where) == 64
        assert scrape.value("attnd_call_phase_seconds_sum", **where) == pytest.approx(total_us * 1e-6)
        assert scrape.value("attnd_call_phase_seconds_bucket", **where, le="1e-06") == in_first_bucket


def test_launches_are_counted_by_how_many_calls_share_them():
    metrics = Metrics()
    for num_calls in (1, 1, 3, 64):
        metrics.launched(num_calls)
    scrape = scraped(metrics)
    buckets = {labels["le"]: value for labels, value in scrape.samples["attnd_calls_per_launch_bucket"]}
    assert [buckets[le] for le in ("1.0", "2.0", "4.0", "32.0", "64.0", "+Inf")] == [2, 2, 3, 3, 4, 4]
    assert scrape.value("attnd_calls_per_launch_sum") == 69


def test_phases_are_told_in_seconds_and_cumulated():
    metrics = Metrics()
    for kernel_us in (5, 900, 9_000_000):
        metrics.call_served("inline", CALL, RESULT, 0, kernel_us)
    scrape = scraped(metrics)
    buckets = {
        labels["le"]: value
        for labels, value in scrape.samples["attnd_call_phase_seconds_bucket"]
        if labels["phase"] == "kernel"
    }
    assert len(buckets) == len(PHASE_BOUNDS_US) + 1
    assert [buckets[le] for le in ("4e-06", "8e-06", "0.000512", "0.001024", "8.388608", "+Inf")] == [0, 1, 1, 2, 2, 3]
    assert scrape.value("attnd_call_phase_seconds_sum", phase="kernel") == pytest.approx(9.000905)
    assert scrape.value("attnd_call_phase_seconds_bucket", phase="queue", le="1e-06") == 3
    for phase, microseconds in (("copy_in", 20), ("copy_out", 30)):
        assert scrape.value("attnd_call_phase_seconds_sum", phase=phase) == pytest.approx(3e-6 * microseconds)


def test_every_class_of_error_is_a_reason_from_the_start():
    def leaves(kind):
        return {kind}.union(*(leaves(each) for each in kind.__subclasses__() if each.__module__ == errors.__name__))

    metrics = Metrics()
    assert set(metrics.refusals) == leaves(errors.AttndError) - {errors.AttndError}
    metrics.refused(errors.Exhausted("full"))
    metrics.refused(errors.Exhausted("full"))
    metrics.refused(errors.EpochMismatch("gone"))
    scrape = scraped(metrics)
    assert scrape.by("attnd_refusals_total", "reason") == {"Exhausted": 2, "EpochMismatch": 1}
    assert ({"reason": "CacheLost"}, 0) in scrape.samples["attnd_refusals_total"]


def test_memory_and_queue_are_what_they_are_when_asked():
    def cache(num_pages, num_pages_written, num_bytes, *num_graphs):
        return types.SimpleNamespace(
            shape=types.SimpleNamespace(num_pages=num_pages),
            num_pages_written=num_pages_written,
            num_bytes=num_bytes,
            num_graph_bytes=100 * len(num_graphs),
            graphs=[types.SimpleNamespace(num_graphs=each) for each in num_graphs],
        )

    scrape = scraped(Metrics(), [cache(8, 3, 1000), cache(4, 4, 900, 2, 32)], queue_depth=17)
    told = {name: scrape.value(name) for name, kind in scrape.types.items() if kind == "gauge"}
    assert told == {
        "attnd_queue_depth": 17,
        "attnd_queue_depth_limit": 1024,
        "attnd_caches": 2,
        "attnd_caches_limit": 9,
        "attnd_pages": 12,
        "attnd_pages_in_use": 7,
        "attnd_kv_memory_bytes": 1900,
        "attnd_kv_memory_limit_bytes": 1 << 30,
        "attnd_graphs": 34,
        "attnd_graph_memory_bytes": 200,
        "attnd_device_healthy": 1,
    }


def test_kernels_are_told_by_state_where_they_are_compiled():
    states = KernelStates(5, 4, [("a", 1.0), ("b", 2.0)], [("c", "why")], num_compiled=3, num_found=2)
    scrape = scraped(Metrics(), kernels=states)
    told = {state: scrape.value("attnd_kernels", state=state) for state in ("loaded", "waiting", "compiling", "failed")}
    assert told == {"loaded": 5, "waiting": 4, "compiling": 2, "failed": 1}
    assert scrape.value("attnd_kernels_compiled_total") == 3
    assert scrape.value("attnd_kernels_found_total") == 2
    assert "attnd_kernels" not in scraped(Metrics()).types


class Context:
    """As much of gRPC's context as a handler here uses."""

    def __init__(self, *messages):
        self._messages = list(messages)
        self.written = []

    async def read(self):
        return self._messages.pop(0) if self._messages else grpc.aio.EOF

    async def abort(self, code, details):
        raise RuntimeError(f"{code.name}: {details}")

    def time_remaining(self):
        return 3.0

    async def write(self, message):
        self.written.append(message)


def run_counted(handler, context, method="/attnd.Service/Method", metrics=None):
    """Runs a handler as a server with metrics would; returns what it gives."""

    async def continuation(details):
        return handler

    async def main():
        counter = RpcCounter(metrics, "attnd.Service")
        counted = await counter.intercept_service(continuation, types.SimpleNamespace(method=method))
        behaviour = counted.stream_unary or counted.stream_stream
        return await behaviour(None, context)

    return asyncio.run(main())


def rpcs(metrics):
    return {
        key: (sum(tally.seconds.counts), tally.received_bytes.sum, tally.sent_bytes.sum)
        for key, tally in metrics.rpcs.items()
    }


def test_bytes_of_each_kind_of_rpc():
    async def unary(_, context):
        return await context.read() + b"!!"

    async def download(_, context):
        request = await context.read()
        await context.write(request)
        await context.write(request)

    async def both(_, context):
        while (request := await context.read()) is not grpc.aio.EOF:
            await context.write(request[1:])

    metrics, context = Metrics(), Context(b"123", b"1234", b"12", b"345")
    assert run_counted(grpc.stream_unary_rpc_method_handler(unary), context, metrics=metrics) == b"123!!"
    run_counted(grpc.stream_stream_rpc_method_handler(download), context, metrics=metrics)
    run_counted(grpc.stream_stream_rpc_method_handler(both), context, metrics=metrics)
    assert context.written == [b"1234", b"1234", b"2", b"45"]
    assert metrics.rpcs_started == {"attnd.Service/Method": 3}
    assert rpcs(metrics) == {("attnd.Service/Method", "OK"): (3, 3 + 4 + 5, 5 + 8 + 3)}


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("a bug"), "UNKNOWN"), (asyncio.CancelledError(), "CANCELLED")]
)
def test_status_of_an_rpc_that_fails(error, status):
    async def failing(_, context):
        await context.read()
        raise error

    metrics = Metrics()
    with pytest.raises(type(error)):
        run_counted(grpc.stream_unary_rpc_method_handler(failing), Context(b"123"), metrics=metrics)
    assert rpcs(metrics) == {("attnd.Service/Method", status): (1, 3, 0)}


@pytest.mark.parametrize("make", [grpc.stream_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler])
def test_status_of_an_rpc_that_is_aborted(make):
    async def aborting(_, context):
        await context.read()
        assert context.time_remaining() == 3.0
        await context.abort(grpc.StatusCode.NOT_FOUND, "no such cache")

    metrics = Metrics()
    with pytest.raises(RuntimeError, match="NOT_FOUND: no such cache"):
        run_counted(make(aborting), Context(b"123"), metrics=metrics)
    assert rpcs(metrics) == {("attnd.Service/Method", "NOT_FOUND"): (1, 3, 0)}


def test_other_services_are_left_alone():
    async def unary(_, context):
        return await context.read()

    metrics = Metrics()
    handler = grpc.stream_unary_rpc_method_handler(unary)
    assert run_counted(handler, Context(b"1"), method="/grpc.health.v1.Health/Check", metrics=metrics) == b"1"
    assert (metrics.rpcs_started, metrics.rpcs) == ({}, {})


def test_a_port_that_is_taken_names_the_field():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(RuntimeError, match=f"metrics is {address}, but must be .*: Address already in use"):
            MetricsEndpoint(address, collector(Metrics()))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_an_endpoint_answers_until_it_is_closed(host):
    endpoint = MetricsEndpoint(f"{host}:0", collector(Metrics(), queue_depth=3))
    scrape = Scrape.of(f"http://{endpoint.address}/metrics")
    assert scrape.value("attnd_queue_depth") == 3
    assert scrape.value("process_resident_memory_bytes") > 0
    endpoint.close()
    with pytest.raises(OSError, match="refused"):
        Scrape.of(f"http://{endpoint.address}/metrics")


def test_a_server_without_metrics_does_not_import_prometheus():
    program = "import sys, attnd_server.app; print('prometheus_client' in sys.modules)"
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert result.stdout == "False\n"
