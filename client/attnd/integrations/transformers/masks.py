"""Masks that transformers makes: which tokens are real, and which later ones a token sees.

Most are causal, with padding and a window: bool `[batch_size, num_columns]`, true for real tokens, says all of it.
Others, where an image's tokens see each other, come whole, as int8 `[batch_size, 1, num_new, num_columns]`: a copy of
one on another device loses nothing. They are served where they are causal but for blocks of tokens that see each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.masking_utils import sdpa_mask

from attnd.errors import InvalidRequest, Unsupported

# What a whole mask says of a query and a key.
HIDDEN, VISIBLE, PADDING = 0, 1, -1


class Reading(NamedTuple):
    """What a mask says.

    Attributes:
        real: bool `[batch_size, num_columns]` on the host, true for real tokens; None: all are.
        blocks: int64 `[batch_size, num_new]` on the host, the last new token that each new one sees, counted in
            columns; None: each sees itself and those before it.
    """

    real: torch.Tensor | None
    blocks: torch.Tensor | None


def whole(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None,
    device: torch.device | str,
    mask_function: Callable[..., Any],
    **kwargs: Any,
) -> torch.Tensor:
    """A mask of every query and key, int8 `[batch_size, 1, q_length, kv_length]`; arguments are transformers'."""
    arguments = {name: kwargs[name] for name in ("q_offset", "kv_offset", "use_vmap") if name in kwargs}
    visible = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=None,
        allow_is_causal_skip=False,
        device=device,
        **arguments,
    )
    assert visible is not None  # nothing allows to skip it
    mask = visible.expand(batch_size, 1, q_length, kv_length).to(torch.int8)
    if attention_mask is None:
        return mask
    real = torch.nn.functional.pad(attention_mask, (0, max(0, kv_length - attention_mask.shape[-1])))
    return mask.masked_fill(~real[:, None, None, :kv_length], PADDING)


def read(mask: torch.Tensor | None, number: int, num_new: int, window: int) -> Reading:
    """What the mask of a layer says.

    Args:
        mask: as above; None: causal, and all tokens are real.
        number: of the layer, for errors.
        num_new: tokens of each row that are new.
        window: of the layer, in tokens; 0: none.

    Raises:
        InvalidRequest: it is another kind of tensor.
        Unsupported: a token sees what it does not see in a causal mask with that window and blocks.
    """
    if mask is None:
        return Reading(None, None)
    if mask.dim() == 4 and mask.dtype == torch.int8 and mask.shape[2] == num_new:
        return _read_whole(mask.detach()[:, 0], number, window)
    if mask.dim() != 2 or mask.dtype != torch.bool:
        rule = "must be [batch_size, num_columns] of bool: causal, with padding"
        raise InvalidRequest(
            f"attention_mask has shape {list(mask.shape)} of {mask.dtype}, but {rule}", field="attention_mask"
        )
    return Reading(mask.detach().cpu(), None)


def _read_whole(mask: torch.Tensor, number: int, window: int) -> Reading:
    num_new, num_columns = mask.shape[1:]
    first = num_columns - num_new
    columns = torch.arange(num_columns, device=mask.device)
    queries = columns[first:]
    real = mask[:, 0] != PADDING
    visible = mask == VISIBLE
    # The last that each new token sees. Padding within a block belongs to it, so that the block is one.
    last = torch.where(visible, columns, -1).amax(-1)
    ends = torch.where(real[:, first:], torch.maximum(last, queries), queries).cummax(1).values
    before = torch.nn.functional.pad(ends[:, :-1], (1, 0), value=-1)
    block = torch.where((ends > queries) | (before >= queries), ends, -1)
    block_of = torch.nn.functional.pad(block, (first, 0), value=-1)

    expected = columns <= queries[:, None]
    if window:
        expected = expected & (columns > queries[:, None] - window)
    later = columns > queries[:, None]
    expected = expected | (later & (block[:, :, None] == block_of[:, None]) & (block[:, :, None] >= 0))
    wrong = ((expected != visible) & real[:, None] & real[:, first:, None]).nonzero()
    if len(wrong):
        row, query, key = wrong[0].tolist()
        sees = "sees" if visible[row, query, key] else "does not see"
        rule = "calls know causal masks, windows, padding, and blocks of tokens that see each other within the window"
        raise Unsupported(
            f"in the mask of layer {number} token {first + query} of row {row} {sees} token {key}, but {rule}",
            field="attention_mask",
        )
    if not bool((block >= 0).any()):
        return Reading(real.cpu(), None)
    return Reading(real.cpu(), (ends - first).cpu())
