"""Pages of a snapshot as the tokens that calls carry, and back, in plain Python.

Calls carry K and V in the cache's dtype and by token; a snapshot has the bytes of pages. Between the two lies what a
server does when it stores and reads, on a few pages at a time. FP8 is read as its value times a scale and stored as
that divided by the scale: where that gives every value back, the bits are the same (a NaN stays a NaN), else it is
refused. Bytes are moved by slices with a step, which Python copies as fast as the network brings them.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cache

from attnd.errors import InvalidRequest
from attnd_server.attention import fp8
from attnd_server.attention.geometry import DISTINCT_LANES, FP8_NAME, ITEM_SIZES, Geometry, Layout, dtype_name

# array's letter of a word of so many bytes.
_WORDS = {1: "B", 2: "H", 4: "I", 8: "Q"}


def refuse_if_inexact(config: Geometry) -> None:
    """Raises InvalidRequest where some FP8 value does not come back from a call's dtype."""
    dtype = dtype_name(config.dtype)
    fp8_scales = {"k_scales": config.k_scales} if config.k_is_quantised else {}
    if config.v_is_quantised and not config.latent:
        fp8_scales["v_scales"] = config.v_scales
    for name, scales in fp8_scales.items():
        for head, scale in enumerate(scales):
            values = [fp8.decoded(fp8.encoded(code, scale, dtype), dtype) for code in range(256)]
            again = [fp8.stored(value, scale) for value in values]
            if any(code != back for code, back in enumerate(again) if code & fp8.NAN != fp8.NAN):
                raise InvalidRequest(
                    f"{name}[{head}] is {scale:g}, but must let every FP8 value times it be told from others in "
                    f"{dtype}, in which calls carry it",
                    field=name,
                )


def slots_of(pages: Sequence[int], config: Geometry) -> array[int]:
    """The slots of pages, in order, in the fewest bytes."""
    slots = array("i" if config.num_slots < 1 << 31 else "q")
    for page in pages:
        slots.extend(range(page * config.page_size, (page + 1) * config.page_size))
    return slots


def pages_of(tokens: bytes | memoryview, is_k: bool, config: Geometry) -> bytes:
    """The bytes of whole pages with these tokens, of K or of V."""
    data = bytes(tokens)
    if _is_quantised(is_k, config):
        data = _quantised(data, is_k, config)
    return _moved(data, is_k, config, to_pages=True)


def tokens_of(pages: bytes, is_k: bool, config: Geometry) -> bytes:
    """The tokens of whole pages with these bytes, of K or of V."""
    data = _moved(pages, is_k, config, to_pages=False)
    return _dequantised(data, is_k, config) if _is_quantised(is_k, config) else data


def _is_quantised(is_k: bool, config: Geometry) -> bool:
    return config.k_is_quantised if is_k else config.v_is_quantised


def _moved(data: bytes, is_k: bool, config: Geometry, *, to_pages: bool) -> bytes:
    """From token order to the layout of pages, or back; the two are alike in the unified one."""
    if config.layout is Layout.UNIFIED or not data:
        return data
    item, size = ITEM_SIZES[config.kv_dtype if is_k else config.v_dtype], config.page_size
    # In a page the two orders of units are [page_size, num_units] and [num_units, page_size]: of K a unit is the lanes
    # of a group, of V an element.
    unit = DISTINCT_LANES * item if is_k else item
    num_units = config.num_kv_heads * (config.head_dim // DISTINCT_LANES if is_k else config.head_dim_v)
    word = min(unit, 8)
    parts = unit // word  # words of a unit
    row = num_units * parts  # words of a token
    source, target = array(_WORDS[word], data), array(_WORDS[word], bytes(len(data)))
    for slot in range(size):  # of every page: its units lie in steps that go on from page to page
        rows = range(slot * row, len(source), size * row)
        steps = [slice(slot * parts + part, None, size * parts) for part in range(parts)]
        if to_pages:
            tokens = array(_WORDS[word], b"".join(source[first : first + row].tobytes() for first in rows))
            for part, step in enumerate(steps):
                target[step] = tokens[part::parts]
            continue
        tokens = array(_WORDS[word], bytes(len(rows) * row * word))
        for part, step in enumerate(steps):
            tokens[part::parts] = source[step]
        for index, first in enumerate(rows):
            target[first : first + row] = tokens[index * row : (index + 1) * row]
    return target.tobytes()


def _quantised(data: bytes, is_k: bool, config: Geometry) -> bytes:
    """Tokens in the dtype of calls as FP8."""
    item = ITEM_SIZES[config.dtype]
    words = array(_WORDS[item], data)
    scales, row = _scales(is_k, config)
    target = bytearray(len(words))
    for first in range(0, len(words), row):
        codes = _codes(scales[first // row % len(scales)], config.dtype)
        target[first : first + row] = bytes(map(codes.__getitem__, words[first : first + row]))
    return bytes(target)


def _dequantised(data: bytes, is_k: bool, config: Geometry) -> bytes:
    """FP8 tokens in the dtype of calls."""
    item = ITEM_SIZES[config.dtype]
    scales, row = _scales(is_k, config)
    target = bytearray(len(data) * item)
    for first in range(0, len(data), row):
        planes = _planes(scales[first // row % len(scales)], config.dtype)
        codes = data[first : first + row]
        for index, plane in enumerate(planes):
            target[first * item + index : (first + len(codes)) * item : item] = codes.translate(plane)
    return bytes(target)


def _scales(is_k: bool, config: Geometry) -> tuple[tuple[float, ...], int]:
    """The scales, and how many elements in a row have the same: those of a head, or all that there are."""
    scales = config.k_scales if is_k else config.v_scales
    head_dim = config.head_dim if is_k else config.head_dim_v
    return scales, head_dim if len(scales) > 1 else 1 << 20


class _Codes(dict[int, int]):
    """FP8 codes by the bits of what they are read as."""

    def __init__(self, scale: float, dtype: str) -> None:
        bits = (int.from_bytes(fp8.encoded(code, scale, dtype), "little") for code in range(256))
        super().__init__(zip(bits, range(256), strict=True))
        self._dtype = dtype

    def __missing__(self, bits: int) -> int:
        """Of a NaN with other bits, which is all that is left."""
        value = fp8.decoded(bits.to_bytes(ITEM_SIZES[self._dtype], "little"), self._dtype)
        if value == value:
            raise InvalidRequest(f"a value is {value:g}, but must be one that {FP8_NAME} pages hold", field="kv")
        return fp8.NAN | (0x80 if bits >> (8 * ITEM_SIZES[self._dtype] - 1) else 0)


@cache
def _codes(scale: float, dtype: str) -> _Codes:
    return _Codes(scale, dtype)


@cache
def _planes(scale: float, dtype: str) -> tuple[bytes, ...]:
    """For each byte of an element, from the least significant, the table of it by the code."""
    elements = [fp8.encoded(code, scale, dtype) for code in range(256)]
    return tuple(map(bytes, zip(*elements, strict=True)))
