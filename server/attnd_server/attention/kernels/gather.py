"""Reads K and V at slots: what `pages.read_kv` does, in one launch of Triton.

A program reads a piece of several tokens' K and V. Elements are moved as they are, whatever their type and number, or
multiplied by their head's scale in float32 and rounded, bit for bit as torch does it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attnd_server.attention.config import DISTINCT_LANES, Layout
from attnd_server.attention.kernels.given import K_SCALES, NARROW, RUN_TIME_NUMBERS, V_SCALES, bits_of, some
from attnd_server.attention.kernels.store import slot_offsets, slot_tile
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.device.kernels.launch import launch_kernel

_LANES = tl.constexpr(DISTINCT_LANES)


@triton.jit
def _write_piece(
    read, values, scales, tokens, elements, exists, kv_heads, has_scales,
    HEAD_DIM: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """What the pages hold of elements `elements` of tokens `tokens`, `[TOKENS, PIECE]`, into the result."""
    if SCALED:
        heads = elements // HEAD_DIM
        scale = tl.load(scales + heads, mask=(heads < kv_heads) & has_scales, other=1.0)
        values = values.to(tl.float32) * scale[None, :]
    # int64: a result may hold more than 2^31 elements.
    targets = tokens.to(tl.int64)[:, None] * (kv_heads * HEAD_DIM) + elements[None, :]
    tl.store(read + targets, values.to(read.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=RUN_TIME_NUMBERS, do_not_specialize_on_alignment=NARROW)
def _read_kernel(
    k, v,
    k_pages, v_pages, slot_mapping, k_scales, v_scales, num_tokens, kv_heads, given,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, PAGE_SIZE: tl.constexpr, DISTINCT: tl.constexpr,
    TOKENS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Grid: (groups of TOKENS tokens, pieces of PIECE elements of a token)."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    elements = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    slots = tl.load(slot_mapping + tokens, mask=tokens < num_tokens, other=0)
    k_exists = (tokens < num_tokens)[:, None] & (elements < kv_heads * HEAD_DIM)[None, :]
    v_exists = (tokens < num_tokens)[:, None] & (elements < kv_heads * HEAD_DIM_V)[None, :]
    k_offsets = slot_offsets(slots, elements, kv_heads, HEAD_DIM, PAGE_SIZE, _LANES if DISTINCT else 0)
    v_offsets = slot_offsets(slots, elements, kv_heads, HEAD_DIM_V, PAGE_SIZE, 1 if DISTINCT else 0)
    K_SCALED: tl.constexpr = k_pages.dtype.element_ty == tl.float8e4nv
    V_SCALED: tl.constexpr = v_pages.dtype.element_ty == tl.float8e4nv
    # Both loads first, so that they wait for memory together.
    stored_k = tl.load(k_pages + k_offsets, mask=k_exists)
    stored_v = tl.load(v_pages + v_offsets, mask=v_exists)
    _write_piece(
        k, stored_k, k_scales, tokens, elements, k_exists, kv_heads, (given & K_SCALES) != 0, HEAD_DIM, K_SCALED
    )
    _write_piece(
        v, stored_v, v_scales, tokens, elements, v_exists, kv_heads, (given & V_SCALES) != 0, HEAD_DIM_V, V_SCALED
    )


def read_kv(
    pages: LayerPages,
    slots: torch.Tensor,
    layout: Layout,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies the K and V of slots out of one layer's pages. All tensors lie on one device.

    Args:
        pages: of a layer.
        slots: int64 `[num_tokens]`, contiguous, each of them in the cache: nothing else is looked at.
        layout: of the pages.
        dtype: of the results.

    Returns:
        New contiguous tensors `[num_tokens, num_kv_heads, head_dim]` and `[num_tokens, num_kv_heads, head_dim_v]`.
    """
    num_tokens = len(slots)
    page_size, num_kv_heads, head_dim, head_dim_v = _sizes(pages, layout)
    k = pages.k.new_empty(num_tokens, num_kv_heads, head_dim, dtype=dtype)
    v = pages.k.new_empty(num_tokens, num_kv_heads, head_dim_v, dtype=dtype)
    if not num_tokens:
        return k, v
    row = num_kv_heads * max(head_dim, head_dim_v)
    # As in the store: the same bytes go the other way.
    tokens, piece = slot_tile(layout, row, dtype.itemsize)
    others = slots.view(torch.float32)
    with torch.cuda.device_of(pages.k):
        launch_kernel(
            _read_kernel,
            (triton.cdiv(num_tokens, tokens), triton.cdiv(row, piece)),
            k,
            v,
            pages.k,
            pages.v,
            slots,
            some(pages.k_scales, others),
            some(pages.v_scales, others),
            num_tokens,
            num_kv_heads,
            bits_of(k_scales=pages.k_scales, v_scales=pages.v_scales),
            HEAD_DIM=head_dim,
            HEAD_DIM_V=head_dim_v,
            PAGE_SIZE=page_size if layout is Layout.DISTINCT else 0,
            DISTINCT=layout is Layout.DISTINCT,
            TOKENS=tokens,
            PIECE=piece,
            num_warps=4,
        )
    return k, v


def _sizes(pages: LayerPages, layout: Layout) -> tuple[int, int, int, int]:
    """Slots of a page, KV heads, and elements of a head of K and of V."""
    if layout is Layout.UNIFIED:
        _, page_size, num_kv_heads, head_dim = pages.k.shape
        return page_size, num_kv_heads, head_dim, pages.v.shape[3]
    _, num_kv_heads, groups, page_size, lanes = pages.k.shape
    return page_size, num_kv_heads, groups * lanes, pages.v.shape[2]
