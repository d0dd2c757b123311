"""Messages of resident steps to a server that has none, or where they make no sense: what is told, and what goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import attnd
from attnd.errors import InvalidRequest, Unsupported
from attnd.protocol.cuda.resident import tensors_end
from attnd.v1 import attention_pb2, step_pb2
from attnd_server.build import build_service
from attnd_server.config import ServerConfig
from attnd_server.device.kernels.launch import KernelMissing
from attnd_server.inproc import InprocTransport
from attnd_server.planes.cuda.checks import places_of
from attnd_server.planes.cuda.resident import session as resident_session
from attnd_server.planes.cuda.session import CudaSession
from tests import host_channels, interpreter
from tests.servers import wait_for

pytestmark = pytest.mark.skipif(
    interpreter.reason_against() is not None or torch.cuda.is_available(), reason="needs Triton's interpreter"
)

GEOMETRY: dict[str, Any] = {
    "num_layers": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "num_pages": 8,
    "page_size": 16,
    "dtype": "float32",
    "backend": "triton_grouped",
}


class Rig:
    """A server's session, and a cache of its client."""

    def __init__(self) -> None:
        self.service = build_service(ServerConfig(device="cpu", kv_bytes=1 << 20))
        self.client = attnd.Client(InprocTransport(self.service), timeout_s=20)
        self.cache = self.client.create_cache(**GEOMETRY)
        channel: Any = SimpleNamespace(
            num_bytes=1 << 20, capture=None, drain=lambda: None, flags=SimpleNamespace(is_stopped=False)
        )
        principal = self.service.caches.all()[0].principal
        self.session = CudaSession(self.service, principal, channel, SimpleNamespace(), print)  # type: ignore[arg-type]

    def steps(self, **fields: Any) -> attention_pb2.ResidentSteps:
        wanted: dict[str, Any] = {"num_heads": 4, "query_len": 1, "max_reqs": 4, "max_pages": 4}
        wanted |= {"mask": step_pb2.MASK_CAUSAL, **fields}
        return attention_pb2.ResidentSteps(cache=self.cache.ref, **wanted)

    def answer(self, **message: Any) -> attention_pb2.AttendResponse:
        answer = self.session.begin(attention_pb2.AttendRequest(**message).SerializeToString())
        assert isinstance(answer, bytes)
        return attention_pb2.AttendResponse.FromString(answer)

    def close(self) -> None:
        self.client.close()
        self.service.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    with interpreter.interpreter():
        rig = Rig()
        try:
            yield rig
        finally:
            rig.close()


def test_a_server_without_hoppers_kernels_says_so_and_goes_on(rig: Rig) -> None:
    reply = rig.answer(resident_steps=rig.steps())
    assert reply.WhichOneof("message") == "resident_steps"
    assert reply.resident_steps.reason == (
        "backend triton_grouped does not plan these steps: Hopper's kernels do not serve this cache on this device"
    )
    assert rig.cache.info().num_bytes == rig.service.caches.all()[0].shape.num_bytes  # nothing was taken
    assert not rig.session.is_under_way


def test_a_backend_that_plans_on_the_host_is_named(rig: Rig) -> None:
    options = [step_pb2.AttentionOptions(backend="BACKEND_NAIVE")]
    reply = rig.answer(resident_steps=rig.steps(options=options))
    assert reply.resident_steps.reason == "backend naive does not plan steps on the device"


