"""A step as two partial attentions that are put together by their log-sum-exp, for libraries that know no more.

One part is over the cached tokens in the pages, each new token seeing all of them; the other over the new tokens in the
call's own tensors, causal or each seeing all. So nothing depends on whether a new token has a slot or was stored
before. A step without context has the second part alone, a cache-only step the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from attnd_server.attention import scales
from attnd_server.attention.backends import plain_masks
from attnd_server.attention.config import AttentionConfig, Layout
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions

Partial = tuple[torch.Tensor, torch.Tensor]
"""Output `[num_tokens, num_heads, head_dim_v]` and natural lse `[num_heads, num_tokens]` over some of the keys."""


@dataclass(frozen=True, eq=False)
class Lengths:
    """Tokens of each request that has new ones: int32 on the device as libraries want them, and on the host.

    Attributes:
        counts: of each request.
        on_device: int32 `[num_reqs]`, the same.
        ends: int32 `[num_reqs + 1]` on the device: 0, then their running sum.
        longest: the greatest of them.
    """

    counts: list[int]
    on_device: torch.Tensor
    ends: torch.Tensor
    longest: int


@dataclass(frozen=True, eq=False)
class TwoParts:
    """What the layers of a step share.

    Attributes:
        new: new tokens of each request.
        context: cached tokens of each request; None if no request has any.
        page_tables: int32 `[num_reqs, pages of the longest context]` on the device; None without context. Columns that
            a request does not use are 0.
        without_context: bool `[num_tokens]` on the device: rows of requests that have none where others have; or None.
        sees_new: the new tokens are keys too.
        is_causal: a new token sees the new ones up to itself, and otherwise all.
        window: in tokens; 0 if it hides nothing in this step.
        options: the layer's.
        sinks: float32 `[num_heads]` on the device, or None.
        head_dim_v: elements per head of the output.
    """

    new: Lengths
    context: Lengths | None
    page_tables: torch.Tensor | None
    without_context: torch.Tensor | None
    sees_new: bool
    is_causal: bool
    window: int
    options: AttentionOptions
    sinks: torch.Tensor | None
    head_dim_v: int


def refusal(config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions) -> str | None:
    """None if the step is one of two such parts in a type that GPU libraries multiply, or the reason why not."""
    if config.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype is {config.dtype}, but must be float16 or bfloat16"
    if config.latent:
        return "the cache is latent, but K and V must have memory of their own"
    if config.precision.dtype(config.dtype) is not config.dtype:
        return f"precision is {config.precision.value}, but must be that of dtype {config.dtype}"
    if options.alibi_slopes is not None:
        return "partial attentions have no alibi_slopes"
    reason = scales.refusal(options)
    if reason is not None:
        return reason
    if not metadata.is_plain:
        return "it has new tokens that are no keys, or requests without sinks"
    if metadata.reads_rounded(config):
        return "it reads new tokens as FP8 pages have them"
    if not plain_masks.all_valid(metadata):
        return "valid_lens leaves new tokens out, but all must be valid"
    causal, bidirectional = plain_masks.causal(metadata).all(), plain_masks.bidirectional(metadata).all()
    if not metadata.cache_only and not causal and not bidirectional:
        return "its masks are neither all causal nor all such that the new tokens of a request see each other"
    return _context_refusal(config, metadata) if metadata.max_context_len else None


def _context_refusal(config: AttentionConfig, metadata: AttentionMetadata) -> str | None:
    if config.layout is not Layout.UNIFIED:
        return f"layout is {config.layout.value}, but must be unified"
    for name in ("kv_dtype", "v_dtype"):
        if getattr(config, name) is not config.dtype:
            return f"{name} is {getattr(config, name)}, but must be {config.dtype} as dtype"
    holes = metadata.hole_ends.minimum(metadata.context_lens) > metadata.hole_starts
    if holes.any():
        return "it has a prefix hole, but every cached token must be seen"
    if (_used_pages(config, metadata) & (metadata.page_tables < 0)).any():
        return "page_tables has -1 within a context, but every cached token must be seen"
    return None


def _used_pages(config: AttentionConfig, metadata: AttentionMetadata) -> torch.Tensor:
    """Bool like the page tables: columns that hold context."""
    num_used = -(-metadata.context_lens // config.page_size)
    return torch.arange(metadata.page_tables.shape[1]) < num_used[:, None]


def visible_window(metadata: AttentionMetadata, options: AttentionOptions) -> int:
    """The window in tokens; 0 if it is off or hides nothing from any request."""
    lens = metadata.context_lens + torch.diff(metadata.cu_seqlens_q)
    return options.window if options.window and (lens > options.window).any() else 0


def make_parts(
    config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions, device: torch.device
) -> TwoParts:
    """The parts of a step that `refusal` lets pass. Requests without new tokens are left out."""
    lens = torch.diff(metadata.cu_seqlens_q)
    some = lens > 0
    lens, context_lens = lens[some], metadata.context_lens[some]
    num_pages = -(-int(context_lens.max()) // config.page_size) if len(lens) else 0
    tables = metadata.page_tables.masked_fill(~_used_pages(config, metadata), 0)[some, :num_pages]
    without = (context_lens == 0).repeat_interleave(lens)
    return TwoParts(
        new=_lengths(lens, device),
        context=_lengths(context_lens, device) if num_pages else None,
        page_tables=tables.to(device, torch.int32).contiguous() if num_pages else None,
        without_context=without.to(device) if num_pages and without.any() else None,
        sees_new=not metadata.cache_only,
        is_causal=bool(plain_masks.causal(metadata).all()),
        window=visible_window(metadata, options),
        options=options,
        sinks=None if options.sinks is None else options.sinks.to(device),
        head_dim_v=config.head_dim_v,
    )


def _lengths(counts: torch.Tensor, device: torch.device) -> Lengths:
    ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    listed = counts.tolist()
    return Lengths(listed, counts.to(device, torch.int32), ends.to(device, torch.int32), max(listed, default=0))


def run_parts(
    parts: TwoParts, q: torch.Tensor, over_context: Callable[[], Partial], over_new: Callable[[], Partial]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output and lse of a layer from its parts; see `AttentionKernel.run`.

    Args:
        parts: the step.
        q: `[num_tokens, num_heads, head_dim]`.
        over_context: computes the first part. Rows of requests without context may be anything.
        over_new: computes the second.
    """
    results = []
    if len(q) and parts.context is not None:
        output, lse = over_context()
        if parts.without_context is not None:
            output = output.masked_fill(parts.without_context[:, None, None], 0)
            lse = lse.masked_fill(parts.without_context, -torch.inf)
        results.append((output, lse))
    if len(q) and parts.sees_new:
        results.append(over_new())
    if not results:
        nothing = q.new_full(q.shape[1::-1], -torch.inf, dtype=torch.float32)
        results.append((q.new_zeros(*q.shape[:2], parts.head_dim_v), nothing))
    output, lse = results[0] if len(results) == 1 and parts.sinks is None else merge(results, parts.sinks)
    return output.to(q.dtype), lse.T.float().contiguous() if parts.options.return_lse else None


def copy_results(
    results: tuple[torch.Tensor, torch.Tensor | None], output: torch.Tensor, lse: torch.Tensor | None
) -> None:
    """Copies what `run_parts` gave into `output` and `lse`."""
    output.copy_(results[0])
    if lse is not None and results[1] is not None:
        lse.copy_(results[1])


def merge(results: list[Partial], sinks: torch.Tensor | None) -> Partial:
    """Attention over the keys of all `results` together, in float32 (arXiv 2311.01282).

    Args:
        results: partial attentions over different keys.
        sinks: float32 `[num_heads]`, or None: logits that only add to the denominator.
    """
    lses = torch.stack([lse.float() for _, lse in results])  # [num_parts, num_heads, num_tokens]
    total = lses.logsumexp(0)
    if sinks is not None:
        total = torch.logaddexp(total, sinks[:, None])
    weights = (lses - total.masked_fill(total == -torch.inf, 0)).exp().transpose(1, 2)[..., None]
    output = sum(weight * output for weight, (output, _) in zip(weights, results, strict=True))
    assert isinstance(output, torch.Tensor)
    return output, total
