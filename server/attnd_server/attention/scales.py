"""The numbers of a layer's options in forms that every library and kernel computes with."""

from __future__ import annotations

import torch

from attnd_server.attention.metadata import AttentionOptions

MAX_NUMBER = 1e29
"""Greatest scale, slope or sink that fast backends take: float32 holds it times a product of queries and keys, or times
a distance, in units of log2. Past it a score may be infinite, and inf - inf is NaN."""
MAX_SOFTCAP = 1024.0
"""Greatest softcap of kernels that make tanh of exp2: that errs by 1e-7, which the softcap multiplies."""

# The least normal number: less may count as 0, and 0 * -inf is NaN.
MIN_SCALE = torch.finfo(torch.float32).tiny


def plain_scale(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """Queries and a positive scale with the same scores.

    Fast kernels scale late: they take the greatest product for the greatest score, and multiply the -inf of a hidden
    key too, which a scale of 0 makes NaN and a negative one the greatest of all. torch's own causal path is of that
    kind.
    """
    if scale >= MIN_SCALE:
        return q, scale
    if scale <= -MIN_SCALE:
        return -q, -scale
    return q * (scale / MIN_SCALE), MIN_SCALE


def refusal(options: AttentionOptions) -> str | None:
    """None, or the number that is too great for fast backends; `naive` takes any."""
    for name, size in options.sizes:
        if size > MAX_NUMBER:
            return f"{name} is as great as {size:g}, but must be at most {MAX_NUMBER:g} for scores to fit float32"
    return None
