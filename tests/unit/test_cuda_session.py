"""Sessions on a cuda plane, both ends in this process and without a GPU: messages, steps, errors, ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

import attnd
from attnd.planes.cuda.session import CudaSession
from attnd.planes.cuda.step import CudaStep
from attnd.protocol.features import KNOWN, MissingFeatures
from attnd_server import inproc
from attnd_server.attention.backends.base import DecodeShape
from attnd_server.attention.backends.triton.attention import TritonPagedAttention
from attnd_server.attention.config import AttentionBackend, AttentionConfig
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions
from attnd_server.device.kernels.launch import KernelMissing
from attnd_server.identity import TokenFile
from attnd_server.identity.tokens import add_token
from attnd_server.observe.counts import Metrics
from attnd_server.planes.cuda import session as cuda_server
from attnd_server.planes.cuda import watchdog as cuda_watchdog
from attnd_server.planes.cuda.step_graph import StepGraph
from tests import host_channels, interpreter
from tests.servers import wait_for

pytestmark = pytest.mark.skipif(
    interpreter.reason_against() is not None or torch.cuda.is_available(), reason="needs Triton's interpreter"
)

GEOMETRY = {
    "num_layers": 3,
    "num_kv_heads": 2,
    "head_dim": 16,
    "num_pages": 16,
    "page_size": 16,
    "dtype": "float32",
    "backend": "triton_grouped",
}
HEADS = 4
# Seconds: longer than anything here should take.
TIMEOUT_S = 20.0


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    with interpreter.interpreter():
        yield


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[attnd.Client, host_channels.HostPlanes]]:
    with host_channels.serving(tmp_path, monkeypatch) as (client, planes, _):
        yield client, planes


def new_tokens(num_tokens: int, heads: int = HEADS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.randn(num_tokens, heads, 16)
    return q, torch.randn(num_tokens, 2, 16), torch.randn(num_tokens, 2, 16)


def metadata(context_len: int, num_tokens: int, **more: object) -> attnd.StepMetadata:
    slots = range(context_len, context_len + num_tokens)
    return attnd.StepMetadata([num_tokens], [context_len], [[0, 1, 2]], slots, **more)


def test_outputs_are_those_of_inline_bit_for_bit(opened: tuple[attnd.Client, host_channels.HostPlanes]) -> None:
    client, _ = opened
    layers = [attnd.AttentionOptions(), attnd.AttentionOptions(window=3), attnd.AttentionOptions(return_lse=True)]
    with (
        client.create_cache(**GEOMETRY) as one,
        client.create_cache(**GEOMETRY) as other,
        one.session() as ours,
        other.session(plane="inline") as theirs,
    ):
        assert isinstance(ours, CudaSession)
        context_len = 0
        for num_tokens in (7, 1, 1, 3):
            step = ours.step(metadata(context_len, num_tokens), num_heads=HEADS, options=layers)
            calls = [new_tokens(num_tokens) for _ in layers]
            outputs = [step.attend(layer, *call) for layer, call in enumerate(calls)]
            if num_tokens != 1:
                step.finish()
            reference = theirs.step(metadata(context_len, num_tokens))
            for layer, (options, call) in enumerate(zip(layers, calls, strict=True)):
                pair = outputs[layer], reference.attend(layer, *call, options)
                for one_of_ours, one_of_theirs in zip(*pair, strict=True) if options.return_lse else [pair]:
                    assert torch.equal(one_of_ours, one_of_theirs)
            context_len += num_tokens
        assert ours.plane == "cuda"
        assert ours.timings().backend == "triton_grouped"
        assert ours.timings().num_steps == 4
        assert ours.timings().num_calls == 12
        assert one.info().num_pages_written == other.info().num_pages_written
        for layer in range(3):
            for k_or_v in range(2):
                stored = [cache.read_kv(layer, range(12), torch.empty(0))[k_or_v] for cache in (one, other)]
                assert torch.equal(*stored)


def test_a_step_counts_as_one_that_waits_until_it_is_over(
    opened: tuple[attnd.Client, host_channels.HostPlanes],
) -> None:
    client, _ = opened
    quiet = client.transport._service.executor.quiet
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        step = session.step(metadata(0, 4), num_heads=HEADS)
        step.attend(0, *new_tokens(4))
        assert not quiet.are_over(0)
        step.attend(1, *new_tokens(4))
        step.attend(2, *new_tokens(4))
        step.finish()
        assert quiet.are_over(TIMEOUT_S)
        step = session.step(metadata(4, 1), num_heads=HEADS)
        step.attend(0, *new_tokens(1))
        assert not quiet.are_over(0)
    assert quiet.are_over(TIMEOUT_S)  # also one that its worker leaves


def test_a_step_is_held_back_while_nothing_may_wait(opened: tuple[attnd.Client, host_channels.HostPlanes]) -> None:
    client, planes = opened
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        with client.transport._service.executor.quiet.moment(0) as is_quiet:
            assert is_quiet
            step = session.step(metadata(0, 4), num_heads=HEADS)
            time.sleep(0.05)
            assert planes.channels[-1].flags.num_waits == 0
        for layer in range(3):
            step.attend(layer, *new_tokens(4))
        step.finish()
        assert planes.channels[-1].flags.num_waits == 3


def test_a_step_whose_kernel_is_not_there_yet_waits_for_it_outside_the_gpu(
    opened: tuple[attnd.Client, host_channels.HostPlanes], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = opened
    quiet, enqueue = client.transport._service.executor.quiet, cuda_server.CudaStep.enqueue
    kernels: list[Future[None]] = [Future(), Future()]
    tries: list[int] = []

    def lacking(step: cuda_server.CudaStep, *arguments: object) -> None:
        tries.append(len(tries))
        if len(tries) <= len(kernels):
            raise KernelMissing("a_kernel", kernels[len(tries) - 1])
        enqueue(step, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(cuda_server.CudaStep, "enqueue", lacking)
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        step = session.step(metadata(0, 4), num_heads=HEADS)
        for number, kernel in enumerate(kernels, 1):
            wait_for(lambda number=number: len(tries) == number, "the step was not tried")
            with quiet.moment(TIMEOUT_S) as is_quiet:
                assert is_quiet
                assert len(cache.written_pages()) == 0  # others go on
            kernel.set_result(None)
        for layer in range(3):
            step.attend(layer, *new_tokens(4))
        step.finish()
        assert cache.written_pages() == [0]
        kernels.append(Future())
        kernels[-1].set_exception(attnd.Unsupported("no such kernel can be"))
        tries[:] = [0, 1]
        step = session.step(metadata(4, 1), num_heads=HEADS)
        with pytest.raises(attnd.Unsupported, match="no such kernel can be"):
            step.finish()
    assert quiet.are_over(TIMEOUT_S)


def test_a_step_that_refines_in_place_has_no_window(opened: tuple[attnd.Client, host_channels.HostPlanes]) -> None:
    client, _ = opened
    refining = attnd.AttnMetaDataBase(
        cu_seqlens_q=[0, 4], context_lens=[12], page_tables=[[0]], slot_mapping=[4, 5, 6, 7], page_size=16
    )
    refining.init_multi_block(status_table=[2])
    refining.fdv2_cache_only = True
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        with pytest.raises(attnd.InvalidRequest, match="window is 6, but must be absent"):
            session.step(
                refining, num_heads=HEADS, options=[attnd.AttentionOptions(), attnd.AttentionOptions(window=6)]
            )
        step = session.step(refining, num_heads=HEADS, options=attnd.AttentionOptions())
        for layer in range(3):
            step.attend(layer, *new_tokens(4))
        step.finish()
        assert cache.written_pages() == [0]


def test_nothing_new_is_asked_of_an_older_server(opened: tuple[attnd.Client, host_channels.HostPlanes]) -> None:
    client, _ = opened
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        cache.missing = MissingFeatures("0.1.0", KNOWN)
        with pytest.raises(attnd.Unsupported, match=r"of version 0\.1\.0, which has no store-first steps"):
            session.step(metadata(0, 4, store_first=True), num_heads=HEADS)
        assert session.timings().bytes_sent == 0
        step = session.step(metadata(0, 4), num_heads=HEADS)
        for layer in range(3):
            step.attend(layer, *new_tokens(4))
        step.finish()
        assert cache.written_pages() == [0]


def test_steps_are_counted_as_their_calls(opened: tuple[attnd.Client, host_channels.HostPlanes]) -> None:
    client, _ = opened
    metrics = client.transport._service.metrics = Metrics()
    layers = [attnd.AttentionOptions(), attnd.AttentionOptions(return_lse=True), attnd.AttentionOptions()]
    q, k, v = new_tokens(5)
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        step = session.step(metadata(0, 5), num_heads=HEADS, options=layers)
        for layer in range(3):
            step.attend(layer, q, k, v)
        step.finish()
        step = session.step(attnd.StepMetadata([5], [0], [[0, 1, 2]], range(5), store_only=True), num_heads=HEADS)
        for layer in range(3):
            assert step.attend(layer, None, k, v) is None
        step.finish()
        step = session.step(attnd.StepMetadata([5], [5], [[0, 1, 2]], None, cache_only=True), num_heads=HEADS)
        for layer in range(3):
            step.attend(layer, q, None, None)
        step.finish()
    attended, stored = metrics.calls.values()
    assert [(tally.plane, tally.backend) for tally in (attended, stored)] == [
        ("cuda", AttentionBackend.TRITON_GROUPED),
        ("cuda", None),
    ]
    assert [sum(tally.kernel_us.counts) for tally in (attended, stored)] == [6, 3]
    assert attended.received_bytes == 3 * (q.nbytes + k.nbytes + v.nbytes) + 3 * q.nbytes
    assert attended.sent_bytes == 6 * q.nbytes + 5 * HEADS * 4
    assert stored.received_bytes == 3 * (k.nbytes + v.nbytes)
    assert stored.sent_bytes == 0


class ReplannedPlan:
    """A fixed plan that plans each step anew, where the real one needs a Hopper GPU."""

    num_bytes = 1000

    def __init__(self, config: AttentionConfig, shape: DecodeShape, options: AttentionOptions) -> None:
        self.shape = shape
        self._config, self._options = config, options

    def refusal(self, metadata: AttentionMetadata) -> str | None:
        return "its context is too long" if metadata.max_context_len > self.shape.max_context_len else None

    def update(self, metadata: AttentionMetadata) -> None:
        kernel = TritonPagedAttention(AttentionBackend.TRITON_GROUPED)
        self._plan = kernel.plan(self._config, metadata, self._options, torch.device("cpu"))

    def launch(self, *tensors: Any) -> None:
        self._plan.launch(*tensors)


def test_captured_steps_give_the_same_bits(
    opened: tuple[attnd.Client, host_channels.HostPlanes], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, planes = opened
    made: list[DecodeShape] = []

    def fixed_plan(kernel: object, config: Any, shape: DecodeShape, options: Any, device: object) -> ReplannedPlan:
        made.append(shape)
        return ReplannedPlan(config, shape, options)

    replays: list[int] = []

    def captured(launches: Callable[[], None]) -> Callable[[], None]:
        return lambda: (replays.append(1), launches())[1]

    monkeypatch.setattr(TritonPagedAttention, "fixed_plan", fixed_plan)
    monkeypatch.setattr(host_channels.HostChannel, "capture", staticmethod(captured))
    layers = [attnd.AttentionOptions(), attnd.AttentionOptions(window=3), attnd.AttentionOptions(return_lse=True)]
    with client.create_cache(**GEOMETRY) as one, client.create_cache(**GEOMETRY) as other:
        with one.session() as ours, other.session(plane="inline") as theirs:
            for context_len, num_tokens in ((0, 1), (1, 1), (2, 1), (3, 2), (5, 1), (6, 2), (8, 1)):
                slots = [context_len] if context_len == 2 else range(context_len, context_len + num_tokens)
                slots = None if context_len == 5 else slots
                decode = attnd.StepMetadata([num_tokens], [context_len], [[0, 1, 2]], slots, kind="decode")
                calls = [new_tokens(num_tokens) for _ in layers]
                step = ours.step(decode, num_heads=HEADS, options=layers)
                outputs = [step.attend(layer, *call) for layer, call in enumerate(calls)]
                step.finish()
                reference = theirs.step(decode)
                for layer, (options, call) in enumerate(zip(layers, calls, strict=True)):
                    pair = outputs[layer], reference.attend(layer, *call, options)
                    for one_of_ours, one_of_theirs in zip(*pair, strict=True) if options.return_lse else [pair]:
                        assert torch.equal(one_of_ours, one_of_theirs), (context_len, layer)
            assert len(replays) == 4 + 1  # all but the first step of each of the two shapes
            assert made == [DecodeShape(1, 1, 256)] * 3 + [DecodeShape(1, 2, 256)] * 3  # 256 slots, three options
            used = client.capabilities().devices[0].num_bytes_used
            assert used == one.info().num_bytes + other.info().num_bytes + 6 * ReplannedPlan.num_bytes
        assert wait_until(lambda: planes.channels[0].is_closed)
        used = client.capabilities().devices[0].num_bytes_used
        assert used == one.info().num_bytes + other.info().num_bytes


def test_a_graph_whose_kernel_is_not_there_yet_is_captured_once_it_is(
    opened: tuple[attnd.Client, host_channels.HostPlanes], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = opened
    capture, kernel, tries = StepGraph.capture, Future[None](), []

    def lacking(graph: StepGraph, *arguments: Any) -> None:
        tries.append(graph)
        if not kernel.done():
            raise KernelMissing("a_kernel", kernel)
        capture(graph, *arguments)

    def fixed_plan(kernel: object, config: Any, shape: DecodeShape, options: Any, device: object) -> ReplannedPlan:
        return ReplannedPlan(config, shape, options)

    monkeypatch.setattr(TritonPagedAttention, "fixed_plan", fixed_plan)
    monkeypatch.setattr(host_channels.HostChannel, "capture", staticmethod(lambda launches: launches))
    monkeypatch.setattr(StepGraph, "capture", lacking)
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        for context_len in range(3):
            decode = attnd.StepMetadata([1], [context_len], [[0]], [context_len], kind="decode")
            step = session.step(decode, num_heads=HEADS)
            if context_len == 1:
                wait_for(lambda: len(tries) == 1, "the step was not tried")
                used = client.capabilities().devices[0].num_bytes_used
                assert used == cache.info().num_bytes  # nothing of the graph is kept
                kernel.set_result(None)
            for layer in range(3):
                step.attend(layer, *new_tokens(1))
            step.finish()
        assert len(tries) == 2  # the third step has the graph of the second


def test_a_step_is_told_by_its_first_call(opened: tuple[attnd.Client, host_channels.HostPlanes]) -> None:
    client, planes = opened
    options = attnd.AttentionOptions(softcap=5.0)
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        for context_len in range(3):
            step = session.step(metadata(context_len, 1))
            for layer in range(3):
                assert step.attend(layer, *new_tokens(1), options).shape == (1, HEADS, 16)
        step.finish()
        assert len(planes.channels) == 1


def test_cache_only_and_store_only_steps(opened: tuple[attnd.Client, host_channels.HostPlanes]) -> None:
    client, _ = opened
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        step = session.step(metadata(0, 2, store_only=True), num_heads=HEADS)
        stored = [new_tokens(2)[1:] for _ in range(3)]
        for layer, (k, v) in enumerate(stored):
            assert step.attend(layer, None, k, v) is None
        step.finish()
        step = session.step(attnd.StepMetadata([1], [1], [[0]], cache_only=True))
        for layer, (_, v) in enumerate(stored):
            output = step.attend(layer, new_tokens(1)[0], None, None)
            assert torch.equal(output, v[:1].repeat_interleave(2, dim=1))
        step.finish()


def one_step(session: CudaSession, context_len: int = 0) -> None:
    step = session.step(metadata(context_len, 1), num_heads=HEADS)
    for layer in range(3):
        step.attend(layer, *new_tokens(1))
    step.finish()


@pytest.mark.parametrize(
    ("num_heads", "page", "error"),
    [
        (3, 0, "num_heads is 3, but must be a multiple of the cache's 2 KV heads"),
        (0, 0, "num_heads is 0, but must be a multiple of the cache's 2 KV heads"),
        (4, 99, r"page_tables\[0, 0\] is 99"),
    ],
)
def test_a_refused_step_is_told_by_finish_and_the_next_step_works(
    opened: tuple[attnd.Client, host_channels.HostPlanes], num_heads: int, page: int, error: str
) -> None:
    client, planes = opened
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        one_step(session)
        bad = session.step(attnd.StepMetadata([1], [1], [[page]], [1]), num_heads=num_heads)
        with pytest.raises(attnd.InvalidRequest, match=error):
            bad.finish()
        with pytest.raises(attnd.InvalidRequest, match=error):
            bad.attend(0, *new_tokens(1, num_heads))
        one_step(session, 1)
        assert len(planes.channels) == 2
    assert wait_until(lambda: all(channel.is_closed for channel in planes.channels))


def test_the_next_step_raises_what_went_wrong(opened: tuple[attnd.Client, host_channels.HostPlanes]) -> None:
    client, _ = opened
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        session.step(attnd.StepMetadata([1], [0], [[99]], [0]), num_heads=HEADS)
        with pytest.raises(attnd.InvalidRequest, match="is 99"):  # noqa: PT012  # at the second, or sooner
            for _ in range(2):
                session.step(metadata(0, 1))
        one_step(session)


def test_a_failure_that_is_found_while_a_step_is_sent_is_told_once(
    opened: tuple[attnd.Client, host_channels.HostPlanes],
) -> None:
    client, _ = opened
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        one_step(session)
        plane = session._plane
        answer, plane.answer = plane.answer, lambda step_id, wait: None  # `step` looks before the answer is there
        bad = session.step(attnd.StepMetadata([1], [0], [[99]], [0]), num_heads=HEADS)
        assert wait_until(lambda: plane.failure is not None)
        session._settle = lambda: None
        with pytest.raises(attnd.InvalidRequest, match="is 99"):
            session.step(metadata(1, 1))
        del session._settle
        plane.answer = answer
        with pytest.raises(attnd.InvalidRequest, match="is 99"):
            bad.finish()
        one_step(session, 1)


@pytest.mark.parametrize("backend", ["naive", "sdpa"])
def test_a_backend_that_makes_the_executor_wait_is_refused(
    opened: tuple[attnd.Client, host_channels.HostPlanes], backend: str
) -> None:
    client, _ = opened
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        step = session.step(metadata(0, 1), num_heads=HEADS, options=attnd.AttentionOptions(backend=backend))
        with pytest.raises(attnd.Unsupported, match=f"backend {backend} serves this step, but on a cuda plane must be"):
            step.finish()


def test_a_refused_step_spoils_none_that_came_before_it(
    opened: tuple[attnd.Client, host_channels.HostPlanes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second step is refused before the first one's end is looked at."""
    client, planes = opened
    refused = threading.Event()
    finish = cuda_server.CudaSession.finish

    def finish_late(session: cuda_server.CudaSession, under_way: Any) -> bytes:
        if under_way.step.step.id == 1:
            assert refused.wait(host_channels.PATIENCE_S)
        return finish(session, under_way)

    def enqueue(session: cuda_server.CudaSession, step: Any) -> None:
        if step.step.id == 1:
            return real_enqueue(session, step)
        refused.set()
        raise attnd.Unsupported("not here")

    real_enqueue = cuda_server.CudaSession._enqueue
    monkeypatch.setattr(cuda_server.CudaSession, "finish", finish_late)
    monkeypatch.setattr(cuda_server.CudaSession, "_enqueue", enqueue)
    cache = client.create_cache(**GEOMETRY)
    held = client.transport._service.caches.all()[0]
    with cache.session() as session:
        first = session.step(metadata(0, 1), num_heads=HEADS)
        for layer in range(3):
            first.attend(layer, *new_tokens(1))
        second = session.step(metadata(1, 1))
        first.finish()
        with pytest.raises(attnd.Unsupported, match="not here"):
            second.finish()
    assert wait_until(lambda: planes.channels[0].is_closed)
    assert held._num_holders == 1  # the cache itself


