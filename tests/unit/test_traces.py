"""Traces: which steps have one, what is noted of them, and that nobody can make an operator pay for them."""

from __future__ import annotations

import gc
import logging
import queue
import subprocess
import sys
import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import use_span

import attnd
from attnd import traces
from attnd.protocol import frames, requests
from attnd.v1 import cache_pb2
from attnd_server.build import build_service
from attnd_server.config import ServerConfig
from attnd_server.device.copy_timer import Copies
from attnd_server.observe.traces import StepTrace, Traces, export
from attnd_server.observe.traces import traces as traces_module
from attnd_server.observe.traces.allowance import Allowance
from attnd_server.observe.traces.parent import Parent, sampled_parent
from attnd_server.observe.traces.spans import SpanWriter
from tests.servers import wait_for
from tests.spans import Memory, traced

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"
GEOMETRY: dict[str, Any] = {"num_layers": 2, "num_kv_heads": 1, "head_dim": 8, "num_pages": 6, "page_size": 4}
Q, K, V = torch.ones(3, 2, 8), torch.ones(3, 1, 8), torch.ones(3, 1, 8)
PREFILL = attnd.StepMetadata([3], [0], [[1, 2]], [4, 5, 6])


class Sink:
    """Keeps steps."""

    def __init__(self) -> None:
        self.written: list[StepTrace] = []
        self.is_closed = threading.Event()

    def write(self, trace: StepTrace) -> None:
        self.written.append(trace)

    def close(self) -> None:
        self.is_closed.set()


class Served:
    """A server in this process that traces to a sink."""

    def __init__(self, sink: Any, traces: int = 1_000, tokens: str = "") -> None:
        config = ServerConfig(device="cpu", kv_bytes=1 << 20, traces=traces, tokens=tokens)
        self.service = build_service(config, spans=sink)
        self._step_id = 0

    def cache(self, principal: str = "alice", **more: Any) -> cache_pb2.CacheRef:
        request = attnd.CacheSpec(**{**GEOMETRY, "dtype": "float32", **more}).to_request()
        return cache_pb2.CreateCacheResponse.FromString(
            self.run(self.service.unary["CreateCache"](request, principal))
        ).cache.cache

    def run(self, work: Any) -> bytes:
        """Runs work at once, or in its turn if the executor is busy."""
        result = self.service.executor.run_now(work)
        if result is not None:
            return result
        answers: queue.SimpleQueue[tuple[bytes | None, BaseException | None]] = queue.SimpleQueue()
        self.service.executor.submit(work, lambda *answer: answers.put(answer))
        result, error = answers.get(timeout=30)
        assert result is not None, error
        return result

    def step(self, session: Any, cache: cache_pb2.CacheRef, traceparent: str, layers: int = 2) -> None:
        self._step_id += 1
        message = PREFILL.to_message(self._step_id, cache)
        message.traceparent = traceparent
        session.request(frames.step_request(message))
        for layer in range(layers):
            self.run(session.request(requests.attend_call(self._step_id, layer, Q, K, V, requests.DEFAULT_OPTIONS)))


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "00",
        TRACEPARENT[:-1] + "0",  # not sampled
        TRACEPARENT[:-2] + "fe",
        TRACEPARENT[:-2] + "zz",
        TRACEPARENT.upper(),
        TRACEPARENT + "-more",
        " " + TRACEPARENT[1:],
        TRACEPARENT + "\n",
        "ff" + TRACEPARENT[2:],
        f"00-{'0' * 32}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        TRACEPARENT.replace("-", "_"),
        "\u0660" * 55,
        "x" * (1 << 20),
    ],
)
def test_what_names_no_sampled_span_is_ignored(traceparent: str) -> None:
    assert sampled_parent(traceparent) is None
    served = Served(sink := Sink())
    cache, session = served.cache(), served.service.open_session("alice")
    served.step(session, cache, traceparent)
    served.service.close()
    assert not sink.written


@pytest.mark.parametrize("traceparent", [TRACEPARENT, TRACEPARENT[:-2] + "03", "01" + TRACEPARENT[2:]])
def test_a_sampled_span_is_found(traceparent: str) -> None:
    assert sampled_parent(traceparent) == Parent(int(TRACE_ID, 16), int(SPAN_ID, 16))


