"""Stores K and V of new tokens in their slots: the Triton twin of `pages.store_kv`, in one launch.

A program copies a piece of one token's K and V. Elements are moved as they are, whatever their type and number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attnd_server.config import DISTINCT_LANES, Layout

# Elements of K and of V that a program copies.
_PIECE = 1024
_LANES = tl.constexpr(DISTINCT_LANES)


@triton.jit
def _store_piece(
    pages, tokens, slot, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    LANES: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Copies a piece of token `program_id(0)` to int64 `slot`. LANES: of the distinct layout; 0 is the unified one."""
    elements = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    exists = elements < KV_HEADS * HEAD_DIM
    values = tl.load(tokens + tl.program_id(0).to(tl.int64) * (KV_HEADS * HEAD_DIM) + elements, mask=exists)
    if LANES == 0:
        targets = slot * (KV_HEADS * HEAD_DIM) + elements
    else:
        # int64: a layer's pages may hold more than 2^31 elements.
        heads = slot // PAGE_SIZE * KV_HEADS + elements // HEAD_DIM
        dims = elements % HEAD_DIM
        targets = heads * (HEAD_DIM * PAGE_SIZE) + dims // LANES * (PAGE_SIZE * LANES)
        targets += slot % PAGE_SIZE * LANES + dims % LANES
    tl.store(pages + targets, values, mask=exists)


@triton.jit
def _store_kernel(
    k_pages, v_pages,
    k, v, slot_mapping,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, PAGE_SIZE: tl.constexpr,
    DISTINCT: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens, pieces of a token)."""
    slot = tl.load(slot_mapping + tl.program_id(0))
    if slot >= 0:
        _store_piece(k_pages, k, slot, KV_HEADS, HEAD_DIM, PAGE_SIZE, _LANES if DISTINCT else 0, PIECE)
        _store_piece(v_pages, v, slot, KV_HEADS, HEAD_DIM_V, PAGE_SIZE, 1 if DISTINCT else 0, PIECE)


def store_kv(
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: Layout,
) -> None:
    """Writes each token's K and V into its slot. All tensors lie on one device.

    Args:
        k_pages: one layer's K, contiguous, written in place.
        v_pages: one layer's V, contiguous, written in place.
        k: `[num_tokens, num_kv_heads, head_dim]` of the pages' dtype.
        v: `[num_tokens, num_kv_heads, head_dim_v]` of the pages' dtype.
        slot_mapping: int64 `[num_tokens]`; no slot twice, -1 for tokens that are not stored.
        layout: of the pages.
    """
    num_tokens, num_kv_heads, head_dim = k.shape
    distinct = layout is Layout.DISTINCT
    if not num_tokens:
        return
    largest = num_kv_heads * max(head_dim, v.shape[2])
    piece = min(_PIECE, triton.next_power_of_2(largest))
    with torch.cuda.device_of(k):
        _store_kernel[(num_tokens, triton.cdiv(largest, piece))](
            k_pages,
            v_pages,
            k.contiguous(),
            v.contiguous(),
            slot_mapping,
            KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            HEAD_DIM_V=v.shape[2],
            PAGE_SIZE=v_pages.shape[3 if distinct else 1],
            DISTINCT=distinct,
            PIECE=piece,
            num_warps=4,
        )
