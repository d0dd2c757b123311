"""Triton's kernels at the sizes that models have, on a GPU: exactness, batch invariance, big caches, graphs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from attnd_server import NaiveAttention, TritonPagedAttention
from attnd_server.attention.config import FP8, AttentionBackend, Layout
from attnd_server.attention.kv_split import KVSplitConfig
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.attention.metadata import AttentionOptions
from tests.oracle import check
from tests.steps import BLOCK_CAUSAL, CAUSAL, PREFIX_FULL, Case, Request
from tests.tolerances import assert_as_exact_as_plain

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

KERNELS = {
    backend.value: TritonPagedAttention(backend)
    for backend in (AttentionBackend.TRITON_GROUPED, AttentionBackend.TRITON)
}
Arrays = list[Any]  # q, k, v and the layer's pages


def step(lens: list[tuple[int, int]], mask: str = CAUSAL, first_page: int = 0, num_pages: int = 8192) -> Case:
    """Requests of `(context_len, query_len)` with their pages in `[first_page, num_pages)`, in no order."""
    order = torch.randperm(num_pages - first_page, generator=torch.Generator().manual_seed(0))
    pages = (first_page + order).tolist()
    columns = -(-max(context_len for context_len, _ in lens) // 16)
    tables = [[pages.pop() for _ in range(-(-context_len // 16))] for context_len, _ in lens]
    return Case(
        [
            Request(
                context_len,
                query_len,
                query_len,
                table + [-1] * (columns - len(table)),
                mask,
                block_size=32,
                prefix_len=context_len // 2,
                padded_prefix_len=context_len + query_len // 2,
            )
            for (context_len, query_len), table in zip(lens, tables, strict=True)
        ],
        num_kv_heads=8,
        group=4,
        head_dim=128,
        head_dim_v=128,
        num_pages=num_pages,
        dtype=torch.bfloat16,
        scale=128**-0.5,
    )


def arrays(case: Case) -> Arrays:
    """Random tensors on the GPU, NaN in slots that hold no context."""
    config = case.config()

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(case.dtype)

    q = normal(case.num_tokens, case.num_heads, case.head_dim)
    k = normal(case.num_tokens, case.num_kv_heads, case.head_dim)
    v = normal(case.num_tokens, case.num_kv_heads, case.head_dim_v)
    k_pages, v_pages = (
        torch.full(shape, math.nan, dtype=case.dtype, device="cuda") for shape in (config.k_shape, config.v_shape)
    )
    for request in case.requests:
        for column in range(-(-request.context_len // case.page_size)):
            page, used = request.pages[column], min(case.page_size, request.context_len - column * case.page_size)
            for pages in (k_pages, v_pages):
                if case.layout is Layout.UNIFIED:
                    pages[page, :used] = normal(used, *pages.shape[2:])
                elif pages.dim() == 5:
                    pages[page, :, :, :used] = normal(*pages.shape[1:3], used, pages.shape[4])
                else:
                    pages[page, :, :, :used] = normal(*pages.shape[1:3], used)
    return [q, k, v, LayerPages(k_pages, v_pages)]


def options(case: Case) -> AttentionOptions:
    return AttentionOptions(
        num_heads=case.num_heads,
        scale=case.scale,
        softcap=case.softcap,
        window=case.window,
        alibi_slopes=torch.rand(case.num_heads) if case.alibi else None,
        sinks=torch.randn(case.num_heads) if case.sinks else None,
        return_lse=True,
    )


def check_as_plain(case: Case, kernel: TritonPagedAttention) -> None:
    """At most twice the error of the plain computation, and nearly its lse."""
    given, opts, device = arrays(case), options(case), torch.device("cuda")

    def run(with_kernel: TritonPagedAttention | NaiveAttention, *tensors: Any) -> Arrays:
        return with_kernel.run(with_kernel.plan(case.config(), case.metadata(), opts, device), *tensors)

    output, lse = run(kernel, *given)
    exact, exact_lse = run(NaiveAttention(torch.float64), *(x.double() for x in given[:3]), *given[3:])
    plain, _ = run(NaiveAttention(case.dtype), *given)
    assert_as_exact_as_plain(output, plain, exact, case.dtype)
    assert (lse - exact_lse).abs().max() < 1e-3


STEPS = {
    "decode": step([(1, 1), (15, 1), (16, 1), (17, 1), (4097, 1), (32768, 1)]),
    "speculative": step([(1, 5), (4097, 5), (9000, 5)]),
    "blocks": step([(0, 32), (31, 32), (512, 32), (4097, 32)], BLOCK_CAUSAL),
    "prefill": step([(0, 2048), (777, 1000), (0, 257)]),
    "prefix": step([(100, 600), (900, 90)], PREFIX_FULL),
    "mixed": step([(8192, 1), (2000, 700), (33, 1), (64, 32)]),
}


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", STEPS)
def test_as_exact_as_a_plain_computation(name: str, dtype: torch.dtype, backend: str) -> None:
    check_as_plain(replace(STEPS[name], dtype=dtype), KERNELS[backend])


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("name", STEPS)
def test_every_option_at_once(name: str, layout: Layout) -> None:
    case = replace(STEPS[name], layout=layout, softcap=20.0, alibi=True, sinks=True, window=1000)
    check_as_plain(case, KERNELS["triton_grouped"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256, 512])
def test_every_head_dim_fits_the_chip(head_dim: int, dtype: torch.dtype) -> None:
    requests = [Request(20, 1, 1, [3, 9]), Request(17, 4, 3, [1, 7]), Request(3, 260, 260, [5, -1])]
    case = Case(requests, num_kv_heads=1, group=5, head_dim=head_dim, head_dim_v=head_dim, scale=0.05, dtype=dtype)
    check(KERNELS["triton_grouped"], case, "cuda")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("batch_invariant", [True, None])
def test_bits_do_not_depend_on_the_batch(backend: str, batch_invariant: bool | None) -> None:
    lens = [(int(2 ** (4 + index / 7)), 1) for index in range(60)] + [(100, 400), (0, 300), (300, 1)]
    if batch_invariant:  # without it, what is cut by the batch: few new tokens, but more than one
        lens += [(5000, 32), (300, 5), (3000, 5)]
    case = step(lens, num_pages=16384)
    config = replace(case.config(), kv_split=KVSplitConfig(batch_invariant=batch_invariant))
    q, k, v, *pages = arrays(case)
    kernel, opts, device = KERNELS[backend], options(case), torch.device("cuda")
    output, lse = kernel.run(kernel.plan(config, case.metadata(), opts, device), q, k, v, *pages)
    start = 0
    for request in case.requests:
        rows = slice(start, start + request.query_len)
        alone = kernel.plan(config, replace(case, requests=[request]).metadata(), opts, device)
        alone_output, alone_lse = kernel.run(alone, q[rows], k[rows], v[rows], *pages)
        assert torch.equal(alone_output, output[rows])
        assert torch.equal(alone_lse, lse[rows])
        start = rows.stop


@pytest.mark.parametrize("layout", Layout)
def test_a_cache_of_more_than_two_to_the_31_elements(layout: Layout) -> None:
    # A page has 16 * 8 * 128 elements; every page of the step lies past element 2^31 of both K and V.
    first_page = 2**31 // (16 * 8 * 128)
    case = step([(4097, 1), (300, 40), (77, 300)], first_page=first_page + 1, num_pages=first_page + 2048)
    check_as_plain(replace(case, layout=layout), KERNELS["triton_grouped"])


@pytest.mark.parametrize("name", ["decode", "speculative", "blocks", "prefill"])
def test_fp8_pages_as_exact_as_what_they_hold(name: str) -> None:
    case = STEPS[name]
    config, opts, device = (
        replace(case.config(), kv_dtype=FP8, v_dtype=None, k_scales=(0.5,)),
        options(case),
        torch.device("cuda"),
    )
    q, k, v, pages = arrays(case)
    scales = [torch.full([case.num_kv_heads], 0.5, device=device), torch.ones(case.num_kv_heads, device=device)]
    stored = LayerPages((pages.k / 0.5).clamp(-448, 448).to(FP8), pages.v.to(FP8), *scales)
    kernel, naive = KERNELS["triton_grouped"], NaiveAttention(torch.float64)
    output, _ = kernel.run(kernel.plan(config, case.metadata(), opts, device), q, k, v, stored)
    plan = naive.plan(config, case.metadata(), opts, device)
    exact, _ = naive.run(plan, q.double(), k.double(), v.double(), stored)
    assert (output - exact).norm() / exact.norm() < 3e-3


def test_run_can_be_captured_in_a_graph() -> None:
    case = STEPS["decode"]
    given, opts = arrays(case), options(case)
    kernel = KERNELS["triton_grouped"]
    plan = kernel.plan(case.config(), case.metadata(), opts, torch.device("cuda"))
    kernel.run(plan, *given)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, lse = kernel.run(plan, *given)
    given[0].copy_(torch.randn_like(given[0]))
    graph.replay()
    expected, expected_lse = kernel.run(plan, *given)
    assert torch.equal(output, expected)
    assert torch.equal(lse, expected_lse)
