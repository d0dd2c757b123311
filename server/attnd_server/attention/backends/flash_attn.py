"""Backend `flash_attn`: the newest package of FlashAttention that is installed and runs on the device."""

from __future__ import annotations

import torch

from attnd_server.attention.backends import two_parts
from attnd_server.attention.backends.base import DecodeShape
from attnd_server.attention.backends.flash_libraries import FlashCall, FlashLibrary
from attnd_server.attention.backends.two_parts import Partial, TwoParts
from attnd_server.attention.config import AttentionBackend, AttentionConfig
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions
from attnd_server.attention.scales import plain_scale

# The libraries' positions are int32.
MAX_CONTEXT_LEN = 1 << 30


class FlashAttention:
    """Serves causal and bidirectional steps in float16 and bfloat16; see `two_parts`. Holds no state.

    Not batch-invariant: the libraries choose how to split keys by the batch. Cached tokens outside a window must be
    finite: the libraries multiply them by zero.

    Args:
        library: computes.
    """

    backend = AttentionBackend.FLASH_ATTN
    batch_invariant = False

    def __init__(self, library: FlashLibrary) -> None:
        self.library = library

    def supports(self, config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions) -> str | None:
        """None, or the reason why not, which may depend on the package."""
        reason = two_parts.refusal(config, metadata, options)
        reason = reason or self.library.head_dims_refusal(config.head_dim, config.head_dim_v)
        if reason is None and metadata.max_context_len:
            reason = self._pages_refusal(config, metadata) or _window_refusal(metadata, options)
        return reason and f"{self.library.package}: {reason}"

    def _pages_refusal(self, config: AttentionConfig, metadata: AttentionMetadata) -> str | None:
        multiple, whole = self.library.page_multiple, self.library.whole_pages
        if config.page_size % multiple:
            return f"page_size is {config.page_size}, but must be a multiple of {multiple}"
        if whole and config.page_size >= whole and (metadata.context_lens % config.page_size).any():
            return (
                f"it may read pages of {config.page_size} tokens past the context's end, so contexts must fill theirs "
                f"unless page_size is less than {whole}"
            )
        return None

    def supports_context_length(self, num_tokens: int) -> bool:
        """Whether positions fit the libraries' integers."""
        return num_tokens <= MAX_CONTEXT_LEN

    def plan(
        self, config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions, device: torch.device
    ) -> TwoParts:
        """The step's parts, their lengths and page tables on the device."""
        return two_parts.make_parts(config, metadata, options, device)

    def fixed_plan(
        self, config: AttentionConfig, shape: DecodeShape, options: AttentionOptions, device: torch.device
    ) -> str:
        """The reason why there is none."""
        return "the library splits keys by the batch"

    def run(
        self,
        plan: TwoParts,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        pages: LayerPages,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of one layer; see `AttentionKernel.run`."""
        q, scale = plain_scale(q.contiguous(), plan.options.scale)

        def over_context() -> Partial:
            assert plan.context is not None
            # The library takes row i of n for one at position context_len - n + i; it stands n further.
            left = plan.window - 1 - plan.new.longest if plan.window else -1
            call = _call(plan, plan.context, plan.page_tables, False, (left, -1), scale)
            return self.library.attend(q, pages.k, pages.v, call)

        def over_new() -> Partial:
            assert k is not None
            assert v is not None
            window = (plan.window - 1, 0 if plan.is_causal else -1) if plan.window else (-1, -1)
            call = _call(plan, plan.new, None, plan.is_causal, window, scale)
            return self.library.attend(q, k.contiguous(), v.contiguous(), call)

        return two_parts.run_parts(plan, q, over_context, over_new)

    def launch(
        self,
        plan: TwoParts,
        output: torch.Tensor,
        lse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        pages: LayerPages,
    ) -> None:
        """As `run`, into `output` and `lse`: the library has results of its own, which are copied."""
        two_parts.copy_results(self.run(plan, q, k, v, pages), output, lse)


def _call(
    plan: TwoParts,
    keys: two_parts.Lengths,
    page_tables: torch.Tensor | None,
    is_causal: bool,
    window: tuple[int, int],
    scale: float,
) -> FlashCall:
    return FlashCall(plan.new, keys, page_tables, scale, is_causal, window, plan.options.softcap)


def _window_refusal(metadata: AttentionMetadata, options: AttentionOptions) -> str | None:
    """Over the context, one window counted from the context's end must be right for every request."""
    window = two_parts.visible_window(metadata, options)
    if not window:
        return None
    lens = {length for length in metadata.query_lens if length}
    if len(lens) > 1:
        return f"window is {window}, but requests with a context must then have equally many new tokens"
    longest = max(lens, default=0)
    if window <= longest:
        return f"window is {window}, but must be more than the {longest} new tokens of a request with a context"
    return None