def test_a_step_is_told_of_when_its_last_layer_is_served() -> None:
    served = Served(sink := Sink())
    cache, session = served.cache(name="hers"), served.service.open_session("alice")
    served.step(session, cache, TRACEPARENT)
    wait_for(lambda: bool(sink.written), "the step is not told of")
    (trace,) = sink.written
    assert trace.parent.span_id == int(SPAN_ID, 16)
    assert trace.attributes == {
        "attnd.plane": "inline",
        "attnd.cache": "hers",
        "attnd.step_id": "1",
        "attnd.is_decode": False,
        "attnd.num_reqs": 1,
        "attnd.num_tokens": 3,
        "attnd.num_layers": 2,
    }
    assert [(call.layer, call.backend) for call in trace.calls] == [(0, "sdpa"), (1, "sdpa")]
    assert len(trace.plans) == 1
    assert trace.began_ns <= trace.plans[0][0] <= trace.plans[0][1] <= trace.calls[0].ended_ns
    served.service.close()


@pytest.mark.parametrize("end", ["session", "later steps"])
def test_a_step_without_all_its_layers_is_told_of_when_it_goes(end: str) -> None:
    served = Served(sink := Sink())
    cache, session = served.cache(), served.service.open_session("alice")
    served.step(session, cache, TRACEPARENT, layers=1)
    assert not sink.written
    if end == "session":
        del session
        gc.collect()
    else:
        for _ in range(9):
            served.step(session, cache, "")
        gc.collect()
    wait_for(lambda: bool(sink.written), "the step is not told of")
    assert [call.layer for call in sink.written[0].calls] == [0]
    served.service.close()


def test_a_step_that_is_sent_again_has_another_trace_of_the_same_parent() -> None:
    served = Served(sink := Sink())
    cache = served.cache()
    for _ in range(2):
        served.step(served.service.open_session("alice"), cache, TRACEPARENT)
    wait_for(lambda: len(sink.written) == 2, "a step is not told of")
    assert sink.written[0].parent == sink.written[1].parent
    served.service.close()


def test_the_calls_of_all_layer_groups_are_of_one_step() -> None:
    served = Served(sink := Sink())
    groups = [attnd.LayerGroup([0, 2], page_size=4), attnd.LayerGroup([1], page_size=2)]
    cache, session = served.cache(num_layers=3, groups=groups), served.service.open_session("alice")
    parts = [attnd.StepGroup([[1, 2]], [4, 5, 6]), attnd.StepGroup([[1, 2]], [2, 3, 4])]
    for step_id, layers in ((1, [2, 1, 0]), (2, [1])):
        message = attnd.StepMetadata([3], [0], groups=parts).to_message(step_id, cache)
        message.traceparent = TRACEPARENT
        session.request(frames.step_request(message))
        for layer in layers:
            served.run(session.request(requests.attend_call(step_id, layer, Q, K, V, requests.DEFAULT_OPTIONS)))
    wait_for(lambda: len(sink.written) == 1, "the step is not told of")
    assert [call.layer for call in sink.written[0].calls] == [2, 1, 0]
    assert sink.written[0].attributes["attnd.num_layers"] == 3
    session.close()  # and so drops the steps of all groups
    wait_for(lambda: len(sink.written) == 2, "a step that was dropped is not told of")
    assert [call.layer for call in sink.written[1].calls] == [1]
    served.service.close()


def test_nobody_has_more_traces_than_the_operator_allows() -> None:
    served = Served(sink := Sink(), traces=4, tokens="a file")
    caches = {name: served.cache(name) for name in ("mallory", "alice")}
    sessions = {name: served.service.open_session(name) for name in caches}
    for _ in range(200):
        served.step(sessions["mallory"], caches["mallory"], TRACEPARENT)
    served.step(sessions["alice"], caches["alice"], TRACEPARENT)
    served.service.close()
    assert len(sink.written) < 60  # 2 at once, 2 a second for mallory, and one of alice's
    assert sink.is_closed.is_set()


def test_an_allowance_is_shared_and_fills_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    allowance = Allowance(4, 2)
    assert [allowance.take("mallory") for _ in range(3)] == [True, True, False]
    assert [allowance.take("alice") for _ in range(3)] == [True, True, False]
    assert not allowance.take("bob")
    now += 0.25
    assert [allowance.take("bob"), allowance.take("alice")] == [True, False]
    now += 3600
    assert [allowance.take("mallory") for _ in range(3)] == [True, True, False]


