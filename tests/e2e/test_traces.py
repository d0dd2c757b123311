"""Spans of real servers, as a collector gets them, below those of both clients."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

import attnd
from attnd import traces
from attnd.protocol import requests
from tests.servers import ServerProcess, wait_for
from tests.spans import Collector, Memory, Span, traced

GEOMETRY = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 16, "num_pages": 8, "page_size": 4, "dtype": "float32"}
Q, K, V = torch.ones(2, 4, 16), torch.ones(2, 2, 16), torch.ones(2, 2, 16)
PREFILL = attnd.StepMetadata(query_lens=[2], context_lens=[0], page_tables=[[0]], slot_mapping=[0, 1])


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def serving(folder: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, *options: str) -> ServerProcess:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return ServerProcess(
        folder / "log",
        "--device",
        "cpu",
        "--socket-dir",
        str(folder / "s"),
        "--traces",
        "1000",
        "--drain-s",
        "1",
        *options,
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[ServerProcess]:
    with pytest.MonkeyPatch.context() as patch:
        process = serving(tmp_path_factory.mktemp("traces"), patch, collector.endpoint)
    yield process
    process.stop()


def below(collector: Collector, parent: Span) -> Span:
    """The server's span below one of a client's, once it has come."""

    def found() -> list[Span]:
        return [span for span in collector.spans("attnd.step") if span.parent_id == parent.id]

    wait_for(lambda: bool(found()), "the server's span does not come")
    (span,) = found()
    assert span.trace_id == parent.trace_id
    return span


def of_steps(memory: Memory) -> list[Span]:
    """Those of a client, the earliest first; what a refusal was raised in keeps its step until garbage is collected."""
    gc.collect()
    return sorted(memory.spans("attnd.step"), key=lambda span: span.began_ns)


def layers(collector: Collector, step: Span) -> list[int]:
    """Layers of the calls below a server's span."""
    return [span.attributes["attnd.layer"] for span in collector.spans("attnd.call") if span.parent_id == step.id]


@pytest.mark.parametrize("plane", ["inline", "shm"])
def test_a_step_has_a_span_on_both_sides(server: ServerProcess, collector: Collector, plane: str) -> None:
    with traced() as memory, attnd.connect(server.address) as client:
        with client.create_cache(**GEOMETRY, name="traced") as cache, cache.session(plane=plane) as session:
            with memory.tracer.start_as_current_span("generate"):
                step = session.step(PREFILL)
                for layer in range(3):
                    step.attend(layer, Q, K, V)
    (generate,) = memory.spans("generate")
    (ours,) = memory.spans("attnd.step")
    assert ours.parent_id == generate.id
    theirs = below(collector, ours)
    assert theirs.attributes["attnd.plane"] == ours.attributes["attnd.plane"] == plane
    assert (theirs.attributes["attnd.cache"], theirs.attributes["attnd.num_tokens"]) == ("traced", 2)
    assert layers(collector, theirs) == [0, 1, 2]
    assert ours.attributes["attnd.slowest_layer"] in (0, 1, 2)
    (plan,) = [span for span in collector.spans("attnd.plan") if span.parent_id == theirs.id]
    assert plan.ended_ns >= plan.began_ns
    calls = {span.id for span in collector.spans("attnd.call") if span.parent_id == theirs.id}
    assert {span.parent_id for span in collector.spans("attnd.kernel")} >= calls
    assert {resource["service.name"] for resource in collector.resources} == {"attnd"}


def test_two_steps_under_way_have_a_span_each(server: ServerProcess, collector: Collector) -> None:
    with traced() as memory, attnd.connect(server.address) as client:
        with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
            steps = [session.step(PREFILL) for _ in range(2)]
            for layer in range(3):
                for call in [step.submit(layer, Q, K, V) for step in steps]:
                    call.wait()
    spans = memory.spans("attnd.step")
    assert len(spans) == 2
    for ours in spans:
        assert layers(collector, below(collector, ours)) == [0, 1, 2]


