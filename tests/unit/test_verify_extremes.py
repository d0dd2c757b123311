"""Verification of numbers that a caller may send and float32 does not hold: nothing is wrong, and nothing says so."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from attnd_server.attention.backends.naive import NaiveAttention
from attnd_server.attention.backends.sdpa import SdpaAttention
from attnd_server.device.faults import DeviceFaults
from attnd_server.execution.step import Call, Result
from attnd_server.observe.calls import CallObserver
from attnd_server.observe.verify import Verifier
from attnd_server.observe.verify.check import Verdict, verify
from attnd_server.observe.verify.choice import choose
from attnd_server.observe.verify.sample import sample_of
from tests import oracle
from tests.steps import BIDIRECTIONAL, Case, Request

CPU = torch.device("cpu")
KERNELS = [NaiveAttention(), SdpaAttention()]
# A decode and a prefill over a context, of one head each.
DECODE = Case(
    [Request(24, 1, 1, [3, 5]), Request(9, 1, 1, [7, -1])], num_kv_heads=1, group=1, head_dim=16, head_dim_v=16
)
PREFILL = replace(DECODE, requests=[Request(24, 5, 5, [3, 5])])
Change = Callable[[Case, oracle.Tensors], None]


def verdict_of(case: Case, kernel: Any, change: Change, spoil: float = 0.0) -> Verdict | None:
    """Of what a kernel makes of a case whose tensors were changed; None: it does not serve it."""
    tensors = oracle.tensors(case)
    change(case, tensors)
    options = oracle.options(case, tensors)
    if kernel.supports(case.config(), case.metadata(), options) is not None:
        return None
    output, lse = oracle.run(kernel, case, tensors, "cpu")
    output[0, 0, 0] += spoil
    group = types.SimpleNamespace(config=case.config(), device=CPU, layers=[tensors.pages], layer_numbers=[0])
    step = types.SimpleNamespace(group=group, metadata=case.metadata())
    choice = choose(step.metadata, case.config(), options, 0, 1 << 30)
    assert choice is not None
    call = Call(step, 0, options, tensors.q, tensors.k, tensors.v)
    return verify(sample_of(call, Result(output, lse, kernel.backend), choice, 0))


def alternating(tensor: torch.Tensor, size: float) -> None:
    """Sets all, so that a product of two has terms of both signs which are each beyond float32."""
    filled(tensor, size)
    tensor[..., 1::2] *= -1


def filled(tensor: torch.Tensor, size: float) -> None:
    """Sets all to a number, or to the greatest that there is."""
    tensor.fill_(min(size, torch.finfo(tensor.dtype).max))


def products(size: float) -> Change:
    def change(_: Case, tensors: oracle.Tensors) -> None:
        assert tensors.k is not None
        filled(tensors.q, size)
        alternating(tensors.k, size)
        alternating(tensors.k_pages, size)

    return change


def values(size: float) -> Change:
    def change(_: Case, tensors: oracle.Tensors) -> None:
        assert tensors.v is not None
        filled(tensors.v, size)
        filled(tensors.v_pages, size)

    return change


def new_key(number: float) -> Change:
    """The last new token's key, which the rows before it do not see."""

    def change(_: Case, tensors: oracle.Tensors) -> None:
        assert tensors.k is not None
        tensors.k[-1, 0, 0] = number

    return change


def new_value(number: float) -> Change:
    def change(_: Case, tensors: oracle.Tensors) -> None:
        assert tensors.v is not None
        tensors.v[-1, 0, 0] = number

    return change


def query(number: float) -> Change:
    def change(_: Case, tensors: oracle.Tensors) -> None:
        tensors.q[0, 0, 0] = number

    return change


def stored(number: float) -> Change:
    def change(_: Case, tensors: oracle.Tensors) -> None:
        tensors.k_pages[3, 2, 0, 0] = number
        tensors.v_pages[3, 4, 0, 0] = number

    return change


def slopes(size: float) -> Change:
    def change(_: Case, tensors: oracle.Tensors) -> None:
        tensors.alibi_slopes = torch.tensor([size])

    return change


def sinks(size: float) -> Change:
    def change(_: Case, tensors: oracle.Tensors) -> None:
        tensors.sinks = torch.tensor([size])

    return change


def nothing(_: Case, tensors: oracle.Tensors) -> None:
    del tensors


