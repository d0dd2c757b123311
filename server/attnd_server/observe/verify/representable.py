"""Which rows of a sample can be compared: those whose sums float32 holds, whatever the order of summation.

A caller may send finite numbers whose products, sums or scores are beyond float32. What a backend makes of them depends
on its order of summation: inf, NaN or a number. None of them is wrong, and none says anything about the server.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from attnd_server.attention.metadata import AttentionOptions

_FLOAT32 = torch.finfo(torch.float32)
# Sizes up to which every partial sum fits, also of powers of two instead of e, and of sizes that add up.
MOST = _FLOAT32.max / 16
# Below it float32 has numbers of fewer digits, and some devices have zero.
LEAST = _FLOAT32.tiny


class Sizes(NamedTuple):
    """How large the numbers of some keys and values of a head are; NaN or infinite where one of them is.

    Attributes:
        key: the greatest norm of a key.
        key_element: the greatest size of an element of one.
        value: the greatest size of an element of a value, times the number of values: of their sum.
        value_element: the greatest size of an element of a value.
    """

    key: float
    key_element: float
    value: float
    value_element: float

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor) -> Sizes:
        """Of keys `[num, 1, head_dim]` and values `[num, 1, head_dim_v]`."""
        most = _most(values)
        return cls(_most(keys.double().norm(dim=2)), _most(keys), most * max(1, len(values)), most)


def fit(q: torch.Tensor, sizes: Sizes, options: AttentionOptions, bias: float, operand: torch.dtype) -> torch.Tensor:
    """Whether each row of a head has only sums that float32 holds, and operands that their type holds.

    Args:
        q: `[num_rows, 1, head_dim]`.
        sizes: of the keys and values that may be multiplied.
        options: of the call.
        bias: how much ALiBi and a sink may add to a score; NaN or infinite: one of them is.
        operand: the narrowest type in which operands are multiplied, scaled or not.

    Returns:
        bool `[num_rows]`.
    """
    scale, most_operand = max(1.0, abs(options.scale)), float(torch.finfo(operand).max)
    scores = scale * q.double().norm(dim=2).amax(dim=1) * sizes.key
    # NaN is no size that fits.
    fits = (scale * q.double().abs().amax(dim=(1, 2)) <= most_operand) & (scores + bias <= MOST)
    if options.softcap:  # by which scores are divided
        fits &= scores <= MOST * min(1.0, options.softcap)
    operands_fit = scale * sizes.key_element <= most_operand and sizes.value_element <= most_operand
    softcap_fits = not options.softcap or LEAST <= options.softcap <= MOST
    others_fit = operands_fit and softcap_fits and sizes.value <= MOST
    return fits if others_fit else torch.zeros_like(fits)


def underflow(options: AttentionOptions, q_sizes: torch.Tensor, key_size: float, head_dim: int) -> torch.Tensor:
    """By how much scores may be off because products below `LEAST` become zero, before or after they are scaled.

    Args:
        options: of the call.
        q_sizes: norms of rows, of any shape.
        key_size: the greatest norm of a key.
        head_dim: elements of both.
    """
    if 0 < abs(options.scale) < LEAST:
        return abs(options.scale) * q_sizes * key_size
    return LEAST * (head_dim * max(1.0, abs(options.scale)) + math.sqrt(head_dim) * (q_sizes + key_size))


def _most(tensor: torch.Tensor) -> float:
    """The greatest size; NaN if there is one, 0 if there is no number."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0
