"""A step of the Triton backends on the device, and the launches of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attnd_server.backends.triton import MAX_CONTEXT_LEN
from attnd_server.backends.triton_schedule import Launch, request_table, schedule
from attnd_server.config import AttentionConfig
from attnd_server.kernels.merge import MERGE_FIELDS, merge
from attnd_server.kernels.paged_attention import ITEM_FIELDS, LOG2E, paged_attention
from attnd_server.metadata import AttentionMetadata, AttentionOptions


@dataclass(frozen=True, eq=False)
class TritonPlan:
    """What the layers of a step with the same options share.

    Attributes:
        config: the cache's.
        options: the layers'.
        is_grouped: the query heads of a KV head share a program.
        launches: of the attention kernel, each with its items, int32 `[num_items, ITEM_FIELDS]` on the device.
        requests: int32 `[num_reqs, REQUEST_FIELDS]` on the device.
        page_tables: int32 `[num_reqs, pages of the longest context]` on the device.
        merges: int32 `[num_merges, MERGE_FIELDS]` on the device; empty if no request's keys are split.
        merge_tokens: most new tokens of a merge.
        num_partial_rows: rows of the partial results.
        alibi_slopes: float32 `[num_heads]` times LOG2E on the device, or None.
        sinks: likewise.
    """

    config: AttentionConfig
    options: AttentionOptions
    is_grouped: bool
    launches: list[tuple[Launch, torch.Tensor]]
    requests: torch.Tensor
    page_tables: torch.Tensor
    merges: torch.Tensor
    merge_tokens: int
    num_partial_rows: int
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Launches the kernels of one layer; see `AttentionKernel.run`."""
        num_tokens, num_heads, _ = q.shape
        head_dim_v, options = self.config.head_dim_v, self.options
        output = q.new_empty(num_tokens, num_heads, head_dim_v)
        lse = q.new_empty(num_tokens, num_heads, dtype=torch.float32) if options.return_lse else None
        partial_output = q.new_empty(self.num_partial_rows, num_heads, head_dim_v, dtype=torch.float32)
        partial_lse = q.new_empty(self.num_partial_rows, num_heads, dtype=torch.float32)
        q, k, v = q.contiguous(), k if k is None else k.contiguous(), v if v is None else v.contiguous()
        with torch.cuda.device_of(q):
            for launch, items in self.launches:
                paged_attention(
                    output,
                    lse,
                    partial_output,
                    partial_lse,
                    q,
                    k,
                    v,
                    k_pages,
                    v_pages,
                    self.page_tables,
                    items,
                    self.requests,
                    self.alibi_slopes,
                    self.sinks,
                    item_tokens=launch.item_tokens,
                    tile_class=launch.tile_class,
                    heads=num_heads // self.config.num_kv_heads if self.is_grouped else 1,
                    compute=self.config.precision.dtype(q.dtype),
                    scale=options.scale,
                    softcap=options.softcap,
                    window=min(options.window, MAX_CONTEXT_LEN),
                )
            if self.num_partial_rows:
                merge(output, lse, partial_output, partial_lse, self.merges, self.merge_tokens, self.sinks)
        return output, lse


def make_plan(
    config: AttentionConfig,
    metadata: AttentionMetadata,
    options: AttentionOptions,
    is_grouped: bool,
    device: torch.device,
) -> TritonPlan:
    """Lays out the work of a step and copies it to the device."""
    work = schedule(metadata, config.kv_split, options.window)
    num_pages = -(-metadata.max_context_len // config.page_size)
    # Absent ones are empty on the device.
    per_head = [torch.empty(0) if x is None else x * LOG2E for x in (options.alibi_slopes, options.sinks)]
    requests, page_tables, merges, slopes, sinks, *items = _upload(
        [
            request_table(metadata),
            metadata.page_tables[:, :num_pages],
            _table(work.merges, MERGE_FIELDS),
            *per_head,
            *(_table(launch.items, ITEM_FIELDS) for launch in work.launches),
        ],
        device,
    )
    return TritonPlan(
        config=config,
        options=options,
        is_grouped=is_grouped,
        launches=list(zip(work.launches, items, strict=True)),
        requests=requests,
        page_tables=page_tables,
        merges=merges,
        merge_tokens=work.merge_tokens,
        num_partial_rows=work.num_partial_rows,
        alibi_slopes=None if options.alibi_slopes is None else slopes,
        sinks=None if options.sinks is None else sinks,
    )


def _table(rows: list[tuple[int, ...]], num_fields: int) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32).view(-1, num_fields)


def _upload(parts: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Host tensors on the device, by one copy that does not wait: integers as int32, floats as float32."""
    # Aligned to 16 bytes, because Triton compiles anew for a pointer that is not.
    sizes = [-(-part.numel() // 4) * 4 for part in parts]
    host = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
    for part, space in zip(parts, torch.split(host, sizes), strict=True):
        typed = space.view(torch.float32) if part.is_floating_point() else space
        typed[: part.numel()].view(part.shape).copy_(part)
    uploaded = torch.split(host.to(device, non_blocking=True), sizes)
    return [
        (space.view(torch.float32) if part.is_floating_point() else space)[: part.numel()].view(part.shape)
        for part, space in zip(parts, uploaded, strict=True)
    ]
