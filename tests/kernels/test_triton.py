"""Backends `triton` and `triton_grouped` against the oracle: on a GPU if there is one, else in the interpreter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from attnd_server.attention.backends.triton.attention import (
    MAX_CONTEXT_LEN,
    TritonPagedAttention,
    availability,
    triton_attention,
    triton_grouped_attention,
)
from attnd_server.attention.backends.window import SlidingWindowAttention
from attnd_server.attention.config import FP8, AttentionBackend, AttentionConfig, Layout, PrecisionMode
from attnd_server.attention.kv_split import KVSplitConfig
from tests import interpreter, oracle
from tests.steps import BIDIRECTIONAL, BLOCK_CAUSAL, CAUSAL, NUM_PAGES, PREFIX_FULL, Case, Request, cases
from tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(interpreter.reason_against() is not None, reason=str(interpreter.reason_against()))

ON_GPU = torch.cuda.is_available()
HALF = torch.bfloat16 if ON_GPU else torch.float16  # the interpreter cannot multiply bfloat16
SINGLE = AttentionBackend.TRITON


class Kernel(TritonPagedAttention):
    """The backend with a fixed split of KV."""

    def __init__(self, backend: AttentionBackend = AttentionBackend.TRITON_GROUPED, chunk_size: int = 0) -> None:
        super().__init__(backend)
        self.kv_split = KVSplitConfig(chunk_size)

    def plan(self, config: AttentionConfig, *args: Any) -> Any:
        return super().plan(replace(config, kv_split=self.kv_split), *args)


KERNELS = {"grouped": Kernel(), "single": Kernel(SINGLE), "split": Kernel(chunk_size=16)}
EVERY_KERNEL = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[str]:
    """Where the kernels run. Fresh memory is NaN as long as the tests of this module run."""
    new_empty = torch.Tensor.new_empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        fresh = new_empty(*args, **kwargs)
        return fresh.fill_(math.nan) if fresh.is_floating_point() else fresh

    with interpreter.interpreter() as device, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", poisoned)
        yield device


def requests(page_size: int, context_lens: list[int], query_len: int = 1) -> list[Request]:
    """Requests whose pages lie anywhere, with unused columns of both kinds."""
    pages = torch.randperm(NUM_PAGES).tolist()
    columns = -(-max(context_lens) // page_size) + 1
    unused = [-1, 10**9]
    tables = [[pages.pop() for _ in range(-(-length // page_size))] for length in context_lens]
    return [
        Request(length, query_len, query_len, table + (unused * columns)[: columns - len(table)])
        for length, table in zip(context_lens, tables, strict=True)
    ]


@EVERY_KERNEL
@settings(max_examples=10 if ON_GPU else 16, deadline=None, derandomize=True)  # a GPU compiles each anew
@given(case=cases())
def test_any_step(device: str, kernel: Kernel, case: Case) -> None:
    if not ON_GPU and case.coarsest is torch.bfloat16:
        case = case.of_type(torch.float16, precision=PrecisionMode.AUTO)
    oracle.check(kernel, case, device)


@EVERY_KERNEL
@pytest.mark.parametrize(("layout", "dtype"), [(Layout.UNIFIED, torch.float16), (Layout.DISTINCT, torch.float32)])
@pytest.mark.parametrize("parts", ["k", "v", "kv"])
@pytest.mark.parametrize("store_first", [False, True])
def test_fp8_of_k_or_of_v_alone(
    device: str, kernel: Kernel, store_first: bool, parts: str, dtype: torch.dtype, layout: Layout
) -> None:
    """Decode and prefill over pages of two types, each with its scales or none, and new tokens that are read so too."""
    kinds = {"kv_dtype": FP8 if "k" in parts else dtype, "v_dtype": FP8 if "v" in parts else dtype}
    scales = {f"{part}_scales": (0.1, 0.73) for part in parts}
    for query_len in (1, 20):
        case = Case(
            requests(4, [0, 1, 3, 4, 5, 37], query_len), head_dim_v=24, page_size=4, dtype=dtype, layout=layout,
            return_lse=True, window=30, seed=query_len, store_first=store_first, **kinds, **scales,
        )  # fmt: skip
        assert kernel.supports(case.config(), case.metadata(), oracle.options(case, oracle.tensors(case))) is None
        oracle.check(kernel, case, device)


@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize(("group", "head_dim", "head_dim_v"), [(1, 64, 64), (3, 80, 80), (5, 96, 64), (7, 64, 128)])
def test_groups_and_head_dims(device: str, page_size: int, group: int, head_dim: int, head_dim_v: int) -> None:
    case = Case(
        requests(page_size, [0, 1, max(1, page_size - 1), page_size, page_size + 1, 3 * page_size + 1]),
        num_kv_heads=1,
        group=group,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        page_size=page_size,
        scale=head_dim**-0.5,
        dtype=HALF,
        return_lse=True,
    )
    oracle.check(Kernel(), case, device)


@pytest.mark.parametrize("query_len", [1, 40])
def test_chunks_shorter_than_a_tile_of_keys(device: str, query_len: int) -> None:
    # Long enough for one program to take several chunks.
    case = Case(requests(16, [1024], query_len), num_kv_heads=1, group=4, head_dim=64, head_dim_v=64, return_lse=True)
    oracle.check(KERNELS["split"], case, device)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("chunk_size", [0, 16, 32, 1024])
def test_splits_change_nothing(device: str, layout: Layout, chunk_size: int) -> None:
    # 130 is an odd number of chunks, 16 * 16 + 1 more than the merge takes at once.
    case = Case(
        requests(16, [130, 16 * 16 + 1, 15], query_len=2),
        group=3,
        layout=layout,
        softcap=8.0,
        alibi=True,
        sinks=True,
        return_lse=True,
    )
    oracle.check(Kernel(chunk_size=chunk_size), case, device)
    oracle.check(Kernel(chunk_size=chunk_size), replace(case, window=50), device)


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if ON_GPU else [torch.float16])
def test_bits_do_not_depend_on_the_batch(device: str, kernel: Kernel, dtype: torch.dtype) -> None:
    case = Case(
        [
            *requests(16, [300, 33, 0]),
            Request(40, 9, 7, [150, -1, 151], BLOCK_CAUSAL, block_size=4),
            Request(7, 260, 258, [152], CAUSAL),
            Request(20, 0, 0, [153, 154]),
        ],
        group=3,
        dtype=dtype,
        sinks=True,
        return_lse=True,
    )
    columns = max(len(request.pages) for request in case.requests)
    padded = [replace(request, pages=(request.pages + [-1] * columns)[:columns]) for request in case.requests]
    case = replace(case, requests=padded)
    tensors = oracle.tensors(case)
    output, lse = oracle.run(kernel, case, tensors, device)
    assert not output.isnan().any()
    for index in range(len(case.requests)):
        alone, rows = oracle.one_request(case, index)
        part = replace(tensors, q=tensors.q[rows], k=tensors.k[rows], v=tensors.v[rows])
        alone_output, alone_lse = oracle.run(kernel, alone, part, device)
        assert torch.equal(alone_output, output[rows])
        assert torch.equal(alone_lse, lse[rows])


@pytest.mark.parametrize("mask", [CAUSAL, BLOCK_CAUSAL, BIDIRECTIONAL, PREFIX_FULL])
def test_a_long_prefill(device: str, mask: str) -> None:
    request = Request(21, 261, 259, [3, 90], mask, block_size=32, prefix_len=100, padded_prefix_len=130)
    case = Case([request], num_kv_heads=1, group=2, head_dim=16, head_dim_v=16, window=0 if mask == CAUSAL else 40)
    oracle.check(Kernel(), case, device)


@EVERY_KERNEL
def test_rows_that_see_nothing(device: str, kernel: Kernel) -> None:
    blind = [
        Request(0, 2, 2, [-1, -1, -1]),
        Request(40, 2, 0, [5, 6, 7]),
        Request(40, 2, 2, [-1, -1, -1]),
        Request(33, 2, 2, [8, 9, 10], prefix_len=0, padded_prefix_len=33),
    ]
    case = Case(blind, cache_only=True, mask_prefix_hole=True, return_lse=True)
    output, lse = oracle.run(kernel, case, oracle.tensors(case), device)
    assert not output.any()
    assert (lse == -math.inf).all()
    oracle.check(kernel, replace(case, sinks=True), device)


def test_a_step_without_requests(device: str) -> None:
    case = Case([], return_lse=True)
    output, lse = oracle.run(Kernel(), case, oracle.tensors(case), device)
    assert output.shape == (0, case.num_heads, case.head_dim_v)
    assert lse is not None


def test_a_window_around_the_kernel(device: str) -> None:
    case = replace(Case(requests(16, [40, 90, 5], query_len=3)), window=20)
    tensors = oracle.tensors(case)
    output, _ = oracle.run(SlidingWindowAttention(Kernel(), 20), replace(case, window=0), tensors, device)
    assert_close(output, oracle.attend(case, tensors)[0], case.dtype)


def test_large_scores(device: str) -> None:
    case = Case(requests(16, [40, 17]), scale=40.0, dtype=torch.float16, sinks=True, return_lse=True)
    tensors = oracle.tensors(case)
    output, lse = oracle.run(Kernel(chunk_size=16), case, tensors, device)
    expected, expected_lse = oracle.attend(case, tensors)
    assert_close(output, expected, torch.float16)
    assert_close(lse, expected_lse, torch.float32)


def test_functions_for_one_call(device: str) -> None:
    case = Case(requests(4, [9, 3]), dtype=torch.float16, precision=PrecisionMode.FP32, return_lse=True)
    tensors = oracle.tensors(case)
    expected, _ = oracle.attend(case, tensors)
    arrays = [x.to(device) for x in (tensors.q, tensors.k, tensors.v, tensors.k_pages, tensors.v_pages)]
    for function in (triton_attention, triton_grouped_attention):
        output, lse = function(case.config(), case.metadata(), oracle.options(case, tensors), *arrays)
        assert_close(output, expected, torch.float16)
        assert lse is not None


def test_what_is_refused(device: str) -> None:
    case = Case(requests(4, [9]))
    config, metadata, options = case.config(), case.metadata(), oracle.options(case, oracle.tensors(case))
    kernel = Kernel()
    assert kernel.supports(config, metadata, options) is None
    assert not kernel.supports_context_length(MAX_CONTEXT_LEN + 1)
    too_long = replace(metadata, context_lens=metadata.context_lens + MAX_CONTEXT_LEN)
    assert "must have at most" in str(kernel.supports(config, too_long, options))
    halves = kernel.supports(replace(config, dtype=torch.bfloat16, kv_dtype=None, v_dtype=None), metadata, options)
    assert halves == (None if ON_GPU else "Triton's interpreter cannot multiply bfloat16")
    latent = replace(case, num_kv_heads=1, latent=True).config()
    reason = "the cache is latent, but its kernels read K and V from memory of their own"
    assert kernel.supports(latent, metadata, options) == reason
    with pytest.raises(ValueError, match="must be TRITON or TRITON_GROUPED"):
        TritonPagedAttention(AttentionBackend.SDPA)


def test_availability(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert availability(torch.device(device)) is None
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert availability(torch.device("cpu")) == "device is cpu, but must be a CUDA device"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability is (7, 5)" in str(availability(torch.device("cuda")))


@pytest.mark.parametrize("return_lse", [False, True])
def test_results_can_be_written_into_tensors_that_are_there(device: str, return_lse: bool) -> None:
    oracle.check_launch(Kernel(), Case(requests(4, [9, 3]), group=2, return_lse=return_lse), device)