def test_calls_that_are_not_the_steps_are_refused_before_anything_is_enqueued(
    opened: tuple[attnd.Client, host_channels.HostPlanes],
) -> None:
    client, _ = opened
    q, k, v = new_tokens(1)
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        step = session.step(metadata(0, 1), num_heads=HEADS)
        wrong = [
            ((1, q, k, v), "layer is 1, but on a cuda plane must be the next, 0 of 3"),
            ((0, q[:, :2], k, v), r"q has shape \[1, 2, 16\], but must have \[1, 4, 16\]"),
            ((0, q, k.half(), v), "k has dtype torch.float16, but must have torch.float32"),
            ((0, q, k, v.to("meta")), "v has device meta, but must have cpu"),
            ((0, q, None, v), "k is None, but must be given to this step"),
            ((0, q, k, v, attnd.AttentionOptions(window=2)), "options of layer 0 are not those of the step"),
        ]
        for call, error in wrong:
            with pytest.raises(attnd.InvalidRequest, match=error):
                step.attend(*call)
        for layer in range(3):
            step.attend(layer, q, k, v)
        with pytest.raises(attnd.InvalidRequest, match="layer is 3, but no more of 3"):
            step.attend(3, q, k, v)
        step.finish()
        with pytest.raises(attnd.InvalidRequest, match=r"the step has 4096 tokens of 4 heads, which take \d+ bytes"):
            session.step(attnd.StepMetadata([4096], [0], [[0] * 256], None), num_heads=HEADS)


