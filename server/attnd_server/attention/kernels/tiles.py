"""Loads tiles of K and V: device functions. Keys that are not seen are not read and give zeros.

Tensors are contiguous, so that every stride is known when a kernel is compiled. Shapes are those of `Layout`.
"""

import triton
import triton.language as tl

from attnd_server.attention.config import DISTINCT_LANES

_LANES = tl.constexpr(DISTINCT_LANES)


@triton.jit
def _load(pointers, keys_mask, dims_mask, MASK_KEYS: tl.constexpr, MASK_DIMS: tl.constexpr):
    """A tile with no more of a mask than it needs: a load without one is wider."""
    if MASK_KEYS and MASK_DIMS:
        return tl.load(pointers, mask=keys_mask & dims_mask, other=0.0)
    if MASK_KEYS:
        return tl.load(pointers, mask=keys_mask, other=0.0)
    if MASK_DIMS:
        return tl.load(pointers, mask=dims_mask, other=0.0)
    return tl.load(pointers)


@triton.jit
def load_cached(
    k_pages, v_pages, pages, slots, kv_head, seen, dims, dims_v,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    DIMS: tl.constexpr, DIMS_V: tl.constexpr, PAGE_SIZE: tl.constexpr, DISTINCT: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """K `[dims, keys]` and V `[keys, dims_v]` of cached keys; zeros where not seen. Without MASK all are seen."""
    # int64: a layer's pages may hold more than 2^31 elements.
    pages = pages.to(tl.int64)
    if DISTINCT:
        heads = pages * KV_HEADS + kv_head
        k_slots = heads * (HEAD_DIM * PAGE_SIZE) + slots * _LANES
        k_dims = dims // _LANES * (PAGE_SIZE * _LANES) + dims % _LANES
        v_slots = heads * (HEAD_DIM_V * PAGE_SIZE) + slots
        v_dims = dims_v * PAGE_SIZE
    else:
        heads = (pages * PAGE_SIZE + slots) * KV_HEADS + kv_head
        k_slots = heads * HEAD_DIM
        k_dims = dims
        v_slots = heads * HEAD_DIM_V
        v_dims = dims_v
    k_pointers = k_pages + (k_slots[None, :] + k_dims[:, None])
    v_pointers = v_pages + (v_slots[:, None] + v_dims[None, :])
    k = _load(k_pointers, seen[None, :], (dims < HEAD_DIM)[:, None], MASK, HEAD_DIM != DIMS)
    v = _load(v_pointers, seen[:, None], (dims_v < HEAD_DIM_V)[None, :], MASK, HEAD_DIM_V != DIMS_V)
    return k, v


@triton.jit
def load_new(
    k, v, rows, kv_head, seen, dims, dims_v,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    DIMS: tl.constexpr, DIMS_V: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """K `[dims, keys]` and V `[keys, dims_v]` of new tokens at int64 `rows`; zeros where not seen."""
    heads = rows * KV_HEADS + kv_head
    k_pointers = k + ((heads * HEAD_DIM)[None, :] + dims[:, None])
    v_pointers = v + ((heads * HEAD_DIM_V)[:, None] + dims_v[None, :])
    k_tile = _load(k_pointers, seen[None, :], (dims < HEAD_DIM)[:, None], MASK, HEAD_DIM != DIMS)
    v_tile = _load(v_pointers, seen[:, None], (dims_v < HEAD_DIM_V)[None, :], MASK, HEAD_DIM_V != DIMS_V)
    return k_tile, v_tile
