"""Stores K and V of new tokens in their slots: what `pages.store_kv` does, in one launch of Triton.

A program moves a piece of several tokens' K and V. Elements are moved as they are, whatever their type and number, or
quantised to FP8 bit for bit as torch does it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attnd_server.attention.config import DISTINCT_LANES, Layout
from attnd_server.attention.kernels.given import K_SCALES, NARROW, RUN_TIME_NUMBERS, V_SCALES, bits_of, some
from attnd_server.attention.kernels.pages import FP8_MAX
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.device.kernels.launch import launch_kernel

_LANES = tl.constexpr(DISTINCT_LANES)
_FP8_MAX = tl.constexpr(FP8_MAX)
# Bytes of K that a program moves, and of V, in the unified layout: 16 for each of its 128 threads. The fastest on an
# H200 from 1 token to 16,384 of 8 heads x 128, or as good.
_UNIFIED_BYTES = 2048
# Tokens and elements of a token that a program moves in the distinct layout, likewise. There V of one token is
# scattered, and only tokens of one page lie side by side.
_DISTINCT_TILE = (16, 64)


@triton.jit
def _load_piece(
    new, scales, tokens, elements, exists, kv_heads, has_scales, HEAD_DIM: tl.constexpr, QUANTISED: tl.constexpr
):
    """Elements `elements` of tokens `tokens`, `[TOKENS, PIECE]`, as they are to be stored."""
    # int64: a step's k may hold more than 2^31 elements.
    values = tl.load(new + tokens.to(tl.int64)[:, None] * (kv_heads * HEAD_DIM) + elements[None, :], mask=exists)
    if QUANTISED:
        heads = elements // HEAD_DIM
        scale = tl.load(scales + heads, mask=(heads < kv_heads) & has_scales, other=1.0)
        scale = tl.broadcast_to(scale[None, :], values.shape)
        scaled = tl.math.div_rn(values.to(tl.float32), scale)  # `/` would not round as torch does
        # Comparisons keep NaN.
        scaled = tl.where(scaled > _FP8_MAX, _FP8_MAX, tl.where(scaled < -_FP8_MAX, -_FP8_MAX, scaled))
        values = scaled.to(tl.float8e4nv)
    return values


@triton.jit
def slot_offsets(slots, elements, kv_heads, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, LANES: tl.constexpr):
    """Where elements `elements` of int64 slots `slots` lie in the pages.

    LANES, PAGE_SIZE: of the distinct layout; 0: unified, where a slot is a row whatever the page size.
    """
    # Slots are int64 because a layer's pages may hold more than 2^31 elements.
    if LANES == 0:
        return slots[:, None] * (kv_heads * HEAD_DIM) + elements[None, :]
    heads, dims = elements // HEAD_DIM, elements % HEAD_DIM
    in_page = heads * (HEAD_DIM * PAGE_SIZE) + dims // LANES * (PAGE_SIZE * LANES) + dims % LANES
    of_slots = slots // PAGE_SIZE * (kv_heads * HEAD_DIM * PAGE_SIZE) + slots % PAGE_SIZE * LANES
    return of_slots[:, None] + in_page[None, :]


@triton.jit(do_not_specialize=RUN_TIME_NUMBERS, do_not_specialize_on_alignment=NARROW)
def _store_kernel(
    k_pages, v_pages,
    k, v, slot_mapping, k_scales, v_scales, num_tokens, kv_heads, given,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, PAGE_SIZE: tl.constexpr,
    DISTINCT: tl.constexpr, TOKENS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Grid: (groups of TOKENS tokens, pieces of PIECE elements of a token)."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    elements = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    slots = tl.load(slot_mapping + tokens, mask=tokens < num_tokens, other=-1)
    k_exists = (slots >= 0)[:, None] & (elements < kv_heads * HEAD_DIM)[None, :]
    v_exists = (slots >= 0)[:, None] & (elements < kv_heads * HEAD_DIM_V)[None, :]
    K_QUANTISED: tl.constexpr = k_pages.dtype.element_ty == tl.float8e4nv
    V_QUANTISED: tl.constexpr = v_pages.dtype.element_ty == tl.float8e4nv
    # Both loads first, so that they wait for memory together.
    new_k = _load_piece(
        k, k_scales, tokens, elements, k_exists, kv_heads, (given & K_SCALES) != 0, HEAD_DIM, K_QUANTISED
    )
    new_v = _load_piece(
        v, v_scales, tokens, elements, v_exists, kv_heads, (given & V_SCALES) != 0, HEAD_DIM_V, V_QUANTISED
    )
    k_targets = slot_offsets(slots, elements, kv_heads, HEAD_DIM, PAGE_SIZE, _LANES if DISTINCT else 0)
    v_targets = slot_offsets(slots, elements, kv_heads, HEAD_DIM_V, PAGE_SIZE, 1 if DISTINCT else 0)
    tl.store(k_pages + k_targets, new_k, mask=k_exists)
    tl.store(v_pages + v_targets, new_v, mask=v_exists)


def store_kv(
    pages: LayerPages,
    k: torch.Tensor,
    v: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: Layout,
) -> None:
    """Writes each token's K and V into its slot. All tensors lie on one device.

    Args:
        pages: of a layer, written in place. Those without scales have k's type.
        k: `[num_tokens, num_kv_heads, head_dim]`.
        v: `[num_tokens, num_kv_heads, head_dim_v]`.
        slot_mapping: int64 `[num_tokens]`; no slot twice, -1 for tokens that are not stored.
        layout: of the pages.
    """
    num_tokens, num_kv_heads, head_dim = k.shape
    if not num_tokens:
        return
    row = num_kv_heads * max(head_dim, v.shape[2])
    tokens, piece = slot_tile(layout, row, k.element_size())
    others = slot_mapping.view(torch.float32)
    with torch.cuda.device_of(k):
        launch_kernel(
            _store_kernel,
            (triton.cdiv(num_tokens, tokens), triton.cdiv(row, piece)),
            pages.k,
            pages.v,
            k.contiguous(),
            v.contiguous(),
            slot_mapping,
            some(pages.k_scales, others),
            some(pages.v_scales, others),
            num_tokens,
            num_kv_heads,
            bits_of(k_scales=pages.k_scales, v_scales=pages.v_scales),
            HEAD_DIM=head_dim,
            HEAD_DIM_V=v.shape[2],
            PAGE_SIZE=pages.v.shape[3] if layout is Layout.DISTINCT else 0,
            DISTINCT=layout is Layout.DISTINCT,
            TOKENS=tokens,
            PIECE=piece,
            num_warps=4,
        )


def slot_tile(layout: Layout, row: int, itemsize: int) -> tuple[int, int]:
    """Tokens and elements of a token that a program moves, for tokens of `row` elements; powers of two."""
    if layout is Layout.DISTINCT:
        return _DISTINCT_TILE
    elements = _UNIFIED_BYTES // itemsize
    piece = min(triton.next_power_of_2(row), elements)
    return elements // piece, piece
