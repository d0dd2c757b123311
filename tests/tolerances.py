"""How far a result may be from the float64 oracle: one table for all tests."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch


class Tolerance(NamedTuple):
    """|actual - expected| <= absolute + relative * |expected|, for inputs of order 1."""

    absolute: float
    relative: float


# By the coarsest type that the computation rounds to: about 4 roundings of an operand or result, each up to half a unit
# in the last place, and for float32 the errors of the sums on top.
TOLERANCES = {
    torch.float64: Tolerance(1e-11, 1e-11),
    torch.float32: Tolerance(2e-5, 2e-5),
    torch.float16: Tolerance(2e-3, 2e-3),
    torch.bfloat16: Tolerance(1.6e-2, 1.6e-2),
}


def assert_close(actual: torch.Tensor, expected: np.ndarray, dtype: torch.dtype) -> None:
    """Fails unless `actual` is within the tolerance of `dtype`; NaN is never close, an infinity only to itself."""
    tolerance = TOLERANCES[dtype]
    np.testing.assert_allclose(
        actual.double().cpu().numpy(), expected, rtol=tolerance.relative, atol=tolerance.absolute, equal_nan=False
    )
