"""The interface of a backend."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from attnd_server.config import AttentionBackend, AttentionConfig
from attnd_server.metadata import AttentionMetadata, AttentionOptions


class AttentionKernel(Protocol):
    """One way of computing the attention of a step.

    `plan` runs once per step and kind of layer, `run` once per layer. Inputs are valid: nothing is checked again.
    """

    @property
    def backend(self) -> AttentionBackend:
        """Its name."""

    @property
    def batch_invariant(self) -> bool:
        """Whether a request's output bits never depend on what shares its batch, if `KVSplitConfig` asks for that."""

    def supports(self, config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions) -> str | None:
        """None, or the reason why this step cannot be served, for people."""

    def supports_context_length(self, num_tokens: int) -> bool:
        """Whether a request may have `num_tokens` of context."""

    def plan(
        self, config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions, device: torch.device
    ) -> Any:
        """What `run` needs and every layer with these options shares."""

    def run(
        self,
        plan: Any,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        k_scales: torch.Tensor | None = None,
        v_scales: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of one layer. Reads the pages as they were before the call; writes nothing but its results.

        Args:
            plan: from `plan`.
            q: `[num_tokens, num_heads, head_dim]`.
            k: `[num_tokens, num_kv_heads, head_dim]`, or None in a cache-only step.
            v: `[num_tokens, num_kv_heads, head_dim_v]`, or None in a cache-only step.
            k_pages: the layer's K, of shape `config.k_shape`.
            v_pages: the layer's V, of shape `config.v_shape`.
            k_scales: float32 `[num_kv_heads]` on the pages' device, by which what K's pages hold is multiplied; None:
                pages are not scaled.
            v_scales: likewise for V.

        Returns:
            output `[num_tokens, num_heads, head_dim_v]` in q's dtype, and lse float32 `[num_tokens, num_heads]` if
            `options.return_lse`, else None. A row that sees nothing has zeros and -inf.
        """
