"""Every backend with numbers that few models have: a scale that is 0 or negative, endless windows, sinks alone.

On a GPU the grouped kernels are Hopper's where it is one. The libraries that are not installed are emulated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from attnd_server.attention.backends.base import AttentionKernel
from attnd_server.attention.backends.flash_attn import FlashAttention
from attnd_server.attention.backends.naive import NaiveAttention
from attnd_server.attention.backends.sdpa import SdpaAttention
from attnd_server.attention.backends.triton.attention import TritonPagedAttention
from attnd_server.attention.backends.two_parts import merge
from attnd_server.attention.backends.window import SlidingWindowAttention
from attnd_server.attention.config import AttentionBackend, AttentionConfig
from attnd_server.attention.kv_split import KVSplitConfig
from attnd_server.attention.scales import MAX_NUMBER, MAX_SOFTCAP
from tests import flash_emulation, interpreter, oracle
from tests.kernels.test_xformers import KERNEL as XFORMERS
from tests.steps import BIDIRECTIONAL, CAUSAL, PREFIX_FULL, Case, Request
from tests.tolerances import assert_close

ON_GPU = torch.cuda.is_available()
HAS_TRITON = interpreter.reason_against() is None


class Split(TritonPagedAttention):
    """Contexts in chunks of one tile of keys, which are merged."""

    def plan(self, config: AttentionConfig, *args: Any) -> Any:
        return super().plan(replace(config, kv_split=KVSplitConfig(16)), *args)


KERNELS: dict[str, AttentionKernel] = {"naive": NaiveAttention(), "sdpa": SdpaAttention(), "xformers": XFORMERS}
KERNELS |= {name: FlashAttention(library) for name, library in flash_emulation.libraries().items()}
TRITON: dict[str, AttentionKernel] = {
    "triton": TritonPagedAttention(AttentionBackend.TRITON),
    "triton_grouped": TritonPagedAttention(),
    "split": Split(),
}
KERNELS |= TRITON if HAS_TRITON else {}
EVERY_KERNEL = pytest.mark.parametrize("name", KERNELS)
# All that the emulated libraries take at once: halves, and full pages of 256.
GEOMETRY: dict[str, Any] = {
    "num_kv_heads": 1,
    "head_dim": 64,
    "head_dim_v": 64,
    "dtype": torch.float16,
    "page_size": 256,
    "num_pages": 8,
}
PROMPTS = [Request(0, 9, 9, []), Request(0, 1, 1, [])]
DECODE = [Request(512, 1, 1, [3, 1]), Request(256, 1, 1, [6, -1])]
BLOCKS = [Request(512, 5, 5, [3, 1]), Request(256, 2, 2, [6, -1]), Request(0, 3, 3, [-1, -1])]


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[str]:
    """Where kernels of ours run; the emulated libraries always run on the processor."""
    with interpreter.interpreter() as device:
        yield device


def device_of(name: str, device: str) -> str:
    return device if name in ("naive", "sdpa", *TRITON) else "cpu"


def refusal(name: str, case: Case) -> str | None:
    return KERNELS[name].supports(case.config(), case.metadata(), oracle.options(case, oracle.tensors(case)))


def masked(requests: list[Request], mask: str) -> list[Request]:
    return [replace(r, mask=mask, block_size=4, prefix_len=3, padded_prefix_len=6) for r in requests]


@EVERY_KERNEL
@pytest.mark.parametrize("scale", [-0.3, 0.0, -1e-45])
@pytest.mark.parametrize("mask", [CAUSAL, BIDIRECTIONAL, PREFIX_FULL])
@pytest.mark.parametrize("kind", ["prompts", "decode", "blocks", "cache_only"])
def test_any_scale(device: str, name: str, scale: float, mask: str, kind: str) -> None:
    requests = {"prompts": PROMPTS, "decode": DECODE}.get(kind, BLOCKS)
    case = Case(masked(requests, mask), scale=scale, cache_only=kind == "cache_only", **GEOMETRY)
    assert mask not in (CAUSAL, BIDIRECTIONAL) or refusal(name, case) is None
    oracle.check(KERNELS[name], case, device_of(name, device))


@EVERY_KERNEL
@pytest.mark.parametrize("option", ["softcap", "alibi", "window", "sinks", "return_lse"])
def test_a_negative_scale_with_an_option(device: str, name: str, option: str) -> None:
    value = {"softcap": 2.0, "window": 7}.get(option, True)
    for requests in (PROMPTS, DECODE):
        # Libraries multiply by zero what a window hides.
        case = replace(Case(requests, scale=-0.3, poison=1e4, **GEOMETRY), **{option: value})
        assert name not in ("naive", *TRITON) or refusal(name, case) is None
        oracle.check(KERNELS[name], case, device_of(name, device))


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("head_dim_v", [64, 16])
def test_a_long_prompt_with_a_negative_scale_does_not_see_ahead(dtype: torch.dtype, head_dim_v: int) -> None:
    """In bfloat16 torch gave numbers for NaN, of tokens that had not come yet."""
    geometry = GEOMETRY | {"dtype": dtype, "head_dim_v": head_dim_v}
    case = Case([Request(0, 300, 300, [])], scale=-0.2, **geometry)
    tensors = oracle.tensors(case)
    output, _ = oracle.run(SdpaAttention(), case, tensors, "cpu")
    expected, _ = oracle.run(NaiveAttention(torch.float64), case, tensors, "cpu")
    assert_close(output, expected.double().numpy(), dtype)


@EVERY_KERNEL
@pytest.mark.parametrize("window", [2**30 + 1, 2**31 - 1, 2**31, 2**32 - 1])
def test_a_window_wider_than_any_context_hides_nothing(device: str, name: str, window: int) -> None:
    for requests in (PROMPTS, DECODE):
        case = Case(requests, window=window, **GEOMETRY)
        assert refusal(name, case) is None
        oracle.check(KERNELS[name], case, device_of(name, device))
    around = SlidingWindowAttention(KERNELS[name], window)
    tensors = oracle.tensors(case)
    output, _ = oracle.run(around, case, tensors, device_of(name, device))
    assert_close(output, oracle.attend(case, tensors)[0], case.dtype)


# Rows that see no key: no context; absent pages; a hole; behind the window; and rows that do not count at all.
BLIND = [
    Request(0, 3, 3, [-1, -1], prefix_len=0, padded_prefix_len=300),
    Request(300, 3, 2, [-1, -1], prefix_len=0, padded_prefix_len=1),
    Request(300, 3, 3, [2, 3], prefix_len=0, padded_prefix_len=300),
    Request(300, 3, 0, [4, 5], prefix_len=0, padded_prefix_len=1),
    Request(300, 3, 3, [6, 7], prefix_len=0, padded_prefix_len=40),
]


@EVERY_KERNEL
@pytest.mark.parametrize("group", [2, 8] if ON_GPU else [2])
@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("pages_have", ["halves", "fp8"])
def test_a_row_that_sees_no_key_has_its_sink_for_lse(
    device: str, name: str, window: int, group: int, pages_have: str
) -> None:
    case = Case(BLIND, cache_only=True, mask_prefix_hole=True, window=window, group=group, sinks=True, return_lse=True)
    geometry: dict[str, Any] = GEOMETRY | {"page_size": 256}
    if pages_have == "fp8":
        geometry |= {"kv_dtype": torch.float8_e4m3fn, "head_dim": 128, "head_dim_v": 128}
    if pages_have == "fp8" and name in TRITON and not ON_GPU:
        pytest.skip("Triton's interpreter has not all numbers of FP8")
    case = replace(case, **geometry)
    tensors = oracle.tensors(case)
    if refusal(name, case) is not None:
        assert name not in ("naive", *TRITON)
        requests = [replace(BLIND[0], padded_prefix_len=0)]  # what every library with lse takes
        case = replace(case, requests=requests, mask_prefix_hole=False, window=0)
        assert name == "sdpa" or pages_have == "fp8" or refusal(name, case) is None
    oracle.check(KERNELS[name], case, device_of(name, device))
    _, expected = oracle.attend(case, tensors)
    assert tensors.sinks is not None
    assert (expected[:3] == tensors.sinks.double().numpy()).all()
    if len(case.requests) > 1:
        assert np.isneginf(expected[[5, 9, 10, 11]]).all()


@EVERY_KERNEL
def test_sinks_of_any_size_alone(device: str, name: str) -> None:
    """Whatever exp makes of them."""
    case = Case([Request(0, 2, 2, [-1])], cache_only=True, sinks=True, return_lse=True, group=4, **GEOMETRY)
    tensors = oracle.tensors(case)
    tensors.sinks = torch.tensor([-1e6, 300.0, -math.inf, 1e25])
    options = oracle.options(case, tensors)
    if KERNELS[name].supports(case.config(), case.metadata(), options) is not None:
        assert name == "sdpa"
        return
    output, lse = oracle.run(KERNELS[name], case, tensors, device_of(name, device))
    assert not output.any()
    assert lse is not None
    torch.testing.assert_close(lse, tensors.sinks.expand(2, 4))


@EVERY_KERNEL
@pytest.mark.parametrize("with_sinks", ["sees the context", "sees no key"])
def test_parts_of_a_context_make_the_whole_when_one_of_them_has_the_sinks(
    device: str, name: str, with_sinks: str
) -> None:
    if name == "sdpa":
        pytest.skip("it has no lse")
    whole = Case([Request(512, 2, 2, [3, 1])], cache_only=True, sinks=True, return_lse=True, **GEOMETRY)
    tensors = oracle.tensors(whole)
    expected, expected_lse = oracle.attend(whole, tensors)
    nothing = replace(whole, requests=[Request(0, 2, 2, [-1])])
    cases = [
        replace(whole, sinks=with_sinks != "sees no key"),
        replace(nothing, sinks=with_sinks == "sees no key"),
        replace(nothing, sinks=False),
    ]
    parts = []
    for case in cases:
        assert refusal(name, case) is None
        given = replace(tensors, sinks=tensors.sinks if case.sinks else None)
        output, lse = oracle.run(KERNELS[name], case, given, device_of(name, device))
        assert lse is not None
        parts.append((output, lse.T))
    output, lse = merge(parts, None)
    assert_close(output, expected, whole.dtype)
    assert_close(lse.T, expected_lse, torch.float32)


@EVERY_KERNEL
@pytest.mark.parametrize(
    "numbers", [{"scale": 1e38}, {"scale": -3e38}, {"alibi": 3e38}, {"alibi": -3e38}, {"sinks": 3e38}, {"sinks": -3e38}]
)
def test_numbers_that_scores_do_not_hold_are_no_nan(device: str, name: str, numbers: dict[str, float]) -> None:
    """The specification takes them, and who cannot says so."""
    for requests in (PROMPTS, DECODE):
        case = Case(requests, return_lse=True, scale=numbers.get("scale", 0.2), **GEOMETRY)
        tensors = oracle.tensors(case)
        if "alibi" in numbers:
            tensors.alibi_slopes = torch.full((case.num_heads,), numbers["alibi"])
        if "sinks" in numbers:
            tensors.sinks = torch.full((case.num_heads,), numbers["sinks"])
        reason = KERNELS[name].supports(case.config(), case.metadata(), oracle.options(case, tensors))
        if name != "naive":
            assert reason is not None
            assert name not in TRITON or f"but must be at most {MAX_NUMBER:g}" in reason
            continue
        output, lse = oracle.run(KERNELS[name], case, tensors, device_of(name, device))
        assert output.isfinite().all()
        assert lse is not None
        assert lse.isfinite().all()


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.filterwarnings("ignore:overflow encountered")  # tanh saturates there
@pytest.mark.parametrize("name", TRITON)
@pytest.mark.parametrize("softcap", [1e-44, 1e-20, 50.0, MAX_SOFTCAP, 2 * MAX_SOFTCAP, 3e38])
def test_softcaps_of_any_size(device: str, name: str, softcap: float) -> None:
    for scale in (0.2, 0.0, -0.2, MAX_NUMBER):
        case = Case(DECODE, softcap=softcap, scale=scale, **GEOMETRY)
        reason = refusal(name, case)
        assert (reason is None) == (softcap <= MAX_SOFTCAP)
        assert reason in (None, f"softcap is {softcap:g}, but must be at most {MAX_SOFTCAP:g}")
        oracle.check(KERNELS[name], case, device_of(name, device))
