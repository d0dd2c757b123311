"""Backend `xformers`: partial attentions of the package xformers.

Signatures from github.com/facebookresearch/xformers: `memory_efficient_attention_partial` in `xformers/ops/fmha/
__init__.py`, the masks in `attn_bias.py`. Its only operator that gives partial attention over pages on any GPU is
`triton_splitk.FwOp`, which is never chosen by itself for that; its limits are those of `supports`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attnd_server.attention.backends import two_parts
from attnd_server.attention.backends.base import DecodeShape
from attnd_server.attention.backends.two_parts import Partial, TwoParts
from attnd_server.attention.config import AttentionBackend, AttentionConfig
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions
from attnd_server.attention.scales import plain_scale

MIN_CAPABILITY = (8, 0)
PAGE_MULTIPLE = 64
"""Keys of a tile of `triton_splitk`, which must not cross pages."""
HEAD_DIMS = (16, 32, 64, 128, 256)
"""What both `triton_splitk` and xformers' FlashAttention take."""
MAX_SLOTS = 1 << 31
"""`triton_splitk` counts slots of the cache in int32."""


@dataclass(frozen=True)
class Xformers:
    """What is used of the package.

    Attributes:
        partial: `memory_efficient_attention_partial`.
        masks: module `xformers.ops.fmha.attn_bias`.
        paged_operator: `triton_splitk.FwOp`.
    """

    partial: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    masks: Any
    paged_operator: Any


def find(device: torch.device, capability: tuple[int, int]) -> Xformers | str:
    """The package, or the reason why it cannot serve on a device with this compute capability."""
    if device.type != "cuda":
        return f"the package xformers needs a CUDA device, but device is {device}"
    if capability < MIN_CAPABILITY:
        return f"compute capability is {capability}, but must be at least {MIN_CAPABILITY}"
    try:
        fmha = importlib.import_module("xformers.ops.fmha")
        paged, flash = fmha.triton_splitk.FwOp, fmha.flash.FwOp
        for operator in (paged, flash):
            if not operator.is_available():
                return f"the package xformers has no {operator.NAME} for this torch"
        return Xformers(fmha.memory_efficient_attention_partial, fmha.attn_bias, paged)
    except (ImportError, OSError, AttributeError) as error:  # absent, built for another torch, too old
        return f"the package xformers cannot be loaded ({error})"


@dataclass(frozen=True, eq=False)
class _Plan:
    parts: TwoParts
    new_mask: Any
    context_mask: Any


class XformersAttention:
    """Serves causal and bidirectional steps in float16 and bfloat16; see `two_parts`. Holds no state.

    Not batch-invariant: keys are split by the batch.

    Args:
        library: computes.
    """

    backend = AttentionBackend.XFORMERS
    batch_invariant = False

    def __init__(self, library: Xformers) -> None:
        self.library = library

    def supports(self, config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions) -> str | None:
        """None, or the reason why not."""
        reason = two_parts.refusal(config, metadata, options)
        if reason is not None:
            return reason
        if config.head_dim != config.head_dim_v or config.head_dim not in HEAD_DIMS:
            dims = f"head_dim is {config.head_dim} and head_dim_v {config.head_dim_v}"
            return f"{dims}, but both must be the same of {', '.join(map(str, HEAD_DIMS))}"
        if options.softcap:
            return "xformers has no softcap"
        if two_parts.visible_window(metadata, options):
            return "xformers has no window over pages"
        if metadata.max_context_len and config.page_size % PAGE_MULTIPLE:
            return f"page_size is {config.page_size}, but must be a multiple of {PAGE_MULTIPLE}"
        if metadata.max_context_len and config.num_slots >= MAX_SLOTS:
            return f"the cache has {config.num_slots} slots, but must have less than {MAX_SLOTS}"
        return None

    def supports_context_length(self, num_tokens: int) -> bool:
        """Whether positions fit the package's integers."""
        return num_tokens < MAX_SLOTS

    def plan(
        self, config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions, device: torch.device
    ) -> _Plan:
        """The step's parts and their masks."""
        parts = two_parts.make_parts(config, metadata, options, device)
        masks = self.library.masks
        new_mask = context_mask = None
        if parts.sees_new:
            new_mask = masks.BlockDiagonalMask.from_seqlens(parts.new.counts, device=device)
            new_mask = new_mask.make_causal() if parts.is_causal else new_mask
        if parts.context is not None:
            context_mask = masks.PagedBlockDiagonalPaddedKeysMask.from_seqlens(
                q_seqlen=parts.new.counts,
                kv_seqlen=parts.context.counts,
                block_tables=parts.page_tables,
                page_size=config.page_size,
                device=device,
            )
        return _Plan(parts, new_mask, context_mask)

    def fixed_plan(
        self, config: AttentionConfig, shape: DecodeShape, options: AttentionOptions, device: torch.device
    ) -> str:
        """The reason why there is none."""
        return "the library splits keys by the batch"

    def run(
        self,
        plan: _Plan,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        pages: LayerPages,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of one layer; see `AttentionKernel.run`."""

        def over_context() -> Partial:
            k_slots, v_slots = pages.k.flatten(0, 1), pages.v.flatten(0, 1)
            return self._attend(q, k_slots, v_slots, plan, plan.context_mask, self.library.paged_operator)

        def over_new() -> Partial:
            assert k is not None
            assert v is not None
            return self._attend(q, k, v, plan, plan.new_mask, None)

        return two_parts.run_parts(plan.parts, q, over_context, over_new)

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
        """As `run`, into `output` and `lse`: the library has results of its own, which are copied."""
        two_parts.copy_results(self.run(plan, q, k, v, pages), output, lse)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: _Plan, mask: Any, operator: Any
    ) -> Partial:
        """One part, over keys `[num_keys, num_kv_heads, head_dim]`."""
        num_tokens, num_heads, head_dim = q.shape
        q, scale = plain_scale(q, plan.parts.options.scale)
        num_kv_heads = k.shape[1]
        # [1, tokens, KV heads, query heads of each, head_dim]; keys are not copied for the heads.
        shape = (num_kv_heads, num_heads // num_kv_heads, head_dim)
        queries = q.reshape(1, num_tokens, *shape)
        keys, values = (tensor[None, :, :, None].expand(1, len(tensor), *shape) for tensor in (k, v))
        output, lse = self.library.partial(queries, keys, values, attn_bias=mask, scale=scale, op=operator)
        return output.reshape(num_tokens, num_heads, head_dim), lse.reshape(num_heads, num_tokens)
