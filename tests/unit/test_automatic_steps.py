"""Which steps of a session are resident without being asked for, and what becomes of them. No GPU."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import attnd
from attnd import traces
from attnd.errors import DeadlineExceeded, Disconnected, InvalidRequest, Unsupported, to_message
from attnd.planes.cuda import automatic, opening
from attnd.planes.cuda import session as cuda_session
from attnd.planes.cuda.automatic import OTHERS_AFTER
from attnd.planes.cuda.plane import Answer
from attnd.planes.cuda.session import CudaSession
from attnd.protocol.cuda import copies as cuda_copies
from attnd.protocol.cuda import gate_flags as cuda_gates
from attnd.protocol.cuda.resident import VERSION
from attnd.v1 import attention_pb2
from tests.resident_worker import Copier, Counter, Plane

LAYERS, HEADS, KV_HEADS, DIM, PAGE = 3, 4, 2, 16, 4
GEOMETRY: dict[str, Any] = {
    "num_layers": LAYERS,
    "num_kv_heads": KV_HEADS,
    "head_dim": DIM,
    "page_size": PAGE,
    "num_pages": 256,
    "dtype": "float32",
}


class SendingPlane(Plane):
    """Takes steps by message too, and answers them at once, or when the test says so.

    Attributes:
        sent: messages of steps.
        places: offsets of q, k, v and output of each layer that was handed over.
        refused_shapes: the server has no resident steps of so many requests.
    """

    takes_turns = False

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[attention_pb2.CudaStep] = []
        self.places: list[tuple[int, ...]] = []
        self.answers, self.is_closed = True, False
        self.refused_shapes: tuple[int, ...] = ()
        self.is_late = False

    def current_stream(self) -> int:
        return 0

    def send(self, step: attention_pb2.CudaStep, timeout_s: float) -> None:
        self.sent.append(step)

    def answer(self, step_id: int, wait: bool) -> Answer | None:
        if not (self.answers or wait):
            return None
        return Answer(attention_pb2.CudaStepReply(step_id=step_id, takes_deltas=True), None)

    def ask(self, request: attention_pb2.AttendRequest, timeout_s: float) -> Any:
        reply = super().ask(request, timeout_s)
        if request.WhichOneof("message") == "resident_steps" and self.is_late:
            return attention_pb2.ResidentStepsReply(reason="the kernels are on their way", is_late=True)
        if request.WhichOneof("message") == "resident_steps" and request.resident_steps.max_reqs in self.refused_shapes:
            return attention_pb2.ResidentStepsReply(reason="no memory for so many")
        return reply

    def hand_over(self, stream: int, layer: int, is_last: bool, inputs: Any, outputs: Any) -> None:
        self.places.append(tuple(place.offset for place, _ in [*inputs, *outputs]))
        super().hand_over(stream, layer, is_last, inputs, outputs)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def planes() -> list[SendingPlane]:
    """Those that were opened."""
    return []


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, planes: list[SendingPlane]) -> Iterator[CudaSession]:
    def asked(*_: Any) -> tuple[SendingPlane, int]:
        planes.append(SendingPlane())
        return planes[-1], len(planes)

    monkeypatch.setattr(opening, "asked", asked)
    monkeypatch.setattr(cuda_session, "await_end", lambda *_: None)
    monkeypatch.setattr(cuda_gates, "Counter", Counter)
    monkeypatch.setattr(cuda_copies, "Copier", Copier)
    with attnd.connect("inproc://", timeout_s=1.0) as client, client.create_cache(**GEOMETRY) as cache:
        yield cache.session(plane="cuda")


def decode(num_reqs: int = 2, context_len: int = 5, query_len: int = 1, **more: Any) -> attnd.StepMetadata:
    num_pages = -(-(context_len + query_len) // PAGE)
    tables = [list(range(request * num_pages, (request + 1) * num_pages)) for request in range(num_reqs)]
    positions = range(context_len, context_len + query_len)
    slots = [table[position // PAGE] * PAGE + position % PAGE for table in tables for position in positions]
    lens = [query_len] * num_reqs, [context_len] * num_reqs
    return attnd.StepMetadata(*lens, tables, slots, kind="decode", **more)


def prefill() -> attnd.StepMetadata:
    return attnd.StepMetadata([3], [0], [[0]], [0, 1, 2])


def run(session: CudaSession, metadata: attnd.StepMetadata, *, finishes: bool = True) -> str:
    """A whole step; why it went by message."""
    step = session.step(metadata, num_heads=HEADS)
    why, n = session.by_message, metadata.num_tokens
    for layer in range(LAYERS):
        step.attend(layer, torch.randn(n, HEADS, DIM), *(torch.randn(n, KV_HEADS, DIM) for _ in range(2)))
    if finishes:
        step.finish()
    return why


def ready(session: CudaSession, **more: Any) -> None:
    """Until decode steps are resident."""
    assert run(session, decode(**more)) == "resident steps are made ready after 2 that are alike"
    assert run(session, decode(**more)) == ""


def test_decode_steps_are_resident_from_the_second_on(session: CudaSession, planes: list[SendingPlane]) -> None:
    assert run(session, prefill()) == "kind is 'prefill'"
    ready(session)
    assert run(session, decode(context_len=6)) == ""
    (plane,) = planes
    assert [len(step.step.cu_seqlens_q.data) // 4 - 1 for step in plane.sent] == [1, 2]
    assert plane.asked == ["resident_steps"]
    assert session.timings().resident == 2
    assert session.timings().num_steps == 4
    where, lens = plane.where, plane.region
    told = lens[where.lens :][: 16 * where.max_reqs].view(torch.int32).view(4, -1)
    assert told[:, :2].tolist() == [[2, 1], [6, 6], [1, 1], [1, 1]]
    tables = plane.region[where.page_tables :].view(torch.int32)[: 2 * where.max_pages].view(2, -1)
    assert tables[:, :2].tolist() == [[0, 1], [2, 3]]


def test_each_steps_metadata_is_its_own(session: CudaSession, planes: list[SendingPlane]) -> None:
    """Though what is as in the step before is not written again, and two buffers take turns."""
    ready(session, num_reqs=4)
    (plane,) = planes
    chance = random.Random(5)
    for _ in range(120):
        n, length, table = chance.choice([1, 2, 4]), chance.choice([0, 5, 6, 40]), chance.choice([0, 0, 50, 100])
        metadata = decode(num_reqs=n, context_len=length)
        tables = [[page + table for page in row] for row in metadata.page_tables]
        stored = chance.choice([1, 1, 1, 0])
        slots = [slot + table * PAGE if stored else -1 for slot in metadata.slot_mapping]
        valid = chance.choice([None, None, [chance.randint(0, 1) for _ in range(n)]])
        lens = metadata.query_lens, metadata.context_lens
        told = attnd.StepMetadata(*lens, tables, slots, kind="decode", valid_lens=valid)
        assert run(session, told) == ""
        where = plane.where
        found = plane.region[where.lens :][: 16 * where.max_reqs].view(torch.int32).view(4, -1)
        assert found[0, :2].tolist() == [n, VERSION]
        assert found[1:, :n].tolist() == [[length] * n, valid or [1] * n, [stored] * n]
        columns = -(-(length + stored) // PAGE)
        pages = plane.region[where.page_tables :].view(torch.int32)[: n * where.max_pages].view(n, -1)
        assert pages[:, :columns].tolist() == [row[:columns] for row in tables]


def test_tensors_lie_at_the_same_places_however_a_step_goes(session: CudaSession, planes: list[SendingPlane]) -> None:
    """A worker's CUDA graph of the layers is replayed in any step of as many tokens."""
    run(session, prefill())
    ready(session, num_reqs=3)
    run(session, decode(num_reqs=5, context_len=99))  # for which others are made
    session.uses_resident_steps = False
    run(session, decode(num_reqs=3))
    (plane,) = planes
    assert {step.layout_tokens for step in plane.sent} == {plane.wanted.layout_tokens} != {0}
    each = [plane.places[LAYERS * step :][:LAYERS] for step in range(5)]
    assert len(each[0]) == LAYERS
    assert all(places == each[0] for places in each)
    assert each[0][0] == each[0][2] != each[0][1]  # K and V of odd layers lie apart


