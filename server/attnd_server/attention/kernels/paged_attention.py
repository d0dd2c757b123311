"""Attention of new tokens over a paged context and over each other: one Triton kernel for prefill and decode.

A program computes an item (see `items.py`): first over the cached keys, gathered through the page table, then over the
new ones from the call's own tensors. Several programs may share the keys of one request ("Flash-Decoding", arXiv
2311.01282); the one that finishes the last chunk puts the partial results together. Products are in the type COMPUTE,
softmax and accumulation in float32. An option that is off is compiled away. Nothing that no row of a tile may see is
loaded: others' data or NaN may lie there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attnd_server.attention.kernels.items import (
    BLOCK_SIZE,
    CHUNK_KEYS,
    CONTEXT_LEN,
    COUNTER,
    END_KEY,
    FIRST_CHUNK,
    FIRST_KEY,
    FIRST_ROW,
    HAS_ABSENT_PAGES,
    HOLE_END,
    HOLE_START,
    ITEM_FIELDS,
    NUM_CHUNKS,
    NUM_NEW,
    NUM_VALID,
    PADDED_PREFIX_LEN,
    PARTIAL_ROW,
    PREFIX_LEN,
    Q_ROW,
    TABLE,
)
from attnd_server.attention.kernels.launch_shapes import FEW_NEW_TOKENS, Tile
from attnd_server.attention.kernels.merge import ROWS as MERGE_ROWS
from attnd_server.attention.kernels.merge import merge_rows
from attnd_server.attention.kernels.softmax import attend, finish, log2_numbers, score
from attnd_server.attention.kernels.tiles import load_cached, load_new
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.device.kernels.launch import launch_kernel

# New tokens that a decode program loads before the cached ones: no fewer than the keys that tl.dot takes.
_FEW = tl.constexpr(FEW_NEW_TOKENS)
_ITEM_FIELDS = tl.constexpr(ITEM_FIELDS)
_MERGE_ROWS = tl.constexpr(MERGE_ROWS)
_LN2 = tl.constexpr(0.6931471805599453)
_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _limits(positions, block_size, prefix_len, padded_prefix_len):
    """First position that each token does not see among the new ones; see `masks.new_token_limits`."""
    limits = (positions // block_size + 1) * block_size
    limits = tl.where(positions < padded_prefix_len, padded_prefix_len, limits)
    return tl.where(positions < prefix_len, prefix_len, limits)


@triton.jit
def _store_partial(
    partial_output, partial_lse, accumulator, row_max, row_sum, live, exists, first_place, tokens, heads, dims_v,
    NUM_HEADS: tl.constexpr, HEAD_DIM_V: tl.constexpr,
):  # fmt: skip
    """Stores the attention over the keys of one chunk."""
    result, row_lse = finish(accumulator, row_max, tl.where(live, row_sum, 0.0), 0.0, False)
    places = (first_place + tokens).to(tl.int64) * NUM_HEADS + heads
    mask = exists[:, None] & (dims_v < HEAD_DIM_V)[None, :]
    tl.store(partial_output + ((places * HEAD_DIM_V)[:, None] + dims_v[None, :]), result, mask=mask)
    tl.store(partial_lse + places, row_lse, mask=exists)


@triton.jit
def _store_output(
    output, lse, sinks, accumulator, row_max, row_sum, live, exists, places, heads, dims_v,
    NUM_HEADS: tl.constexpr, HEAD_DIM_V: tl.constexpr, SINKS: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Stores the output and lse of rows whose keys were all seen here."""
    sink = tl.load(sinks + heads, mask=live, other=float("-inf")) if SINKS else 0.0
    result, row_lse = finish(accumulator, row_max, tl.where(live, row_sum, 0.0), sink, SINKS)
    places = places * NUM_HEADS + heads
    stored = exists[:, None] & (dims_v < HEAD_DIM_V)[None, :]
    tl.store(output + ((places * HEAD_DIM_V)[:, None] + dims_v[None, :]), result, mask=stored)
    if LSE:
        tl.store(lse + places, row_lse * _LN2, mask=exists)


