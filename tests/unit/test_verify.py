"""Verification: what is picked and copied, what counts as wrong, and what comes of it."""

from __future__ import annotations

import logging
import math
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from prometheus_client import CollectorRegistry, generate_latest

import attnd
from attnd_server.attention.backends.naive import NaiveAttention
from attnd_server.attention.backends.sdpa import SdpaAttention
from attnd_server.attention.config import FP8, AttentionBackend
from attnd_server.build import build_service
from attnd_server.config import ServerConfig
from attnd_server.device.faults import DeviceFaults
from attnd_server.execution.step import Call, Result
from attnd_server.inproc import InprocTransport
from attnd_server.observe.counts import Metrics
from attnd_server.observe.verify import Verifier, verifier
from attnd_server.observe.verify.check import Verdict, verify
from attnd_server.observe.verify.choice import MAX_REQS, choose
from attnd_server.observe.verify.sample import Sample, sample_of
from attnd_server.service.service import AttentionService
from tests import oracle
from tests.scrape import Scrape
from tests.servers import wait_for
from tests.shared_calls import Caller, Waiting
from tests.steps import Case, Request, cases
from tests.unit.test_decode_graphs import Captures, FixedNaive
from tests.unit.test_metrics import collector

CPU = torch.device("cpu")
PLENTY = 1 << 30
FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def call_of(case: Case, tensors: oracle.Tensors) -> Call:
    """A call of a case, on a layer group with its pages as the only layer."""
    group = types.SimpleNamespace(
        config=case.config(),
        device=CPU,
        layers=[tensors.pages],
        layer_numbers=[0],
    )
    step = types.SimpleNamespace(group=group, metadata=case.metadata())
    return Call(step, 0, oracle.options(case, tensors), tensors.q, tensors.k, tensors.v)


def sampled(case: Case, kernel: Any, max_bytes: int = PLENTY, spoil: Callable[..., None] | None = None) -> Sample:
    """A sample of what a kernel gives, spoilt if asked for; nothing to see or read is left of the call."""
    tensors = oracle.tensors(case)
    output, lse = oracle.run(kernel, case, tensors, "cpu")
    if spoil is not None:
        spoil(output, lse)
    call = call_of(case, tensors)
    choice = choose(call.step.metadata, case.config(), call.options, case.seed, max_bytes)
    assert choice is not None
    assert choice.num_bytes <= max_bytes
    sample = sample_of(call, Result(output, lse, kernel.backend), choice, case.seed)
    for tensor in (tensors.q, tensors.k, tensors.v, output, lse, tensors.k_pages.float(), tensors.v_pages.float()):
        if tensor is not None:
            tensor.fill_(7)
    tensors.k_pages.view(torch.uint8).fill_(1)
    tensors.v_pages.view(torch.uint8).fill_(1)
    return sample


@FEW
@given(cases())
def test_right_results_are_right(case: Case) -> None:
    if not case.num_tokens:
        return
    tensors = oracle.tensors(case)
    for kernel in (NaiveAttention(), SdpaAttention()):
        if kernel.supports(case.config(), case.metadata(), oracle.options(case, tensors)) is None:
            verdict = verify(sampled(case, kernel))
            assert not verdict.is_mismatch, verdict


