"""Rows of a part of a step among all of the step."""

from __future__ import annotations

import torch

from attnd_server.attention.metadata import AttentionMetadata

Rows = slice | torch.Tensor
"""Rows of q, k or v: a range, or int64 indices on the device."""


def num_of(rows: Rows) -> int:
    """How many rows these are."""
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def rows_of(metadata: AttentionMetadata, requests: list[int], tokens: torch.Tensor, device: torch.device) -> Rows:
    """Where the tokens `tokens`, consecutive ones, of each request lie among all new tokens of the step."""
    if not len(tokens):
        return slice(0, 0)
    rows = (metadata.cu_seqlens_q[requests][:, None] + tokens).flatten()
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows):  # rows ascend, so these are all in between
        return slice(first, last + 1)
    return rows.to(device)
