"""The arithmetic of `divide`, against Python's. What kernels make of it: the tests of each backend."""

from __future__ import annotations

import pytest

from tests import interpreter

pytest.importorskip("triton", reason="triton is not installed")

with interpreter.interpreter():  # or other tests would find its device function compiled
    from attnd_server.attention.kernels.division import SHIFT, inverse


@pytest.mark.parametrize("divisor", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 28, 71, 96, 128])
def test_quotients_are_those_of_integers(divisor: int) -> None:
    end = min((1 << SHIFT) // divisor, divisor << 24, 1 << 31)
    last = (end - 1) // divisor
    for multiple in {0, 1, 2, 7, 1000, last // 3, last // 2, last - 1, last}:
        for number in range(max(0, multiple * divisor - 2), min(end, multiple * divisor + 3)):
            product = number * inverse(divisor)
            assert product < 1 << 63
            assert product >> SHIFT == number // divisor