@FEW
@given(cases())
def test_a_part_of_a_call_can_be_verified(case: Case) -> None:
    if not case.num_tokens:
        return
    call = call_of(case, oracle.tensors(case))
    whole = choose(call.step.metadata, case.config(), call.options, case.seed, PLENTY)
    assert whole is not None
    some = max(whole.num_bytes // 3, 40_000)
    if choose(call.step.metadata, case.config(), call.options, case.seed, some) is None:  # no head of any request fits
        assert whole.num_bytes > some * whole.num_kv_heads * len(whole.rows)
        return
    sample = sampled(case, NaiveAttention(), some)
    assert not verify(sample).is_mismatch
    copied = (sample.q, sample.k, sample.v, sample.output, sample.lse, sample.pages.k, sample.pages.v)
    empty = sample.config.page_size * (sample.pages.k[0].nbytes + sample.pages.v[0].nbytes)  # a page for no context
    assert sum(tensor.nbytes for tensor in copied if tensor is not None) <= sample.choice.num_bytes + empty


@FEW
@given(cases())
def test_a_wrong_number_is_found_wherever_it_is(case: Case) -> None:
    if not case.num_tokens or len(case.requests) > MAX_REQS:
        return
    place = (case.seed % case.num_tokens, case.seed % case.num_heads, case.seed % case.head_dim_v)

    def spoil(output: torch.Tensor, _: torch.Tensor | None) -> None:
        output[place] += 50

    verdict = verify(sampled(case, NaiveAttention(), spoil=spoil))
    assert verdict.is_mismatch
    assert verdict.error > 49
    starts = [sum(request.query_len for request in case.requests[:index]) for index in range(len(case.requests))]
    assert verdict.worst is not None
    request, row, head = verdict.worst
    assert (starts[request] + row, head) == place[:2]


PLAIN = Case([Request(24, 3, 3, [3, 5]), Request(9, 3, 3, [7, -1])], return_lse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": 0.3},
        {"window": 20},
        {"softcap": 2.0},
        {"requests": [Request(24, 3, 3, [3, 6]), Request(9, 3, 3, [7, -1])]},
        {"requests": [Request(24, 3, 3, [3, 5], mask="bidirectional"), Request(9, 3, 3, [7, -1])]},
        {"requests": [Request(23, 3, 3, [3, 5]), Request(9, 3, 3, [7, -1])]},
    ],
    ids=["scale", "window", "softcap", "page", "mask", "length"],
)
def test_a_wrong_computation_is_found(wrong: dict[str, Any], dtype: torch.dtype) -> None:
    case = replace(PLAIN, dtype=dtype)
    tensors = oracle.tensors(case)
    tensors.k_pages.normal_()
    tensors.v_pages.normal_()
    output, lse = oracle.run(NaiveAttention(), replace(case, **wrong), tensors, "cpu")
    call = call_of(case, tensors)
    choice = choose(call.step.metadata, case.config(), call.options, 0, PLENTY)
    assert choice is not None
    assert verify(sample_of(call, Result(output, lse, AttentionBackend.NAIVE), choice, 0)).is_mismatch


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_counted_and_wrong(number: float) -> None:
    def spoil(output: torch.Tensor, _: torch.Tensor | None) -> None:
        output[1, 2, :4] = number

    verdict = verify(sampled(PLAIN, NaiveAttention(), spoil=spoil))
    assert (verdict.num_not_finite, verdict.ratio) == (4, math.inf)


def test_the_callers_own_nan_is_counted_and_not_wrong() -> None:
    tensors = oracle.tensors(PLAIN)
    tensors.q[0, 1, 0] = math.nan
    output, lse = oracle.run(NaiveAttention(), PLAIN, tensors, "cpu")
    call = call_of(PLAIN, tensors)
    choice = choose(call.step.metadata, PLAIN.config(), call.options, 0, PLENTY)
    assert choice is not None
    verdict = verify(sample_of(call, Result(output, lse, AttentionBackend.NAIVE), choice, 0))
    assert (verdict.num_not_finite, verdict.is_mismatch) == (PLAIN.head_dim_v, False)


def test_a_wrong_lse_alone_is_found() -> None:
    def spoil(_: torch.Tensor, lse: torch.Tensor | None) -> None:
        assert lse is not None
        lse[4, 1] += 0.01

    verdict = verify(sampled(PLAIN, NaiveAttention(), spoil=spoil))
    assert (verdict.is_mismatch, verdict.worst) == (True, (1, 1, 1))


@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
def test_tolerances_follow_the_sizes_of_a_models_numbers(size: float) -> None:
    tensors = oracle.tensors(PLAIN)
    tensors.v.mul_(size)
    tensors.v_pages.mul_(size)
    output, lse = oracle.run(NaiveAttention(), PLAIN, tensors, "cpu")
    call = call_of(PLAIN, tensors)
    choice = choose(call.step.metadata, PLAIN.config(), call.options, 0, PLENTY)
    assert choice is not None
    assert not verify(sample_of(call, Result(output, lse, AttentionBackend.NAIVE), choice, 0)).is_mismatch
    output[0, 0, 0] += 0.01 * size
    assert verify(sample_of(call, Result(output, lse, AttentionBackend.NAIVE), choice, 0)).is_mismatch