@triton.jit(do_not_specialize=["window"])
def _paged_attention_kernel(
    output, lse, partial_output, partial_lse, counters,
    q, k, v,
    k_pages, v_pages, k_scales, v_scales, page_tables, items, alibi_slopes, sinks, seen_tokens,
    scale, softcap, window,
    NUM_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, PAGE_SIZE: tl.constexpr, DISTINCT: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIMS: tl.constexpr, DIMS_V: tl.constexpr, COMPUTE: tl.constexpr,
    NEW_TOKENS: tl.constexpr, FEW: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, SINKS: tl.constexpr, LSE: tl.constexpr, K_SCALED: tl.constexpr, V_SCALED: tl.constexpr,
    SOME_NEW: tl.constexpr, NEW_SCALED: tl.constexpr,
):  # fmt: skip
    """Grid: items * NUM_HEADS / HEADS. The tensors are `paged_attention`'s.

    FEW: no request has more than `_FEW` new tokens. SPLIT: some have more than one chunk. K_SCALED, V_SCALED: K's pages
    have scales, V's. SOME_NEW: only new tokens whose `seen_tokens` is not 0 are keys. NEW_SCALED: they have the scales
    of pages.
    """
    # What to do: an item of the work list, for HEADS query heads of one KV head. All loads at once.
    GROUPS: tl.constexpr = NUM_HEADS // HEADS
    group = tl.program_id(0) % GROUPS
    first_head = group * HEADS
    kv_head = first_head // (NUM_HEADS // KV_HEADS)
    item = items + tl.program_id(0) // GROUPS * _ITEM_FIELDS
    table = page_tables + tl.load(item + TABLE)
    q_row = tl.load(item + Q_ROW).to(tl.int64)
    num_new = tl.load(item + NUM_NEW)
    num_valid = tl.load(item + NUM_VALID)
    context_len = tl.load(item + CONTEXT_LEN)
    block_size = tl.load(item + BLOCK_SIZE)
    prefix_len = tl.load(item + PREFIX_LEN)
    padded_prefix_len = tl.load(item + PADDED_PREFIX_LEN)
    hole_start = tl.load(item + HOLE_START)
    hole_end = tl.load(item + HOLE_END)
    has_absent_pages = tl.load(item + HAS_ABSENT_PAGES)
    first_row = tl.load(item + FIRST_ROW)
    first_key = tl.load(item + FIRST_KEY)
    end_key = tl.load(item + END_KEY)
    chunk_keys = tl.load(item + CHUNK_KEYS)
    chunk = tl.load(item + FIRST_CHUNK)
    num_chunks = tl.load(item + NUM_CHUNKS)
    partial_row = tl.load(item + PARTIAL_ROW)
    counter = tl.load(item + COUNTER)

    # Its rows. Those past the request's valid tokens are stored, but see nothing.
    rows = first_row + tl.arange(0, ROWS)
    tokens = rows // HEADS
    heads = first_head + rows % HEADS
    exists = tokens < num_new
    live = tokens < num_valid
    positions = context_len + tokens
    limits = _limits(positions, block_size, prefix_len, padded_prefix_len)
    first_token = first_row // HEADS
    last_token = tl.minimum((first_row + ROWS - 1) // HEADS, num_valid - 1)
    end_new = tl.minimum(
        context_len + num_valid, _limits(context_len + last_token, block_size, prefix_len, padded_prefix_len)
    )
    num_mine = tl.cdiv(tl.maximum(end_key - first_key, 1), chunk_keys)
    if chunk + num_mine < num_chunks:
        end_new = context_len
    if (not SPLIT) and first_token >= num_valid:
        end_key = first_key
        end_new = context_len
    full_key = tl.minimum(end_key, context_len)
    if (hole_end > hole_start) | (has_absent_pages != 0):
        full_key = first_key
    dims = tl.arange(0, DIMS)
    dims_v = tl.arange(0, DIMS_V)
    q_rows = ((q_row + tokens) * NUM_HEADS + heads) * HEAD_DIM
    q_mask = live[:, None] & (dims < HEAD_DIM)[None, :]
    q_tile = tl.load(q + (q_rows[:, None] + dims[None, :]), mask=q_mask, other=0.0).to(COMPUTE)
    slopes = tl.load(alibi_slopes + heads) if ALIBI else 0.0
    new_keys = context_len + tl.arange(0, _FEW)
    if NEW_TOKENS and FEW:
        # On their way while the cached keys are worked on.
        seen_new = new_keys < end_new
        if SOME_NEW:
            seen_new &= tl.load(seen_tokens + q_row + tl.arange(0, _FEW), mask=seen_new, other=0) != 0
        k_new, v_new = load_new(
            k, v, q_row + tl.arange(0, _FEW), kv_head, seen_new, dims, dims_v, KV_HEADS, HEAD_DIM, HEAD_DIM_V, DIMS,
            DIMS_V, True,
        )  # fmt: skip
    if WINDOW:
        # Keys before the window of the tile's first token are skipped, those before the last one's seen by some rows.
        full_key = first_key
        if not SPLIT:
            first_key = tl.maximum(first_key, context_len + first_token - window + 1)
    k_scale = scale
    v_scale = 1.0
    if K_SCALED:
        k_scale = scale * tl.load(k_scales + kv_head)
    if V_SCALED:
        v_scale = tl.load(v_scales + kv_head)
    new_scale = k_scale if NEW_SCALED else scale

    accumulator = tl.zeros([ROWS, DIMS_V], dtype=tl.float32)
    row_max = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([ROWS], dtype=tl.float32)

    # Cached keys, through the page table; with many rows first those tiles that are seen whole.
    PHASES: tl.constexpr = 1 if ROWS <= 32 or SPLIT else 2
    full_key = first_key + tl.maximum(full_key - first_key, 0) // KEYS * KEYS
    for phase in tl.static_range(PHASES):
        for start in tl.range(
            full_key if PHASES == 2 and phase == 1 else first_key,
            full_key if PHASES == 2 and phase == 0 else end_key,
            KEYS,
        ):
            keys = start + tl.arange(0, KEYS)
            if phase == PHASES - 1:
                pages = tl.load(table + keys // PAGE_SIZE, mask=keys < end_key, other=-1)
            else:
                pages = tl.load(table + keys // PAGE_SIZE)
            seen = (pages >= 0) & ((keys < hole_start) | (keys >= hole_end))
            k_tile, v_tile = load_cached(
                k_pages, v_pages, pages, keys % PAGE_SIZE, kv_head, seen, dims, dims_v,
                KV_HEADS, HEAD_DIM, HEAD_DIM_V, DIMS, DIMS_V, PAGE_SIZE, DISTINCT, phase == PHASES - 1,
            )  # fmt: skip
            visible = seen[None, :]
            if WINDOW:
                visible = visible & (positions[:, None] - keys[None, :] < window)
            scores = score(q_tile, k_tile.to(COMPUTE), positions, keys, slopes, k_scale, softcap, SOFTCAP, ALIBI)
            accumulator, row_max, row_sum = attend(
                accumulator,
                row_max,
                row_sum,
                scores,
                visible,
                v_tile.to(COMPUTE),
                v_scale,
                phase == PHASES - 1,
                V_SCALED,
            )
            if SPLIT:
                done = start + KEYS - first_key
                if (done % chunk_keys == 0) & (start + KEYS < end_key):
                    place = partial_row + (chunk + done // chunk_keys - 1) * num_new
                    _store_partial(
                        partial_output, partial_lse, accumulator, row_max, row_sum, live, exists, place, tokens, heads,
                        dims_v, NUM_HEADS, HEAD_DIM_V,
                    )  # fmt: skip
                    accumulator = tl.zeros([ROWS, DIMS_V], dtype=tl.float32)
                    row_max = tl.full([ROWS], float("-inf"), dtype=tl.float32)
                    row_sum = tl.zeros([ROWS], dtype=tl.float32)

    # New keys, from the call's own tensors, up to the last that any row sees.
    if NEW_TOKENS and FEW:
        visible = seen_new[None, :] & (new_keys[None, :] < limits[:, None])
        if WINDOW:
            visible = visible & (positions[:, None] - new_keys[None, :] < window)
        scores = score(q_tile, k_new.to(COMPUTE), positions, new_keys, slopes, new_scale, softcap, SOFTCAP, ALIBI)
        accumulator, row_max, row_sum = attend(
            accumulator, row_max, row_sum, scores, visible, v_new.to(COMPUTE), v_scale, True, NEW_SCALED and V_SCALED
        )
    elif NEW_TOKENS:
        first_new = context_len
        full_new = tl.minimum(
            context_len + num_valid, _limits(context_len + first_token, block_size, prefix_len, padded_prefix_len)
        )
        if WINDOW:
            first_new = tl.maximum(first_new, context_len + first_token - window + 1)
            full_new = first_new
        full_new = first_new + tl.maximum(tl.minimum(full_new, end_new) - first_new, 0) // KEYS * KEYS
        for phase in tl.static_range(2):
            for start in tl.range(full_new if phase == 1 else first_new, end_new if phase == 1 else full_new, KEYS):
                keys = start + tl.arange(0, KEYS)
                seen = keys < end_new
                if SOME_NEW:
                    seen &= tl.load(seen_tokens + q_row + (keys - context_len), mask=seen, other=0) != 0
                k_tile, v_tile = load_new(
                    k, v, q_row + (keys - context_len), kv_head, seen, dims, dims_v, KV_HEADS, HEAD_DIM, HEAD_DIM_V,
                    DIMS, DIMS_V, SOME_NEW or phase == 1,
                )  # fmt: skip
                visible = seen[None, :] & (keys[None, :] < limits[:, None])
                if WINDOW:
                    visible = visible & (positions[:, None] - keys[None, :] < window)
                scores = score(q_tile, k_tile.to(COMPUTE), positions, keys, slopes, new_scale, softcap, SOFTCAP, ALIBI)
                accumulator, row_max, row_sum = attend(
                    accumulator,
                    row_max,
                    row_sum,
                    scores,
                    visible,
                    v_tile.to(COMPUTE),
                    v_scale,
                    SOME_NEW or phase == 1,
                    NEW_SCALED and V_SCALED,
                )

    if SPLIT:
        if num_chunks > 1:
            _store_partial(
                partial_output, partial_lse, accumulator, row_max, row_sum, live, exists,
                partial_row + (chunk + num_mine - 1) * num_new, tokens, heads, dims_v, NUM_HEADS, HEAD_DIM_V,
            )  # fmt: skip
            # Every warp's stores before the count, and the count before the loads of who merges.
            tl.debug_barrier()
            place = counters + counter * GROUPS + group
            if tl.atomic_add(place, num_mine, sem="acq_rel", scope="gpu") + num_mine == num_chunks:
                tl.debug_barrier()
                tl.store(place, 0)  # for the next layer
                for row in tl.range(first_row, tl.minimum(first_row + ROWS, num_new * HEADS), _MERGE_ROWS):
                    merge_rows(
                        output, lse, partial_output, partial_lse, sinks,
                        q_row, num_new, num_valid, partial_row, num_chunks, row, first_head,
                        NUM_HEADS, HEADS, HEAD_DIM_V, DIMS_V, SINKS, LSE,
                    )  # fmt: skip
        else:
            _store_output(
                output, lse, sinks, accumulator, row_max, row_sum, live, exists, q_row + tokens, heads, dims_v,
                NUM_HEADS, HEAD_DIM_V, SINKS, LSE,
            )  # fmt: skip
    else:
        _store_output(
            output, lse, sinks, accumulator, row_max, row_sum, live, exists, q_row + tokens, heads, dims_v,
            NUM_HEADS, HEAD_DIM_V, SINKS, LSE,
        )  # fmt: skip


def paged_attention(
    output: torch.Tensor,
    lse: torch.Tensor | None,
    partial_output: torch.Tensor | None,
    partial_lse: torch.Tensor | None,
    counters: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    pages: LayerPages,
    page_tables: torch.Tensor,
    items: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    seen_tokens: torch.Tensor | None = None,
    *,
    tile: Tile,
    heads: int,
    is_few: bool,
    new_is_scaled: bool = False,
    compute: torch.dtype,
    scale: float,
    softcap: float,
    window: int,
) -> None:
    """Attention of the items of a work list; all tensors are contiguous and on one device.

    Args:
        output: `[num_tokens, num_heads, head_dim_v]`, written at the rows of the items' requests.
        lse: float32 `[num_tokens, num_heads]`, likewise, natural logarithm; or None.
        partial_output: float32 `[num_partial_rows, num_heads, head_dim_v]`, for requests of several chunks; see
            `merge`. None: there are none.
        partial_lse: float32 `[num_partial_rows, num_heads]`, likewise, in units of log2.
        counters: int32, all zero before and after, `num_heads // heads` for each of the items' counters.
        q: `[num_tokens, num_heads, head_dim]`.
        k: `[num_tokens, num_kv_heads, head_dim]`, or None: new tokens are not seen.
        v: `[num_tokens, num_kv_heads, head_dim_v]`, or None.
        pages: of a layer, in either layout.
        page_tables: int32; the items say where each request's begins. Only pages of the context are read.
        items: int32 `[num_items, ITEM_FIELDS]`; see `items.py`.
        alibi_slopes: float32 `[num_heads]` times LOG2E, or None.
        sinks: float32 `[num_heads]` times LOG2E, or None.
        seen_tokens: int32 `[num_tokens]`, 0 for new tokens that are no keys; None: all are.
        tile: the launch shape.
        heads: query heads that share a program: 1, or num_heads // num_kv_heads.
        is_few: no request of the items has more than FEW_NEW_TOKENS new tokens.
        new_is_scaled: k and v are numbers of FP8 pages, to be multiplied by their scales.
        compute: type of the products.
        scale: factor of q.k.
        softcap: 0 is off.
        window: 0 is off.
    """
    num_heads, head_dim = q.shape[1:]
    head_dim_v = output.shape[2]
    k_pages, v_pages, k_scales, v_scales = pages
    distinct = k_pages.dim() == 5
    num_kv_heads, page_size = v_pages.shape[1::2] if distinct else v_pages.shape[2:0:-1]
    dims, dims_v = (max(16, triton.next_power_of_2(dim)) for dim in (head_dim, head_dim_v))
    launch_kernel(
        _paged_attention_kernel, (len(items) * (num_heads // heads),),
        output, lse, partial_output, partial_lse, counters,
        q, k, v,
        k_pages, v_pages, k_scales, v_scales, page_tables, items, alibi_slopes, sinks, seen_tokens,
        *log2_numbers(scale, softcap), window,
        NUM_HEADS=num_heads, KV_HEADS=num_kv_heads, HEADS=heads,
        HEAD_DIM=head_dim, HEAD_DIM_V=head_dim_v, PAGE_SIZE=page_size, DISTINCT=distinct,
        ROWS=tile.rows, KEYS=tile.keys, DIMS=dims, DIMS_V=dims_v, COMPUTE=_DTYPES[compute],
        NEW_TOKENS=k is not None, FEW=is_few, SPLIT=partial_output is not None, WINDOW=window > 0, SOFTCAP=softcap > 0,
        ALIBI=alibi_slopes is not None, SINKS=sinks is not None, LSE=lse is not None,
        K_SCALED=k_scales is not None, V_SCALED=v_scales is not None,
        SOME_NEW=seen_tokens is not None, NEW_SCALED=new_is_scaled,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
