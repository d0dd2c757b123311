"""Attention of new tokens over a paged context and over each other on Hopper's own units: prefill and block decode.

The same mathematics as `paged_attention.py`, for whom it is the fast way where it fits: float16 or bfloat16, head dims
64, 128 and 256, unified pages of a multiple of 16 tokens. A program has three roles ("FlashAttention-3", arXiv
2407.08608): one warp brings tiles of K, another those of V into a ring in shared memory with the tensor memory
accelerator, page by page; two groups of four warps multiply 64 rows each, and while a group's tensor cores work on one
tile, its other units take the softmax of the next. Programs stay on their multiprocessor and take every
`num_programs`-th item.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from attnd_server.attention.kernels.cuts import EVERYTHING
from attnd_server.attention.kernels.division import inverse
from attnd_server.attention.kernels.given import NARROW, RUN_TIME_NUMBERS, bits_of, has_options, some
from attnd_server.attention.kernels.hopper.consumer import CONSUMERS, consumer
from attnd_server.attention.kernels.hopper.decode import hopper_decode_kernel
from attnd_server.attention.kernels.hopper.items import COLUMNS
from attnd_server.attention.kernels.hopper.lone_consumer import lone_consumer
from attnd_server.attention.kernels.hopper.producer import make_ring, producer
from attnd_server.attention.kernels.launch_shapes import HOPPER_ROWS, hopper_launch
from attnd_server.attention.kernels.softmax import log2_numbers
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.attention.scales import plain_scale
from attnd_server.device.kernels.launch import launch_kernel

_CONSUMERS = gl.constexpr(CONSUMERS)
_COLUMNS = gl.constexpr(COLUMNS)


@gluon.jit(do_not_specialize=RUN_TIME_NUMBERS, do_not_specialize_on_alignment=NARROW)
def _hopper_attention_kernel(
    output, lse, partial_output, partial_lse, q, k, v, k_pages, v_pages,
    k_descriptor, v_descriptor, k_pages_descriptor, v_pages_descriptor,
    page_tables, items, alibi_slopes, sinks, scale, softcap, window,
    ROWS: gl.constexpr, GROUP: gl.constexpr, KV_HEADS: gl.constexpr, PAGE_SIZE: gl.constexpr, DIM: gl.constexpr,
    DIM_V: gl.constexpr, KEYS: gl.constexpr, PIECE: gl.constexpr, STAGES: gl.constexpr, NEW_TOKENS: gl.constexpr,
    WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr, SINKS: gl.constexpr, LSE: gl.constexpr,
    CONSUMERS: gl.constexpr,
):  # fmt: skip
    """Grid: as many programs as run at once, or fewer.

    Unlike the decode kernels, this one is compiled for each group and for what a launch has: at 64 rows a group of
    warps has no registers to spare, and each item paid some microseconds for numbers that it was told at run time.
    `partial_output` and `partial_lse` are None where no item has several parts. CONSUMERS: of `consumer.py`, or 1 for
    `lone_consumer.py`, with eight warps.
    """
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    MOST: gl.constexpr = DIM if DIM > DIM_V else DIM_V
    SHARE: gl.constexpr = ROWS // CONSUMERS
    dtype: gl.constexpr = q.dtype.element_ty
    k_ring, k_ready = make_ring(dtype, STAGES, KEYS, PIECE, DIM)
    v_ring, v_ready = make_ring(dtype, STAGES, KEYS, PIECE, DIM_V)
    # Of the item at hand and, where there is room, of the next one.
    Q_TILES: gl.constexpr = 2 if MOST <= 128 and CONSUMERS > 1 else 1
    q_tiles = gl.allocate_shared_memory(dtype, [Q_TILES * CONSUMERS, SHARE, MOST], LAYOUT)
    # Open for ever: see `consumer`.
    gate = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(gate, count=1)
    fence_async_shared()
    # The last numbers: warps and registers of the roles after the first. The producers stand here twice, because what
    # is given a name before is no constant any more.
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (lone_consumer, (
                    k_ring, v_ring, q_tiles, k_ready, v_ready, output, lse, partial_output, partial_lse, q,
                    items, alibi_slopes, sinks, scale, softcap, window,
                    ROWS, GROUP, KV_HEADS, DIM, DIM_V, KEYS, PIECE, STAGES, NEW_TOKENS, WINDOW, SOFTCAP, ALIBI, SINKS,
                    LSE,
                )),
                (producer, (
                    k_ring, k_ready, k, k_pages, k_descriptor, k_pages_descriptor, page_tables, items, window, -1,
                    KV_HEADS, PAGE_SIZE, DIM, KEYS, PIECE, STAGES, WINDOW, NEW_TOKENS, ROWS, GROUP, False, _CONSUMERS,
                )),
                (producer, (
                    v_ring, v_ready, v, v_pages, v_descriptor, v_pages_descriptor, page_tables, items, window, -1,
                    KV_HEADS, PAGE_SIZE, DIM_V, KEYS, PIECE, STAGES, WINDOW, NEW_TOKENS, ROWS, GROUP, True, _CONSUMERS,
                )),
            ],
            [1, 1],
            [24, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consumer, (
                    k_ring, v_ring, q_tiles, k_ready, v_ready, gate, output, lse, partial_output, partial_lse, q,
                    items, alibi_slopes, sinks, scale, softcap, window,
                    0, SHARE, ROWS, GROUP, KV_HEADS, DIM, DIM_V, KEYS, PIECE, STAGES, NEW_TOKENS, WINDOW, SOFTCAP,
                    ALIBI, SINKS, LSE,
                )),
                (consumer, (
                    k_ring, v_ring, q_tiles, k_ready, v_ready, gate, output, lse, partial_output, partial_lse, q,
                    items, alibi_slopes, sinks, scale, softcap, window,
                    SHARE, SHARE, ROWS, GROUP, KV_HEADS, DIM, DIM_V, KEYS, PIECE, STAGES, NEW_TOKENS, WINDOW, SOFTCAP,
                    ALIBI, SINKS, LSE,
                )),
                (producer, (
                    k_ring, k_ready, k, k_pages, k_descriptor, k_pages_descriptor, page_tables, items, window, -1,
                    KV_HEADS, PAGE_SIZE, DIM, KEYS, PIECE, STAGES, WINDOW, NEW_TOKENS, ROWS, GROUP, False, _CONSUMERS,
                )),
                (producer, (
                    v_ring, v_ready, v, v_pages, v_descriptor, v_pages_descriptor, page_tables, items, window, -1,
                    KV_HEADS, PAGE_SIZE, DIM_V, KEYS, PIECE, STAGES, WINDOW, NEW_TOKENS, ROWS, GROUP, True, _CONSUMERS,
                )),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )  # fmt: skip


def hopper_attention(
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
    """Attention of the items of a work list; all tensors are contiguous and on one Hopper GPU.

    Args:
        output: `[num_tokens, num_heads, head_dim_v]`, written at the rows of items of one part.
        lse: float32 `[num_tokens, num_heads]`, likewise, natural logarithm; or None.
        partial_output: float32 `[num_partial_rows, num_heads, head_dim_v]`, written by the other items; see `merge`.
        partial_lse: float32 `[num_partial_rows, num_heads]`, likewise, in units of log2.
        q: `[num_tokens, num_heads, head_dim]`, float16 or bfloat16.
        k: `[num_tokens, num_kv_heads, head_dim]`, or None: new tokens are not seen.
        v: `[num_tokens, num_kv_heads, head_dim_v]`, or None.
        pages: of a layer, unified and without scales; page_size is a multiple of 16.
        page_tables: int32; the items say where each request's begins. Only pages of the context are read, and up to
            PREFETCHED elements past them brought close.
        items: int32 `[num_items, ITEM_FIELDS]`; see `kernels/items.py`.
        alibi_slopes: float32 `[num_heads]` times LOG2E, or None.
        sinks: float32 `[num_heads]` times LOG2E, or None.
        rows: of an item: HOPPER_ROWS, or for decode a power of two from 16 to HOPPER_DECODE_ROWS, with head dims up
            to 128.
        num_multiprocessors: of the GPU.
        scale: factor of q.k.
        softcap: 0 is off.
        window: 0 is off.
    """
    num_heads, head_dim = q.shape[1:]
    k_pages, v_pages, _, _ = pages
    page_size, num_kv_heads, head_dim_v = v_pages.shape[1:]
    piece = 32 if page_size % 32 == 0 else 16
    launch = hopper_launch(rows, head_dim, head_dim_v)
    q, scale = plain_scale(q, scale)
    group, others = num_heads // num_kv_heads, items.view(torch.float32)
    grid = (min(launch.num_programs * num_multiprocessors, len(items) * num_kv_heads),)
    read = q, some(k, k_pages), some(v, v_pages), k_pages, v_pages, *descriptors(k, v, k_pages, v_pages, piece)
    step = page_tables, items, some(alibi_slopes, others), some(sinks, others)
    scale, softcap = log2_numbers(scale, softcap)
    shape: dict[str, Any] = {
        "ROWS": rows, "KV_HEADS": num_kv_heads, "PAGE_SIZE": page_size, "DIM": head_dim, "DIM_V": head_dim_v,
        "KEYS": launch.keys, "PIECE": piece, "STAGES": launch.num_stages, "num_warps": 4,
        "maxnreg": launch.max_registers,
    }  # fmt: skip
    if rows == HOPPER_ROWS:
        launch_kernel(
            _hopper_attention_kernel, grid, output, some(lse, others), partial_output, partial_lse, *read, *step,
            scale, softcap, window, GROUP=group, NEW_TOKENS=k is not None, WINDOW=window > 0, SOFTCAP=softcap > 0,
            ALIBI=alibi_slopes is not None, SINKS=sinks is not None, LSE=lse is not None, CONSUMERS=CONSUMERS,
            sooner={"CONSUMERS": 1, "num_warps": 8}, **shape,
        )  # fmt: skip
        return
    launch_kernel(
        hopper_decode_kernel, grid, output, some(lse, others), some(partial_output, others), some(partial_lse, others),
        *read, *step, group, inverse(group), scale, softcap, window or EVERYTHING, 0 if k is None else -1,
        bits_of(lse=lse, sinks=sinks, slopes=alibi_slopes), OPTIONS=has_options(alibi_slopes, softcap, window), **shape,
    )  # fmt: skip


def descriptors(
    k: torch.Tensor | None, v: torch.Tensor | None, k_pages: torch.Tensor, v_pages: torch.Tensor, piece: int
) -> tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor, TensorDescriptor]:
    """What the copy engine must know of k, v and the pages, of which it copies `piece` tokens at once."""
    layout = gl.NVMMASharedLayout(128, 16, 2)

    def descriptor(tensor: torch.Tensor) -> TensorDescriptor:
        rows = tensor.view(-1, tensor.shape[-2] * tensor.shape[-1])
        return TensorDescriptor.from_tensor(rows, [piece, COLUMNS], layout)

    pages = descriptor(k_pages), descriptor(v_pages)
    return (*(pages if k is None or v is None else (descriptor(k), descriptor(v))), *pages)
