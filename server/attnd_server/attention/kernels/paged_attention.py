"""Attention of new tokens over a paged context and over each other: one Triton kernel for prefill and decode.

A program computes an item (see `items.py`): first over the cached keys, gathered through the page table, then over the
new ones from the call's own tensors. Several programs may share the keys of one request ("Flash-Decoding", arXiv
2311.01282); the one that finishes the last chunk puts the partial results together. Products are in the type COMPUTE,
softmax and accumulation in float32. What a launch may lack, it says by `given`. Nothing that no row of a tile may see
is loaded: others' data or NaN may lie there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language import int64

from attnd_server.attention.kernels.cuts import EVERYTHING
from attnd_server.attention.kernels.division import divide, inverse
from attnd_server.attention.kernels.given import (
    K_SCALES,
    LSE,
    NARROW,
    NEW_IS_SCALED,
    NEW_TOKENS,
    RUN_TIME_NUMBERS,
    SEEN_TOKENS,
    SINKS,
    SLOPES,
    V_SCALES,
    bits_of,
    has_options,
    some,
)
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
    partial_output, partial_lse, accumulator, row_max, row_sum, live, exists, first_place, tokens, head, dims_v,
    num_heads, HEAD_DIM_V: tl.constexpr,
):  # fmt: skip
    """Stores the attention over the keys of one chunk."""
    result, row_lse = finish(accumulator, row_max, tl.where(live, row_sum, 0.0), 0.0, False)
    places = (first_place + tokens).to(tl.int64) * num_heads + head
    mask = exists[:, None] & (dims_v < HEAD_DIM_V)[None, :]
    tl.store(partial_output + ((places * HEAD_DIM_V)[:, None] + dims_v[None, :]), result, mask=mask)
    tl.store(partial_lse + places, row_lse, mask=exists)


@triton.jit
def _store_output(
    output, lse, sinks, accumulator, row_max, row_sum, live, exists, places, head, dims_v,
    num_heads, given, HEAD_DIM_V: tl.constexpr,
):  # fmt: skip
    """Stores the output and lse of rows whose keys were all seen here."""
    sink = tl.load(sinks + head, mask=live & ((given & SINKS) != 0), other=float("-inf"))
    result, row_lse = finish(accumulator, row_max, tl.where(live, row_sum, 0.0), sink, True)
    places = places * num_heads + head
    stored = exists[:, None] & (dims_v < HEAD_DIM_V)[None, :]
    tl.store(output + ((places * HEAD_DIM_V)[:, None] + dims_v[None, :]), result, mask=stored)
    tl.store(lse + places, row_lse * _LN2, mask=exists & ((given & LSE) != 0))


@triton.jit(do_not_specialize=RUN_TIME_NUMBERS, do_not_specialize_on_alignment=NARROW)
def _paged_attention_kernel(
    output, lse, partial_output, partial_lse, counters,
    q, k, v,
    k_pages, v_pages, k_scales, v_scales, page_tables, items, alibi_slopes, sinks, seen_tokens,
    num_heads, heads, heads_inverse: int64, groups, groups_inverse: int64,
    scale, softcap, window, given,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, PAGE_SIZE: tl.constexpr,
    DISTINCT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIMS: tl.constexpr, DIMS_V: tl.constexpr,
    COMPUTE: tl.constexpr, FEW: tl.constexpr, SPLIT: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Grid: items * groups. The tensors are `paged_attention`'s; `given` says which of them there are.

    FEW: no request has more than `_FEW` new tokens. SPLIT: some may have more than one chunk. OPTIONS: there may be a
    softcap, ALiBi or a window.
    """
    # What to do: an item of the work list, for `heads` query heads of one KV head. All loads at once.
    index = divide(tl.program_id(0), groups_inverse)
    group = tl.program_id(0) - index * groups
    first_head = group * heads
    kv_head = divide(group * KV_HEADS, groups_inverse)
    K_SCALED: tl.constexpr = k_pages.dtype.element_ty == tl.float8e4nv
    V_SCALED: tl.constexpr = v_pages.dtype.element_ty == tl.float8e4nv
    item = items + index * _ITEM_FIELDS
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
    tokens = divide(rows, heads_inverse)
    head = first_head + (rows - tokens * heads)
    exists = tokens < num_new
    live = tokens < num_valid
    positions = context_len + tokens
    limits = _limits(positions, block_size, prefix_len, padded_prefix_len)
    first_token = divide(first_row, heads_inverse)
    last_token = tl.minimum(divide(first_row + ROWS - 1, heads_inverse), num_valid - 1)
    end_position = context_len + tl.where((given & NEW_TOKENS) != 0, num_valid, 0)
    end_new = tl.minimum(end_position, _limits(context_len + last_token, block_size, prefix_len, padded_prefix_len))
    num_mine = tl.cdiv(tl.maximum(end_key - first_key, 1), chunk_keys)
    if chunk + num_mine < num_chunks:
        end_new = context_len
    if (not SPLIT) and first_token >= num_valid:
        end_key = first_key
        end_new = context_len
    full_key = tl.minimum(end_key, context_len)
    if (hole_end > hole_start) | (has_absent_pages != 0):
        full_key = first_key
    # Without a window it is greater than any position. What the last row does not see, not all rows do.
    starts = positions - window + 1
    last_start = context_len + last_token - window + 1
    if OPTIONS:
        full_key = tl.where(last_start > first_key, first_key, full_key)
    dims = tl.arange(0, DIMS)
    dims_v = tl.arange(0, DIMS_V)
    q_rows = ((q_row + tokens) * num_heads + head) * HEAD_DIM
    q_mask = live[:, None] & (dims < HEAD_DIM)[None, :]
    q_tile = tl.load(q + (q_rows[:, None] + dims[None, :]), mask=q_mask, other=0.0).to(COMPUTE)
    slopes = 0.0
    if OPTIONS:
        slopes = tl.load(alibi_slopes + head, mask=exists & ((given & SLOPES) != 0), other=0.0)
    seen_given = (given & SEEN_TOKENS) != 0
    new_keys = context_len + tl.arange(0, _FEW)
    if FEW:
        # On their way while the cached keys are worked on.
        seen_new = new_keys < end_new
        seen_new &= tl.load(seen_tokens + q_row + tl.arange(0, _FEW), mask=seen_new & seen_given, other=1) != 0
        k_new, v_new = load_new(
            k, v, q_row + tl.arange(0, _FEW), kv_head, seen_new, dims, dims_v, KV_HEADS, HEAD_DIM, HEAD_DIM_V, DIMS,
            DIMS_V, True,
        )  # fmt: skip
    if OPTIONS and not SPLIT:
        # Keys before the window of the tile's first token are skipped.
        first_key = tl.maximum(first_key, context_len + first_token - window + 1)
    k_scale = scale
    v_scale = 1.0
    if K_SCALED:
        k_scale = scale * tl.load(k_scales + kv_head, mask=(given & K_SCALES) != 0, other=1.0)
    if V_SCALED:
        v_scale = tl.load(v_scales + kv_head, mask=(given & V_SCALES) != 0, other=1.0)
    new_is_scaled = (given & NEW_IS_SCALED) != 0
    new_scale = tl.where(new_is_scaled, k_scale, scale)
    new_v_scale = tl.where(new_is_scaled, v_scale, 1.0)

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
            if OPTIONS:
                visible = visible & (keys[None, :] >= starts[:, None])
            scores = score(q_tile, k_tile.to(COMPUTE), positions, keys, slopes, k_scale, softcap, OPTIONS)
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
                    chunk_place = partial_row + (chunk + done // chunk_keys - 1) * num_new
                    _store_partial(
                        partial_output, partial_lse, accumulator, row_max, row_sum, live, exists, chunk_place, tokens,
                        head, dims_v, num_heads, HEAD_DIM_V,
                    )  # fmt: skip
                    accumulator = tl.zeros([ROWS, DIMS_V], dtype=tl.float32)
                    row_max = tl.full([ROWS], float("-inf"), dtype=tl.float32)
                    row_sum = tl.zeros([ROWS], dtype=tl.float32)

    # New keys, from the call's own tensors, up to the last that any row sees.
    if FEW:
        visible = seen_new[None, :] & (new_keys[None, :] < limits[:, None])
        if OPTIONS:
            visible = visible & (new_keys[None, :] >= starts[:, None])
        scores = score(q_tile, k_new.to(COMPUTE), positions, new_keys, slopes, new_scale, softcap, OPTIONS)
        accumulator, row_max, row_sum = attend(
            accumulator, row_max, row_sum, scores, visible, v_new.to(COMPUTE), new_v_scale, True, V_SCALED
        )
    else:
        first_new = context_len
        if OPTIONS:
            first_new = tl.maximum(context_len, context_len + first_token - window + 1)
        full_new = tl.minimum(
            end_position, _limits(context_len + first_token, block_size, prefix_len, padded_prefix_len)
        )
        if OPTIONS:
            full_new = tl.where(last_start > first_new, first_new, full_new)
        full_new = tl.where(seen_given, first_new, full_new)
        full_new = first_new + tl.maximum(tl.minimum(full_new, end_new) - first_new, 0) // KEYS * KEYS
        for phase in tl.static_range(2):
            for start in tl.range(full_new if phase == 1 else first_new, end_new if phase == 1 else full_new, KEYS):
                keys = start + tl.arange(0, KEYS)
                seen = keys < end_new
                if phase == 1:
                    seen &= tl.load(seen_tokens + q_row + (keys - context_len), mask=seen & seen_given, other=1) != 0
                k_tile, v_tile = load_new(
                    k, v, q_row + (keys - context_len), kv_head, seen, dims, dims_v, KV_HEADS, HEAD_DIM, HEAD_DIM_V,
                    DIMS, DIMS_V, phase == 1,
                )  # fmt: skip
                visible = seen[None, :] & (keys[None, :] < limits[:, None])
                if OPTIONS:
                    visible = visible & (keys[None, :] >= starts[:, None])
                scores = score(q_tile, k_tile.to(COMPUTE), positions, keys, slopes, new_scale, softcap, OPTIONS)
                accumulator, row_max, row_sum = attend(
                    accumulator, row_max, row_sum, scores, visible, v_tile.to(COMPUTE), new_v_scale, phase == 1,
                    V_SCALED,
                )  # fmt: skip

    if SPLIT:
        if num_chunks > 1:
            _store_partial(
                partial_output, partial_lse, accumulator, row_max, row_sum, live, exists,
                partial_row + (chunk + num_mine - 1) * num_new, tokens, head, dims_v, num_heads, HEAD_DIM_V,
            )  # fmt: skip
            # Every warp's stores before the count, and the count before the loads of who merges.
            tl.debug_barrier()
            place = counters + counter * groups + group
            if tl.atomic_add(place, num_mine, sem="acq_rel", scope="gpu") + num_mine == num_chunks:
                tl.debug_barrier()
                tl.store(place, 0)  # for the next layer
                for row in tl.range(first_row, tl.minimum(first_row + ROWS, num_new * heads), _MERGE_ROWS):
                    merge_rows(
                        output, lse, partial_output, partial_lse, sinks,
                        q_row, num_new, num_valid, partial_row, num_chunks, row, first_head,
                        num_heads, heads, heads_inverse, given, HEAD_DIM_V, DIMS_V,
                    )  # fmt: skip
        else:
            _store_output(
                output, lse, sinks, accumulator, row_max, row_sum, live, exists, q_row + tokens, head, dims_v,
                num_heads, given, HEAD_DIM_V,
            )  # fmt: skip
    else:
        _store_output(
            output, lse, sinks, accumulator, row_max, row_sum, live, exists, q_row + tokens, head, dims_v,
            num_heads, given, HEAD_DIM_V,
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
    may_be_split: bool = True,
    heads: int,
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
        may_be_split: whether a request of more than FEW_NEW_TOKENS may be in several chunks; without, the kernel is
            another one, which takes less time. With few new tokens it makes no difference, and it is one kernel.
        heads: query heads that share a program: 1, or num_heads // num_kv_heads.
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
    others, groups = items.view(torch.float32), num_heads // heads
    is_few = tile.most_tokens == FEW_NEW_TOKENS
    launch_kernel(
        _paged_attention_kernel, (len(items) * groups,),
        output, some(lse, others), some(partial_output, others), some(partial_lse, others), some(counters, items),
        q, some(k, q), some(v, q),
        k_pages, v_pages, some(k_scales, others), some(v_scales, others), page_tables, items,
        some(alibi_slopes, others), some(sinks, others), some(seen_tokens, items),
        num_heads, heads, inverse(heads), groups, inverse(groups),
        *log2_numbers(scale, softcap), window or EVERYTHING,
        bits_of(
            lse=lse, sinks=sinks, slopes=alibi_slopes, new_tokens=k, k_scales=k_scales, v_scales=v_scales,
            seen_tokens=seen_tokens, new_is_scaled=new_is_scaled,
        ),
        KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, HEAD_DIM_V=head_dim_v, PAGE_SIZE=page_size,
        DISTINCT=distinct, ROWS=tile.rows, KEYS=tile.keys, DIMS=dims, DIMS_V=dims_v, COMPUTE=_DTYPES[compute],
        FEW=is_few, SPLIT=is_few or (tile.most_tokens is not None and may_be_split),
        OPTIONS=has_options(alibi_slopes, softcap, window),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