def test_the_next_step_goes_by_message_while_one_is_not_finished(
    session: CudaSession, planes: list[SendingPlane]
) -> None:
    ready(session)
    first = session.step(decode(), num_heads=HEADS)
    second = session.step(decode())
    assert session.by_message == "a step before it is not finished"
    (plane,) = planes
    assert plane.sent[-1].after_resident == 2  # which the server awaits, and this process does not
    for step in (first, second):
        for layer in range(LAYERS):
            step.attend(layer, torch.randn(2, HEADS, DIM), *(torch.randn(2, KV_HEADS, DIM) for _ in range(2)))
    first.finish()
    plane.answers = False
    session.step(decode())
    assert session.by_message == "a step before it is not finished"  # by message: nobody has asked for its answer
    plane.answers = True


def test_a_step_whose_layers_are_elsewhere_is_waited_for(session: CudaSession, planes: list[SendingPlane]) -> None:
    """As in a CUDA graph that is replayed on a stream of its own."""
    ready(session)
    step = session.step(decode())
    assert session.by_message == ""
    (plane,), looks = planes, []

    def served_at_the_third_look() -> None:
        looks.append(None)
        if len(looks) == 3:
            plane.num_done += 1
            plane.tell(0)

    plane.synchronize = served_at_the_third_look  # type: ignore[method-assign]
    marked = session._steps._automatic.steps  # type: ignore[union-attr]
    real = marked.mark  # type: ignore[union-attr]

    def mark() -> None:
        plane.synchronize()
        real()

    marked.mark = mark  # type: ignore[union-attr,method-assign]
    step.finish()
    assert len(looks) == 3
    assert session.timings().resident == 2


def test_a_step_that_never_ends_is_late_and_ends_the_plane(session: CudaSession, planes: list[SendingPlane]) -> None:
    ready(session)
    session.timeout_s = 0.05
    step = session.step(decode())
    with pytest.raises(DeadlineExceeded, match="resident step 2 was not done in time: by the server, or by"):
        step.finish()
    assert planes[0].is_closed
    session.timeout_s = 1.0
    run(session, decode())
    assert len(planes) == 2


def refuse(plane: SendingPlane, step: int) -> None:
    error = to_message(InvalidRequest("page_tables[0, 0] is 9, but must not be", field="page_tables"))
    plane.refusal = attention_pb2.ResidentRefusal(step=step, error=error)


def test_a_refusal_is_raised_by_finish_and_the_plane_goes_on(session: CudaSession, planes: list[SendingPlane]) -> None:
    ready(session)
    (plane,) = planes
    refuse(plane, 2)
    with pytest.raises(InvalidRequest, match=r"page_tables.0, 0. is 9"):
        run(session, decode())
    assert plane.asked[-1] == "resident_resume"
    plane.refusal = None
    assert run(session, decode()) == ""
    assert not plane.is_closed
    assert len(planes) == 1


def test_a_refusal_that_nobody_asks_for_is_raised_by_the_next_step(
    session: CudaSession, planes: list[SendingPlane]
) -> None:
    ready(session)
    refuse(planes[0], 2)
    run(session, decode(), finishes=False)
    with pytest.raises(InvalidRequest, match=r"page_tables.0, 0. is 9"):
        session.step(decode())
    planes[0].refusal = None
    assert run(session, decode()) == ""


def test_a_refusal_with_a_step_behind_it_ends_the_plane(session: CudaSession, planes: list[SendingPlane]) -> None:
    """The server could not take it back before that step is over, which waits for this process."""
    ready(session)
    (plane,) = planes
    refuse(plane, 2)
    first = session.step(decode())
    session.step(decode())
    plane.answers = False
    for layer in range(LAYERS):
        first.attend(layer, torch.randn(2, HEADS, DIM), *(torch.randn(2, KV_HEADS, DIM) for _ in range(2)))
    with pytest.raises(InvalidRequest, match=r"page_tables.0, 0. is 9"):
        first.finish()
    assert plane.is_closed
    assert "resident_resume" not in plane.asked


def test_room_grows_with_the_steps(session: CudaSession, planes: list[SendingPlane]) -> None:
    ready(session, num_reqs=3)
    (plane,) = planes
    assert (plane.wanted.max_reqs, plane.wanted.max_pages, plane.wanted.after_resident) == (4, 16, 0)
    assert run(session, decode(num_reqs=4, context_len=63)) == ""
    assert plane.asked == ["resident_steps"]
    assert run(session, decode(num_reqs=4, context_len=64)) == ""
    assert (plane.wanted.max_reqs, plane.wanted.max_pages, plane.wanted.after_resident) == (4, 32, 2)
    assert run(session, decode(num_reqs=5)) == ""
    assert (plane.wanted.max_reqs, plane.wanted.max_pages, plane.wanted.after_resident) == (8, 16, 3)
    assert session.timings().resident == 4


def test_others_are_made_ready_when_they_stay(session: CudaSession, planes: list[SendingPlane]) -> None:
    ready(session)
    drafts = {"query_len": 3, "mask": "block_causal", "block_size": 4}
    said = [run(session, decode(**drafts)) for _ in range(OTHERS_AFTER)]
    assert said == [f"resident steps are made ready after {OTHERS_AFTER} that are alike"] * (OTHERS_AFTER - 1) + [""]
    wanted = planes[0].wanted
    assert (wanted.query_len, wanted.mask, wanted.block_size) == (3, 2, 4)
    for _ in range(2 * OTHERS_AFTER):  # those that come by turns do not take each other's place
        assert run(session, decode(**drafts)) == ""
        assert run(session, decode()) != ""


def test_less_room_is_asked_for_where_there_is_not_enough(session: CudaSession, planes: list[SendingPlane]) -> None:
    run(session, decode(num_reqs=5))
    planes[0].refused_shapes = (8,)
    assert run(session, decode(num_reqs=5)) == ""
    assert planes[0].wanted.max_reqs == 5


def test_kernels_that_are_on_their_way_are_not_waited_for(
    session: CudaSession, planes: list[SendingPlane], monkeypatch: pytest.MonkeyPatch
) -> None:
    ready(session)
    (plane,) = planes
    assert plane.wanted.if_ready
    now = [100.0]
    monkeypatch.setattr(automatic.time, "monotonic", lambda: now[0])
    plane.is_late = True
    late = "there are no resident steps yet: the kernels are on their way"
    for _ in range(3):
        assert run(session, decode(num_reqs=5)) == late
    assert plane.asked == ["resident_steps"] * 2  # only once for both sizes, and not in each step
    plane.is_late = False
    now[0] += automatic.LATE_S
    assert run(session, decode(num_reqs=5)) == ""
    assert (plane.wanted.max_reqs, plane.wanted.after_resident) == (8, 1)
    assert session.timings().resident == 2
    session.resident(HEADS, max_reqs=2, max_pages=4)
    assert not plane.wanted.if_ready


def test_a_server_without_room_is_not_asked_again(session: CudaSession, planes: list[SendingPlane]) -> None:
    ready(session)
    (plane,) = planes
    plane.refused_shapes = (8, 5)
    for _ in range(3):
        assert run(session, decode(num_reqs=5)) == "there are no resident steps: no memory for so many"
    assert plane.asked == ["resident_steps"] * 3
    assert plane.sent[-1].after_resident == 1
    assert run(session, decode()) == "there are no resident steps: no memory for so many"


def test_a_region_that_is_too_small_is_seen_before_the_server_is_asked(
    session: CudaSession, planes: list[SendingPlane], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SendingPlane, "num_bytes", 8192)
    run(session, decode())
    assert run(session, decode()).startswith("layers of 4 tokens take 8448 bytes of a cuda plane")
    assert planes[0].asked == []


def test_resident_steps_that_were_asked_for_are_the_only_ones(session: CudaSession, planes: list[SendingPlane]) -> None:
    ready(session)
    steps = session.resident(HEADS, max_reqs=2, max_pages=4)
    assert planes[0].wanted.after_resident == 1
    assert run(session, decode()) == "session.resident has made others"
    steps.begin(1)
    for layer in range(LAYERS):
        steps.attend(layer, torch.randn(1, HEADS, DIM), *(torch.randn(1, KV_HEADS, DIM) for _ in range(2)))
    steps.finish()
    assert steps.num_done == 2


def test_a_step_that_is_opened_in_a_capture_goes_by_message(
    session: CudaSession, planes: list[SendingPlane], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its metadata would go with each replay, and not now."""
    ready(session)
    monkeypatch.setattr(SendingPlane, "is_capturing", True)
    assert run(session, decode()) == "a CUDA graph is being captured"
    assert planes[0].asked == ["resident_steps"]


def test_layers_that_are_captured_say_nothing_of_the_step(
    session: CudaSession, planes: list[SendingPlane], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is under way when it is replayed, and not when its last layer is captured."""
    ready(session)
    (plane,) = planes
    step = session.step(decode())
    plane.serves = False
    monkeypatch.setattr(SendingPlane, "is_capturing", True)
    for layer in range(LAYERS):
        step.attend(layer, torch.randn(2, HEADS, DIM), *(torch.randn(2, KV_HEADS, DIM) for _ in range(2)))
    monkeypatch.setattr(SendingPlane, "is_capturing", False)
    assert session._steps is not None
    assert not session._steps.is_known
    plane.num_done += 1  # it was replayed
    plane.tell(0)
    step.finish()
    assert session.timings().resident == 2


def test_steps_are_by_message_for_who_wants_that(session: CudaSession, planes: list[SendingPlane]) -> None:
    session.uses_resident_steps = False
    assert [run(session, decode()) for _ in range(3)] == ["uses_resident_steps is False"] * 3
    assert planes[0].asked == []


@pytest.mark.parametrize("is_sampled", [True, False])
def test_a_step_that_is_traced_goes_by_message(
    session: CudaSession, planes: list[SendingPlane], monkeypatch: pytest.MonkeyPatch, is_sampled: bool
) -> None:
    provider = pytest.importorskip("opentelemetry.sdk.trace").TracerProvider
    sampling = pytest.importorskip("opentelemetry.sdk.trace.sampling")
    ready(session)
    traces.enable(provider(sampler=sampling.ALWAYS_ON if is_sampled else sampling.ALWAYS_OFF))
    try:
        assert run(session, decode()) == ("it is traced" if is_sampled else "")
    finally:
        traces.disable()
    assert bool(planes[0].sent[-1].step.traceparent) == is_sampled


def test_a_sampler_is_asked_once_for_each_step(
    session: CudaSession, planes: list[SendingPlane], monkeypatch: pytest.MonkeyPatch
) -> None:
    ready(session)
    asked: list[Any] = []
    monkeypatch.setattr(traces, "tracer", object())
    monkeypatch.setattr(traces, "begin", lambda *arguments: asked.append(arguments))
    assert run(session, decode()) == ""
    assert run(session, prefill()) == "kind is 'prefill'"
    session.uses_resident_steps = False
    run(session, decode())
    assert len(asked) == 3


def test_an_interrupt_of_a_wait_is_no_answer(
    session: CudaSession, planes: list[SendingPlane], monkeypatch: pytest.MonkeyPatch
) -> None:
    ready(session)
    refuse(planes[0], 2)
    step = session.step(decode())
    for layer in range(LAYERS):
        step.attend(layer, torch.randn(2, HEADS, DIM), *(torch.randn(2, KV_HEADS, DIM) for _ in range(2)))

    def interrupt() -> None:
        raise KeyboardInterrupt

    steps: Any = session._steps._automatic.steps  # type: ignore[union-attr]
    with monkeypatch.context() as patch:
        patch.setattr(steps, "_refuse_if_failed", interrupt)
        with pytest.raises(KeyboardInterrupt):
            step.finish()
    with pytest.raises(InvalidRequest, match=r"page_tables.0, 0. is 9"):
        step.finish()


def test_others_that_were_asked_for_in_vain_are_made_up_for(session: CudaSession, planes: list[SendingPlane]) -> None:
    ready(session)
    (plane,) = planes
    plane.refused_shapes = (77,)
    with pytest.raises(Unsupported, match="no memory for so many"):
        session.resident(HEADS, max_reqs=77, max_pages=4)
    assert run(session, decode()) == ""
    assert plane.wanted.after_resident == 1
    assert session.timings().resident == 2


def test_closing_drops_the_step_that_is_not_finished(session: CudaSession, planes: list[SendingPlane]) -> None:
    ready(session)
    step = session.step(decode())
    session.close()
    with pytest.raises(Disconnected, match="the session was closed before the step was answered"):
        step.finish()
    assert planes[0].is_closed


def test_leaving_a_session_finishes_its_steps(session: CudaSession, planes: list[SendingPlane]) -> None:
    ready(session)
    with session:
        run(session, decode(), finishes=False)
    assert session.timings().resident == 2
    ready(session)
    refuse(planes[1], 2)
    with pytest.raises(InvalidRequest, match=r"page_tables.0, 0. is 9"), session:
        run(session, decode(), finishes=False)
    assert planes[1].is_closed


def test_a_plane_without_them_says_so(session: CudaSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SendingPlane, "has_resident_steps", False)
    assert run(session, decode()) == "the server has no resident steps for this worker"
    with pytest.raises(Unsupported):
        session.resident(HEADS, max_reqs=2, max_pages=4)
