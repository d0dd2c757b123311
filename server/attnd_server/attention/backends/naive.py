"""Backend `naive`: attention as it is written down in `reference`, one request at a time. Specification and oracle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from attnd_server.attention import tiles
from attnd_server.attention.backends.base import DecodeShape
from attnd_server.attention.backends.reference import reference_torch_attention
from attnd_server.attention.backends.window import first_visible_pages
from attnd_server.attention.config import AttentionBackend, AttentionConfig
from attnd_server.attention.kernels.pages import as_stored, gather_pages, of_kv_heads
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.attention.masks import visible
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions

# New tokens of a request whose scores [num_heads, TILE, num_keys] exist at once. Counted from the request's own first
# token, so that it changes nothing between batches.
TILE = 256


@dataclass(frozen=True, eq=False)
class _Plan:
    config: AttentionConfig
    metadata: AttentionMetadata
    options: AttentionOptions
    device: torch.device
    first_positions: list[int]
    page_ids: list[torch.Tensor]  # [pages from the first visible one to the context's end] on the device
    planned_page_ids: list[torch.Tensor]  # likewise, without the offsets of `shifted`
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None


class NaiveAttention:
    """Serves every step; holds no state.

    Args:
        compute_dtype: of products, softmax and sums: float32 or float64. Outputs have q's dtype all the same.
    """

    backend = AttentionBackend.NAIVE
    batch_invariant = True

    def __init__(self, compute_dtype: torch.dtype = torch.float32) -> None:
        self.compute_dtype = compute_dtype

    def supports(self, config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions) -> str | None:
        """None: it supports everything."""
        return None

    def supports_context_length(self, num_tokens: int) -> bool:
        """True: memory is the only limit."""
        return True

    def plan(
        self, config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions, device: torch.device
    ) -> _Plan:
        """Which pages each request reads. Masks are made in `run`, a tile at a time, so that they stay small."""
        first_pages = first_visible_pages(metadata.context_lens, options.window, config.page_size).tolist()
        end_pages = (-(-metadata.context_lens // config.page_size)).tolist()
        page_ids = [
            table[first:end].to(device)
            for table, first, end in zip(metadata.page_tables, first_pages, end_pages, strict=True)
        ]
        return _Plan(
            config,
            metadata,
            options,
            device,
            first_positions=[page * config.page_size for page in first_pages],
            page_ids=page_ids,
            planned_page_ids=page_ids,
            alibi_slopes=None if options.alibi_slopes is None else options.alibi_slopes.to(device),
            sinks=None if options.sinks is None else options.sinks.to(device),
        )

    def shifted(self, plan: _Plan, page_offsets: torch.Tensor) -> _Plan:
        """The plan with a number added to each request's page ids; see `ShiftsPages`."""
        shifted = [ids + offset for ids, offset in zip(plan.planned_page_ids, page_offsets, strict=True)]
        return replace(plan, page_ids=shifted)

    def fixed_plan(
        self, config: AttentionConfig, shape: DecodeShape, options: AttentionOptions, device: torch.device
    ) -> str:
        """The reason why there is none."""
        return "it looks at each request on the host"

    def run(
        self,
        plan: _Plan,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        pages: LayerPages,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of one layer; see `AttentionKernel.run`."""
        output = q.new_empty(*q.shape[:2], plan.config.head_dim_v)
        lse = q.new_empty(q.shape[:2], dtype=torch.float32) if plan.options.return_lse else None
        self.launch(plan, output, lse, q, k, v, pages)
        return output, lse

    def launch(
        self,
        plan: _Plan,
        output: torch.Tensor,
        lse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        pages: LayerPages,
    ) -> None:
        """As `run`, into `output` and `lse`; see `AttentionKernel.launch`."""
        for _ in self.pieces(plan, output, lse, q, k, v, pages):
            pass

    def pieces(
        self,
        plan: _Plan,
        output: torch.Tensor,
        lse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        pages: LayerPages,
    ) -> Iterator[None]:
        """As `launch`, a tile at a time; see `RunsInPieces`."""
        bounds = plan.metadata.cu_seqlens_q.tolist()
        for request, (start, end) in enumerate(pairwise(bounds)):
            new_k, new_v = (None if tensor is None else tensor[start:end] for tensor in (k, v))
            all_keys = slice(0, _num_keys(plan, request))
            is_whole = self._bytes(plan, all_keys.stop, end - start) <= tiles.SCRATCH_BYTES
            if is_whole:
                keys, values = self.keys_and_values(plan, request, new_k, new_v, pages)
            for first in range(start, end, TILE):
                rows = slice(first, min(first + TILE, end))
                if is_whole:
                    output[rows], row_lse = self._rows(plan, request, rows, start, q[rows], keys, values, all_keys)
                    if lse is not None:
                        lse[rows] = _of_valid_rows(plan, request, rows, start, row_lse)
                    yield
                else:
                    yield from self._rows_by_tiles(plan, request, rows, start, output, lse, q, new_k, new_v, pages)

    def keys_and_values(
        self,
        plan: _Plan,
        request: int,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        pages: LayerPages,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The request's cached tokens from its first visible page on, then its new ones, in the type to multiply in.

        Scaled ones are float32 instead: the type to multiply in holds what is stored, but not always its product with
        the scale, which is the factor of a whole head and may as well be that of the score or the output.

        Args:
            plan: from `plan`.
            request: index of the request.
            k: of its new tokens, `[query_len, num_kv_heads, head_dim]`; None in a cache-only step.
            v: likewise, `[query_len, num_kv_heads, head_dim_v]`.
            pages: as for `run`.
        """
        return self._some_keys_and_values(plan, request, k, v, pages, slice(0, _num_keys(plan, request)))

    def _some_keys_and_values(
        self,
        plan: _Plan,
        request: int,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        pages: LayerPages,
        columns: slice,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of `columns`, which begin with a page or behind the context."""
        page_size, num_cached = plan.config.page_size, _num_cached(plan, request)
        cached = slice(min(columns.start, num_cached), min(columns.stop, num_cached))
        page_ids = plan.page_ids[request][cached.start // page_size : -(-cached.stop // page_size)]
        dtype = plan.config.precision.dtype(plan.config.dtype)
        keys, values = (
            gather_pages(each, page_ids, plan.config.layout, dtype if scales is None else torch.float32, scales)
            for each, scales in ((pages.k, pages.k_scales), (pages.v, pages.v_scales))
        )
        num_tokens = cached.stop - cached.start
        if k is None or v is None:
            return keys[:num_tokens], values[:num_tokens]
        k_scales, v_scales = pages[2:] if plan.metadata.store_first else (None, None)
        new = slice(max(columns.start, num_cached) - num_cached, max(columns.stop, num_cached) - num_cached)
        new_keys, new_values = (
            each[new].to(dtype) if scales is None else as_stored(each[new], scales, torch.float32)
            for each, scales in ((k, k_scales), (v, v_scales))
        )
        return torch.cat([keys[:num_tokens], new_keys]), torch.cat([values[:num_tokens], new_values])

    def _rows_by_tiles(
        self,
        plan: _Plan,
        request: int,
        rows: slice,
        start: int,
        output: torch.Tensor,
        lse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        pages: LayerPages,
    ) -> Iterator[None]:
        """Fills in rows `rows` of output and lse, some heads and keys at a time."""
        config, num_keys = plan.config, _num_keys(plan, request)
        of_one_head = self._bytes(plan, min(num_keys, tiles.KEY_TILE), rows.stop - rows.start) // q.shape[1]
        for heads in tiles.head_blocks(q.shape[1], config.num_kv_heads, tiles.SCRATCH_BYTES // max(1, of_one_head)):
            some_q, some_pages = q[rows, heads.query], of_kv_heads(pages, heads.kv, config.layout)
            some_k, some_v = (None if tensor is None else tensor[:, heads.kv] for tensor in (k, v))
            merged = tiles.Merged((*some_q.shape[:2], config.head_dim_v), self.compute_dtype, plan.device)
            for columns in tiles.key_tiles(num_keys, config.page_size):
                if self._seen(plan, request, rows, start, columns).any():
                    keys, values = self._some_keys_and_values(plan, request, some_k, some_v, some_pages, columns)
                    merged.add(*self._rows(plan, request, rows, start, some_q, keys, values, columns, heads.query))
                    yield
            sinks = _sinks(plan, request)
            merged.add_sinks(None if sinks is None else sinks[heads.query])
            output[rows, heads.query] = merged.output.to(output.dtype)
            if lse is not None:
                lse[rows, heads.query] = _of_valid_rows(plan, request, rows, start, merged.lse.float())

    def _bytes(self, plan: _Plan, num_keys: int, num_rows: int) -> int:
        """Memory that all heads of so many rows and keys of a request take at once, beside the results."""
        config, num_heads = plan.config, plan.options.num_heads
        dims, itemsize = config.head_dim + config.head_dim_v, self.compute_dtype.itemsize
        # Of each key: gathered twice, in float32 at most; repeated for the query heads; some five times its scores.
        repeated = num_heads * (dims + 5 * min(num_rows, TILE))
        return num_keys * (8 * config.num_kv_heads * dims + itemsize * repeated)

    def _seen(self, plan: _Plan, request: int, rows: slice, start: int, columns: slice) -> torch.Tensor:
        first_position, page_size = plan.first_positions[request], plan.config.page_size
        first, end = rows.start - start, rows.stop - start
        return visible(plan.metadata, request, plan.options.window, first_position, page_size, first, end, columns)

    def _rows(
        self,
        plan: _Plan,
        request: int,
        rows: slice,
        start: int,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        columns: slice,
        heads: slice | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and lse of rows `rows` of a request that starts at row `start`, over the keys of `columns`.

        Of all heads with their sinks, or of `heads` without.
        """
        context_len, first_position = int(plan.metadata.context_lens[request]), plan.first_positions[request]
        slopes, sinks = plan.alibi_slopes, _sinks(plan, request)
        if heads is not None:
            slopes, sinks = None if slopes is None else slopes[heads], None
        return reference_torch_attention(
            # A fresh tensor is aligned alike in every batch; sums may depend on that.
            q.to(plan.config.precision.dtype(q.dtype)).clone(memory_format=torch.contiguous_format),
            keys,
            values,
            self._seen(plan, request, rows, start, columns).to(plan.device),
            torch.arange(rows.start, rows.stop, device=plan.device) + (context_len - start),
            torch.arange(first_position + columns.start, first_position + columns.stop, device=plan.device),
            plan.options.scale,
            plan.options.softcap,
            slopes,
            sinks,
            self.compute_dtype,
        )


def _of_valid_rows(plan: _Plan, request: int, rows: slice, start: int, lse: torch.Tensor) -> torch.Tensor:
    """The lse `[num_rows, num_heads]` of rows `rows`, with -inf past the valid ones: sinks do not count there."""
    lse[max(0, start + int(plan.metadata.valid_lens[request]) - rows.start) :] = -torch.inf
    return lse


def _sinks(plan: _Plan, request: int) -> torch.Tensor | None:
    """Those of a request: another server may have them."""
    without = plan.metadata.without_sinks
    return None if without is not None and without[request] else plan.sinks


def _num_cached(plan: _Plan, request: int) -> int:
    """Cached keys from the first visible page on."""
    return int(plan.metadata.context_lens[request]) - plan.first_positions[request]


def _num_keys(plan: _Plan, request: int) -> int:
    """These, and the new ones."""
    num_new = 0 if plan.metadata.cache_only else plan.metadata.query_lens[request]
    return _num_cached(plan, request) + num_new