def test_two_options_for_three_layers_are_refused(opened: tuple[attnd.Client, host_channels.HostPlanes]) -> None:
    client, _ = opened
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        step = session.step(metadata(0, 1), num_heads=HEADS, options=[attnd.AttentionOptions()] * 2)
        with pytest.raises(attnd.InvalidRequest, match="options has 2 elements, but must have one for all layers"):
            step.finish()


def wait_until(is_so: object) -> bool:
    deadline = time.monotonic() + host_channels.PATIENCE_S
    while not is_so():  # type: ignore[operator]
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_a_worker_that_leaves_in_the_middle_of_a_step_frees_its_plane_and_the_executor(
    opened: tuple[attnd.Client, host_channels.HostPlanes],
) -> None:
    client, planes = opened
    with client.create_cache(**GEOMETRY) as cache:
        for _ in range(5):
            session = cache.session()
            step = session.step(metadata(0, 1), num_heads=HEADS)
            step.attend(0, *new_tokens(1))
            session.close()
            with pytest.raises(attnd.Disconnected, match="the session was closed"):
                step.attend(1, *new_tokens(1))
        with cache.session() as session:
            one_step(session)
        assert wait_until(lambda: len(planes.channels) == 6 and all(channel.is_closed for channel in planes.channels))


def test_a_step_that_takes_too_long_fails_on_both_sides(
    opened: tuple[attnd.Client, host_channels.HostPlanes], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, planes = opened
    monkeypatch.setattr(cuda_watchdog, "STEP_S", 0.2)
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        step = session.step(metadata(0, 1), num_heads=HEADS)
        with pytest.raises(attnd.DeadlineExceeded, match=r"did not hand over every layer within 0\.2 s"):
            step.finish()
        assert planes.channels[0].flags.is_stopped
        assert wait_until(lambda: planes.channels[0].workers_flags.is_stopped)


def test_a_token_that_goes_ends_a_step_that_waits_for_its_worker(
    opened: tuple[attnd.Client, host_channels.HostPlanes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before the step would be too late, and the plane with it."""
    file = tmp_path / "tokens"
    file.touch(mode=0o600)
    tokens = {name: add_token(str(file), name) for name in ("alice", "bob")}
    known = TokenFile(str(file))
    alice = known.principal(tokens["alice"])
    monkeypatch.setattr(inproc, "PRINCIPAL", alice)
    client, planes = opened
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        one_step(session)
        step = session.step(metadata(1, 1), num_heads=HEADS)
        step.attend(0, *new_tokens(1))
        file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith("alice ")))
        known.reload()
        with pytest.raises(attnd.Unauthenticated, match="no longer known here"):
            step.finish()
        assert planes.channels[0].flags.is_stopped
        assert wait_until(lambda: planes.channels[0].is_closed)
        with pytest.raises(attnd.Unauthenticated, match="no longer known here"):
            one_step(session)
        monkeypatch.setattr(inproc, "PRINCIPAL", "alice")


def test_a_server_that_does_not_answer_in_time_lets_the_worker_go(
    opened: tuple[attnd.Client, host_channels.HostPlanes], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = opened
    never = threading.Event()
    with client.create_cache(**GEOMETRY) as cache:
        session = cache.session()
        one_step(session)
        session.timeout_s = 0.3
        monkeypatch.setattr(cuda_server.CudaSession, "finish", lambda self, under_way: never.wait(5) or b"")
        step = session.step(metadata(1, 1), num_heads=HEADS)
        started = time.monotonic()
        step.attend(0, *new_tokens(1))  # would wait for ever
        with pytest.raises(attnd.DeadlineExceeded, match="step 2 was not done in time"):
            step.finish()
        assert time.monotonic() - started < 4
        never.set()
        session.close()


def test_a_draining_server_ends_the_session_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with host_channels.serving(tmp_path, monkeypatch) as (client, _, server):
        with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
            one_step(session)
            server.drain()
            assert wait_until(lambda: session._plane.going_away)
            with pytest.raises(attnd.Disconnected, match="the server is draining; the next step reconnects"):
                session.step(metadata(1, 1))


def test_a_draining_server_waits_for_a_step_and_not_for_an_idle_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with host_channels.serving(tmp_path, monkeypatch) as (client, planes, server):
        with client.create_cache(**GEOMETRY) as cache, cache.session() as idle, cache.session() as busy:
            one_step(idle)
            step = busy.step(metadata(1, 1), num_heads=HEADS)
            step.attend(0, *new_tokens(1))
            server.drain()
            stopping = threading.Thread(target=server.stop, args=(600,))
            stopping.start()
            assert wait_until(lambda: planes.channels[0].is_closed)
            assert not planes.channels[1].is_closed
            for layer in (1, 2):
                step.attend(layer, *new_tokens(1))
            step.finish()
            stopping.join(60)
            assert not stopping.is_alive()
            assert wait_until(lambda: planes.channels[1].is_closed)


def test_cuda_planes_have_a_limit_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with host_channels.serving(tmp_path, monkeypatch, max_cuda_planes=1, max_planes=1) as (client, _, _):
        with client.create_cache(**GEOMETRY) as cache, cache.session() as one, cache.session(plane="shm") as shm:
            one_step(one)
            other = cache.session()
            with pytest.raises(attnd.Exhausted, match="1 cuda planes are open, which is the limit: each has a stream"):
                one_step(other)
            shm.step(metadata(1, 1)).attend(0, *new_tokens(1))
            assert shm.plane == "shm"
            assert shm.refusals == {"cuda": "it is given only where it is asked for by name"}
            one.close()

            def is_free() -> bool:
                try:
                    one_step(other)
                except attnd.Exhausted:
                    return False
                return True

            assert wait_until(is_free)
            other.close()


def test_a_cache_deleted_in_the_middle_of_a_step_fails_it(
    opened: tuple[attnd.Client, host_channels.HostPlanes],
) -> None:
    client, _ = opened
    cache = client.create_cache(**GEOMETRY)
    with cache.session() as session:
        one_step(session)
        real = CudaStep.attend

        def attend(step: CudaStep, layer: int) -> torch.Tensor:
            output: torch.Tensor = real(step, layer, *new_tokens(1))
            return output

        step = session.step(metadata(1, 1))
        attend(step, 0)
        client.transport._service.caches.all()[0].is_closed = True  # what closing does to those who look
        attend(step, 1)
        attend(step, 2)
        with pytest.raises(attnd.CacheLost, match="was deleted, or its lease ended, while a step ran"):
            step.finish()


def test_the_memory_of_a_deleted_cache_is_kept_until_its_step_is_over(
    opened: tuple[attnd.Client, host_channels.HostPlanes],
) -> None:
    client, planes = opened
    cache = client.create_cache(**GEOMETRY)
    held = client.transport._service.caches.all()[0]
    freed: list[bool] = []
    held._spaces.give_back = lambda *_: freed.append(planes.channels[0].flags.is_stopped)
    session = cache.session()
    one_step(session)
    step = session.step(metadata(1, 1))
    step.attend(0, *new_tokens(1))
    assert wait_until(lambda: held._num_holders == 2)
    held.close()  # as when its lease ends
    assert not freed
    session.close()  # and the step fails
    assert wait_until(lambda: freed == [True])


def test_steps_take_their_turn_among_the_work_on_their_cache(
    opened: tuple[attnd.Client, host_channels.HostPlanes], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = opened
    executor = client.transport._service.executor
    cache_ids: list[bytes] = []
    real = executor.submit

    def submit(work: Any, *rest: Any, **more: Any) -> Any:
        cache_ids.append(work.cache_id)
        return real(work, *rest, **more)

    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        one_step(session)
        monkeypatch.setattr(executor, "submit", submit)
        monkeypatch.setattr(executor, "run_now", lambda work: None)  # something else has the device
        step = session.step(metadata(1, 1))
        for layer in range(3):
            step.attend(layer, *new_tokens(1))
        step.finish()
        assert cache_ids == [cache.ref.id]
        monkeypatch.undo()


def test_a_session_knows_whether_it_takes_turns(
    opened: tuple[attnd.Client, host_channels.HostPlanes], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = opened
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        assert not session.takes_turns  # there is no plane yet
        one_step(session)
        assert session.takes_turns
        monkeypatch.setattr(host_channels._Gpu, "has_mps", True)
        assert not session.takes_turns


def test_a_process_without_a_gpu_says_so(tmp_path: Path) -> None:
    from attnd_server.build import build_service
    from attnd_server.config import ServerConfig
    from attnd_server.inproc import InprocTransport

    service = build_service(ServerConfig(device="cpu"))
    with attnd.Client(InprocTransport(service), plane="cuda") as client, client.create_cache(**GEOMETRY) as cache:
        with pytest.raises(attnd.Unsupported, match="plane is cuda, but this process has no torch with a GPU"):
            cache.session().step(metadata(0, 1))
    service.executor.close()
