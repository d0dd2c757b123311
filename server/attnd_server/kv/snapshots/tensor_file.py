"""The pages of a cache as a safetensors file, written and read a few megabytes at a time.

The format (https://huggingface.co/docs/safetensors) is 8 bytes with the length of a header, the header in JSON, and the
tensors' bytes one after the other. Here these are `pages`, the ids of the pages that were written to, and for each
layer `layers.N.k` and `layers.N.v`, those pages of it. Whoever has the library can look into the file. It is not used
here, because it wants whole tensors, and because what is checked must be just what is loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import torch

from attnd_server.attention.config import AttentionConfig

# Bytes that are in memory at one time.
CHUNK_BYTES = 16 << 20

log = logging.getLogger(__name__)

# The format's names.
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}


class TensorFileRefused(ValueError):
    """A file is not what it must be; the message says what."""


class Part(NamedTuple):
    """K or V of a layer.

    Attributes:
        layer: which.
        is_k: K, or V.
        offset: where it begins in the file.
        page_bytes: bytes of one page.
    """

    layer: int
    is_k: bool
    offset: int
    page_bytes: int


class Progress:
    """Says in the log now and then how far a long thing is."""

    PERIOD_S = 5.0

    def __init__(self, event: str, num_bytes: int, **fields: object) -> None:
        """Of `event`, which comes to `num_bytes`; `fields` go into the log with it."""
        self._event, self._num_bytes, self._fields = event, num_bytes, fields
        self._done = 0
        self._said = time.monotonic()

    def advance(self, num_bytes: int) -> None:
        """So many more are done."""
        self._done += num_bytes
        now = time.monotonic()
        if now - self._said >= self.PERIOD_S:
            self._said = now
            percent = 100 * self._done // max(1, self._num_bytes)
            log.info(self._event, extra={**self._fields, "num_bytes": self._num_bytes, "percent": percent})


class TensorLayout:
    """Where everything lies in the file of a geometry and a number of pages.

    Attributes:
        header: the file's first bytes.
        num_bytes: of the file.
        num_pages: in it.
        parts: K and V of each layer, in the order of the file.
    """

    def __init__(self, config: AttentionConfig, num_pages: int) -> None:
        """Of `num_pages` pages of a cache."""
        self.num_pages = num_pages
        dtype = config.kv_dtype or config.dtype
        tensors: dict[str, object] = {"pages": _tensor("I32", (num_pages,), 0, 4 * num_pages)}
        parts: list[Part] = []
        end = 4 * num_pages
        shapes = {True: config.k_shape[1:], False: config.v_shape[1:]}
        for layer in range(config.num_layers):
            for is_k, shape in shapes.items():
                page_bytes = math.prod(shape) * dtype.itemsize
                begin, end = end, end + num_pages * page_bytes
                name = f"layers.{layer}.{'k' if is_k else 'v'}"
                tensors[name] = _tensor(_DTYPES[dtype], (num_pages, *shape), begin, end)
                parts.append(Part(layer, is_k, begin, page_bytes))
        text = json.dumps(tensors, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that tensors are aligned
        self.header = len(text).to_bytes(8, "little") + text
        self.num_bytes = len(self.header) + end
        self.parts = [part._replace(offset=len(self.header) + part.offset) for part in parts]

    def chunks(self, part: Part) -> Iterator[slice]:
        """The pages of a part by the megabytes."""
        step = max(1, CHUNK_BYTES // part.page_bytes)
        return (slice(first, min(first + step, self.num_pages)) for first in range(0, self.num_pages, step))


def _tensor(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def write_tensors(
    file: BinaryIO,
    layout: TensorLayout,
    pages: torch.Tensor,
    read: Callable[[Part, torch.Tensor], torch.Tensor],
    progress: Progress,
) -> str:
    """Writes the whole file.

    Args:
        file: empty.
        layout: of it.
        pages: int64 `[layout.num_pages]`, their ids, rising.
        read: the bytes of some pages, uint8 `[num, part.page_bytes]` on the host.
        progress: is told.

    Returns:
        The file's SHA-256 in hexadecimal digits.
    """
    digest = hashlib.sha256()

    def put(data: bytes | memoryview) -> None:
        digest.update(data)
        file.write(data)
        progress.advance(len(data))

    put(layout.header)
    put(page_bytes(pages))
    for part in layout.parts:
        for chunk in layout.chunks(part):
            put(_buffer(read(part, pages[chunk])))
    return digest.hexdigest()


def read_tensors(
    file: BinaryIO,
    layout: TensorLayout,
    config: AttentionConfig,
    store: Callable[[Part, torch.Tensor, torch.Tensor], None],
    progress: Progress,
) -> str:
    """Reads the whole file once. Nobody may see what was stored before its checksum was compared.

    Args:
        file: at its beginning.
        layout: of it.
        config: of the cache.
        store: gets ids of pages, int64 `[num]`, and their bytes, uint8 `[num, part.page_bytes]`, used again later.
        progress: is told.

    Returns:
        The file's SHA-256 in hexadecimal digits.

    Raises:
        TensorFileRefused: it is not as `layout` has it, or not whole.
    """
    digest = hashlib.sha256()

    def take(buffer: bytearray | memoryview) -> None:
        view = memoryview(buffer)
        filled = 0
        while filled < len(view):
            count = file.readinto(view[filled:])  # type: ignore[attr-defined]  # BinaryIO has it not, files do
            if not count:
                raise TensorFileRefused("it ends early")
            filled += count
        digest.update(view)
        progress.advance(len(view))

    header = bytearray(len(layout.header))
    take(header)
    if header != layout.header:
        raise TensorFileRefused("its header is not that of the manifest's geometry")
    listed = bytearray(4 * layout.num_pages)
    take(listed)
    pages = page_ids(listed, config.num_pages)
    memory = bytearray(max((_most_bytes(layout, part) for part in layout.parts), default=0))
    for part in layout.parts:
        for chunk in layout.chunks(part):
            ids = pages[chunk]
            view = memoryview(memory)[: len(ids) * part.page_bytes]
            take(view)
            store(part, ids, torch.frombuffer(view, dtype=torch.uint8).view(len(ids), part.page_bytes))
    return digest.hexdigest()


def page_bytes(pages: torch.Tensor) -> bytes:
    """Ids of pages as the file has them."""
    return pages.to(torch.int32).numpy().astype("<i4").tobytes()


def page_ids(data: bytes | bytearray, num_pages: int) -> torch.Tensor:
    """Ids of pages that the file has: int64, rising.

    Raises:
        TensorFileRefused: they do not rise, or the cache has no such pages.
    """
    if not data:
        return torch.empty(0, dtype=torch.int64)
    pages = torch.frombuffer(bytearray(data), dtype=torch.int32).to(torch.int64)
    if pages[0] < 0 or pages[-1] >= num_pages or (pages.diff() <= 0).any():
        raise TensorFileRefused(f"pages must rise within 0..{num_pages - 1}")
    return pages


def _most_bytes(layout: TensorLayout, part: Part) -> int:
    return min(layout.num_pages, max(1, CHUNK_BYTES // part.page_bytes)) * part.page_bytes


def _buffer(data: torch.Tensor) -> memoryview:
    return data.contiguous().numpy().data.cast("B")
