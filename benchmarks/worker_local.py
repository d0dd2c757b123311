"""The worker that has its KV itself: pages on its own GPU, one kernel that stores, and FlashAttention-3."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch

from attnd_server.attention.config import Layout
from attnd_server.attention.layer_pages import LayerPages
from benchmarks.worker_contexts import PAGE_SIZE, Batch, Contexts
from benchmarks.worker_model import ModelShape


class LocalAttention(Protocol):
    """Attention over pages; its calls may run in a capture."""

    def plan(self, batch: Batch, shape: ModelShape, seq_lens: torch.Tensor) -> Any:
        """What the layers of a step share. seq_lens: int32 `[num_reqs]`, new tokens included."""

    def attend(self, plan: Any, q: torch.Tensor, pages: LayerPages, page_tables: torch.Tensor) -> torch.Tensor:
        """Attention of a layer, whose new tokens are in the pages already."""


class FlashAttention3:
    """FlashAttention-3 through the module `fa3` of a folder; benchmarks/README.md says what that has.

    Raises:
        ImportError: there is no such module, or it cannot load what it needs.
    """

    def __init__(self, folder: Path) -> None:
        path = str(folder.resolve())
        sys.path.insert(0, path)
        try:
            self._module = import_module("fa3")
            self._operators = self._module.load(path)
        except Exception as error:
            raise ImportError(f"{path} has no FlashAttention-3: {type(error).__name__}: {error}") from error
        finally:
            sys.path.remove(path)
        self._starts: dict[int, torch.Tensor] = {}  # by requests, made before any capture: no part of a step

    def plan(self, batch: Batch, shape: ModelShape, seq_lens: torch.Tensor) -> Any:
        """The scheduler's metadata, made on the device; and the arguments that all layers have."""
        if batch.num_reqs not in self._starts:
            self._starts[batch.num_reqs] = torch.arange(batch.num_reqs + 1, dtype=torch.int32, device=seq_lens.device)
        common = {
            "max_query_len": 1,
            "max_context_len": batch.context_len + batch.num_steps,
            "seq_lens": seq_lens,
            "cu_seqlens_q": self._starts[batch.num_reqs],
            "causal": True,
        }
        metadata = self._module.plan(
            self._operators,
            num_reqs=batch.num_reqs,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=shape.dtype,
            page_size=PAGE_SIZE,
            **common,
        )
        return {**common, "metadata": metadata, "scale": shape.scale}

    def attend(self, plan: Any, q: torch.Tensor, pages: LayerPages, page_tables: torch.Tensor) -> torch.Tensor:
        """One launch, and another that merges where it has cut KV."""
        output = torch.empty_like(q)
        self._module.attend(self._operators, q, pages.k, pages.v, output, page_tables=page_tables, **plan)
        return output


class PlainAttention:
    """In torch: for the dry run."""

    def plan(self, batch: Batch, shape: ModelShape, seq_lens: torch.Tensor) -> Any:
        """Lengths and scale."""
        return seq_lens, shape.scale

    def attend(self, plan: Any, q: torch.Tensor, pages: LayerPages, page_tables: torch.Tensor) -> torch.Tensor:
        """Gathers the pages of every request whole, and masks what is past its end."""
        seq_lens, scale = plan
        keys, values = (part[page_tables.long()].flatten(1, 2).float() for part in pages[:2])
        group = q.shape[1] // keys.shape[2]
        scores = scale * torch.einsum("bhd,bshd->bhs", q.float(), keys.repeat_interleave(group, 2))
        is_past = torch.arange(keys.shape[1], device=q.device) >= seq_lens[:, None]
        weights = scores.masked_fill(is_past[:, None], -torch.inf).softmax(-1)
        return torch.einsum("bhs,bshd->bhd", weights, values.repeat_interleave(group, 2)).to(q.dtype)


class LocalPages:
    """The pages of all layers on the worker's device, with the contexts in them.

    Attributes:
        layers: the pages of each, `[num_pages, page_size, num_kv_heads, head_dim]`.
        page_tables: int32 `[num_reqs, pages_per_req]` on the device.
    """

    def __init__(self, contexts: Contexts) -> None:
        batch, shape, device = contexts.batch, contexts.shape, contexts.device
        size = (batch.num_pages, PAGE_SIZE, shape.num_kv_heads, shape.head_dim)
        self.layers = [
            LayerPages(*(torch.zeros(size, dtype=shape.dtype, device=device) for _ in range(2)))
            for _ in range(shape.num_layers)
        ]
        self.page_tables = batch.page_tables.to(device)
        self._long_tables = self.page_tables.long()
        slots = [batch.slots(request, 0, batch.context_len).to(device) for request in range(batch.num_reqs)]
        for layer in range(shape.num_layers):
            for request in range(batch.num_reqs):
                self._index_copy(layer, *contexts.draw(layer, request), slots[request])

    def slots(self, positions: torch.Tensor) -> torch.Tensor:
        """int64 `[num_reqs]`: where the tokens at these positions lie. On the device, of what lies there."""
        pages = self._long_tables.gather(1, (positions // PAGE_SIZE)[:, None])[:, 0]
        return pages * PAGE_SIZE + positions % PAGE_SIZE

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """Stores the new tokens of a layer: on a GPU in one launch."""
        if k.device.type == "cuda":
            from attnd_server.attention.kernels.store import store_kv

            store_kv(self.layers[layer], k, v, slots, Layout.UNIFIED)
        else:
            self._index_copy(layer, k, v, slots)

    def _index_copy(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        for pages, new in zip(self.layers[layer][:2], (k, v), strict=True):
            assert pages is not None
            pages.view(-1, *pages.shape[2:]).index_copy_(0, slots, new)
