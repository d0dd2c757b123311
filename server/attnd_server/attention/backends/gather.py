"""Cuts a step into parts that one dense attention each can serve: which slots a part reads, and its mask.

Requests with equally many new tokens and contexts of about one length share a part; a request with many new tokens is
cut into parts of its own, so that masks stay small and a part reads only what its rows can see.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from attnd_server.attention.backends.part_rows import Rows, num_of, rows_of
from attnd_server.attention.backends.window import first_visible_positions
from attnd_server.attention.config import AttentionConfig, Layout
from attnd_server.attention.masks import new_token_limits
from attnd_server.attention.metadata import ALL_SEEN, AttentionMetadata, AttentionOptions
from attnd_server.attention.tiles import EXP_PRODUCTS

# Requests with more new tokens than this get parts of their own: batching no longer pays.
BATCHED_ROWS = 64
# Most rows of a part that has a mask.
TILE_ROWS = 512
# Most rows of a part that has none. In all a processor takes some tenths of a second for a head of it.
PLAIN_ROWS = 8192
# Most elements of the mask of a part of several rows: torch takes eight bytes for each while it makes and uses one.
MASK_ELEMENTS = 1 << 23
# Most tokens whose K and V a part of several requests gathers.
PART_TOKENS = 1 << 17
# Products of a step whose only token is attended where it lies: it is stored first, so its call cannot end between.
MAX_PRODUCTS_IN_PLACE = 1 << 30
# Bytes of masks and slots that a plan keeps for all layers. Where there are more, each part is made in its turn.
KEPT_BYTES = 1 << 24
# Contexts of a part differ at most by a factor of two from here on, in tokens: padding costs what context costs.
SHORT_CONTEXT = 256


@dataclass(frozen=True, eq=False)
class Part:
    """`num_reqs` requests with `num_rows` rows each, over the same number of keys: cached ones, then new ones.

    Attributes:
        num_reqs: requests.
        rows: their rows of q and of the output, request by request.
        new_rows: the rows of k and v that they may see, request by request.
        num_cached: cached keys of each request.
        slots: int64 `[num_reqs * num_keys]` on the device: where each key lies; those of new keys mean nothing. None if
            num_cached is 0.
        side_by_side: the slots of all keys, the new ones too, where they follow each other in pages that can be read
            as they lie: nothing is gathered then. None elsewhere.
        unused: int64 on the device: keys among `num_reqs * num_keys` that no row sees, and that may hold anything, NaN
            too; None if there are none.
        mask: bool `[num_reqs, 1, num_rows, num_keys]` on the device, true where a row sees a key; None if they see
            all keys, or if is_causal.
        is_causal: row i sees the new keys up to i, and there are no cached ones.
        blind: bool `[num_reqs, num_rows, 1, 1]` on the device, true for rows that see nothing; None if there are none.
    """

    num_reqs: int
    rows: Rows
    new_rows: Rows
    num_cached: int
    slots: torch.Tensor | None
    unused: torch.Tensor | None
    mask: torch.Tensor | None
    is_causal: bool
    blind: torch.Tensor | None
    side_by_side: slice | None = None

    @property
    def num_rows(self) -> int:
        """Rows of each request."""
        return num_of(self.rows) // self.num_reqs

    @property
    def num_keys(self) -> int:
        """Keys of each request."""
        return self.num_cached + num_of(self.new_rows) // self.num_reqs


@dataclass(frozen=True, eq=False)
class PartsInTurn:
    """The parts of a step that would take much memory together: each is made in its turn."""

    config: AttentionConfig
    metadata: AttentionMetadata
    options: AttentionOptions
    device: torch.device

    def __iter__(self) -> Iterator[Part]:
        """The parts of `split`."""
        for requests, first, end in _tiles(self.config, self.metadata, self.options):
            yield _part(self.config, self.metadata, self.options, self.device, requests, first, end)


def split(
    config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions, device: torch.device
) -> list[Part] | PartsInTurn:
    """The parts of a step. Together they have each row of each request once."""
    slots = _slots_of_one_token(config, metadata, options)
    if slots is not None:  # fewer are read in place that must be copied to another type
        new = slice(0, 1)
        products = len(slots) * options.num_heads * (config.head_dim + config.head_dim_v + EXP_PRODUCTS)
        most = MAX_PRODUCTS_IN_PLACE if config.precision.dtype(config.dtype) is config.dtype else MASK_ELEMENTS
        run = _side_by_side(config, metadata, slots) if device.type == "cpu" and products <= most else None
        return [Part(1, new, new, len(slots) - 1, slots.to(device), None, None, False, None, side_by_side=run)]
    in_turn = PartsInTurn(config, metadata, options, device)
    return in_turn if _kept_bytes(config, metadata, options) > KEPT_BYTES else list(in_turn)


def _slots_of_one_token(
    config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions
) -> torch.Tensor | None:
    """What the general way finds, in a tenth of the time, for the most frequent step: one new token that sees all.

    Returns:
        int64 `[context_len + 1]`, the last for the token itself; None for any other step.
    """
    is_alone = metadata.num_tokens == metadata.num_reqs == 1
    if not is_alone or options.window or metadata.cache_only or metadata.seen_new is not None:
        return None
    # In numpy, whose operations on a few numbers take a third of torch's.
    context_len = metadata.max_context_len
    pages = metadata.page_tables.numpy()[0, : -(-context_len // config.page_size)]
    in_hole = metadata.hole_starts.item() < metadata.hole_ends.item()
    if not context_len or in_hole or not metadata.valid_lens.item() or pages.min() < 0:
        return None
    slots = np.zeros(context_len + 1, np.int64)
    of_pages = pages[:, None] * np.int64(config.page_size) + np.arange(config.page_size)
    slots[:context_len] = of_pages.ravel()[:context_len]
    return torch.from_numpy(slots)


def _side_by_side(config: AttentionConfig, metadata: AttentionMetadata, slots: torch.Tensor) -> slice | None:
    """The slots of a step's only token and of its context, `slots[:-1]`, if they follow each other in unified pages."""
    if metadata.slot_mapping is None or config.layout is not Layout.UNIFIED or config.is_quantised:
        return None
    cached = slots.numpy()[:-1]
    first, last = int(cached[0]), int(metadata.slot_mapping.item())
    follow = last - first == len(cached) and bool((cached[1:] - cached[:-1] == 1).all())
    return slice(first, last + 1) if follow else None


