"""Backend `naive`, and a window around it, against the oracle."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from attnd_server import NaiveAttention, SlidingWindowAttention
from attnd_server.attention.backends.naive import TILE
from attnd_server.attention.backends.reference import reference_torch_attention
from attnd_server.attention.config import Layout
from tests import oracle
from tests.oracle import BLOCK_CAUSAL, CAUSAL, PREFIX_FULL, Case, Request
from tests.tolerances import assert_close

DEVICES = pytest.mark.parametrize("device", oracle.devices())
# A batch in which every request is of another kind: lengths around the page size, a gap, invalid tokens.
MIXED = Case(
    requests=[
        Request(0, 17, 17, [-1, -1, 9], CAUSAL),
        Request(1, 5, 3, [7, 99, -1], BLOCK_CAUSAL, block_size=4),
        Request(16, 1, 1, [3, -1, 8], CAUSAL),
        Request(37, 33, 30, [40, -1, 11], PREFIX_FULL, block_size=4, prefix_len=41, padded_prefix_len=45),
        Request(15, 0, 0, [2, -1, -1], CAUSAL),
    ],
    group=3,
    return_lse=True,
)


@DEVICES
@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=oracle.cases())
def test_any_step(device: str, case: Case) -> None:
    oracle.check(NaiveAttention(), case, device)


@DEVICES
@settings(max_examples=30, deadline=None, derandomize=True)
@given(case=oracle.cases())
def test_any_step_with_a_window_around_the_kernel(device: str, case: Case) -> None:
    window = SlidingWindowAttention(NaiveAttention(), window=5)
    narrowed = replace(case, window=min(case.window or 5, 5))
    tensors = oracle.tensors(narrowed)
    output, _ = oracle.run(window, case, tensors, device)
    assert_close(output, oracle.attend(narrowed, tensors)[0], case.coarsest)


@DEVICES
@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_bits_do_not_depend_on_the_batch(device: str, layout: Layout, dtype: torch.dtype) -> None:
    case = replace(MIXED, layout=layout, dtype=dtype, softcap=4.0, alibi=True, sinks=True)
    tensors = oracle.tensors(case)
    output, lse = oracle.run(NaiveAttention(), case, tensors, device)
    for index in range(len(case.requests)):
        alone, rows = oracle.one_request(case, index)
        part = replace(tensors, q=tensors.q[rows], k=tensors.k[rows], v=tensors.v[rows])
        alone_output, alone_lse = oracle.run(NaiveAttention(), alone, part, device)
        assert torch.equal(alone_output, output[rows])
        assert torch.equal(alone_lse, lse[rows])


def test_a_long_prefill_is_computed_in_tiles() -> None:
    num_tokens = 2 * TILE + 3
    case = Case([Request(5, num_tokens, num_tokens, [3])], num_kv_heads=1, group=1, head_dim=8, head_dim_v=8, window=40)
    oracle.check(NaiveAttention(), case, "cpu")


@pytest.mark.parametrize("kernel", [NaiveAttention(), SlidingWindowAttention(NaiveAttention(), window=20)])
def test_pages_outside_the_window_and_past_the_context_are_never_read(kernel: SlidingWindowAttention) -> None:
    # Position 40 sees 21 and later: pages 1 and 2. An id out of range would raise if it were read.
    case = Case([Request(40, 1, 1, [10**9, 5, 6, 10**9])], window=20, poison=0.0)
    with_pages = replace(case, requests=[replace(case.requests[0], pages=[-1, 5, 6, -1])])
    tensors = oracle.tensors(with_pages)
    output, _ = oracle.run(kernel, case, tensors, "cpu")
    assert_close(output, oracle.attend(with_pages, tensors)[0], torch.float32)


def test_float64_is_as_exact_as_the_oracle() -> None:
    case = Case([Request(0, 9, 9, [])], softcap=3.0, alibi=True, sinks=True)
    tensors = oracle.tensors(case)
    positions = torch.arange(9)
    output, lse = reference_torch_attention(
        tensors.q,
        tensors.k,
        tensors.v,
        positions[:, None] >= positions,
        positions,
        positions,
        case.scale,
        case.softcap,
        tensors.alibi_slopes,
        tensors.sinks,
        torch.float64,
    )
    expected, expected_lse = oracle.attend(case, tensors)
    assert_close(output, expected, torch.float64)
    assert_close(lse, expected_lse, torch.float64)
    rounded, _ = oracle.run(NaiveAttention(torch.float64), case, tensors, "cpu")
    assert torch.equal(rounded, output.float())


def test_no_keys_at_all_give_zeros() -> None:
    case = Case([Request(0, 3, 3, [-1])], cache_only=True, return_lse=True)
    output, lse = oracle.run(NaiveAttention(), case, oracle.tensors(case), "cpu")
    assert not output.any()
    assert (lse == -math.inf).all()


def test_a_step_without_requests() -> None:
    case = Case([])
    output, _ = oracle.run(NaiveAttention(), case, oracle.tensors(case), "cpu")
    assert output.shape == (0, case.num_heads, case.head_dim_v)


def test_a_window_must_be_positive() -> None:
    with pytest.raises(ValueError, match="window is 0, but must be at least 1"):
        SlidingWindowAttention(NaiveAttention(), 0)


@pytest.mark.parametrize("return_lse", [False, True])
def test_results_can_be_written_into_tensors_that_are_there(return_lse: bool) -> None:
    case = replace(MIXED, return_lse=return_lse)
    for kernel in (NaiveAttention(), SlidingWindowAttention(NaiveAttention(), 5)):
        oracle.check_launch(kernel, case, "cpu")
