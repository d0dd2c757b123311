"""Backend `naive`: attention as it is written down, one request at a time. Specification and oracle."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from attnd_server.attention.backends.base import DecodeShape
from attnd_server.attention.backends.window import first_visible_pages
from attnd_server.attention.config import AttentionBackend, AttentionConfig
from attnd_server.attention.kernels.pages import gather_pages
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.attention.masks import visible
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions

# New tokens of a request whose scores [num_heads, TILE, num_keys] exist at once. Counted from the request's own first
# token, so that it changes nothing between batches.
TILE = 256


def reference_torch_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor,
    q_positions: torch.Tensor,
    key_positions: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one request over keys in token order.

    Args:
        q: `[num_rows, num_heads, head_dim]`.
        keys: `[num_keys, num_kv_heads, head_dim]`. What no row sees may be NaN.
        values: `[num_keys, num_kv_heads, head_dim_v]`, likewise.
        seen: bool `[num_rows, num_keys]`.
        q_positions: int64 `[num_rows]`.
        key_positions: int64 `[num_keys]`.
        scale: factor of q.k.
        softcap: 0 is off.
        alibi_slopes: `[num_heads]` or None.
        sinks: `[num_heads]` or None.
        dtype: in which everything is computed.

    Returns:
        Output `[num_rows, num_heads, head_dim_v]` and lse `[num_rows, num_heads]` in `dtype`; zeros and -inf in rows
        that see nothing.
    """
    group = q.shape[1] // keys.shape[1]
    values = values.masked_fill(~seen.any(0)[:, None, None], 0)  # 0 * NaN is NaN
    keys, values = (tensor.to(dtype).repeat_interleave(group, dim=1) for tensor in (keys, values))
    scores = scale * torch.einsum("nhd,shd->hns", q.to(dtype), keys)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.to(dtype)[:, None, None] * (key_positions - q_positions[:, None])
    scores = scores.masked_fill(~seen, -torch.inf)
    # A sink is one more key without a value.
    sink = scores.new_full(q.shape[1:2], -torch.inf) if sinks is None else sinks.to(dtype)
    scores = torch.cat([scores, sink[:, None, None].expand(-1, len(q), 1)], dim=2)
    blind = ~seen.any(1)
    weights = torch.softmax(scores, dim=2)[:, :, :-1].masked_fill(blind[:, None], 0)
    output = torch.einsum("hns,shd->nhd", weights, values)
    return output, torch.logsumexp(scores, dim=2).T.masked_fill(blind[:, None], -torch.inf)


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
        bounds = plan.metadata.cu_seqlens_q.tolist()
        for request, (start, end) in enumerate(pairwise(bounds)):
            new_k, new_v = (None if tensor is None else tensor[start:end] for tensor in (k, v))
            keys, values = self.keys_and_values(plan, request, new_k, new_v, pages)
            for tile in range(start, end, TILE):
                rows = slice(tile, min(tile + TILE, end))
                output[rows], lse_of_rows = self._tile(plan, request, rows, start, q, keys, values)
                if lse is not None:
                    lse[rows] = lse_of_rows

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
        num_tokens = int(plan.metadata.context_lens[request]) - plan.first_positions[request]
        page_ids, layout = plan.page_ids[request], plan.config.layout
        dtype = plan.config.precision.dtype(plan.config.dtype)
        keys, values = (
            gather_pages(each, page_ids, layout, dtype if scales is None else torch.float32, scales)
            for each, scales in ((pages.k, pages.k_scales), (pages.v, pages.v_scales))
        )
        if k is None or v is None:
            return keys[:num_tokens], values[:num_tokens]
        return torch.cat([keys[:num_tokens], k.to(dtype)]), torch.cat([values[:num_tokens], v.to(dtype)])

    def _tile(
        self,
        plan: _Plan,
        request: int,
        rows: slice,
        start: int,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and lse of rows `rows` of q, which belong to the request that starts at row `start`."""
        context_len, first_position = int(plan.metadata.context_lens[request]), plan.first_positions[request]
        window, page_size = plan.options.window, plan.config.page_size
        seen = visible(plan.metadata, request, window, first_position, page_size, rows.start - start, rows.stop - start)
        dtype = plan.config.precision.dtype(q.dtype)
        return reference_torch_attention(
            q[rows].to(dtype).clone(),  # a fresh tensor is aligned alike in every batch; sums may depend on that
            keys,
            values,
            seen.to(plan.device),
            torch.arange(rows.start, rows.stop, device=plan.device) + (context_len - start),
            torch.arange(first_position, first_position + len(keys), device=plan.device),
            plan.options.scale,
            plan.options.softcap,
            plan.alibi_slopes,
            plan.sinks,
            self.compute_dtype,
        )