@pytest.mark.parametrize("plane", ["inline", "shm"])
def test_the_asyncio_client_traces_too(server: ServerProcess, collector: Collector, plane: str) -> None:
    async def main() -> None:
        async with await attnd.aio.connect(server.address) as client:
            async with await client.create_cache(**GEOMETRY) as cache, cache.session(plane=plane) as session:
                with memory.tracer.start_as_current_span("generate"):
                    step = await session.step(PREFILL)
                    for layer in range(3):
                        await step.attend(layer, Q, K, V)
                    with pytest.raises(attnd.InvalidRequest):
                        await (await session.step(PREFILL)).attend(9, Q, K, V)
                    await client.prefill(cache, PREFILL, 1, Q, K, V)

    with traced() as memory:
        asyncio.run(main())
    (generate,) = memory.spans("generate")
    whole, refused, unary = of_steps(memory)
    assert {whole.parent_id, refused.parent_id, unary.parent_id} == {generate.id}
    assert layers(collector, below(collector, whole)) == [0, 1, 2]
    assert refused.attributes["error.type"] == "InvalidRequest"
    assert layers(collector, below(collector, unary)) == [1]


def test_a_refused_call_is_noted(server: ServerProcess) -> None:
    with traced() as memory, attnd.connect(server.address) as client, client.create_cache(**GEOMETRY) as cache:
        with cache.session() as session, pytest.raises(attnd.InvalidRequest):
            session.step(PREFILL).attend(9, Q, K, V)
        with pytest.raises(attnd.InvalidRequest):
            client.prefill(cache, PREFILL, 9, Q, K, V)
    assert [span.attributes["error.type"] for span in of_steps(memory)] == ["InvalidRequest"] * 2


def test_a_call_that_is_not_answered_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collector: Collector
) -> None:
    async def wait_in_vain(address: str) -> None:
        async with await attnd.aio.connect(address) as client:
            async with await client.create_cache(**GEOMETRY, renew=False) as cache, cache.session() as session:
                step = await session.step(PREFILL)
                await step.attend(0, Q, K, V)
                step._timeout_s = 0.2
                server.freeze()
                with pytest.raises((attnd.DeadlineExceeded, attnd.Disconnected)):
                    await step.attend(1, Q, K, V)
                os.kill(server.pid, signal.SIGCONT)

    with serving(tmp_path, monkeypatch, collector.endpoint) as server, traced() as memory:
        with attnd.connect(server.address) as client, client.create_cache(**GEOMETRY, renew=False) as cache:
            with cache.session() as session:
                step = session.step(PREFILL)
                step.attend(0, Q, K, V)
                session.timeout_s = 0.2
                server.freeze()
                with pytest.raises((attnd.DeadlineExceeded, attnd.Disconnected)):
                    step.attend(1, Q, K, V)
                os.kill(server.pid, signal.SIGCONT)
            del step
        asyncio.run(wait_in_vain(server.address))
    for span in of_steps(memory):
        assert span.attributes["error.type"] in ("DeadlineExceeded", "Disconnected")
        assert span.attributes["attnd.unanswered_layers"] == 2
    assert len(of_steps(memory)) == 2


def test_self_contained_requests_are_steps(server: ServerProcess, collector: Collector) -> None:
    with traced() as memory, attnd.connect(server.address) as client, client.create_cache(**GEOMETRY) as cache:
        client.prefill(cache, PREFILL, 2, Q, K, V)
    (ours,) = memory.spans("attnd.step")
    assert "attnd.unanswered_layers" not in ours.attributes
    assert layers(collector, below(collector, ours)) == [2]


def test_what_is_sent_again_has_another_span_of_the_same_parent(server: ServerProcess, collector: Collector) -> None:
    parent = Memory().tracer.start_span("a client of another kind").get_span_context()
    with attnd.connect(server.address) as client, client.create_cache(**GEOMETRY) as cache:
        step = PREFILL.to_message(0, cache.ref)
        step.traceparent = f"00-{parent.trace_id:032x}-{parent.span_id:016x}-01"
        request = requests.unary_call_of("prefill", step, 0, Q, K, V, requests.DEFAULT_OPTIONS)
        for _ in range(2):
            client.transport.unary("Prefill", request, 30)

    def spans() -> list[Span]:
        return [span for span in collector.spans("attnd.step") if span.parent_id == f"{parent.span_id:016x}"]

    wait_for(lambda: len(spans()) == 2, "a span is missing")
    assert len({span.id for span in spans()}) == 2