EXTREMES: dict[str, tuple[dict[str, Any], Change]] = {
    "products": ({}, products(1e20)),
    "products_at_the_edge": ({}, products(4.6e18)),
    "values": ({}, values(3e38)),
    "values_of_both_signs": ({}, lambda case, tensors: alternating(tensors.v_pages, 3e38)),
    "scale": ({"scale": 1e38}, nothing),
    "scale_that_makes_up_for_it": ({"scale": 1e-38}, products(1e20)),
    "scale_below_the_least": ({"scale": 1e-45}, products(1e19)),
    "tiny_products_scaled": ({"scale": 1e38}, products(1e-22)),
    "softcap": ({"softcap": 1e-44}, nothing),
    "great_softcap": ({"softcap": 3e38}, nothing),
    "softcap_of_great_products": ({"softcap": 5.0}, products(1e20)),
    "slopes": ({"alibi": True}, slopes(3e38)),
    "slopes_below": ({"alibi": True}, slopes(-3e38)),
    "sinks": ({"sinks": True}, sinks(3e38)),
    "sinks_below": ({"sinks": True}, sinks(-3e38)),
    "no_sinks": ({"sinks": True}, sinks(-math.inf)),
    "denormals": ({}, lambda case, tensors: (values(1e-44)(case, tensors), products(1e-42)(case, tensors))),
    "query_nan": ({}, query(math.nan)),
    "query_inf": ({}, query(math.inf)),
    "key_nan": ({}, new_key(math.nan)),
    "key_inf": ({}, new_key(-math.inf)),
    "key_great": ({}, new_key(3e38)),
    "value_nan": ({}, new_value(math.nan)),
    "value_inf": ({}, new_value(math.inf)),
    "stored_nan": ({}, stored(math.nan)),
    "stored_inf": ({}, stored(math.inf)),
    "stored_great": ({}, stored(3e38)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("name", EXTREMES)
def test_no_numbers_of_a_caller_are_wrong_outputs(name: str, case: Case, dtype: torch.dtype) -> None:
    changes, change = EXTREMES[name]
    for lse in (False, True):
        for mask in ("causal", BIDIRECTIONAL):
            requests = [replace(request, mask=mask) for request in case.requests]
            changed = replace(case, requests=requests, dtype=dtype, return_lse=lse, poison=0.0, **changes)
            verdicts = [verdict_of(changed, kernel, change) for kernel in KERNELS]
            assert verdicts[0] is not None
            for verdict in filter(None, verdicts):
                assert not verdict.is_mismatch, verdict


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_outputs_at_the_end_of_their_type_are_not_wrong(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    for kernel in KERNELS:
        verdict = verdict_of(replace(PREFILL, dtype=dtype, poison=0.0), kernel, values(most))
        assert verdict is not None
        assert not verdict.is_mismatch


def test_what_is_left_out_is_counted_and_the_rest_is_compared() -> None:
    """One row of five is beyond float32; a wrong number in another is found, and in that one is not."""

    def second_row(_: Case, tensors: oracle.Tensors) -> None:
        tensors.q[1].fill_(3e38)

    for kernel in KERNELS:
        fine = verdict_of(PREFILL, kernel, second_row)
        assert fine is not None
        assert (fine.num_beyond, fine.is_mismatch) == (1, False)
        wrong = verdict_of(PREFILL, kernel, second_row, spoil=1.0)
        assert wrong is not None
        assert (wrong.num_beyond, wrong.is_mismatch, wrong.worst) == (1, True, (0, 0, 0))
        unseen = verdict_of(replace(PREFILL, poison=0.0), kernel, query(3e38), spoil=1.0)
        assert unseen is not None
        assert (unseen.num_beyond, unseen.is_mismatch) == (1, False)


def scaled(tensors: oracle.Tensors, size: float) -> None:
    tensors.q.mul_(size)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_nothing_of_a_models_size_is_left_out(size: float) -> None:
    for case in (DECODE, PREFILL, replace(PREFILL, softcap=30.0), replace(DECODE, alibi=True, sinks=True)):
        for kernel in KERNELS:
            verdict = verdict_of(case, kernel, lambda _, tensors: scaled(tensors, size))
            if verdict is not None:
                assert (verdict.num_beyond, verdict.is_mismatch) == (0, False)


def test_a_sampled_call_in_shared_memory_runs_on_copies() -> None:
    """What its client changes while it runs, or before it is looked at again, changes neither."""
    tensors = oracle.tensors(PREFILL)
    options = oracle.options(PREFILL, tensors)
    group = types.SimpleNamespace(config=PREFILL.config(), device=CPU, layers=[tensors.pages], layer_numbers=[0])
    step = types.SimpleNamespace(group=group, metadata=PREFILL.metadata())
    call = Call(step, 0, options, tensors.q, tensors.k, tensors.v, plane="shm")  # type: ignore[arg-type]
    verifier = Verifier(1.0, CPU, DeviceFaults(CPU))
    observer = CallObserver(None, verifier)
    runs = observer.begins(call)
    assert tensors.q is not None
    assert tensors.k is not None
    tensors.q.fill_(9)
    output, lse = NaiveAttention().run(
        NaiveAttention().plan(PREFILL.config(), PREFILL.metadata(), options, CPU), runs.q, runs.k, runs.v, tensors.pages
    )
    tensors.k.fill_(9)
    observer.served(runs, Result(output, lse, NaiveAttention().backend), 0, 0)
    verifier.close()
    tally = verifier.tallies[NaiveAttention().backend]
    assert (sum(tally.ratios.counts), tally.mismatches) == (1, 0)
