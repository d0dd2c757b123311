"""Backends over optional packages, and sdpa's dense prefill, against `naive` in float64 on a GPU."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from attnd.errors import Unsupported
from attnd_server import NaiveAttention
from attnd_server.attention.backends.base import AttentionKernel
from attnd_server.attention.config import AttentionBackend
from attnd_server.attention.metadata import AttentionOptions
from attnd_server.attention.ops import TritonAttentionOps
from tests.gpu.test_triton import arrays
from tests.steps import BIDIRECTIONAL, CAUSAL, Case, Request
from tests.tolerances import TOLERANCES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

NUM_PAGES = 64
KINDS = ["decode", "blocks", "chunked", "prefill"]


@pytest.fixture(scope="module")
def ops() -> TritonAttentionOps:
    return TritonAttentionOps("cuda")


def compare(kernel: AttentionKernel, case: Case, options: AttentionOptions) -> None:
    given, device = arrays(case), torch.device("cuda")
    output, lse = kernel.run(kernel.plan(case.config(), case.metadata(), options, device), *given)
    naive = NaiveAttention(torch.float64)
    q, k, v, *pages = given
    plan = naive.plan(case.config(), case.metadata(), options, device)
    exact, exact_lse = naive.run(plan, q.double(), k.double(), v.double(), *pages)
    tolerance = TOLERANCES[case.dtype]
    torch.testing.assert_close(output.double(), exact, atol=tolerance.absolute, rtol=tolerance.relative)
    assert (lse is not None) == options.return_lse
    if lse is not None and exact_lse is not None:
        torch.testing.assert_close(lse.double(), exact_lse.double(), atol=1e-3, rtol=1e-3)


def step(seed: int, page_size: int, kind: str, has_full_pages: bool = False) -> Case:
    """A random step of one kind over random pages, with NaN wherever no token lies."""
    random_ = random.Random(seed)
    num_reqs = random_.randint(1, 6)
    query_lens = {
        "decode": [1] * num_reqs,
        "blocks": [random_.choice([4, 32])] * num_reqs,
        "chunked": [random_.randint(0, 300) for _ in range(num_reqs)],
        "prefill": [random_.choice([1, 100, 300]) for _ in range(num_reqs)],
    }[kind]
    pages = random_.sample(range(NUM_PAGES), NUM_PAGES)
    mask = BIDIRECTIONAL if kind == "blocks" else random_.choice([CAUSAL, BIDIRECTIONAL])
    requests = []
    for query_len in query_lens:
        used = 0 if kind == "prefill" else random_.randint(0, 8)
        spare = 0 if has_full_pages or not used else random_.randrange(page_size)
        table = [pages.pop() for _ in range(used)] + [-1] * (8 - used)
        requests.append(Request(used * page_size - spare, query_len, query_len, table, mask))
    head_dim = random_.choice([64, 128])
    return Case(
        requests,
        num_kv_heads=random_.choice([1, 4]),
        group=random_.choice([1, 3, 4]),
        head_dim=head_dim,
        head_dim_v=head_dim,
        num_pages=NUM_PAGES,
        page_size=page_size,
        dtype=random_.choice([torch.float16, torch.bfloat16]),
        scale=0.1,
    )


def check_supported_of(ops: TritonAttentionOps, backend: AttentionBackend, cases: list[Case], **changes: Any) -> None:
    """Compares each case that the backend serves, at least one; skips if its package is absent.

    Args:
        ops: holds the backend.
        backend: named in the options of each call.
        cases: may differ in heads.
        changes: further fields of the options.
    """
    reason = dict(ops.states())[backend]
    if reason is not None:
        pytest.skip(reason)
    refusals = []
    for case in cases:
        options = AttentionOptions(num_heads=case.num_heads, scale=case.scale, backend=backend, **changes)
        try:
            kernel = ops.choose(case.config(), case.metadata(), options)
        except Unsupported as refused:
            refusals.append(str(refused))
        else:
            compare(kernel, case, options)
    assert len(refusals) < len(cases), refusals


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_flash_attn(ops: TritonAttentionOps, kind: str, seed: int) -> None:
    cases = [step(seed, 16, kind), step(seed, 256, kind), step(seed, 256, kind, has_full_pages=True)]
    softcap = 20.0 if seed % 2 else 0.0
    check_supported_of(ops, AttentionBackend.FLASH_ATTN, cases, return_lse=True, softcap=softcap)


@pytest.mark.parametrize("kind", ["decode", "blocks"])
@pytest.mark.parametrize("window", [40, 300])
def test_flash_attn_with_a_window(ops: TritonAttentionOps, window: int, kind: str) -> None:
    cases = [step(7, 16, kind), step(7, 256, kind, has_full_pages=True)]
    check_supported_of(ops, AttentionBackend.FLASH_ATTN, cases, return_lse=True, window=window)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_xformers(ops: TritonAttentionOps, kind: str, seed: int) -> None:
    case = step(seed, 64, kind)
    sinks = torch.full([case.num_heads], 0.5)
    check_supported_of(ops, AttentionBackend.XFORMERS, [case], return_lse=True, sinks=sinks)


@pytest.mark.parametrize("seed", range(12))
def test_dense_prefill_of_sdpa(ops: TritonAttentionOps, seed: int) -> None:
    check_supported_of(ops, AttentionBackend.SDPA, [step(seed, 16, "prefill")])
