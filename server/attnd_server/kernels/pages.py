"""Moves K and V between token order and pages, in PyTorch, on any device.

Token order is `[num_tokens, num_kv_heads, head_dim]`. Pages lie in one of two layouts (see `Layout`): in the unified
one a slot is one row of memory; in the distinct one K is cut into groups of `DISTINCT_LANES` elements and V is
transposed within a page, so that a slot is scattered. Offsets are int64: a cache may hold more than 2**31 elements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from attnd_server.config import DISTINCT_LANES, Layout


class StoredTokens(NamedTuple):
    """Which tokens of a step are stored, and where: the same for all its layers.

    Attributes:
        tokens: int64 `[num_stored]` on the pages' device, rows of k and v; None if every token is stored.
        slots: int64 `[num_stored]` on the pages' device.
    """

    tokens: torch.Tensor | None
    slots: torch.Tensor


def stored_tokens(slot_mapping: torch.Tensor, device: torch.device | str) -> StoredTokens:
    """The tokens whose slot is not -1.

    Args:
        slot_mapping: int64 `[num_tokens]` on the host; no slot twice.
        device: of the pages.
    """
    kept = slot_mapping >= 0
    if kept.all():
        return StoredTokens(None, slot_mapping.to(device))
    tokens = kept.nonzero().squeeze(1)
    return StoredTokens(tokens.to(device), slot_mapping[tokens].to(device))


def store_kv(
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    stored: StoredTokens,
    layout: Layout,
) -> None:
    """Writes each stored token's K and V into its slot.

    Args:
        k_pages: one layer's K, contiguous, written in place.
        v_pages: one layer's V, contiguous, written in place.
        k: `[num_tokens, num_kv_heads, head_dim]` on the pages' device.
        v: `[num_tokens, num_kv_heads, head_dim_v]` on the pages' device.
        stored: which tokens, and where.
        layout: of the pages.
    """
    tokens, slots = stored
    if tokens is not None:
        k, v = k[tokens], v[tokens]
    if layout is Layout.UNIFIED:
        _rows(k_pages).index_copy_(0, slots, k)
        _rows(v_pages).index_copy_(0, slots, v)
        return
    page, offset = _split(slots, v_pages.shape[3])
    k_pages[page, :, :, offset] = k.unflatten(2, (-1, DISTINCT_LANES))
    v_pages[page, :, :, offset] = v


def read_kv(
    k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies the K and V of slots out of one layer's pages.

    Args:
        k_pages: one layer's K, contiguous.
        v_pages: one layer's V, contiguous.
        slots: int64 `[num]` on the pages' device, each of them in the cache.
        layout: of the pages.

    Returns:
        New contiguous tensors `[num, num_kv_heads, head_dim]` and `[num, num_kv_heads, head_dim_v]`.
    """
    if layout is Layout.UNIFIED:
        return _rows(k_pages).index_select(0, slots), _rows(v_pages).index_select(0, slots)
    page, offset = _split(slots, v_pages.shape[3])
    return k_pages[page, :, :, offset].flatten(2).contiguous(), v_pages[page, :, :, offset].contiguous()


def gather_pages(pages: torch.Tensor, page_ids: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Copies whole pages of one layer into token order.

    Args:
        pages: one layer's K or V.
        page_ids: int64 `[num]` on the pages' device. -1 gives some page's tokens, which the caller masks.
        layout: of the pages.

    Returns:
        A new contiguous tensor `[num * page_size, num_kv_heads, head_dim]`.
    """
    gathered = pages.index_select(0, page_ids.clamp(min=0))
    if layout is Layout.DISTINCT:
        if gathered.dim() == 5:  # K: [num, num_kv_heads, head_dim // lanes, page_size, lanes]
            gathered = gathered.permute(0, 3, 1, 2, 4).flatten(3)
        else:  # V: [num, num_kv_heads, head_dim_v, page_size]
            gathered = gathered.permute(0, 3, 1, 2)
    return gathered.flatten(0, 1).contiguous()


def copy_pages(
    k_pages: torch.Tensor, v_pages: torch.Tensor, source_pages: torch.Tensor, target_pages: torch.Tensor
) -> None:
    """Copies whole pages in every layer.

    Args:
        k_pages: K of all layers, `[num_layers, num_pages, ...]` in either layout, written in place.
        v_pages: V of all layers, likewise.
        source_pages: int64 `[num_copies]`, pages to read.
        target_pages: int64 `[num_copies]`, pages to write; none twice and none that is also read.
    """
    for pages in (k_pages, v_pages):
        source, target = source_pages.to(pages.device), target_pages.to(pages.device)
        pages.index_copy_(1, target, pages.index_select(1, source))


def _rows(pages: torch.Tensor) -> torch.Tensor:
    """Unified pages as one row per slot: `[num_slots, num_kv_heads, head_dim]`, sharing memory."""
    return pages.view(-1, pages.shape[2], pages.shape[3])


def _split(slots: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Page and offset in it of each slot."""
    return slots // page_size, slots % page_size
