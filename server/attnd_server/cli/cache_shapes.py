"""The layer groups of a cache as a server tells them, and as one is asked for that has the same."""

from __future__ import annotations

from typing import Any

import attnd
from attnd.protocol.tensors import KV_DTYPES
from attnd.v1 import backend_pb2, cache_pb2
from attnd_server.attention.geometry import AttentionBackend, Geometry, KVSplitRule, Layout, PrecisionMode
from attnd_server.cli.texts import enum_name
from attnd_server.kv.cache_shape import CacheShape


def shape_of(config: cache_pb2.CacheConfig) -> CacheShape[Geometry]:
    """That of a cache, as a server tells it.

    Raises:
        InvalidRequest: the server has what this version of attnd does not know.
    """
    if not config.groups:
        return CacheShape.of(_geometry(config, config, config.num_layers))
    layers = [tuple(memoryview(group.layers.data).cast("i")) for group in config.groups]
    return CacheShape(
        tuple(
            _geometry(config, group, len(numbers), window=group.window, latent=group.latent)
            for group, numbers in zip(config.groups, layers, strict=True)
        ),
        tuple(layers),
    )


def _geometry(
    config: cache_pb2.CacheConfig, own: cache_pb2.CacheConfig | cache_pb2.LayerGroup, num_layers: int, **more: Any
) -> Geometry:
    """Of layers that have their `own` fields, and those that all layers have in common."""
    names: dict[int, str] = {number: name for name, number in KV_DTYPES.items()}
    kv_dtype = own.kv_dtype or config.dtype
    v_dtype = own.v_dtype or kv_dtype
    try:
        return Geometry(
            num_layers=num_layers,
            num_kv_heads=own.num_kv_heads,
            head_dim=own.head_dim,
            head_dim_v=own.head_dim_v,
            page_size=own.page_size,
            num_pages=own.num_pages,
            dtype=names[config.dtype],
            kv_dtype=names[kv_dtype],
            v_dtype=names[v_dtype],
            layout=Layout(enum_name(cache_pb2.Layout, config.layout)),
            backend=AttentionBackend(enum_name(backend_pb2.Backend, config.backend)),
            precision=PrecisionMode(enum_name(cache_pb2.Precision, config.precision)),
            kv_split=_kv_split(config.kv_split),
            k_scales=_scales(own.k_scales) if kv_dtype != config.dtype else (1.0,),
            v_scales=_scales(own.v_scales) if v_dtype != config.dtype else (1.0,),
            **more,
        )
    except (KeyError, ValueError) as error:
        if isinstance(error, attnd.InvalidRequest):
            raise
        raise attnd.InvalidRequest(f"config has what attnd {attnd.__version__} does not know: {error}") from None


def _kv_split(message: cache_pb2.KvSplit) -> KVSplitRule:
    is_invariant = message.batch_invariant if message.HasField("batch_invariant") else None
    return KVSplitRule(message.chunk_size, message.max_splits, is_invariant)


def _scales(message: Any) -> tuple[float, ...]:
    return tuple(memoryview(message.data).cast("f")) if message.data else (1.0,)


def create(client: attnd.Client, shape: CacheShape[Geometry], ttl_s: float, name: str) -> attnd.Cache:
    """Leases a cache of a shape."""
    config, split = shape.common, shape.common.kv_split
    common: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "dtype": config.dtype,
        "layout": config.layout.value,
        "backend": config.backend.value,
        "precision": config.precision.value,
        "kv_split": attnd.KVSplit(split.chunk_size, split.max_splits, split.batch_invariant),
        "ttl_s": ttl_s,
        "name": name,
    }
    if shape.is_flat:
        return client.create_cache(**common, **_own(config))
    groups = [
        attnd.LayerGroup(layers, window=group.window, latent=group.latent, **_own(group))
        for group, layers in zip(shape.groups, shape.layers, strict=True)
    ]
    return client.create_cache(**common, groups=groups)


def _own(config: Geometry) -> dict[str, Any]:
    """What layers need not have in common with others."""
    return {
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "head_dim_v": config.head_dim_v,
        "num_pages": config.num_pages,
        "page_size": config.page_size,
        "kv_dtype": config.kv_dtype,
        "v_dtype": config.v_dtype if config.v_dtype != config.kv_dtype else None,
        "k_scales": list(config.k_scales) if config.k_is_quantised else None,
        "v_scales": list(config.v_scales) if config.v_is_quantised else None,
    }