def test_an_allowance_forgets_who_asked_long_ago() -> None:
    allowance = Allowance(1e9, 1)
    for number in range(5_000):
        assert allowance.take(f"tenant-{number}")
    assert len(allowance._principals) == 1_024


def test_open_steps_with_a_trace_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces_module, "MAX_UNDER_WAY", 6)
    served = Served(sink := Sink(), tokens="a file")
    steps = []
    for name in ("mallory", "alice"):
        cache = served.cache(name)
        for _ in range(2):
            session = served.service.open_session(name)
            steps.append(session)
            for _ in range(4):
                served.step(session, cache, TRACEPARENT, layers=0)
    steps.clear()
    gc.collect()
    served.service.close()
    assert len(sink.written) == 6  # 3 of each


def test_little_is_noted_of_a_step_whatever_is_called() -> None:
    served = Served(Sink())
    cache, session = served.cache(), served.service.open_session("alice")
    served.step(session, cache, TRACEPARENT, layers=1)
    step = next(iter(session._steps.values()))[0]
    trace: Any = step.trace
    for _ in range(5_000):
        trace.call_served(0, 1, 2, Copies(0, 0), "sdpa")
        trace.planned(0)
    assert len(trace.calls) == len(trace.plans) == 1_024
    served.service.close()


def test_a_collector_that_never_answers_does_not_keep_the_server() -> None:
    release = threading.Event()

    class Stuck(Sink):
        def close(self) -> None:
            release.wait(60)
            super().close()

    stuck = Stuck()
    made = Traces(ServerConfig(traces=1), stuck)
    made.close()
    assert not stuck.is_closed.is_set()
    release.set()
    assert stuck.is_closed.wait(30)


def test_a_sink_that_fails_harms_no_later_step(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Sink):
        def write(self, trace: StepTrace) -> None:
            super().write(trace)
            raise ValueError("no span of this")

    served = Served(sink := Failing())
    cache, session = served.cache(), served.service.open_session("alice")
    for _ in range(2):
        served.step(session, cache, TRACEPARENT)
    wait_for(lambda: len(sink.written) == 2, "a step is not told of")
    served.service.close()
    assert "the spans of a step cannot be made" in caplog.text


def test_spans_of_a_step_say_where_its_time_went() -> None:
    memory, served = Memory(), Served(sink := Sink())
    cache, session = served.cache(), served.service.open_session("alice")
    served.step(session, cache, TRACEPARENT, layers=0)
    step: Any = next(iter(session._steps.values()))[0]
    trace: Any = step.trace
    began = trace.began_ns
    trace.planned(began)
    trace.call_served(0, 100, 300, Copies(20, 0), "triton")
    trace.call_served(1, 0, 500, Copies(0, 0), "")
    wait_for(lambda: bool(sink.written), "the step is not told of")
    SpanWriter(memory.provider).write(trace)
    served.service.close()
    (of_step,) = memory.spans("attnd.step")
    assert (of_step.trace_id, of_step.parent_id) == (TRACE_ID, SPAN_ID)
    assert (of_step.began_ns, of_step.attributes["attnd.num_calls"]) == (began, 2)
    (plan,) = memory.spans("attnd.plan")
    assert plan.parent_id == of_step.id
    first, second = memory.spans("attnd.call")
    assert {first.parent_id, second.parent_id} == {of_step.id}
    assert (first.attributes["attnd.layer"], first.attributes["attnd.backend"]) == (0, "triton")
    assert "attnd.backend" not in second.attributes
    assert first.ended_ns - first.began_ns == 420_000
    phases = {span.name: span for span in memory.spans() if span.parent_id == first.id}
    assert {name: span.ended_ns - span.began_ns for name, span in phases.items()} == {
        "attnd.queue": 100_000,
        "attnd.copy_in": 20_000,
        "attnd.kernel": 300_000,
    }
    assert phases["attnd.queue"].ended_ns == phases["attnd.copy_in"].began_ns
    assert phases["attnd.copy_in"].ended_ns == phases["attnd.kernel"].began_ns
    assert phases["attnd.kernel"].ended_ns == first.ended_ns


