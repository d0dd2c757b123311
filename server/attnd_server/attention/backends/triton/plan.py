"""A step of the Triton backends on the device, and the launches of one layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypedDict

import torch

from attnd_server.attention.backends.triton.launches import LaunchShape, multiprocessors
from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.kernels.cuts import EVERYTHING
from attnd_server.attention.kernels.launch_shapes import Tile
from attnd_server.attention.kernels.merge import merge
from attnd_server.attention.kernels.paged_attention import paged_attention
from attnd_server.attention.kernels.pages import quantised
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.attention.metadata import NONE_SEEN, SOME_SEEN, AttentionOptions
from attnd_server.device.kernels.launch import launch_all


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch of an attention kernel.

    Attributes:
        shape: of the launch.
        num_partial_rows: rows of partial results; 0: none.
        items: int32 `[num_items, ITEM_FIELDS]` on the device.
        merges: int32 `[num_merges, MERGE_FIELDS]` on the device, for a launch of `merge`; None without.
        counters: int32 on the device, zero between launches; None where no program counts chunks.
        max_tokens: most new tokens of a request.
    """

    shape: LaunchShape
    num_partial_rows: int
    items: torch.Tensor
    merges: torch.Tensor | None
    counters: torch.Tensor | None
    max_tokens: int


class _Results(NamedTuple):
    """Where a launch writes; see `paged_attention`."""

    output: torch.Tensor
    lse: torch.Tensor | None
    partial_output: torch.Tensor | None
    partial_lse: torch.Tensor | None


class _Numbers(TypedDict):
    """What Hopper's kernels take by name; see `hopper_attention`."""

    rows: int
    num_multiprocessors: int
    scale: float
    softcap: float
    window: int


@dataclass(frozen=True, eq=False)
class TritonPlan:
    """What the layers of a step with the same options share.

    Attributes:
        config: the cache's.
        options: the layers'.
        group: query heads that share a program.
        launches: of the attention kernels.
        page_tables: int32 on the device; the items say where each request's begins.
        alibi_slopes: float32 `[num_heads]` times LOG2E on the device, or None.
        sinks: likewise.
        seen_new: int32 `[num_tokens]` on the device, whether a new token is a key; None: all are.
        reads_rounded: whether new tokens are read as FP8 pages have them.
        planned_tables: the page tables without the offsets of `shifted`; None: there are none.
        partials: by the index of the launch; made when they are first needed.
    """

    config: AttentionConfig
    options: AttentionOptions
    group: int
    launches: list[Launch]
    page_tables: torch.Tensor
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    seen_new: torch.Tensor | None = None
    reads_rounded: bool = False
    planned_tables: torch.Tensor | None = None
    partials: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def shifted(self, page_offsets: torch.Tensor) -> TritonPlan:
        """The plan with a number added to each request's page ids, in place; see `ShiftsPages`."""
        planned = self.page_tables.clone() if self.planned_tables is None else self.planned_tables
        torch.add(planned, page_offsets[:, None], out=self.page_tables)
        return self if self.planned_tables is not None else replace(self, planned_tables=planned)

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        pages: LayerPages,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Launches the kernels of one layer; see `AttentionKernel.run`."""
        num_tokens, num_heads, _ = q.shape
        output = q.new_empty(num_tokens, num_heads, self.config.head_dim_v)
        lse = q.new_empty(num_tokens, num_heads, dtype=torch.float32) if self.options.return_lse else None
        q, k, v = q.contiguous(), k if k is None else k.contiguous(), v if v is None else v.contiguous()
        self.launch(output, lse, q, k, v, pages)
        return output, lse

    def launch(
        self,
        output: torch.Tensor,
        lse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        pages: LayerPages,
    ) -> None:
        """As `run`, into `output` and `lse`. All tensors are contiguous."""
        if self.reads_rounded and k is not None and v is not None:
            k, v = _codes(k, pages.k_scales), _codes(v, pages.v_scales)

        def launch_each() -> None:
            for index, launch in enumerate(self.launches):
                results = _Results(output, lse, *self._partials(index, launch, q))
                shape = launch.shape
                new_k, new_v = (None, None) if shape.keys.new == NONE_SEEN else (k, v)
                sinks = self.sinks if shape.keys.sinks else None
                if shape.tile is None:
                    self._run_on_hopper(launch, results, q, new_k, new_v, pages, sinks)
                else:
                    self._run(launch, shape.tile, results, q, new_k, new_v, pages, sinks)

        with torch.cuda.device_of(q):
            launch_all(launch_each, q.device.index)

    def _run(
        self,
        launch: Launch,
        tile: Tile,
        results: _Results,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        pages: LayerPages,
        sinks: torch.Tensor | None,
    ) -> None:
        paged_attention(
            results.output,
            results.lse,
            results.partial_output,
            results.partial_lse,
            launch.counters,
            q,
            k,
            v,
            pages,
            self.page_tables,
            launch.items,
            self.alibi_slopes,
            sinks,
            self.seen_new if launch.shape.keys.new == SOME_SEEN else None,
            tile=tile,
            may_be_split=self.config.kv_split.batch_invariant or launch.num_partial_rows > 0,
            heads=self.group,
            new_is_scaled=self.reads_rounded,
            compute=self.config.precision.dtype(q.dtype),
            scale=self.options.scale,
            softcap=self.options.softcap,
            window=min(self.options.window, EVERYTHING),
        )

    def _run_on_hopper(
        self,
        launch: Launch,
        results: _Results,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        pages: LayerPages,
        sinks: torch.Tensor | None,
    ) -> None:
        output, lse, partial_output, partial_lse = results
        step = (self.page_tables, launch.items, self.alibi_slopes, sinks)
        numbers: _Numbers = {
            "rows": launch.shape.rows,
            "num_multiprocessors": multiprocessors(q.device),
            "scale": self.options.scale,
            "softcap": self.options.softcap,
            "window": min(self.options.window, EVERYTHING),
        }
        # Only here: elsewhere these modules need not even load.
        if self.config.is_quantised:
            from attnd_server.attention.kernels.hopper.decode_fp8 import hopper_decode_fp8

            hopper_decode_fp8(*results, q, k, v, pages, *step, **numbers)
        else:
            from attnd_server.attention.kernels.hopper.attention import hopper_attention

            hopper_attention(*results, q, k, v, pages, *step, **numbers)
        if partial_output is not None and partial_lse is not None and launch.merges is not None:
            merge(
                output,
                lse,
                partial_output,
                partial_lse,
                launch.merges,
                sinks,
                heads=self.group,
                max_tokens=launch.max_tokens,
            )

    def _partials(self, index: int, launch: Launch, q: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Room for a launch's partial results: the same for all layers of the step."""
        num_rows = launch.num_partial_rows
        if not num_rows:
            return None, None
        if index not in self.partials:
            self.partials[index] = (
                q.new_empty(num_rows, q.shape[1], self.config.head_dim_v, dtype=torch.float32),
                q.new_empty(num_rows, q.shape[1], dtype=torch.float32),
            )
        return self.partials[index]


def _codes(tokens: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """New tokens as the numbers that pages have for them, which any type holds; without scales, as they are."""
    return tokens if scales is None else quantised(tokens, scales).to(tokens.dtype)
