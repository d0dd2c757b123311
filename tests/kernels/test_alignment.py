"""The bits of an output follow from the values of its inputs, not from where these lie in memory."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

from attnd_server import NaiveAttention
from attnd_server.attention.backends.base import AttentionKernel
from attnd_server.attention.backends.sdpa import SdpaAttention
from attnd_server.attention.config import Layout
from attnd_server.attention.kernels.pages import store_kv, stored_tokens
from attnd_server.attention.layer_pages import LayerPages
from tests import oracle
from tests.oracle import Case, Request

OFFSETS = range(64)
CPU = torch.device("cpu")
KERNELS = pytest.mark.parametrize(
    "kernel", [NaiveAttention(), SdpaAttention()], ids=lambda kernel: kernel.backend.value
)
DTYPES = pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)

STEPS = {
    "decode": [Request(50, 1, 1, [7, 2, 9, 4])],
    "batched decode": [Request(n, 1, 1, [7, 2, 9, 4]) for n in (50, 33, 60)],
    "few new tokens": [Request(50, 3, 3, [7, 2, 9, 4])],
    "prefill": [Request(0, 37, 37, [])],
    "prefill of several": [Request(0, 5, 5, []), Request(0, 17, 17, []), Request(0, 5, 5, [])],
    # Each length of query is a part of its own, which begins where those before it end.
    "mixed": [Request(50, n, n, [7, 2, 9, 4]) for n in (1, 3, 2)],
}


def at(tensor: torch.Tensor | None, offset: int) -> torch.Tensor | None:
    """A copy that begins so many bytes behind a multiple of 64, as received bytes may."""
    if tensor is None:
        return None
    room = torch.empty(tensor.nbytes + 128, dtype=torch.uint8)
    buffer = (ctypes.c_char * tensor.nbytes).from_address(room.data_ptr() - room.data_ptr() % -64 + offset)
    buffer.owner = room  # type: ignore[attr-defined]  # keeps the memory as long as the copy
    copy = torch.frombuffer(buffer, dtype=tensor.dtype).view(tensor.shape)
    assert copy.data_ptr() % 64 == offset
    return copy.copy_(tensor)


def offsets_with_other_bits(kernel: AttentionKernel, case: Case, slots: list[int] | None = None) -> list[int]:
    """At which offsets of q, k, v and the pages the output is not that at 0, or the lse."""
    given = oracle.tensors(case)
    metadata = case.metadata()
    if slots is not None:
        metadata = replace(metadata, slot_mapping=torch.tensor(slots))
        assert given.k is not None
        assert given.v is not None
        store_kv(
            LayerPages(given.k_pages, given.v_pages),
            given.k,
            given.v,
            stored_tokens(metadata.slot_mapping, CPU),
            case.layout,
        )
    plan = kernel.plan(case.config(), metadata, oracle.options(case, given), CPU)
    if slots is not None and isinstance(kernel, SdpaAttention):
        assert plan.parts[0].side_by_side is not None

    def run(offset: int) -> list[torch.Tensor]:
        tensors = (given.q, given.k, given.v, given.k_pages, given.v_pages)
        q, k, v, *pages = (at(tensor, offset) for tensor in tensors)
        output, lse = kernel.run(plan, q, k, v, LayerPages(*pages))
        return [output] if lse is None else [output, lse]

    expected = run(0)
    return [offset for offset in OFFSETS if not all(map(torch.equal, run(offset), expected))]


@KERNELS
@DTYPES
@pytest.mark.parametrize(
    ("num_kv_heads", "group", "head_dim"), [(3, 3, 64), (2, 2, 40), (1, 1, 128), (2, 1, 24)], ids=str
)
@pytest.mark.parametrize("step", STEPS)
def test_a_step(
    kernel: AttentionKernel, step: str, num_kv_heads: int, group: int, head_dim: int, dtype: torch.dtype
) -> None:
    case = Case(
        STEPS[step], num_kv_heads, group, head_dim, head_dim, num_pages=10, dtype=dtype, return_lse=False, poison=0.0
    )
    assert offsets_with_other_bits(kernel, case) == []


@KERNELS
@DTYPES
@pytest.mark.parametrize("layout", list(Layout))
def test_a_step_without_new_keys(kernel: AttentionKernel, layout: Layout, dtype: torch.dtype) -> None:
    requests = [Request(50, 3, 3, [7, 2, 9, 4]), Request(20, 1, 1, [1, 3, 0, 0])]
    case = Case(requests, 3, 1, 40, 40, num_pages=10, layout=layout, dtype=dtype, cache_only=True)
    assert offsets_with_other_bits(kernel, case) == []


@DTYPES
@pytest.mark.parametrize(("num_kv_heads", "group", "head_dim"), [(3, 3, 64), (1, 5, 40), (3, 1, 40), (1, 9, 8)])
@pytest.mark.parametrize("first_page", [2, 3])
def test_pages_that_are_read_where_they_lie(
    num_kv_heads: int, group: int, head_dim: int, first_page: int, dtype: torch.dtype
) -> None:
    # Page 3 begins at an odd multiple of a page, which may be no multiple of 64 bytes.
    pages = list(range(first_page, first_page + 6))
    request = Request(33, 1, 1, pages)
    case = Case([request], num_kv_heads, group, head_dim, head_dim, num_pages=10, page_size=7, dtype=dtype, poison=0.0)
    assert offsets_with_other_bits(SdpaAttention(), case, [first_page * 7 + 33]) == []
