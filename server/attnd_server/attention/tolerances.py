"""How far a result may be from an exact one: one table, for tests and for `observe.verify`."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

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

# Roundings to float32 on a score's way: of the product, the scale, the change to powers of two, the difference from the
# greatest, and the partial sums between.
_SCORE_ROUNDINGS = 8


def coarsest(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """The type whose tolerance holds for a computation that rounds to both."""
    return max(first, second, key=lambda dtype: torch.finfo(dtype).eps)


Size = TypeVar("Size", float, torch.Tensor)


def score_error(score_size: Size, key_dtype: torch.dtype | None = None) -> Size:
    """By how much a score may be off that was computed in float32 from numbers whose sizes add up to `score_size`.

    Args:
        score_size: as above; of one score, or of several.
        key_dtype: the type that keys may be rounded to once more: what FP8 stands for, times its scale, does not fit
            the type in which libraries multiply. None: they are multiplied as they are.
    """
    rounded = 0.0 if key_dtype is None else torch.finfo(key_dtype).eps / 2
    return (_SCORE_ROUNDINGS * torch.finfo(torch.float32).eps + rounded) * score_size


def output_bounds(
    expected: torch.Tensor, dtype: torch.dtype, output_dtype: torch.dtype, value_size: float, off: float | torch.Tensor
) -> torch.Tensor:
    """How far each element of an output may be from the exact one, whatever the sizes of the inputs.

    An output is an average of values. So the table's absolute error, for values of order 1, is one of their size here;
    and a score that is off by d moves each weight by d of itself, and so the average by up to 2 d of the values' size.

    Args:
        expected: the exact output.
        dtype: the coarsest type that the computation rounds to.
        output_dtype: of the output itself, below whose least normal number everything may become zero.
        value_size: of the greatest value that is seen.
        off: by how much scores may be off, see `score_error`; in a shape that goes with `expected`.
    """
    absolute, relative = TOLERANCES[dtype]
    floor = torch.finfo(output_dtype).tiny
    return relative * expected.abs() + (absolute + 2 * off) * value_size + floor


def lse_bounds(expected: torch.Tensor, off: float | torch.Tensor) -> torch.Tensor:
    """How far each lse may be from the exact one, always float32; scores may be off by `off`."""
    absolute, relative = TOLERANCES[torch.float32]
    return relative * expected.abs() + absolute + off
