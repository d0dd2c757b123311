"""Decode over pages of FP8 (e4m3) on Hopper's own units: `decode.py` for half the bytes.

The copy engine and shared memory see two FP8 as one int16, so that everything there is as for 16-bit pages. On the way
to the tensor cores, which take their first operand from registers, each int16 becomes two float16, exactly: two tensors
of half the dims, whose products are summed up (K) or are two halves of the output (V). Queries and weights are float16,
queries times a power of two for each row, and sums are float32. New tokens are seen as the call has them, in float32.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language import int64

from attnd_server.attention.kernels.cuts import EVERYTHING
from attnd_server.attention.kernels.division import inverse
from attnd_server.attention.kernels.given import (
    K_SCALES,
    NARROW,
    RUN_TIME_NUMBERS,
    SLOPES,
    V_SCALES,
    bits_of,
    has_options,
    some,
)
from attnd_server.attention.kernels.hopper.attention import descriptors
from attnd_server.attention.kernels.hopper.items import (
    COLUMNS,
    divide,
    item_at,
    limit,
    num_work,
    prefetch,
    release,
    release_all,
    tile_at,
    tile_of,
    work,
)
from attnd_server.attention.kernels.hopper.producer import make_ring, producer
from attnd_server.attention.kernels.hopper.rows import cap_scores, mask_scores, rebase, store_item
from attnd_server.attention.kernels.items import (
    BLOCK_SIZE,
    CONTEXT_LEN,
    END_KEY,
    FIRST_ROW,
    HOLE_END,
    HOLE_START,
    NUM_CHUNKS,
    NUM_NEW,
    NUM_VALID,
    PADDED_PREFIX_LEN,
    PARTIAL_ROW,
    PREFIX_LEN,
    Q_ROW,
)
from attnd_server.attention.kernels.launch_shapes import hopper_fp8_launch
from attnd_server.attention.kernels.softmax import log2_numbers
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.attention.scales import plain_scale
from attnd_server.device.kernels.launch import launch_kernel

_COLUMNS = gl.constexpr(COLUMNS)


@gluon.jit
def _split_along_dims(pairs):
    """FP8 pairs `[keys, dims / 2]`, 4 dims of a key in 32 bits, as float16: dims 0, 1, 4, 5, ... and 2, 3, 6, 7, ...

    A sum over dims does not mind their order, and so no byte need move.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .b16 low, high; mov.b32 {low, high}, $2;"
        " cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high; }",
        "=r,=r,r", [pairs], (gl.float16, gl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def _split_along_keys(pairs):
    """FP8 pairs `[dims / 2, keys]`, 2 dims of 2 keys in 32 bits, as float16: even dims and odd dims."""
    return gl.inline_asm_elementwise(
        "{ .reg .b16 even, odd; .reg .b32 bytes; prmt.b32 bytes, $2, 0, 0x3120; mov.b32 {even, odd}, bytes;"
        " cvt.rn.f16x2.e4m3x2 $0, even; cvt.rn.f16x2.e4m3x2 $1, odd; }",
        "=r,=r,r", [pairs], (gl.float16, gl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def _store_queries(q_low, q_high, queries, ROWS: gl.constexpr, DIM: gl.constexpr):
    """Stores queries `[ROWS, DIM]` as float16 in the order of `_split_along_dims`, and returns the factor of each row.

    The factor is a power of two, and the greatest element of a stored row in [1, 2): what bfloat16 holds may not fit.
    """
    queries = queries.to(gl.float32)
    exponent = gl.max(gl.abs(queries), 1).to(gl.int32, bitcast=True) >> 23
    exponent = gl.minimum(gl.maximum(exponent, 1), 253)  # both powers are normal numbers, also for 0, inf and NaN
    queries = queries * ((254 - exponent) << 23).to(gl.float32, bitcast=True)[:, None]
    low, high = gl.split(queries.to(gl.float16).reshape([ROWS, DIM // 4, 2, 2]).permute([0, 1, 3, 2]))
    q_low.store(low.reshape([ROWS, DIM // 2]))
    q_high.store(high.reshape([ROWS, DIM // 2]))
    fence_async_shared()
    return (exponent << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _load_token(k, v, token, exists, kv_head, KV_HEADS: gl.constexpr, DIM: gl.constexpr, LAYOUT: gl.constexpr):
    """A new token's K in the order of `_split_along_dims`, and even and odd dims of its V; each `[DIM / 2]`."""
    columns = gl.arange(0, DIM // 2, layout=gl.SliceLayout(1, LAYOUT))
    place = (token * KV_HEADS + kv_head) * DIM
    low = k + (place + columns // 2 * 4 + columns % 2)
    even = v + (place + columns * 2)
    return (
        gl.load(low, mask=exists, other=0.0).to(gl.float32),
        gl.load(low + 2, mask=exists, other=0.0).to(gl.float32),
        gl.load(even, mask=exists, other=0.0).to(gl.float32),
        gl.load(even + 1, mask=exists, other=0.0).to(gl.float32),
    )


@gluon.jit
def _consumer(
    k_ring, v_ring, q_low, q_high, weights_tile, k_ready, v_ready,
    output, lse, partial_output, partial_lse, q, k, v, k_scales, v_scales, items, alibi_slopes, sinks,
    group, group_inverse, scale, softcap, window, new_mask, given,
    ROWS: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr, KEYS: gl.constexpr, PIECE: gl.constexpr,
    STAGES: gl.constexpr, OPTIONS: gl.constexpr,
):  # fmt: skip
    """Four warps: all rows of each item. Scores and weights are `[KEYS, ROWS]`, sums of products `[DIM / 2, ROWS]`."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    COLUMN: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    Q_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    num_heads = KV_HEADS * group
    PAIRS: gl.constexpr = DIM // 2
    release_all(STAGES, 1)
    end = num_work(items, KV_HEADS)
    count = 0
    for index in range(gl.program_id(0), end, gl.num_programs(0)):
        kv_head = index % KV_HEADS
        item = item_at(items, index, KV_HEADS)
        num_tiles, num_full, first_tile, full_tile, full_end_tile, _, end_cached = work(
            item, window, 0, KEYS, PIECE, OPTIONS, False
        )
        prefetch(item_at(items, gl.minimum(index + gl.num_programs(0), end - 1), KV_HEADS))
        q_row = gl.load(item + Q_ROW).to(gl.int64)
        num_new = gl.load(item + NUM_NEW)
        num_valid = gl.load(item + NUM_VALID)
        context_len = gl.load(item + CONTEXT_LEN)
        hole_start = gl.load(item + HOLE_START)
        hole_end = gl.load(item + HOLE_END)
        first_row = gl.load(item + FIRST_ROW)
        partial_row = gl.load(item + PARTIAL_ROW)
        is_split = gl.load(item + NUM_CHUNKS) > 1
        cached_keys = (context_len + PIECE - 1) // PIECE * PIECE
        k_scale = scale * gl.load(k_scales + kv_head, mask=(given & K_SCALES) != 0, other=1.0)
        v_scale = gl.load(v_scales + kv_head, mask=(given & V_SCALES) != 0, other=1.0)
        # New tokens are seen with the last part.
        num_seen = gl.where(gl.load(item + END_KEY) > context_len, num_valid & new_mask, 0)
        k_low, k_high, v_even, v_odd = _load_token(k, v, q_row, num_seen > 0, kv_head, KV_HEADS, DIM, LAYOUT)

        q_rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, Q_LAYOUT))
        q_tokens = divide(q_rows, group_inverse)
        places = (q_row + q_tokens) * num_heads + kv_head * group + (q_rows - q_tokens * group)
        dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, Q_LAYOUT))
        pointers = q + ((places * DIM)[:, None] + dims[None, :])
        queries = gl.load(pointers, mask=(q_rows < num_valid * group)[:, None], other=0.0)
        q_factor = gl.convert_layout(_store_queries(q_low, q_high, queries, ROWS, DIM), ROW)

        rows = first_row + gl.arange(0, ROWS, layout=ROW)
        tokens = divide(rows, group_inverse)
        heads = kv_head * group + (rows - tokens * group)
        positions = context_len + tokens
        limits = limit(
            positions, gl.load(item + BLOCK_SIZE), gl.load(item + PREFIX_LEN), gl.load(item + PADDED_PREFIX_LEN)
        )
        slopes = 0.0
        if OPTIONS:
            slopes = gl.load(alibi_slopes + heads, mask=(heads >= 0) & ((given & SLOPES) != 0), other=0.0)
        row_max = gl.full([ROWS], float("-inf"), gl.float32, ROW)
        row_sum = gl.full([ROWS], 0.0, gl.float32, ROW)
        zeros = gl.full([KEYS, ROWS], 0.0, gl.float32, LAYOUT)
        even = gl.full([PAIRS, ROWS], 0.0, gl.float32, LAYOUT)
        odd = gl.full([PAIRS, ROWS], 0.0, gl.float32, LAYOUT)
        for token in range(num_seen):
            low, high = q_low.permute([1, 0]).load(LAYOUT), q_high.permute([1, 0]).load(LAYOUT)
            scores = gl.sum(low.to(gl.float32) * k_low[:, None] + high.to(gl.float32) * k_high[:, None], 0)
            scores = cap_scores(scores * (q_factor * scale), softcap, OPTIONS)
            position = context_len + token
            if OPTIONS:
                scores += slopes * (position - positions).to(gl.float32)
            visible = position < limits
            if OPTIONS:
                visible = visible & (positions - position < window)
            scores = gl.where(visible, scores, float("-inf"))
            row_max, base, decay = rebase(row_max, scores)
            weights = gl.exp2(scores - base)
            row_sum = row_sum * decay + weights
            weights = weights / v_scale
            even = even * decay[None, :] + v_even[:, None] * weights[None, :]
            odd = odd * decay[None, :] + v_odd[:, None] * weights[None, :]
            following = token + 1
            k_low, k_high, v_even, v_odd = _load_token(
                k, v, q_row + following, following < num_seen, kv_head, KV_HEADS, DIM, LAYOUT
            )

        scales = q_factor * k_scale
        first_key = gl.arange(0, KEYS, layout=COLUMN) == 0
        sums = gl.where(first_key[:, None], row_sum[None, :], zeros)
        for order in range(num_tiles):
            stage = count % STAGES
            phase = count // STAGES & 1
            key = tile_at(order, first_tile, full_tile, full_end_tile) * KEYS
            mbarrier.wait(k_ready.index(stage), phase)
            k_tile = tile_of(k_ring, stage, KEYS, PAIRS).load(OPERAND)
            release(stage, False, 1)
            low, high = _split_along_dims(k_tile)
            scores = warpgroup_mma(low, q_low.permute([1, 0]), zeros, use_acc=False, is_async=True)
            scores = warpgroup_mma(high, q_high.permute([1, 0]), scores, is_async=True)
            scores, low, high = warpgroup_mma_wait(0, [scores, low, high])
            keys = key + gl.arange(0, KEYS, layout=COLUMN)
            scores = mask_scores(
                scores * scales[None, :], keys, order >= num_full, positions, limits, slopes, context_len, cached_keys,
                hole_start, hole_end, end_cached, softcap, window, False, OPTIONS,
            )  # fmt: skip
            row_max, base, decay = rebase(row_max, gl.max(scores, 0))
            weights = gl.exp2(scores - base[None, :])
            sums = sums * decay[None, :] + weights
            weights_tile.store(weights.to(gl.float16))
            fence_async_shared()
            mbarrier.wait(v_ready.index(stage), phase)
            v_tile = tile_of(v_ring, stage, KEYS, PAIRS).permute([1, 0]).load(OPERAND)
            release(stage, True, 1)
            low, high = _split_along_keys(v_tile)
            even = warpgroup_mma(low, weights_tile, even * decay[None, :], is_async=True)
            odd = warpgroup_mma(high, weights_tile, odd * decay[None, :], is_async=True)
            even, odd, low, high = warpgroup_mma_wait(0, [even, odd, low, high])
            count += 1

        store_item(
            output, lse, partial_output, partial_lse, (even, odd), v_scale, row_max, gl.sum(sums, 0), rows, heads,
            sinks, q_row, num_new, num_valid, partial_row, is_split, group, num_heads, group_inverse,
            given, DIM, LAYOUT,
        )  # fmt: skip


@gluon.jit(do_not_specialize=RUN_TIME_NUMBERS, do_not_specialize_on_alignment=NARROW)
def hopper_decode_fp8_kernel(
    output, lse, partial_output, partial_lse, q, k, v, k_pages, v_pages, k_descriptor, v_descriptor,
    k_scales, v_scales, page_tables, items, alibi_slopes, sinks,
    group, group_inverse: int64, scale, softcap, window, new_mask, given,
    ROWS: gl.constexpr, KV_HEADS: gl.constexpr, PAGE_SIZE: gl.constexpr, DIM: gl.constexpr, KEYS: gl.constexpr,
    PIECE: gl.constexpr, STAGES: gl.constexpr, OPTIONS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid: a few programs for each multiprocessor, or fewer. ROWS: of an item, a power of two from 16."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    WEIGHTS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, ROWS], gl.float16)
    PAIRS: gl.constexpr = DIM // 2
    k_ring, k_ready = make_ring(gl.int16, STAGES, KEYS, PIECE, PAIRS)
    v_ring, v_ready = make_ring(gl.int16, STAGES, KEYS, PIECE, PAIRS)
    q_low = gl.allocate_shared_memory(gl.float16, [ROWS, PAIRS], LAYOUT)
    q_high = gl.allocate_shared_memory(gl.float16, [ROWS, PAIRS], LAYOUT)
    weights_tile = gl.allocate_shared_memory(gl.float16, [KEYS, ROWS], WEIGHTS_LAYOUT)
    fence_async_shared()
    # The last numbers: warps and registers of the roles after the first. Of new tokens the producers know nothing.
    gl.warp_specialize(
        [
            (_consumer, (
                k_ring, v_ring, q_low, q_high, weights_tile, k_ready, v_ready,
                output, lse, partial_output, partial_lse, q, k, v, k_scales, v_scales, items, alibi_slopes, sinks,
                group, group_inverse, scale, softcap, window, new_mask, given,
                ROWS, KV_HEADS, DIM, KEYS, PIECE, STAGES, OPTIONS,
            )),
            (producer, (
                k_ring, k_ready, k_pages, k_pages, k_descriptor, k_descriptor, page_tables, items,
                window, 0,
                KV_HEADS, PAGE_SIZE, PAIRS, KEYS, PIECE, STAGES, OPTIONS, False, 0, 0, False, 1,
            )),
            (producer, (
                v_ring, v_ready, v_pages, v_pages, v_descriptor, v_descriptor, page_tables, items,
                window, 0,
                KV_HEADS, PAGE_SIZE, PAIRS, KEYS, PIECE, STAGES, OPTIONS, False, 0, 0, True, 1,
            )),
        ],
        [1, 1],
        [PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def hopper_decode_fp8(
    output: torch.Tensor,
    lse: torch.Tensor | None,
    partial_output: torch.Tensor | None,
    partial_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    pages: LayerPages,
    page_tables: torch.Tensor,
    items: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    *,
    rows: int,
    num_multiprocessors: int,
    scale: float,
    softcap: float,
    window: int,
) -> None:
    """As `hopper_attention` over pages of FP8, for items of few rows: see `fits_hopper_fp8`.

    The pages are unified, in float8_e4m3fn, with or without scales; head dims are alike and 128 or 256.
    """
    num_heads, head_dim = q.shape[1:]
    k_pages, v_pages, k_scales, v_scales = pages
    page_size, num_kv_heads = k_pages.shape[1:3]
    k_pairs, v_pairs = k_pages.view(torch.int16), v_pages.view(torch.int16)
    piece = 32 if page_size % 32 == 0 else 16
    launch = hopper_fp8_launch(rows, head_dim)
    q, scale = plain_scale(q, scale)
    group, others = num_heads // num_kv_heads, items.view(torch.float32)
    launch_kernel(
        hopper_decode_fp8_kernel, (min(launch.num_programs * num_multiprocessors, len(items) * num_kv_heads),),
        output, some(lse, others), some(partial_output, others), some(partial_lse, others), q, some(k, q), some(v, q),
        k_pairs, v_pairs, *descriptors(None, None, k_pairs, v_pairs, piece)[2:],
        some(k_scales, others), some(v_scales, others), page_tables, items,
        some(alibi_slopes, others), some(sinks, others),
        group, inverse(group), *log2_numbers(scale, softcap), window or EVERYTHING,
        0 if k is None else -1,
        bits_of(lse=lse, sinks=sinks, slopes=alibi_slopes, k_scales=k_scales, v_scales=v_scales),
        ROWS=rows, KV_HEADS=num_kv_heads, PAGE_SIZE=page_size, DIM=head_dim, KEYS=launch.keys,
        PIECE=piece, STAGES=launch.num_stages, OPTIONS=has_options(alibi_slopes, softcap, window),
        PRODUCER_REGISTERS=56 if launch.max_registers else 96, num_warps=4, maxnreg=launch.max_registers,
    )  # fmt: skip
