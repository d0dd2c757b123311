"""The pages of a cache as a safetensors file, written and read a few megabytes at a time.

Whoever has the library can look into the file. It is not used here, because it wants whole tensors, and because what is
checked must be just what is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import BinaryIO

import torch

from attnd_server.attention.config import AttentionConfig
from attnd_server.kv.cache_shape import CacheShape
from attnd_server.kv.snapshots.page_ids import TensorFileRefused, page_bytes, page_ids
from attnd_server.kv.snapshots.progress import Progress
from attnd_server.kv.snapshots.tensor_layout import Part, TensorLayout


def write_tensors(
    file: BinaryIO,
    layout: TensorLayout,
    pages: Sequence[torch.Tensor],
    read: Callable[[Part, torch.Tensor], torch.Tensor],
    progress: Progress,
) -> str:
    """Writes the whole file.

    Args:
        file: empty.
        layout: of it.
        pages: of each layer group int64 `[num_pages]`, their ids, rising.
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
    for ids in pages:
        put(page_bytes(ids.tolist()))
    for part in layout.parts:
        for chunk in layout.chunks(part):
            put(_buffer(read(part, pages[part.group][chunk])))
    return digest.hexdigest()


def read_tensors(
    file: BinaryIO,
    layout: TensorLayout,
    shape: CacheShape[AttentionConfig],
    store: Callable[[Part, torch.Tensor, torch.Tensor], None],
    progress: Progress,
) -> str:
    """Reads the whole file once. Nobody may see what was stored before its checksum was compared.

    Args:
        file: at its beginning.
        layout: of it.
        shape: of the cache.
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
    pages = []
    for num_pages, config in zip(layout.num_pages, shape.groups, strict=True):
        listed = bytearray(4 * num_pages)
        take(listed)
        pages.append(torch.tensor(page_ids(listed, config.num_pages), dtype=torch.int64))
    memory = bytearray(max((layout.most_bytes(part) for part in layout.parts), default=0))
    for part in layout.parts:
        for chunk in layout.chunks(part):
            ids = pages[part.group][chunk]
            view = memoryview(memory)[: len(ids) * part.page_bytes]
            take(view)
            store(part, ids, torch.frombuffer(view, dtype=torch.uint8).view(len(ids), part.page_bytes))
    return digest.hexdigest()


def _buffer(data: torch.Tensor) -> memoryview:
    return data.contiguous().numpy().data.cast("B")