def test_what_is_chosen_is_bounded_and_everything_has_its_chance() -> None:
    case = Case([Request(900, 1, 1, list(range(57)))] * 40, num_kv_heads=8, group=1)
    metadata, config = case.metadata(), case.config()
    options = oracle.options(case, types.SimpleNamespace(alibi_slopes=None, sinks=None))
    requests: set[int] = set()
    heads: set[int] = set()
    head_bytes = 912 * 64 * 4 + 64 * 4 + 64 * 4 + 4
    for seed in range(200):
        few = choose(metadata, config, options, seed, 3 * head_bytes)
        assert few is not None
        assert (len(few.rows), few.num_kv_heads, few.num_bytes) == (1, 3, 3 * head_bytes)
        heads.update(range(few.first_kv_head, few.first_kv_head + 3))
        many = choose(metadata, config, options, seed, PLENTY)
        assert many is not None
        assert (len(many.rows), many.num_kv_heads) == (MAX_REQS, 8)
        requests.update(rows.request for rows in many.rows)
    assert (requests, heads) == (set(range(40)), set(range(8)))
    assert choose(metadata, config, options, 0, head_bytes - 1) is None


def test_few_rows_of_a_long_prompt_are_enough() -> None:
    case = Case([Request(0, 50_000, 50_000, [])], num_kv_heads=1, group=1)
    options = oracle.options(case, types.SimpleNamespace(alibi_slopes=None, sinks=None))
    firsts = set()
    for seed in range(20):
        choice = choose(case.metadata(), case.config(), options, seed, PLENTY)
        assert choice is not None
        (rows,) = choice.rows
        assert rows.num_rows == (1 << 20) // 50_000
        firsts.add(rows.first_row)
    assert len(firsts) > 10


class Wrong(NaiveAttention):
    """A backend of which one head is off, or whatever `spoil` makes of it."""

    def __init__(self, spoil: Callable[[torch.Tensor], None] | None = None) -> None:
        super().__init__()
        self.spoil = spoil or (lambda output: output[:, 1].mul_(1.01))

    def run(self, *arguments: Any) -> Any:
        output, lse = super().run(*arguments)
        self.spoil(output)
        return output, lse


@contextmanager
def serving(
    kernel: Any = None, *, verify: float = 1.0, action: str = "log"
) -> Iterator[tuple[AttentionService, attnd.Client]]:
    config = ServerConfig(device="cpu", kv_bytes=1 << 24, verify=verify, verify_action=action)
    service = build_service(config, Metrics())
    if kernel is not None:
        service.executor.ops._kernels[AttentionBackend.NAIVE] = kernel
    with attnd.Client(InprocTransport(service), timeout_s=60) as client:
        yield service, client


def checked(service: AttentionService) -> Verifier:
    """The verifier, once it has done all that it has."""
    assert service.verifier is not None
    verifier = service.verifier
    wait_for(lambda: not verifier.num_bytes, "the verifier still has work")
    return verifier


def scraped(service: AttentionService) -> Scrape:
    registry = CollectorRegistry()
    registry.register(collector(service.metrics, verifier=service.verifier))
    return Scrape.parse(generate_latest(registry).decode())


def caller(service: AttentionService, client: attnd.Client, **options: Any) -> Caller:
    return Caller(Waiting(service, client), [7, 0, 12], seed=3, **options)


DEFAULT = attnd.AttentionOptions()


def test_a_wrong_backend_is_logged_after_its_answer(caplog: pytest.LogCaptureFixture) -> None:
    with serving(Wrong()) as (service, client), caplog.at_level(logging.ERROR):
        worker = caller(service, client)
        worker.open()
        (answer,) = worker.server.together([worker.call(1, DEFAULT)])
        assert isinstance(answer, bytes)
        checked(service)
        (record,) = [each for each in caplog.records if each.getMessage().startswith("wrong output")]
        assert (record.backend, record.layer, record.worst_request_row_head[2]) == ("naive", 1, 1)
        assert sorted(zip(record.requests, record.context_lens, strict=True)) == [(0, 7), (1, 0), (2, 12)]
        assert 1 < float(record.error_ratio) < math.inf
        numbers = [value for value in vars(record).values() if isinstance(value, torch.Tensor)]
        assert not numbers
        scrape = scraped(service)
        assert scrape.by("attnd_verify_mismatches_total", "backend") == {"naive": 1}
        assert scrape.by("attnd_verify_error_ratio_count", "backend") == {"naive": 1}
        assert scrape.value("attnd_verify_error_ratio_bucket", backend="naive", le="1.0") == 0


