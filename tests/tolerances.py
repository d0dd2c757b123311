"""How far a result may be from the float64 oracle: one table for all tests, and one rule where sizes are a model's."""

from __future__ import annotations

import math

import numpy as np
import torch

from attnd_server.attention.tolerances import TOLERANCES

__all__ = ["TOLERANCES", "assert_as_exact_as_plain", "assert_close"]


def assert_close(actual: torch.Tensor, expected: np.ndarray, dtype: torch.dtype) -> None:
    """Fails unless `actual` is within the tolerance of `dtype`; NaN is never close, an infinity only to itself."""
    tolerance = TOLERANCES[dtype]
    np.testing.assert_allclose(
        actual.double().cpu().numpy(), expected, rtol=tolerance.relative, atol=tolerance.absolute, equal_nan=False
    )


def assert_as_exact_as_plain(
    actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype
) -> None:
    """FlashAttention-3's rule: fails unless `actual` errs at most twice as much as `plain`, and rounding.

    Args:
        actual: to be judged; every number must be finite.
        plain: from a plain computation in `dtype` of the same inputs.
        exact: from one in float64.
        dtype: of the inputs.
    """
    num_broken = int((~actual.isfinite()).sum())
    assert not num_broken, f"{num_broken} of {actual.numel()} numbers are not finite"
    rounding = (exact.to(dtype) + 0.3 - 0.3 - exact).abs().max()
    bound = float(2 * (plain - exact).abs().max() + 2 * rounding)
    error = float((actual - exact).abs().max())
    assert error <= bound < math.inf, f"the error is {error:.3g}, but must be at most {bound:.3g}, a finite number"
