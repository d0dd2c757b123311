"""A worker's resident steps without a GPU: what is enqueued in which order, and how refusals and failures are told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import attnd
from attnd.errors import CacheLost, Disconnected, InvalidRequest, Unsupported, to_message
from attnd.planes.cuda.making import made as made_ready
from attnd.planes.cuda.resident import ResidentSteps
from attnd.planes.cuda.resident_shape import ResidentShape
from attnd.protocol.cuda import copies as cuda_copies
from attnd.protocol.cuda import gate_flags as cuda_gates
from attnd.protocol.cuda.layout import Geometry
from attnd.protocol.cuda.resident import LENS_ROWS, NUM_REQS, VERSION
from attnd.protocol.tensors import DTYPES
from attnd.timings import Timings
from attnd.v1 import attention_pb2
from tests.resident_worker import Copier, Counter, Plane

LAYERS, HEADS, KV_HEADS, DIM = 3, 4, 2, 16


class Session:
    """What steps need of one."""

    timeout_s = 1.0
    geometry = Geometry(KV_HEADS, DIM, DIM, DTYPES["float32"])

    def __init__(self) -> None:
        config = SimpleNamespace(num_layers=LAYERS)
        self.cache: Any = SimpleNamespace(config=config, ref=attention_pb2.ResidentSteps().cache)
        self.lost: Any = None
        self.is_closed = False
        self._timings = Timings()

    def timings(self) -> Timings:
        return self._timings

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture(autouse=True)
def _without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_gates, "Counter", Counter)
    monkeypatch.setattr(cuda_copies, "Copier", Copier)


@pytest.fixture
def plane() -> Plane:
    return Plane()


@pytest.fixture
def session() -> Session:
    return Session()


@pytest.fixture
def steps(session: Session, plane: Plane) -> attnd.ResidentSteps:
    return made(session, plane)


def made(session: Any, plane: Any, before: Any = None, **more: Any) -> attnd.ResidentSteps:
    return made_ready(ResidentSteps, session, plane, [ResidentShape(HEADS, 3, 5, **more)], before)


def tokens(num_tokens: int) -> list[torch.Tensor]:
    return [torch.randn(num_tokens, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def run(steps: attnd.ResidentSteps, num_reqs: int = 2) -> None:
    steps.begin(num_reqs)
    for layer in range(LAYERS):
        steps.attend(layer, *tokens(num_reqs))


def test_metadata_goes_where_the_server_looks_for_it(steps: attnd.ResidentSteps, plane: Plane) -> None:
    steps.context_lens[:2] = torch.tensor([7, 9])
    steps.stored_lens[1] = 0
    steps.page_tables[1, :3] = torch.tensor([4, 5, 6])
    run(steps)
    where = plane.where
    lens = plane.region[where.lens :][: LENS_ROWS * where.max_reqs * 4].view(torch.int32).view(LENS_ROWS, -1)
    assert lens[NUM_REQS, :2].tolist() == [2, VERSION]
    assert lens[1:, :3].tolist() == [[7, 9, 0], [1, 1, 1], [1, 0, 1]]
    tables = plane.region[where.page_tables :][: where.max_reqs * where.max_pages * 4].view(torch.int32)
    assert tables.view(where.max_reqs, -1)[1, :4].tolist() == [4, 5, 6, 0]
    assert plane.noted == ["step", *(f"layer {layer}: 3 in, 1 out" for layer in range(LAYERS))]


def test_steps_are_counted_once_they_are_finished(steps: attnd.ResidentSteps, session: Session) -> None:
    for _ in range(3):
        run(steps)
    steps.finish()
    steps.finish()
    assert steps.num_done == session.timings().resident == 3
    assert session.timings().backend == "triton_grouped"


def test_what_lies_in_the_region_is_not_copied(steps: attnd.ResidentSteps, plane: Plane) -> None:
    steps.begin(2)
    for layer in range(LAYERS):
        inputs = steps.inputs(layer, 2)
        output = steps.attend(layer, *inputs, copies=False)
        assert output.data_ptr() == plane.memory.data_ptr() + steps._layouts[0].output.offset
    assert plane.noted[1:] == [f"layer {layer}: 0 in, 0 out" for layer in range(LAYERS)]


def test_layers_alternate_where_their_k_and_v_lie(steps: attnd.ResidentSteps) -> None:
    places = [[tensor.data_ptr() for tensor in steps.inputs(layer, 1)] for layer in range(3)]
    assert places[0] == places[2]
    assert places[0][0] == places[1][0]  # q
    assert not set(places[0][1:]) & set(places[1][1:])


def test_a_refusal_is_raised_once_and_the_server_is_asked_to_go_on(steps: attnd.ResidentSteps, plane: Plane) -> None:
    error = to_message(InvalidRequest("page_tables[0, 0] is 9, but must not be", field="page_tables"))
    plane.refusal = attention_pb2.ResidentRefusal(step=1, error=error)
    run(steps)
    run(steps)
    with pytest.raises(InvalidRequest, match=r"page_tables.0, 0. is 9"):
        steps.finish()
    assert plane.asked == ["resident_steps", "resident_resume"]
    plane.refusal = None
    run(steps)
    steps.finish()
    assert steps.num_done == 3


def test_a_step_that_was_not_done_is_a_failure_though_all_its_outputs_came(
    steps: attnd.ResidentSteps, plane: Plane, session: Session
) -> None:
    run(steps)
    steps.finish()
    plane.serves, plane.failure_to_come = False, Disconnected("the server has gone")
    run(steps)
    with pytest.raises(Disconnected, match="the server has gone"):
        steps.finish()
    session.lost = CacheLost("it was deleted")
    with pytest.raises(CacheLost):
        steps.finish()


@pytest.mark.parametrize("num_reqs", [0, 4, -1])
def test_a_number_of_requests_that_there_is_no_room_for(steps: attnd.ResidentSteps, num_reqs: int) -> None:
    with pytest.raises(InvalidRequest, match=f"num_reqs is {num_reqs}, but must be 1..3"):
        steps.begin(num_reqs)


def test_tensors_and_layers_are_checked(steps: attnd.ResidentSteps) -> None:
    steps.begin(2)
    with pytest.raises(InvalidRequest, match="layer is 1, but must be the next, 0"):
        steps.attend(1, *tokens(2))
    with pytest.raises(InvalidRequest, match="q has 4 tokens, but these steps have at most 3 requests of 1 new tokens"):
        steps.attend(0, *tokens(4))
    q, k, v = tokens(2)
    with pytest.raises(InvalidRequest, match=r"k has shape \[1, 2, 16\]"):
        steps.attend(0, q, k[:1], v)
    with pytest.raises(InvalidRequest, match=r"v has dtype torch\.float64"):
        steps.attend(0, q, k, v.double())


def test_a_server_that_drains_ends_the_session_at_the_next_step(
    steps: attnd.ResidentSteps, plane: Plane, session: Session
) -> None:
    run(steps)
    plane.going_away = "the server is draining"
    steps.finish()
    with pytest.raises(Disconnected, match="the server is draining; the next step reconnects"):
        steps.begin(1)
    assert session.is_closed


def test_older_steps_of_a_session_say_that_they_are_over(
    steps: attnd.ResidentSteps, plane: Plane, session: Session
) -> None:
    run(steps)
    newer = made(session, plane, steps, query_len=2)
    assert plane.wanted.after_resident == newer.num_done == 1
    assert newer.valid_lens.tolist() == [2, 2, 2]
    with pytest.raises(attnd.AttndError, match="the session has other resident steps by now"):
        steps.begin(1)


def test_why_there_are_none_is_said(session: Session, plane: Plane) -> None:
    plane.reason = "backend naive does not plan steps on the device"
    with pytest.raises(Unsupported, match="there are no resident steps: backend naive does not plan"):
        made(session, plane)
    with pytest.raises(InvalidRequest, match="mask is 'diagonal', but must be one of causal"):
        made(session, plane, mask="diagonal")
    plane.has_resident_steps = False  # type: ignore[misc]
    with pytest.raises(Unsupported, match="they need a GPU each"):
        made(session, plane)