def test_a_step_on_a_cuda_plane_is_one_call_of_all_layers() -> None:
    memory, served = Memory(), Served(sink := Sink())
    cache, session = served.cache(), served.service.open_session("alice")
    served.step(session, cache, TRACEPARENT, layers=0)
    step: Any = next(iter(session._steps.values()))[0]
    step.trace.step_served(7, 900, "triton")
    wait_for(lambda: bool(sink.written), "the step is not told of")
    SpanWriter(memory.provider).write(sink.written[0])
    served.service.close()
    (call,) = memory.spans("attnd.call")
    assert "attnd.layer" not in call.attributes
    assert call.attributes["attnd.kernel_us"] == 900


def complaint(text: str) -> None:
    logging.getLogger("opentelemetry.exporter.otlp").error(text)


def test_libraries_complain_once_a_minute(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    logger, now = logging.getLogger("opentelemetry"), 100.0
    before = logger.handlers, logger.propagate
    monkeypatch.setattr(export.time, "monotonic", lambda: now)
    try:
        export._complain_seldom()
        export._complain_seldom()
        for number in range(50):
            complaint(f"cannot reach it, {number}")
        now += 61
        complaint("still not")
    finally:
        logger.handlers, logger.propagate = before
    assert [record.getMessage() for record in caplog.records] == [
        "traces cannot be sent: cannot reach it, 0",
        "traces cannot be sent: still not",
    ]
    assert [vars(record)["num_complaints"] for record in caplog.records] == [1, 50]


def test_what_cannot_export_says_why_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "carrier pigeon")
    with pytest.raises(RuntimeError, match="OTEL_EXPORTER_OTLP_PROTOCOL is 'carrier pigeon', but must be one of"):
        build_service(ServerConfig(device="cpu", traces=1))
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(RuntimeError, match=r"traces is 1, but .* is not installed, which attnd\[otel\] brings"):
        build_service(ServerConfig(device="cpu", traces=1))


def test_the_environment_may_name_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    assert export._resource(ServerConfig(port=7411)).attributes["service.name"] == "attnd"
    assert export._resource(ServerConfig(port=7411)).attributes["service.instance.id"].endswith(":7411")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "attention")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.instance.id=a17")
    attributes = export._resource(ServerConfig(port=7411)).attributes
    assert (attributes["service.name"], attributes["service.instance.id"]) == ("attention", "a17")


# --- the client ------------------------------------------------------------------------------------------------------


def message_of_step() -> Any:
    return PREFILL.to_message(7, cache_pb2.CacheRef())


def test_a_client_that_was_not_told_to_makes_no_span() -> None:
    message = message_of_step()
    with Memory().tracer.start_as_current_span("an application's"):
        assert traces.begin(message, range(2), "inline") is None
    assert message.traceparent == ""


def test_a_client_never_imports_what_it_was_not_asked_to() -> None:
    code = "import sys, attnd, attnd.aio, attnd.traces; assert 'opentelemetry' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ModuleNotFoundError, match=r"attnd\[otel\]"):
        traces.enable()
    assert traces.tracer is None


@pytest.mark.parametrize("is_sampled", [True, False])
def test_only_a_sampled_step_names_its_span(is_sampled: bool) -> None:
    message = message_of_step()
    with traced(ParentBased(ALWAYS_OFF)) as memory:
        parent = Memory().tracer.start_span("sampled elsewhere")
        with use_span(parent) if is_sampled else nullcontext():
            span = traces.begin(message, range(2), "shm")
        assert (span is not None) is is_sampled
        assert bool(sampled_parent(message.traceparent)) is is_sampled
        if span is not None:
            span.answered(0, 0.5)
            span.answered(1, 0.25)
            (ended,) = memory.spans("attnd.step")
            assert ended.parent_id == f"{parent.get_span_context().span_id:016x}"
            assert message.traceparent.startswith(f"00-{ended.trace_id}-{ended.id}-")
            assert ended.attributes["attnd.slowest_layer"] == 0
            assert ended.attributes["attnd.slowest_call_us"] == 500_000
            assert (ended.attributes["attnd.plane"], ended.attributes["attnd.num_tokens"]) == ("shm", 3)


def test_a_span_ends_with_its_step() -> None:
    with traced() as memory:
        span: Any = traces.begin(message_of_step(), range(2), "inline")
        span.answered(1, 0.1)
        span.failed(attnd.Disconnected("gone"))
        assert not memory.spans()
        del span
        (ended,) = memory.spans()
        assert (ended.attributes["attnd.unanswered_layers"], ended.attributes["error.type"]) == (1, "Disconnected")
