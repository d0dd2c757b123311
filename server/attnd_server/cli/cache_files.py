"""A cache to a snapshot and back through the client, as anybody can who may use it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import attnd
from attnd.protocol.tensors import DTYPES, ITEM_SIZES, KV_DTYPES, Array
from attnd.v1 import backend_pb2, cache_pb2
from attnd_server.attention.geometry import AttentionBackend, Geometry, KVSplitRule, Layout, PrecisionMode
from attnd_server.cli.cache_pages import pages_of, refuse_if_inexact, slots_of, tokens_of
from attnd_server.cli.texts import enum_name
from attnd_server.kv.cache_shape import CacheShape
from attnd_server.kv.snapshots.folder import TENSORS, open_regular, read_manifest, refused, write_folder
from attnd_server.kv.snapshots.manifest import Manifest
from attnd_server.kv.snapshots.page_ids import TensorFileRefused, page_bytes, page_ids
from attnd_server.kv.snapshots.tensor_layout import CHUNK_BYTES, TensorLayout

_NOT_YET = (
    "the cache has layer groups, but must have none to go through a client: a server itself writes and reads snapshots "
    "of them (serve --snapshot-dir)"
)

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
        InvalidRequest: `cache_id` is no id, the cache has layer groups, or its FP8 values do not all survive the way.
        AttndError: the server refused, or is away.
        OSError: the folder cannot be written.
    """
    cache = client.open_cache(cache_id)
    info = cache.info()
    config = geometry(info.config)
    refuse_if_inexact(config)
    pages = cache.written_pages()
    shape = CacheShape.of(config)
    layout = TensorLayout(shape, (len(pages),))

    def write(file: BinaryIO) -> Manifest:
        file.write(layout.header)
        file.write(page_bytes(pages))
        for layer, chunk in _chunks(config, layout):
            tokens = cache.read_kv(layer, slots_of(pages[chunk], config), like=pages)
            for part, array in zip(layout.parts[2 * layer : 2 * layer + 2], tokens, strict=True):
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
            num_pages=(len(pages),),
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
    config = _only(manifest.shape)
    refuse_if_inexact(config)
    with open_regular(folder / TENSORS) as file:
        if (sha256 := _sha256(file)) != manifest.sha256:
            raise refused(folder / TENSORS, f"its sha256 is {sha256}, but must be the manifest's {manifest.sha256}")
        file.seek(0)
        if file.read(len(layout.header)) != layout.header:
            raise refused(folder / TENSORS, "its header is not that of the manifest's geometry")
        try:
            pages = page_ids(file.read(4 * layout.num_pages[0]), config.num_pages)
        except TensorFileRefused as error:
            raise refused(folder / TENSORS, str(error)) from None
        cache = _create(client, config, ttl_s or manifest.ttl_s, manifest.name if name is None else name)
        try:
            for layer, chunk in _chunks(config, layout):
                tokens = []
                for part in layout.parts[2 * layer : 2 * layer + 2]:
                    file.seek(part.offset + chunk.start * part.page_bytes)
                    data = file.read((chunk.stop - chunk.start) * part.page_bytes)
                    advance(len(data), layout.num_bytes)
                    tokens.append(_array(tokens_of(data, part.is_k, config), part.is_k, config))
                cache.store_kv(layer, slots_of(pages[chunk], config), *tokens)
        except BaseException:
            cache.__exit__(None, None, None)
            raise
    return cache


def geometry(config: cache_pb2.CacheConfig) -> Geometry:
    """That of a cache, as a server tells it.

    Raises:
        InvalidRequest: it has layer groups, or the server has what this version of attnd does not know.
    """
    if config.groups:
        raise attnd.InvalidRequest(_NOT_YET, field="config")
    names: dict[int, str] = {number: name for name, number in KV_DTYPES.items()}
    kv_dtype = config.kv_dtype or config.dtype
    v_dtype = config.v_dtype or kv_dtype
    try:
        return Geometry(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            head_dim_v=config.head_dim_v,
            page_size=config.page_size,
            num_pages=config.num_pages,
            dtype=names[config.dtype],
            kv_dtype=names[kv_dtype],
            v_dtype=names[v_dtype],
            layout=Layout(enum_name(cache_pb2.Layout, config.layout)),
            backend=AttentionBackend(enum_name(backend_pb2.Backend, config.backend)),
            precision=PrecisionMode(enum_name(cache_pb2.Precision, config.precision)),
            kv_split=_kv_split(config.kv_split),
            k_scales=_scales(config.k_scales) if kv_dtype != config.dtype else (1.0,),
            v_scales=_scales(config.v_scales) if v_dtype != config.dtype else (1.0,),
        )
    except (KeyError, ValueError) as error:
        if isinstance(error, attnd.InvalidRequest):
            raise
        raise attnd.InvalidRequest(f"config has what attnd {attnd.__version__} does not know: {error}") from None


def _only(shape: CacheShape[Geometry]) -> Geometry:
    """The geometry of all layers. Raises InvalidRequest: they differ."""
    if not shape.is_flat:
        raise attnd.InvalidRequest(_NOT_YET, field="config")
    return shape.common


def _kv_split(message: cache_pb2.KvSplit) -> KVSplitRule:
    is_invariant = message.batch_invariant if message.HasField("batch_invariant") else None
    return KVSplitRule(message.chunk_size, message.max_splits, is_invariant)


def _scales(message: Any) -> tuple[float, ...]:
    return tuple(memoryview(message.data).cast("f")) if message.data else (1.0,)


def _array(data: bytes, is_k: bool, config: Geometry) -> Array:
    row = config.num_kv_heads, config.head_dim if is_k else config.head_dim_v
    dtype = DTYPES[config.dtype]
    return Array(dtype, (len(data) // (row[0] * row[1] * ITEM_SIZES[dtype]), *row), memoryview(data))


def _create(client: attnd.Client, config: Geometry, ttl_s: float, name: str) -> attnd.Cache:
    split = config.kv_split
    return client.create_cache(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        head_dim_v=config.head_dim_v,
        num_pages=config.num_pages,
        page_size=config.page_size,
        dtype=config.dtype,
        layout=config.layout.value,
        backend=config.backend.value,
        precision=config.precision.value,
        kv_dtype=config.kv_dtype,
        v_dtype=config.v_dtype if config.v_dtype != config.kv_dtype else None,
        k_scales=list(config.k_scales) if config.k_is_quantised else None,
        v_scales=list(config.v_scales) if config.v_is_quantised else None,
        kv_split=attnd.KVSplit(split.chunk_size, split.max_splits, split.batch_invariant),
        ttl_s=ttl_s,
        name=name,
    )


def _chunks(config: Geometry, layout: TensorLayout) -> list[tuple[int, slice]]:
    """Layers, and pages of each by the megabytes."""
    step = max(1, CHUNK_BYTES * config.num_layers * config.num_pages // config.num_bytes)
    (num_pages,) = layout.num_pages
    chunks = [slice(first, min(first + step, num_pages)) for first in range(0, num_pages, step)]
    return [(layer, chunk) for layer in range(config.num_layers) for chunk in chunks]


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while data := file.read(CHUNK_BYTES):
        digest.update(data)
    return digest.hexdigest()