def mask_elements(config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions) -> int:
    """An upper bound of the elements of all masks of a step, but those that cut a long causal prompt."""
    bound = metadata.num_tokens * (2 * metadata.max_context_len + SHORT_CONTEXT + metadata.num_tokens)
    if bound <= KEPT_BYTES:
        return bound
    is_masked = ~_plain_causal(config, metadata, options, metadata.num_tokens)
    return int((is_masked * torch.diff(metadata.cu_seqlens_q) * _most_keys(metadata, options)).sum())


def _kept_bytes(config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions) -> int:
    """An upper bound of the bytes of all masks and slots of a step."""
    most_keys = 2 * metadata.max_context_len + SHORT_CONTEXT + metadata.num_tokens
    bound = (metadata.num_tokens + 8 * metadata.num_reqs) * most_keys
    if bound <= KEPT_BYTES:
        return bound
    rows = torch.diff(metadata.cu_seqlens_q)
    per_key = rows + 8 * -(-rows // TILE_ROWS).clamp(min=1)
    is_masked = ~_plain_causal(config, metadata, options)
    return int((is_masked * per_key * _most_keys(metadata, options)).sum())


def _most_keys(metadata: AttentionMetadata, options: AttentionOptions) -> torch.Tensor:
    """More keys than any part has of each request: a batched context is padded to less than twice its length."""
    spans = metadata.context_lens - first_visible_positions(metadata.context_lens, options.window)
    return 2 * spans + SHORT_CONTEXT + torch.diff(metadata.cu_seqlens_q)


def _tiles(
    config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions
) -> Iterator[tuple[list[int], int, int]]:
    """Requests and the half-open range of their new tokens, for each part."""
    spans = (metadata.context_lens - first_visible_positions(metadata.context_lens, options.window)).tolist()
    plain = _plain_causal(config, metadata, options).tolist()
    groups: dict[tuple[int, int, bool], list[int]] = {}
    for request, num_rows in enumerate(metadata.query_lens):
        if num_rows <= BATCHED_ROWS:
            size = max(SHORT_CONTEXT, spans[request]).bit_length()
            groups.setdefault((num_rows, size, plain[request]), []).append(request)
        else:
            step = num_rows if plain[request] else min(TILE_ROWS, MASK_ELEMENTS // (spans[request] + num_rows) or 1)
            for first in range(0, num_rows, step):
                yield [request], first, min(first + step, num_rows)
    for (num_rows, size, _), requests in groups.items():
        num_keys = num_rows + (1 << size)
        most = max(1, min(PART_TOKENS // num_keys, MASK_ELEMENTS // (num_rows * num_keys or 1)))
        for first in range(0, len(requests) if num_rows else 0, most):
            yield requests[first : first + most], 0, num_rows


def _plain_causal(
    config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions, most_rows: int = 0
) -> torch.Tensor:
    """Requests without context, of few enough rows, whose mask is causal and nothing else: bool `[num_reqs]`."""
    rows = torch.diff(metadata.cu_seqlens_q)
    plain = (metadata.context_lens == 0) & (metadata.block_sizes == 1) & (metadata.padded_prefix_lens == 0)
    plain &= rows <= (most_rows or PLAIN_ROWS)
    if metadata.cache_only:
        return torch.zeros_like(plain)
    if metadata.seen_new is not None:
        plain &= torch.from_numpy(metadata.new_keys == ALL_SEEN)
    if options.window:
        plain &= rows <= options.window
    if config.head_dim != config.head_dim_v:  # torch then holds all scores at once: keep tiles small
        plain &= rows <= TILE_ROWS
    return plain


def _part(
    config: AttentionConfig,
    metadata: AttentionMetadata,
    options: AttentionOptions,
    device: torch.device,
    requests: list[int],
    first: int,
    end: int,
) -> Part:
    """The part of the new tokens `[first, end)` of some requests; of one request unless that is all of its tokens."""
    chosen = torch.tensor(requests)
    context = metadata.context_lens[chosen, None]  # [num_reqs, 1], as all that is of requests here
    tokens = torch.arange(first, end)
    positions = context + tokens  # [num_reqs, num_rows]
    valid = metadata.valid_lens[chosen, None]
    plain = bool(_plain_causal(config, metadata, options)[chosen].all())

    limits = new_token_limits(
        positions,
        metadata.block_sizes[chosen, None],
        metadata.prefix_lens[chosen, None],
        metadata.padded_prefix_lens[chosen, None],
    )
    new = _new_tokens(metadata, options, requests, first, end, int((limits - context).max()))
    start = first_visible_positions(context + first, options.window).minimum(context)
    num_cached = int((context - start).max())
    if num_cached + len(new) == 0:
        num_cached = 1  # torch wants a key; nobody sees it
    cached = start + torch.arange(num_cached)  # [num_reqs, num_cached]
    pages = _pages(metadata.page_tables[chosen], cached // config.page_size)
    in_hole = (cached >= metadata.hole_starts[chosen, None]) & (cached < metadata.hole_ends[chosen, None])
    seen_cached = ((cached < context) & (pages >= 0) & ~in_hole)[:, None, :]
    is_key = new < valid
    if metadata.seen_new is not None:
        is_key = is_key & metadata.seen_new[metadata.cu_seqlens_q[chosen, None] + new]
    seen_new = ((context + new)[:, None, :] < limits[:, :, None]) & is_key[:, None, :]
    mask = torch.cat([seen_cached.expand(-1, len(tokens), -1), seen_new], dim=2)
    if options.window:
        keys = torch.cat([cached, context + new], dim=1)
        mask &= (positions - options.window)[:, :, None] < keys[:, None, :]
    mask &= (tokens < valid)[:, :, None]

    slots = pages.clamp(min=0) * config.page_size + cached % config.page_size
    slots = torch.cat([slots, slots.new_zeros(len(requests), len(new))], dim=1)
    unused = (~mask.any(1)).flatten().nonzero().squeeze(1)
    blind = ~mask.any(2)
    return Part(
        num_reqs=len(requests),
        rows=rows_of(metadata, requests, tokens, device),
        new_rows=rows_of(metadata, requests, new, device),
        num_cached=num_cached,
        slots=slots.flatten().to(device) if num_cached else None,
        unused=unused.to(device) if len(unused) else None,
        mask=None if plain or mask.all() else mask[:, None].to(device),
        is_causal=plain and len(tokens) > 1,
        blind=blind[:, :, None, None].to(device) if blind.any() else None,
    )


def _new_tokens(
    metadata: AttentionMetadata, options: AttentionOptions, requests: list[int], first: int, end: int, limit: int
) -> torch.Tensor:
    """The new tokens that some row in `[first, end)` may see; `limit` is the end that the mask sets."""
    if metadata.cache_only:
        return torch.arange(0)
    # A part of several requests has all new tokens of each.
    start = max(0, first - options.window + 1) if options.window and len(requests) == 1 else 0
    return torch.arange(start, max(end, min(metadata.query_lens[requests[0]], limit)))


def _pages(page_tables: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Page ids at `columns` of each request's table, both `[num_reqs, ...]`; int64, -1 past the table's end."""
    last = page_tables.shape[1] - 1
    if last < 0:
        return torch.full_like(columns, -1)
    return page_tables.gather(1, columns.clamp(max=last)).long().masked_fill(columns > last, -1)
