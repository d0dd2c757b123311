"""What new tokens see: the specification of every mask, on the host."""

from __future__ import annotations

import torch

from attnd_server.attention.metadata import AttentionMetadata


def new_token_limits(
    positions: torch.Tensor,
    block_size: torch.Tensor | int,
    prefix_len: torch.Tensor | int,
    padded_prefix_len: torch.Tensor | int,
) -> torch.Tensor:
    """First position that a token does not see among the new tokens; the one mask family, on the host.

    The sizes are those of one request, or tensors that broadcast against `positions` for several.

    Args:
        positions: int64 `[...]`, absolute positions of the tokens.
        block_size: of the request; 1 is causal, 0 is bidirectional.
        prefix_len: of the request; 0 unless prefix-full.
        padded_prefix_len: of the request; 0 unless prefix-full.

    Returns:
        int64 like `positions`, exclusive limits.
    """
    block_size = torch.as_tensor(block_size)
    limits = (positions // block_size.clamp(min=1) + 1) * block_size
    limits = torch.where(positions < padded_prefix_len, padded_prefix_len, limits)
    limits = torch.where(positions < prefix_len, prefix_len, limits)
    return torch.where(block_size == 0, torch.iinfo(torch.int64).max, limits)


def visible(
    metadata: AttentionMetadata,
    request: int,
    window: int,
    first_position: int = 0,
    page_size: int = 1,
    first_token: int = 0,
    end_token: int | None = None,
    columns: slice = slice(None),
) -> torch.Tensor:
    """What each new token of a request sees: the specification of every mask.

    Args:
        metadata: the step.
        request: index of the request.
        window: sliding window in tokens; 0 is off.
        first_position: cached positions before it are left out of the answer (a window excludes them anyway).
        page_size: token slots of a page of `page_tables`.
        first_token: first new token that gets a row.
        end_token: new token before which the rows end; None is the last.
        columns: the part of the answer that is wanted.

    Returns:
        bool `[num_rows, num_cached + num_new]` on the host: cached positions `[first_position, context_len)`, then the
        new tokens. Without the new tokens if the step is cache-only. Rows past `valid` see nothing.
    """
    context_len = int(metadata.context_lens[request])
    valid_len, query_len = int(metadata.valid_lens[request]), metadata.query_lens[request]
    tokens = torch.arange(query_len)[first_token:end_token]
    positions = context_len + tokens
    # New tokens stand behind the context, so a column's position says which of both it is.
    first, end, _ = columns.indices(context_len - first_position + query_len)
    first, end = first_position + first, first_position + end
    cached = torch.arange(min(first, context_len), min(end, context_len))
    new = torch.arange(max(first, context_len), max(end, context_len)) - context_len

    in_hole = (cached >= metadata.hole_starts[request]) & (cached < metadata.hole_ends[request])
    has_page = metadata.page_tables[request, cached // page_size] >= 0
    seen = (has_page & ~in_hole).expand(len(tokens), -1)
    keys = cached
    if not metadata.cache_only:
        limits = new_token_limits(
            positions,
            int(metadata.block_sizes[request]),
            int(metadata.prefix_lens[request]),
            int(metadata.padded_prefix_lens[request]),
        )
        seen_new = (context_len + new[None, :] < limits[:, None]) & (new[None, :] < valid_len)
        if metadata.seen_new is not None:
            seen_new &= metadata.seen_new[new + metadata.cu_seqlens_q[request]]
        seen = torch.cat([seen, seen_new], dim=1)
        keys = torch.cat([cached, context_len + new])
    if window:
        seen = seen & ((positions - window)[:, None] < keys[None, :])
    return seen & (tokens[:, None] < valid_len)