def test_nothing_is_traced_that_is_not_sampled(server: ServerProcess, collector: Collector) -> None:
    began_ns = time.time_ns()  # a span of an earlier test may still be on its way
    with traced(ALWAYS_OFF), attnd.connect(server.address) as client, client.create_cache(**GEOMETRY) as cache:
        client.prefill(cache, PREFILL, 0, Q, K, V)
    traces.disable()
    with attnd.connect(server.address) as client, client.create_cache(**GEOMETRY) as cache:
        client.prefill(cache, PREFILL, 0, Q, K, V)
    with traced() as memory, attnd.connect(server.address) as client, client.create_cache(**GEOMETRY) as cache:
        client.prefill(cache, PREFILL, 0, Q, K, V)
    (ours,) = memory.spans("attnd.step")
    last = below(collector, ours)
    assert {span.trace_id for span in collector.spans() if span.began_ns >= began_ns} == {last.trace_id}


def test_a_restarted_server_traces_what_is_sent_to_it(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--snapshot-dir", str(tmp_path / "kept"), "--restore")
    server = serving(tmp_path, monkeypatch, collector.endpoint, *options)
    with traced() as memory, attnd.connect(server.address, plane="inline") as client:
        cache = client.create_cache(**GEOMETRY)
        with memory.tracer.start_as_current_span("generate"):
            with cache.session() as session:
                session.step(PREFILL).attend(0, Q, K, V)
            port = server.port
            server.stop()
            monkeypatch.setenv("OTEL_SERVICE_NAME", "attnd-again")
            with ServerProcess(tmp_path / "log", "--device", "cpu", "--traces", "9", *options, port=port):
                cache.adopt()
                with cache.session() as session:
                    step = session.step(PREFILL)
                    for layer in range(3):
                        step.attend(layer, Q, K, V)
                assert layers(collector, below(collector, of_steps(memory)[-1])) == [0, 1, 2]
                cache.delete()
    assert "attnd-again" in {resource["service.name"] for resource in collector.resources}
    (generate,) = memory.spans("generate")
    assert [span.parent_id for span in of_steps(memory)] == [generate.id] * 2


@pytest.mark.parametrize("collectors_answer", ["refused", "none"])
def test_a_collector_that_is_away_is_no_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collectors_answer: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        if collectors_answer == "refused":
            listener.close()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "300")
        server = serving(tmp_path, monkeypatch, f"http://127.0.0.1:{port}")
        with traced(), attnd.connect(server.address) as client, client.create_cache(**GEOMETRY) as cache:
            for _ in range(100):
                client.prefill(cache, PREFILL, 0, Q, K, V)
        server.terminate()
        assert server.wait(60) == 0  # and not after the 300 s
        server.stop()
    log = server.log
    assert log.count("traces cannot be sent") <= 1
    assert "Traceback" not in log
    assert len(log.splitlines()) < 20


def test_a_server_in_this_process_traces_where_its_client_does() -> None:
    with traced() as memory, attnd.connect("inproc://") as client:
        with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
            step = session.step(PREFILL)
            for layer in range(3):
                step.attend(layer, Q, K, V)
        wait_for(lambda: len(memory.spans("attnd.step")) == 2, "a side has no span")
    theirs, ours = sorted(memory.spans("attnd.step"), key=lambda span: span.parent_id == "")
    assert theirs.parent_id == ours.id
    assert len(memory.spans("attnd.call")) == 3


def test_a_malformed_context_harms_nothing(server: ServerProcess) -> None:
    with attnd.connect(server.address) as client, client.create_cache(**GEOMETRY) as cache:
        for traceparent in ("nonsense", "x" * 100_000):
            step = PREFILL.to_message(0, cache.ref)
            step.traceparent = traceparent
            request = requests.unary_call_of("prefill", step, 0, Q, K, V, requests.DEFAULT_OPTIONS)
            assert client.transport.unary("Prefill", request, 30)
