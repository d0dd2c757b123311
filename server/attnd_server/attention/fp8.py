"""FP8 (e4m3fn) in plain Python, as pages have it: what its codes are read as, and which code a value is stored as.

A page's value is read as the code's number times a scale, in float32, rounded to the type of calls; it is stored as
that divided by the scale, in float32, rounded to the nearest code. See `attnd_server.attention.kernels.pages`.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_left

# Of a NaN: all ones but for the sign.
NAN = 0x7F
_MAX_CODE = 0x7E


def number(code: int) -> float:
    """What a code of 8 bits is: a sign, 4 bits of exponent, 3 of mantissa, no infinities."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 3) & 15, code & 7
    if code & 0x7F == NAN:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


_NUMBERS = [number(code) for code in range(_MAX_CODE + 1)]  # rising


def stored(value: float, scale: float) -> int:
    """The code as which `value` is stored."""
    if math.isnan(value):
        return NAN
    sign = 0x80 if math.copysign(1.0, value) < 0 else 0
    quotient = min(_float32(abs(value) / scale), _NUMBERS[-1])
    code = bisect_left(_NUMBERS, quotient)
    if code and quotient < _NUMBERS[code]:
        below, above = quotient - _NUMBERS[code - 1], _NUMBERS[code] - quotient
        if below < above or (below == above and code % 2):  # to even
            code -= 1
    return sign | code


def encoded(code: int, scale: float, dtype: str) -> bytes:
    """The bytes, little-endian, of what a code is read as in the dtype of calls."""
    value = _float32(number(code) * scale)
    if dtype == "float32":
        return struct.pack("<f", value)
    if dtype == "float16":
        try:
            return struct.pack("<e", value)
        except OverflowError:
            return struct.pack("<e", math.copysign(math.inf, value))
    bits = int.from_bytes(struct.pack("<f", value), "little")
    if not math.isnan(value):
        bits += 0x7FFF + (bits >> 16 & 1)  # to the nearest, ties to even
    return (bits >> 16).to_bytes(2, "little")


def decoded(data: bytes, dtype: str) -> float:
    """The number whose bytes in that dtype, little-endian, these are."""
    if dtype == "bfloat16":
        data = b"\0\0" + data
    value: float = struct.unpack("<e" if dtype == "float16" else "<f", data)[0]
    return value


def _float32(value: float) -> float:
    """The nearest float32; infinite beyond the largest."""
    try:
        rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded
