"""The ids of pages as a file has them, int32, little-endian."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from operator import lt


class TensorFileRefused(ValueError):
    """A file is not what it must be; the message says what."""


def page_bytes(pages: Sequence[int]) -> bytes:
    """Ids of pages as the file has them."""
    return _swapped(array("i", pages)).tobytes()


def page_ids(data: bytes | bytearray, num_pages: int) -> array[int]:
    """Ids of pages that the file has, rising.

    Raises:
        TensorFileRefused: they do not rise, or the cache has no such pages.
    """
    pages = array("i")
    pages.frombytes(data)
    pages = _swapped(pages)
    if pages and (pages[0] < 0 or pages[-1] >= num_pages or not all(map(lt, pages, pages[1:]))):
        raise TensorFileRefused(f"pages must rise within 0..{num_pages - 1}")
    return pages


def _swapped(pages: array[int]) -> array[int]:
    if sys.byteorder == "big":
        pages.byteswap()
    return pages
