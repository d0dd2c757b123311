"""Where tensors lie in memory: products have the same bits only for operands that are aligned alike.

A processor's libraries of matrix products treat the elements before the first 64-byte boundary apart, and so add in
another order. Received bytes lie wherever the message before them ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ALIGNMENT = 64
"""Bytes: a line of the processor's cache and its widest vector. What torch allocates begins at a multiple of it."""


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor if it is aligned, or not on a processor; else a copy that is, with the same strides if it is dense."""
    return tensor.clone() if tensor.is_cpu and tensor.data_ptr() % ALIGNMENT else tensor
