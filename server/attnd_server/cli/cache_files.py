"""A cache to a snapshot and back through the client, as anybody can who may use it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import attnd
from attnd.protocol.tensors import DTYPES, ITEM_SIZES, Array
from attnd_server.attention.geometry import Geometry
from attnd_server.cli.cache_pages import pages_of, refuse_if_inexact, slots_of, tokens_of
from attnd_server.cli.cache_shapes import create, shape_of
from attnd_server.kv.snapshots.folder import TENSORS, open_regular, read_manifest, refused, write_folder
from attnd_server.kv.snapshots.manifest import Manifest
from attnd_server.kv.snapshots.page_ids import TensorFileRefused, page_bytes, page_ids
from attnd_server.kv.snapshots.tensor_layout import CHUNK_BYTES, Part, TensorLayout

Advance = Callable[[int, int], None]
"""Is told how many bytes more are done, and how many there are in all."""


def export_cache(client: attnd.Client, cache_id: str, target: Path, advance: Advance) -> Manifest:
    """Writes a cache to the folder `target`. Whoever uses it had better not store meanwhile.

    Args:
        client: of the principal whose cache it is.
        cache_id: hexadecimal digits.
        target: must not be there, or be an empty folder.
        advance: is told how far it is.

    Raises:
        InvalidRequest: `cache_id` is no id, or the cache's FP8 values do not all survive the way.
        AttndError: the server refused, or is away.
        OSError: the folder cannot be written.
    """
    cache = client.open_cache(cache_id)
    info = cache.info()
    shape = shape_of(info.config)
    for config in shape.groups:
        refuse_if_inexact(config)
    pages = [cache.written_pages(group=index) for index in range(len(shape.groups))]
    layout = TensorLayout(shape, tuple(map(len, pages)))

    def write(file: BinaryIO) -> Manifest:
        file.write(layout.header)
        for ids in pages:
            file.write(page_bytes(ids))
        for parts in _of_layers(layout):
            first = parts[0]
            config, ids, layer = shape.groups[first.group], pages[first.group], shape.layers[first.group][first.layer]
            for chunk in _chunks(config, len(ids)):
                tokens = cache.read_kv(layer, slots_of(ids[chunk], config), like=ids)
                for part, array in zip(parts, tokens, strict=False):
                    data = pages_of(array.data, part.is_k, config)
                    file.seek(part.offset + chunk.start * part.page_bytes)
                    file.write(data)
                    advance(len(data), layout.num_bytes)
        file.seek(0)
        return Manifest(
            id=cache.ref.id.hex(),
            epochs=(cache.ref.epoch,),
            principal=None,
            name=info.name,
            ttl_s=info.ttl_s,
            shape=shape,
            num_pages=layout.num_pages,
            num_bytes=layout.num_bytes,
            sha256=_sha256(file),
        )

    return write_folder(target, write)


def import_cache(
    client: attnd.Client, folder: Path, advance: Advance, *, ttl_s: float | None = None, name: str | None = None
) -> attnd.Cache:
    """Leases a cache and stores what is in a snapshot; it ends with its lease unless somebody goes on with it.

    Args:
        client: of the principal whose cache it is to be.
        folder: a snapshot of a server's or of `export_cache`.
        advance: is told how far it is.
        ttl_s: its lease, in seconds; None is the snapshot's.
        name: a label for people; None is the snapshot's.

    Raises:
        SnapshotRefused: the snapshot is not whole or was altered. Nothing was leased.
        AttndError: the server refused, or is away. What was leased is deleted, if it can be.
    """
    manifest, layout = read_manifest(folder)
    shape = manifest.shape
    for config in shape.groups:
        refuse_if_inexact(config)
    with open_regular(folder / TENSORS) as file:
        if (sha256 := _sha256(file)) != manifest.sha256:
            raise refused(folder / TENSORS, f"its sha256 is {sha256}, but must be the manifest's {manifest.sha256}")
        file.seek(0)
        if file.read(len(layout.header)) != layout.header:
            raise refused(folder / TENSORS, "its header is not that of the manifest's geometry")
        try:
            counts = zip(layout.num_pages, shape.groups, strict=True)
            pages = [page_ids(file.read(4 * num_pages), config.num_pages) for num_pages, config in counts]
        except TensorFileRefused as error:
            raise refused(folder / TENSORS, str(error)) from None
        cache = create(client, shape, ttl_s or manifest.ttl_s, manifest.name if name is None else name)
        try:
            for parts in _of_layers(layout):
                first = parts[0]
                config, ids = shape.groups[first.group], pages[first.group]
                for chunk in _chunks(config, len(ids)):
                    tokens = []
                    for part in parts:
                        file.seek(part.offset + chunk.start * part.page_bytes)
                        data = file.read((chunk.stop - chunk.start) * part.page_bytes)
                        advance(len(data), layout.num_bytes)
                        tokens.append(_array(tokens_of(data, part.is_k, config), part.is_k, config))
                    cache.store_kv(shape.layers[first.group][first.layer], slots_of(ids[chunk], config), *tokens)
        except BaseException:
            cache.__exit__(None, None, None)
            raise
    return cache


def _array(data: bytes, is_k: bool, config: Geometry) -> Array:
    row = config.num_kv_heads, config.head_dim if is_k else config.head_dim_v
    dtype = DTYPES[config.dtype]
    return Array(dtype, (len(data) // (row[0] * row[1] * ITEM_SIZES[dtype]), *row), memoryview(data))


def _of_layers(layout: TensorLayout) -> Iterator[list[Part]]:
    """The parts of each layer: K and V, or K alone of a latent one."""
    for _, parts in groupby(layout.parts, key=lambda part: (part.group, part.layer)):
        yield list(parts)


def _chunks(config: Geometry, num_pages: int) -> Iterator[slice]:
    """Pages of a layer by the megabytes."""
    step = max(1, CHUNK_BYTES * config.num_layers * config.num_pages // config.num_bytes)
    return (slice(first, min(first + step, num_pages)) for first in range(0, num_pages, step))


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while data := file.read(CHUNK_BYTES):
        digest.update(data)
    return digest.hexdigest()