def test_a_wrong_backend_is_refused_before_its_answer(caplog: pytest.LogCaptureFixture) -> None:
    with serving(Wrong(), action="refuse") as (service, client):
        worker = caller(service, client)
        worker.open()
        work = worker.call(1, DEFAULT)
        (answer,) = worker.server.together([work])
        assert isinstance(answer, attnd.ServerFault)
        assert "output of layer 1 by backend naive was withheld" in str(answer)
        assert str(answer).split()[2].strip(":") in caplog.text
        slots = worker.metadata().slot_mapping
        assert all(map(torch.equal, worker.cache.read_kv(1, slots, like=torch.ones(1)), worker.stored))
        service.executor.ops._kernels[AttentionBackend.NAIVE].spoil = lambda output: None
        (answer,) = worker.server.together([work])  # it may be sent again
        assert isinstance(answer, bytes)


@pytest.mark.parametrize("action", ["log", "refuse"])
def test_calls_that_share_a_launch_are_verified_one_by_one(action: str) -> None:
    last: list[int] = []

    def spoil(output: torch.Tensor) -> None:
        last.append(len(output))
        output[-1] += 1  # of the last call of the launch

    with serving(Wrong(spoil), action=action) as (service, client):
        workers = [caller(service, client) for _ in range(3)]
        for worker in workers:
            worker.open()
        answers = workers[0].server.together([worker.call(2, DEFAULT) for worker in workers])
        assert last == [9]
        checked(service)
        assert scraped(service).value("attnd_verify_mismatches_total") == 1
        assert sum(isinstance(answer, attnd.ServerFault) for answer in answers) == (action == "refuse")
        assert scraped(service).value("attnd_verify_error_ratio_count", backend="naive") == 3


def test_calls_of_graphs_are_verified() -> None:
    with serving(FixedNaive()) as (service, client):
        service.executor.capture = Captures()
        worker = caller(service, client)
        worker.cache.warm_up(num_heads=4, max_reqs=4, options=DEFAULT)
        worker.open()
        for layer in range(3):
            worker.server.together([worker.call(layer, DEFAULT)])
        assert len(service.executor.capture.replays) == 3
        tally = checked(service).tallies[AttentionBackend.NAIVE]
        assert (sum(tally.ratios.counts), tally.mismatches) == (3, 0)
        tally.ratios.counts[:] = [0] * len(tally.ratios.counts)
        graphs = service.executor.graphs.all()[-1]
        replay = graphs._replays[0]
        graphs._replays[0] = lambda: (replay(), graphs._memory.results.host[-1].add_(1))
        worker.server.together([worker.call(0, DEFAULT)])
        assert checked(service).tallies[AttentionBackend.NAIVE].mismatches == 1


