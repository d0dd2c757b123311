"""Moves K and V between token order and pages, in PyTorch, on any device.

Token order is `[num_tokens, num_kv_heads, head_dim]`. Pages lie in one of two layouts (see `Layout`): in the unified
one a slot is one row of memory; in the distinct one K is cut into groups of `DISTINCT_LANES` elements and V is
transposed within a page, so that a slot is scattered. Offsets are int64: a cache may hold more than 2**31 elements.

FP8 pages have scales, float32 `[num_kv_heads]` on their device: see `quantised` and `dequantised`. K may be in FP8 and
V not, and the other way round. In latent pages V is the first part of K's rows: K is stored and copied, V never.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from attnd_server.attention.config import DISTINCT_LANES, FP8, Layout
from attnd_server.attention.layer_pages import LayerPages

FP8_MAX = torch.finfo(FP8).max
# Numbers that are in float32 at one time while tokens become FP8.
CONVERTED_ELEMENTS = 1 << 22
# Bytes that are under way at one time while pages are copied.
COPIED_BYTES = 16 << 20


class StoredTokens(NamedTuple):
    """Which tokens of a step are stored, and where: the same for all its layers.

    Attributes:
        slots: int64 `[num_tokens]` on the pages' device; -1 for tokens that are not stored.
        tokens: int64 `[num_stored]` on the pages' device, the tokens with a slot; None if every token has one.
        first_slot: the first of the slots, if the pages are on the host, every token has a slot, and these follow each
            other; None elsewhere.
    """

    slots: torch.Tensor
    tokens: torch.Tensor | None = None
    first_slot: int | None = None


def is_latent(pages: LayerPages) -> bool:
    """Whether V is the first part of K's rows, and has no memory of its own."""
    return pages.v.data_ptr() == pages.k.data_ptr()


def of_kv_heads(pages: LayerPages, heads: slice, layout: Layout) -> LayerPages:
    """The pages of some KV heads: views, which are not contiguous."""
    axis, num = 2 if layout is Layout.UNIFIED else 1, heads.stop - heads.start
    k, v = (each.narrow(axis, heads.start, num) for each in pages[:2])
    return LayerPages(k, v, *(None if scales is None else scales[heads] for scales in pages[2:]))


def stored_tokens(slot_mapping: torch.Tensor, device: torch.device | str) -> StoredTokens:
    """Copies slots to the device: once per step.

    Args:
        slot_mapping: int64 `[num_tokens]` on the host; no slot twice, -1 for tokens that are not stored.
        device: of the pages.
    """
    kept = slot_mapping >= 0
    if not kept.all():
        return StoredTokens(slot_mapping.to(device), kept.nonzero().squeeze(1).to(device))
    follow = torch.device(device).type == "cpu" and len(slot_mapping) > 0 and bool((slot_mapping.diff() == 1).all())
    return StoredTokens(slot_mapping.to(device), None, int(slot_mapping[0]) if follow else None)


