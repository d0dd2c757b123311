"""Attention of new tokens over a paged context and over each other: one Triton kernel for prefill and decode.

A program computes a tile of rows, `row = (new token, query head of one KV head)` flattened, over a range of keys of one
request: first the cached keys, gathered through the page table, then the new ones from the call's own tensors. Several
programs may share the keys of one request ("Flash-Decoding", arXiv 2311.01282); what they leave in the partial tensors
is put together by `merge.py`. Products are in the type COMPUTE, softmax and accumulation in float32. An option that is
off is compiled away. Nothing that no row of a tile may see is loaded: others' data or NaN may lie there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attnd_server.kernels.launch_shapes import launch_shape
from attnd_server.kernels.softmax import attend, finish, score
from attnd_server.kernels.tiles import load_cached, load_new

# Columns of `items`, the work list: request, first new token, keys [first, end), first row of partial results or -1.
ITEM_FIELDS = 5
# Columns of `requests`: first row of q, new tokens, valid tokens, context, block size, prefix, padded prefix, and the
# hole [start, end).
REQUEST_FIELDS = 9
LOG2E = 1.4426950408889634
_ITEM_FIELDS = tl.constexpr(ITEM_FIELDS)
_REQUEST_FIELDS = tl.constexpr(REQUEST_FIELDS)
_LN2 = tl.constexpr(0.6931471805599453)
_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _limits(positions, block_size, prefix_len, padded_prefix_len):
    """First position that each token does not see among the new ones; see `metadata.new_token_limits`."""
    limits = (positions // block_size + 1) * block_size
    limits = tl.where(positions < padded_prefix_len, padded_prefix_len, limits)
    return tl.where(positions < prefix_len, prefix_len, limits)


@triton.jit(do_not_specialize=["max_pages", "num_item_tokens", "window"])
def _paged_attention_kernel(
    output, lse, partial_output, partial_lse,
    q, k, v,
    k_pages, v_pages, page_tables,
    items, requests, alibi_slopes, sinks, max_pages, num_item_tokens,
    scale, softcap, window,
    NUM_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, PAGE_SIZE: tl.constexpr, DISTINCT: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIMS: tl.constexpr, DIMS_V: tl.constexpr, COMPUTE: tl.constexpr,
    NEW_TOKENS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr,
    LSE: tl.constexpr,
):  # fmt: skip
    """Grid: (items * NUM_HEADS / HEADS, tiles of ROWS rows in an item). The tensors are `paged_attention`'s."""
    # What to do: an item of the work list, for HEADS query heads of one KV head.
    first_head = tl.program_id(0) % (NUM_HEADS // HEADS) * HEADS
    kv_head = first_head // (NUM_HEADS // KV_HEADS)
    item = items + tl.program_id(0) // (NUM_HEADS // HEADS) * _ITEM_FIELDS
    request = tl.load(item)
    first_token = tl.load(item + 1)
    first_key = tl.load(item + 2)
    end_key = tl.load(item + 3)
    partial_row = tl.load(item + 4)
    fields = requests + request * _REQUEST_FIELDS
    first_row = tl.load(fields).to(tl.int64)
    num_new = tl.load(fields + 1)
    valid_len = tl.load(fields + 2)
    context_len = tl.load(fields + 3)
    tile_token = first_token + tl.program_id(1) * ROWS // HEADS
    if tile_token >= num_new:
        return

    # Its rows. Those past the request's valid tokens are stored, but see nothing.
    end_key = tl.where(tile_token < valid_len, end_key, 0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    tokens = first_token + rows // HEADS
    heads = first_head + rows % HEADS
    exists = (rows < num_item_tokens * HEADS) & (tokens < num_new)
    live = exists & (tokens < valid_len)
    positions = context_len + tokens
    limits = _limits(positions, tl.load(fields + 4), tl.load(fields + 5), tl.load(fields + 6))
    dims = tl.arange(0, DIMS)
    dims_v = tl.arange(0, DIMS_V)
    q_rows = ((first_row + tokens) * NUM_HEADS + heads) * HEAD_DIM
    q_mask = live[:, None] & (dims < HEAD_DIM)[None, :]
    q_tile = tl.load(q + q_rows[:, None] + dims[None, :], mask=q_mask, other=0.0).to(COMPUTE)
    slopes = tl.load(alibi_slopes + heads) if ALIBI else 0.0
    if WINDOW:
        # Keys before the window of the tile's first token are skipped.
        first_key = tl.maximum(first_key, tl.min(positions, 0) - window + 1)

    accumulator = tl.zeros([ROWS, DIMS_V], dtype=tl.float32)
    row_max = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([ROWS], dtype=tl.float32)

    # Cached keys, through the page table.
    table = page_tables + request.to(tl.int64) * max_pages
    hole_start = tl.load(fields + 7)
    hole_end = tl.load(fields + 8)
    end_cached = tl.minimum(end_key, context_len)
    for start in tl.range(first_key, end_cached, KEYS):
        keys = start + tl.arange(0, KEYS)
        pages = tl.load(table + keys // PAGE_SIZE, mask=keys < end_cached, other=-1)
        seen = (pages >= 0) & ((keys < hole_start) | (keys >= hole_end))
        k_tile, v_tile = load_cached(
            k_pages, v_pages, pages, keys % PAGE_SIZE, kv_head, seen, dims, dims_v,
            KV_HEADS, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, DISTINCT,
        )  # fmt: skip
        visible = seen[None, :]
        if WINDOW:
            visible = visible & (positions[:, None] - keys[None, :] < window)
        scores = score(q_tile, k_tile.to(COMPUTE), positions, keys, slopes, scale, softcap, SOFTCAP, ALIBI)
        accumulator, row_max, row_sum = attend(accumulator, row_max, row_sum, scores, visible, v_tile.to(COMPUTE))

    # New keys, from the call's own tensors, up to the last that any row sees.
    if NEW_TOKENS:
        end_new = tl.minimum(end_key, context_len + valid_len)
        end_new = tl.minimum(end_new, tl.max(tl.where(live, limits, 0), 0))
        for start in tl.range(tl.maximum(first_key, context_len), end_new, KEYS):
            keys = start + tl.arange(0, KEYS)
            seen = keys < end_new
            new_rows = first_row + (keys - context_len)
            k_tile, v_tile = load_new(k, v, new_rows, kv_head, seen, dims, dims_v, KV_HEADS, HEAD_DIM, HEAD_DIM_V)
            visible = seen[None, :] & (keys[None, :] < limits[:, None])
            if WINDOW:
                visible = visible & (positions[:, None] - keys[None, :] < window)
            scores = score(q_tile, k_tile.to(COMPUTE), positions, keys, slopes, scale, softcap, SOFTCAP, ALIBI)
            accumulator, row_max, row_sum = attend(accumulator, row_max, row_sum, scores, visible, v_tile.to(COMPUTE))

    row_sum = tl.where(live, row_sum, 0.0)
    stored = exists[:, None] & (dims_v < HEAD_DIM_V)[None, :]
    if partial_row < 0:
        sink = tl.load(sinks + heads) if SINKS else 0.0
        result, row_lse = finish(accumulator, row_max, row_sum, sink, SINKS)
        out_rows = (first_row + tokens) * NUM_HEADS + heads
        tl.store(output + (out_rows * HEAD_DIM_V)[:, None] + dims_v[None, :], result, mask=stored)
        if LSE:
            tl.store(lse + out_rows, row_lse * _LN2, mask=exists)
    else:
        result, row_lse = finish(accumulator, row_max, row_sum, 0.0, False)
        out_rows = (partial_row + tokens).to(tl.int64) * NUM_HEADS + heads
        tl.store(partial_output + (out_rows * HEAD_DIM_V)[:, None] + dims_v[None, :], result, mask=stored)
        tl.store(partial_lse + out_rows, row_lse, mask=exists)


def paged_attention(
    output: torch.Tensor,
    lse: torch.Tensor | None,
    partial_output: torch.Tensor | None,
    partial_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_tables: torch.Tensor,
    items: torch.Tensor,
    requests: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    *,
    item_tokens: int,
    tile_class: int,
    heads: int,
    compute: torch.dtype,
    scale: float,
    softcap: float,
    window: int,
) -> None:
    """Attention of the requests in a work list; all tensors are contiguous and on one device.

    Args:
        output: `[num_tokens, num_heads, head_dim_v]`, written at the rows of items with no partial results.
        lse: float32 `[num_tokens, num_heads]`, likewise, natural logarithm; or None.
        partial_output: float32 `[num_partial_rows, num_heads, head_dim_v]`, written by the other items; see `merge`.
        partial_lse: float32 `[num_partial_rows, num_heads]`, likewise, in units of log2.
        q: `[num_tokens, num_heads, head_dim]`.
        k: `[num_tokens, num_kv_heads, head_dim]`, or None: new tokens are not seen.
        v: `[num_tokens, num_kv_heads, head_dim_v]`, or None.
        k_pages: one layer's K in either layout.
        v_pages: one layer's V.
        page_tables: int32 `[num_reqs, max_pages]`; only columns of the context are read.
        items: int32 `[num_items, ITEM_FIELDS]`.
        requests: int32 `[num_reqs, REQUEST_FIELDS]`; block size 0 is not allowed (bidirectional is a large one).
        alibi_slopes: float32 `[num_heads]` times LOG2E, or None.
        sinks: float32 `[num_heads]` times LOG2E, or None.
        item_tokens: new tokens of an item at most.
        tile_class: index in `launch_shapes.CLASSES` of the requests of all items.
        heads: query heads that share a program: 1, or num_heads // num_kv_heads.
        compute: type of the products.
        scale: factor of q.k.
        softcap: 0 is off.
        window: 0 is off.
    """
    num_heads, head_dim = q.shape[1:]
    head_dim_v = output.shape[2]
    distinct = k_pages.dim() == 5
    num_kv_heads, page_size = v_pages.shape[1::2] if distinct else v_pages.shape[2:0:-1]
    dims, dims_v = (max(16, triton.next_power_of_2(dim)) for dim in (head_dim, head_dim_v))
    tile = launch_shape(tile_class, heads, max(dims, dims_v), max(compute.itemsize, k_pages.element_size()))
    # Softcap's tanh(x) is made of exp2(2 x log2(e)).
    factor = 2 * LOG2E * scale / softcap if softcap else LOG2E * scale
    _paged_attention_kernel[(len(items) * (num_heads // heads), triton.cdiv(item_tokens * heads, tile.rows))](
        output, lse, partial_output, partial_lse,
        q, k, v,
        k_pages, v_pages, page_tables,
        items, requests, alibi_slopes, sinks, page_tables.shape[1], item_tokens,
        factor, LOG2E * softcap, window,
        NUM_HEADS=num_heads, KV_HEADS=num_kv_heads, HEADS=heads,
        HEAD_DIM=head_dim, HEAD_DIM_V=head_dim_v, PAGE_SIZE=page_size, DISTINCT=distinct,
        ROWS=tile.rows, KEYS=tile.keys, DIMS=dims, DIMS_V=dims_v, COMPUTE=_DTYPES[compute],
        NEW_TOKENS=k is not None, WINDOW=window > 0, SOFTCAP=softcap > 0, ALIBI=alibi_slopes is not None,
        SINKS=sinks is not None, LSE=lse is not None,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