@pytest.mark.parametrize("kv_dtype", [None, FP8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sound_server_is_never_flagged(dtype: str, kv_dtype: torch.dtype | None) -> None:
    options = attnd.AttentionOptions(softcap=5.0, window=9, sinks=[0.5] * 4, return_lse=True)
    geometry = {"dtype": dtype} if kv_dtype is None else {"dtype": dtype, "kv_dtype": kv_dtype, "k_scales": [0.02]}
    with serving(action="refuse") as (service, client):
        for backend in ("naive", "sdpa"):
            worker = caller(service, client, backend=backend, geometry=geometry, query_len=2)
            worker.open()
            for layer in range(3):
                answers = worker.server.together([worker.call(layer, options if backend == "naive" else DEFAULT)])
                assert isinstance(answers[0], bytes)
        scrape = scraped(service)
        assert scrape.by("attnd_verify_error_ratio_count", "backend") == {"naive": 3, "sdpa": 3}
        assert not scrape.by("attnd_verify_mismatches_total", "backend")
        assert not scrape.by("attnd_verify_not_finite_total", "backend")


def test_nan_of_a_backend_is_counted() -> None:
    def spoil(output: torch.Tensor) -> None:
        output[0, 0, :5] = math.nan

    with serving(Wrong(spoil)) as (service, client):
        worker = caller(service, client)
        worker.open()
        worker.server.together([worker.call(0, DEFAULT)])
        checked(service)
        scrape = scraped(service)
        assert scrape.by("attnd_verify_not_finite_total", "backend") == {"naive": 5}
        assert scrape.by("attnd_verify_mismatches_total", "backend") == {"naive": 1}
        assert math.isfinite(scrape.value("attnd_verify_error_ratio_sum"))


def test_samples_that_wait_are_bounded_and_the_rest_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, busy = threading.Event(), threading.Event()

    def slowly(sample: Sample) -> Verdict:
        busy.set()
        assert go_on.wait(30)
        return Verdict()

    monkeypatch.setattr(verifier, "verify", slowly)
    monkeypatch.setattr(verifier, "MAX_SAMPLES", 3)
    with serving() as (service, client):
        worker = caller(service, client)
        worker.open()
        for turn in range(5):
            worker.server.together([worker.call(turn % 3, DEFAULT)])
        assert busy.wait(30)
        scrape = scraped(service)
        dropped = scrape.by("attnd_verify_dropped_total", "backend", "reason")
        assert dropped == {("naive", "queue_full"): 2}
        assert service.verifier is not None
        one = service.verifier.num_bytes // 3
        monkeypatch.setattr(verifier, "MAX_SAMPLES", 100)
        monkeypatch.setattr(verifier, "MAX_BYTES", 4 * one)
        for _ in range(3):
            worker.server.together([worker.call(0, DEFAULT)])
        assert service.verifier.num_bytes == 4 * one
        assert scraped(service).value("attnd_verify_dropped_total", reason="queue_full") == 4
        go_on.set()
        assert sum(checked(service).tallies[AttentionBackend.NAIVE].ratios.counts) == 4
        monkeypatch.setattr(verifier, "MAX_SAMPLE_BYTES", 100)
        worker.server.together([worker.call(0, DEFAULT)])
        assert scraped(service).value("attnd_verify_dropped_total", reason="too_big") == 1


def test_a_sample_that_cannot_be_verified_is_counted_and_harms_no_call(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no more")

    with serving() as (service, client):
        worker = caller(service, client)
        worker.open()
        for name in ("verify", "sample_of"):
            with monkeypatch.context() as patch:
                patch.setattr(verifier, name, no_memory)
                (answer,) = worker.server.together([worker.call(0, DEFAULT)])
                assert isinstance(answer, bytes)
                checked(service)
        assert scraped(service).value("attnd_verify_dropped_total", reason="failed") == 2
        assert "a sample cannot be verified" in caplog.text
        worker.server.together([worker.call(0, DEFAULT)])
        assert sum(checked(service).tallies[AttentionBackend.NAIVE].ratios.counts) == 1


def test_a_broken_device_that_verification_sees_is_broken_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(verifier, "verify", broken)
    with serving() as (service, client):
        worker = caller(service, client)
        worker.open()
        work = worker.call(0, DEFAULT)
        worker.server.together([work])
        checked(service)
        with pytest.raises(attnd.Disconnected, match="illegal memory access"):
            service.executor.submit(work, lambda result, error: None)


def test_the_fraction_is_kept_and_no_call_has_a_place_of_its_own() -> None:
    some = Verifier(0.05, CPU, DeviceFaults(CPU))
    some._random.seed(1)
    due = [number for number in range(40_000) if some.is_due()]
    some.close()
    assert 1_800 < len(due) < 2_200  # 2000, and 4.6 standard deviations
    assert {number % 32 for number in due} == set(range(32))
    every = Verifier(1.0, CPU, DeviceFaults(CPU), refuses=True)
    assert all(every.is_due() for _ in range(10))


def test_without_it_nobody_looks_at_a_call() -> None:
    with serving(Wrong(), verify=0.0) as (service, client):
        assert service.verifier is None
        worker = caller(service, client)
        worker.open()
        assert isinstance(worker.server.together([worker.call(0, DEFAULT)])[0], bytes)


def test_steps_that_only_store_are_no_samples() -> None:
    with serving() as (service, client):
        worker = caller(service, client)
        step = attnd.StepMetadata([2], [0], [[0]], [0, 1], store_only=True)
        with worker.cache.session() as session:
            session.step(step).attend(0, None, *worker.kv(2))
        checked(service)
        assert not scraped(service).by("attnd_verify_error_ratio_count", "backend")