def test_steps_that_may_be_too_costly_are_none(rig: Rig) -> None:
    rig.service.executor.most_work = 1 << 16
    reply = rig.answer(resident_steps=rig.steps())
    assert "products (new tokens x keys x heads x dims, roughly), but a call may ask for 65536" in (
        reply.resident_steps.reason
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 3}, "num_heads is 3, but must be a multiple of the cache's 2 KV heads"),
        ({"num_heads": 0}, "num_heads is 0, but must be a multiple of the cache's 2 KV heads"),
        ({"query_len": 0}, "query_len is 0, but must be 1"),
        ({"mask": step_pb2.MASK_PREFIX_FULL}, "mask is 4, but must be MASK_CAUSAL, MASK_BLOCK_CAUSAL or MASK_BIDIRECT"),
        ({"max_pages": 1 << 18}, "steps of 4 requests with 262144 pages take .* bytes of a cuda plane's region"),
        ({"options": [step_pb2.AttentionOptions()] * 3}, "options has 3 elements, but must have one for all layers"),
        (
            {"after_resident": 5},
            "after_resident is 5, but must be at most the 0 that are done",
        ),
    ],
)
def test_what_breaks_a_rule_is_refused(rig: Rig, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        rig.answer(resident_steps=rig.steps(**fields))


def test_there_is_nothing_to_resume_or_to_come_after(rig: Rig) -> None:
    with pytest.raises(InvalidRequest, match="message is resident_resume, but there are no resident steps"):
        rig.answer(resident_resume=attention_pb2.ResidentResume())
    step = attnd.StepMetadata([1], [0], [[0]], [0]).to_message(1, rig.cache.ref)
    with pytest.raises(InvalidRequest, match="after_resident is 1, but must be at most the 0 that are done"):
        rig.answer(cuda_step=attention_pb2.CudaStep(step=step, num_heads=4, after_resident=1))


def test_a_worker_on_the_servers_gpu_is_told_why_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        interpreter.interpreter(),
        host_channels.serving(tmp_path, monkeypatch) as (client, _, _),
        client.create_cache(**GEOMETRY) as cache,
        cache.session(plane="cuda") as session,
    ):
        with pytest.raises(Unsupported, match="the server has no resident steps for this worker: they need a GPU each"):
            session.resident(4, max_reqs=2, max_pages=2)  # type: ignore[union-attr]
        step = session.step(attnd.StepMetadata([1], [0], [[0]], [0]), num_heads=4)  # type: ignore[call-arg]
        q, k = torch.randn(1, 4, 16), torch.randn(1, 2, 16)
        for layer in range(2):
            step.attend(layer, q, k, k)
        step.finish()  # type: ignore[union-attr]


def test_kernels_that_are_on_their_way_are_waited_for_unless_there_is_no_hurry(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[KernelMissing] = []
    has_come = threading.Event()

    def made(self: object, message: attention_pb2.ResidentSteps) -> KernelMissing:
        if has_come.is_set():
            raise Unsupported("the end of the test")
        tries.append(KernelMissing("a kernel", Future()))
        return tries[-1]

    monkeypatch.setattr(resident_session.ResidentSteps, "_made", made)
    reply = rig.answer(resident_steps=rig.steps(if_ready=True)).resident_steps
    assert (reply.reason, reply.is_late) == ("their kernels are on their way to the GPU", True)
    monkeypatch.setattr(resident_session, "num_standing_in", lambda device: 1)
    assert rig.answer(resident_steps=rig.steps(if_ready=True)).resident_steps.is_late
    monkeypatch.undo()
    monkeypatch.setattr(resident_session.ResidentSteps, "_made", made)
    answers: list[attention_pb2.ResidentStepsReply] = []
    waiting = threading.Thread(target=lambda: answers.append(rig.answer(resident_steps=rig.steps()).resident_steps))
    waiting.start()
    wait_for(lambda: len(tries) == 2, "nobody has tried")
    assert waiting.is_alive()
    has_come.set()
    tries[-1].ready.set_result(None)
    waiting.join(20)
    assert [(each.reason, each.is_late) for each in answers] == [("the end of the test", False)]


def test_tensors_of_a_step_by_message_end_before_the_metadata(rig: Rig) -> None:
    """Which the server's GPU reads whenever it likes."""
    num_bytes = rig.session._channel.num_bytes
    config = rig.service.caches.all()[0].groups[0].config
    end = tensors_end(places_of(config, 256, 4, num_bytes))

    def message(step_id: int, layout_tokens: int = 0) -> attention_pb2.AttendRequest:
        step = attnd.StepMetadata([256], [0], [[]], None).to_message(step_id, rig.cache.ref)
        cuda_step = attention_pb2.CudaStep(step=step, num_heads=4, layout_tokens=layout_tokens)
        return attention_pb2.AttendRequest(cuda_step=cuda_step)

    def ready_at(word: int) -> None:
        rig.session._resident._ready = SimpleNamespace(where=SimpleNamespace(word=word))  # type: ignore[assignment]

    ready_at(end)
    assert rig.session._checked(message(1)).layouts == places_of(config, 256, 4, num_bytes)
    ready_at(end - 1)
    with pytest.raises(InvalidRequest, match=f"take {end} bytes of a cuda plane's region, but it has {end - 1}"):
        rig.session._checked(message(2))
    whole = tensors_end(places_of(config, 300, 4, num_bytes, 300))
    ready_at(whole)
    assert rig.session._checked(message(3, 300)).layouts == places_of(config, 256, 4, num_bytes, 300)
    ready_at(whole - 1)
    with pytest.raises(InvalidRequest, match=f"layers of 300 tokens take {whole} bytes"):
        rig.session._checked(message(4, 300))
    with pytest.raises(InvalidRequest, match="layout_tokens is 255, but must be 0, or at least the 256 tokens"):
        rig.session._checked(message(5, 255))
    rig.session._resident._ready = None
