"""Sliding windows: where a request's visible context starts, and a kernel that always has a window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from attnd_server.attention.backends.base import AttentionKernel, DecodeShape, FixedPlan
from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions


def first_visible_positions(context_lens: torch.Tensor, window: int) -> torch.Tensor:
    """First cached position that a window leaves to each request.

    The request's first new token, at position `context_len`, looks back furthest: to `context_len - window + 1`.

    Args:
        context_lens: int64 `[num_reqs]`.
        window: in tokens; 0 is off.

    Returns:
        int64 `[num_reqs]`, at most `context_lens`.
    """
    if not window:
        return torch.zeros_like(context_lens)
    return torch.minimum((context_lens - window + 1).clamp(min=0), context_lens)


def first_visible_pages(context_lens: torch.Tensor, window: int, page_size: int) -> torch.Tensor:
    """First column of the page table that each request reads: int64 `[num_reqs]`. Earlier pages are never touched."""
    return first_visible_positions(context_lens, window) // page_size


class SlidingWindowAttention:
    """A kernel with a window: pages outside it are never read, so cost follows the window and not the context.

    Args:
        kernel: does the work.
        window: a token at p sees no position j with p - j >= window; at least 1. A call's own window is kept if it is
            narrower.
    """

    def __init__(self, kernel: AttentionKernel, window: int) -> None:
        if window < 1:
            raise ValueError(f"window is {window}, but must be at least 1")
        self.kernel = kernel
        self.window = window
        self.backend = kernel.backend
        self.batch_invariant = kernel.batch_invariant

    def supports(self, config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions) -> str | None:
        """None, or the inner kernel's reason."""
        return self.kernel.supports(config, metadata, self._narrow(options))

    def supports_context_length(self, num_tokens: int) -> bool:
        """As the inner kernel."""
        return self.kernel.supports_context_length(num_tokens)

    def plan(
        self, config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions, device: torch.device
    ) -> Any:
        """The inner kernel's plan of the step without the pages before the window."""
        options = self._narrow(options)
        first_pages = first_visible_pages(metadata.context_lens, options.window, config.page_size)
        columns = torch.arange(metadata.page_tables.shape[1])
        page_tables = metadata.page_tables.masked_fill(columns < first_pages[:, None], -1)
        return self.kernel.plan(config, replace(metadata, page_tables=page_tables), options, device)

    def fixed_plan(
        self, config: AttentionConfig, shape: DecodeShape, options: AttentionOptions, device: torch.device
    ) -> FixedPlan | str:
        """The inner kernel's, with the window."""
        return self.kernel.fixed_plan(config, shape, self._narrow(options), device)

    def run(
        self,
        plan: Any,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        pages: LayerPages,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of one layer; see `AttentionKernel.run`."""
        return self.kernel.run(plan, q, k, v, pages)

    def launch(
        self,
        plan: Any,
        output: torch.Tensor,
        lse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        pages: LayerPages,
    ) -> None:
        """As `run`, into `output` and `lse`; see `AttentionKernel.launch`."""
        self.kernel.launch(plan, output, lse, q, k, v, pages)

    def _narrow(self, options: AttentionOptions) -> AttentionOptions:
        return replace(options, window=min(options.window or self.window, self.window))
