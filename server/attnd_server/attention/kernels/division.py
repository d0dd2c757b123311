"""Division by numbers that a kernel gets when it is launched, at the price of a multiplication.

A kernel that has a number of heads as a constant divides by it for nothing, and is another kernel for each such number.
"""

from __future__ import annotations

import triton
import triton.language as tl

SHIFT = 39
_SHIFT = tl.constexpr(SHIFT)


def inverse(divisor: int) -> int:
    """What `divide` multiplies with."""
    return (1 << SHIFT) // divisor + 1


@triton.jit
def divide(numbers, inverse):
    """`numbers // divisor` of int32 that are not negative: exact below 2^39 / divisor, and 2^24 times the divisor."""
    return (numbers.to(tl.int64) * inverse >> _SHIFT).to(tl.int32)
