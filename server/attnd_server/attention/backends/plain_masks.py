"""Which requests have masks that libraries know without being given any: causal, or none at all."""

from __future__ import annotations

import torch

from attnd_server.attention.masks import new_token_limits
from attnd_server.attention.metadata import AttentionMetadata


def causal(metadata: AttentionMetadata) -> torch.Tensor:
    """Bool `[num_reqs]`: each new token sees the new ones up to itself. True too for at most one new token."""
    is_plain = (metadata.block_sizes == 1) & (metadata.context_lens >= metadata.padded_prefix_lens)
    return is_plain | (torch.diff(metadata.cu_seqlens_q) <= 1)


def bidirectional(metadata: AttentionMetadata) -> torch.Tensor:
    """Bool `[num_reqs]`: each new token sees all new ones of its request. True too for at most one new token."""
    context_lens, lens = metadata.context_lens, torch.diff(metadata.cu_seqlens_q)
    sizes = metadata.block_sizes, metadata.prefix_lens, metadata.padded_prefix_lens
    # Limits never fall from token to token, so the first one's tells.
    return (new_token_limits(context_lens, *sizes) >= context_lens + lens) | (lens <= 1)


def all_valid(metadata: AttentionMetadata) -> bool:
    """Whether every new token counts."""
    return bool((torch.diff(metadata.cu_seqlens_q) == metadata.valid_lens).all())