def quantised(tokens: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What FP8 pages store: `tokens / scales`, clamped to what FP8 holds and rounded to the nearest.

    Args:
        tokens: `[num_tokens, num_kv_heads, head_dim]`. NaN stays NaN; an infinity becomes the largest number.
        scales: float32 `[num_kv_heads]`.
    """
    # Clamped because torch and the GPUs do not agree on what the cast does beyond the largest number.
    return (tokens.float() / scales[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def _all_quantised(tokens: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`quantised`, as bytes."""
    return _by_parts(lambda part: _bytes(quantised(part, scales)), tokens, torch.uint8)


def _by_parts(
    convert: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`convert` of all tokens to `dtype`, on a processor a part at a time: all in float32 would take much memory."""
    step = max(1, CONVERTED_ELEMENTS // max(1, tokens[:1].numel()))
    if len(tokens) <= step or tokens.device.type != "cpu":
        return convert(tokens)
    result = tokens.new_empty(tokens.shape, dtype=dtype)
    for first in range(0, len(tokens), step):
        part = slice(first, first + step)
        result[part] = convert(tokens[part])
    return result


def dequantised(tokens: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `quantised` tokens are read as: times `scales` in float32, then rounded to `dtype`."""
    return (tokens.float() * scales[:, None]).to(dtype)


def as_stored(tokens: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """What new tokens are read as once they are stored in pages with `scales`, in `dtype`; without scales, the same."""
    if scales is None:
        return tokens.to(dtype)
    return _by_parts(lambda part: dequantised(quantised(part, scales), scales, dtype), tokens, dtype)


def store_kv(
    pages: LayerPages,
    k: torch.Tensor,
    v: torch.Tensor,
    stored: StoredTokens,
    layout: Layout,
) -> None:
    """Writes each stored token's K and V into its slot.

    Args:
        pages: of a layer, written in place. Those without scales have k's type.
        k: `[num_tokens, num_kv_heads, head_dim]` on the pages' device.
        v: `[num_tokens, num_kv_heads, head_dim_v]` on the pages' device. Of latent pages it is not looked at.
        stored: which tokens, and where.
        layout: of the pages.
    """
    if layout is not Layout.UNIFIED:
        _store_distinct(pages, k, v, stored)
        return
    _store_rows(pages.k, k, pages.k_scales, stored)
    if not is_latent(pages):
        _store_rows(pages.v, v, pages.v_scales, stored)


def _store_rows(pages: torch.Tensor, new: torch.Tensor, scales: torch.Tensor | None, stored: StoredTokens) -> None:
    """Stores K or V in unified pages."""
    slots, tokens, first_slot = stored
    if first_slot is not None and scales is None:
        _copy_rows(pages, new, first_slot)
        return
    if tokens is not None:
        new, slots = new[tokens], slots[tokens]
    if scales is not None:
        pages, new = _bytes(pages), _all_quantised(new, scales)
    _rows(pages).index_copy_(0, slots, new)


def _store_distinct(pages: LayerPages, k: torch.Tensor, v: torch.Tensor, stored: StoredTokens) -> None:
    """Stores K and V in distinct pages."""
    slots, tokens, _ = stored
    if tokens is not None:
        k, v, slots = k[tokens], v[tokens], slots[tokens]
    if pages.k_scales is not None:
        k = _all_quantised(k, pages.k_scales)
    if pages.v_scales is not None:
        v = _all_quantised(v, pages.v_scales)
    page, offset = _split(slots, pages.v.shape[3])
    _bytes(pages.k)[page, :, :, offset] = k.unflatten(2, (-1, DISTINCT_LANES))
    _bytes(pages.v)[page, :, :, offset] = v


def kept_slots(pages: LayerPages, stored: StoredTokens, layout: Layout) -> Callable[[], None]:
    """Copies what lies in the slots of some tokens.

    Returns:
        What puts it back.
    """
    slots = stored.slots if stored.tokens is None else stored.slots[stored.tokens]
    parts = [_bytes(each) for each in ((pages.k,) if is_latent(pages) else (pages.k, pages.v))]
    if layout is Layout.UNIFIED:
        rows = [_rows(each) for each in parts]
        kept = [each.index_select(0, slots) for each in rows]

        def put_back() -> None:
            for each, old in zip(rows, kept, strict=True):
                each.index_copy_(0, slots, old)

        return put_back
    page, offset = _split(slots, pages.v.shape[3])
    kept = [each[page, :, :, offset] for each in parts]

    def put_back_distinct() -> None:
        for each, old in zip(parts, kept, strict=True):
            each[page, :, :, offset] = old

    return put_back_distinct


def replace_slot(pages: LayerPages, k: torch.Tensor, v: torch.Tensor, slot: int) -> Callable[[], None]:
    """Writes one token's K and V into a slot of unified pages on the host, which have its type.

    Returns:
        What puts back what was there.
    """
    old_k = _replace_row(pages.k, k, slot)
    old_v = None if is_latent(pages) else _replace_row(pages.v, v, slot)

    def put_back() -> None:
        ctypes.memmove(*old_k)
        if old_v is not None:
            ctypes.memmove(*old_v)

    return put_back


def _replace_row(pages: torch.Tensor, token: torch.Tensor, slot: int) -> tuple[int, bytes, int]:
    """Copies a token by its address, and returns that of its slot, what was there and how many bytes that is."""
    token = token.contiguous()
    num_bytes = token.nbytes
    address = pages.data_ptr() + slot * num_bytes
    old = ctypes.string_at(address, num_bytes)
    ctypes.memmove(address, token.data_ptr(), num_bytes)
    return address, old, num_bytes


def _copy_rows(pages: torch.Tensor, tokens: torch.Tensor, first_slot: int) -> None:
    """Copies tokens to slots that follow each other in unified pages on the host.

    By address: torch's own copies of a token or two take four times as long.
    """
    tokens, num_bytes = tokens.contiguous(), tokens.nbytes
    ctypes.memmove(pages.data_ptr() + first_slot * (num_bytes // len(tokens)), tokens.data_ptr(), num_bytes)


def read_kv(
    pages: LayerPages,
    slots: torch.Tensor,
    layout: Layout,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies the K and V of slots out of one layer's pages.

    Args:
        pages: of a layer.
        slots: int64 `[num]` on the pages' device, each of them in the cache.
        layout: of the pages.
        dtype: of the results.

    Returns:
        New contiguous tensors `[num, num_kv_heads, head_dim]` and `[num, num_kv_heads, head_dim_v]`. Of latent pages
        the second is a view of the first.
    """
    k_pages, v_pages, k_scales, v_scales = pages
    if is_latent(pages):
        k = _rows(_bytes(k_pages)).index_select(0, slots)
        k = _read(k.view(k_pages.dtype), dtype, k_scales)
        return k, k[..., : v_pages.shape[3]]
    k, v = _bytes(k_pages), _bytes(v_pages)
    if layout is Layout.UNIFIED:
        k, v = _rows(k).index_select(0, slots), _rows(v).index_select(0, slots)
    else:
        page, offset = _split(slots, v.shape[3])
        k, v = k[page, :, :, offset].flatten(2).contiguous(), v[page, :, :, offset].contiguous()
    return _read(k.view(k_pages.dtype), dtype, k_scales), _read(v.view(v_pages.dtype), dtype, v_scales)


def gather_pages(
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    layout: Layout,
    dtype: torch.dtype,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Copies whole pages of one layer into token order.

    Args:
        pages: one layer's K or V.
        page_ids: int64 `[num]` on the pages' device. -1 gives some page's tokens, which the caller masks.
        layout: of the pages.
        dtype: of the result.
        scales: float32 `[num_kv_heads]` on the pages' device, or None: the pages are not scaled.

    Returns:
        A new contiguous tensor `[num * page_size, num_kv_heads, head_dim]`.
    """
    gathered = _bytes(pages).index_select(0, page_ids.clamp(min=0))
    if layout is Layout.DISTINCT:
        if gathered.dim() == 5:  # K: [num, num_kv_heads, head_dim // lanes, page_size, lanes]
            gathered = gathered.permute(0, 3, 1, 2, 4).flatten(3)
        else:  # V: [num, num_kv_heads, head_dim_v, page_size]
            gathered = gathered.permute(0, 3, 1, 2)
    return _read(gathered.flatten(0, 1).contiguous().view(pages.dtype), dtype, scales)


def copy_pages(
    k_pages: torch.Tensor, v_pages: torch.Tensor | None, source_pages: torch.Tensor, target_pages: torch.Tensor
) -> None:
    """Copies whole pages in every layer; see `page_copies`."""
    for _ in page_copies(k_pages, v_pages, source_pages, target_pages):
        pass


def page_copies(
    k_pages: torch.Tensor, v_pages: torch.Tensor | None, source_pages: torch.Tensor, target_pages: torch.Tensor
) -> Iterator[None]:
    """Copies whole pages in every layer, some of them whenever it is asked to go on.

    Args:
        k_pages: K of all layers, `[num_layers, num_pages, ...]` in either layout, written in place.
        v_pages: V of all layers, likewise; None of a latent cache.
        source_pages: int64 `[num_copies]`, pages to read.
        target_pages: int64 `[num_copies]`, pages to write; none twice and none that is also read.
    """
    for pages in map(_bytes, (k_pages,) if v_pages is None else (k_pages, v_pages)):
        source, target = source_pages.to(pages.device), target_pages.to(pages.device)
        step = max(1, COPIED_BYTES // max(1, pages[:, 0].nbytes))
        for first in range(0, len(source), step):
            part = slice(first, first + step)
            pages.index_copy_(1, target[part], pages.index_select(1, source[part]))
            yield


def _read(tokens: torch.Tensor, dtype: torch.dtype, scales: torch.Tensor | None) -> torch.Tensor:
    return tokens.to(dtype) if scales is None else dequantised(tokens, scales, dtype)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """FP8 as plain bytes, for which torch has every operation; anything else as it is. Shares memory."""
    return tensor.view(torch.uint8) if tensor.dtype is FP8 else tensor


def _rows(pages: torch.Tensor) -> torch.Tensor:
    """Unified pages as one row per slot: `[num_slots, num_kv_heads, head_dim]`, sharing memory."""
    return pages.view(-1, pages.shape[2], pages.shape[3])


def _split(slots: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Page and offset in it of each slot."""
    return slots // page_size, slots % page_size
