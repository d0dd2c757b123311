"""The geometry of a cache as the wire says it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from attnd.protocol.packing import float32_tensor, int32_tensor
from attnd.protocol.tensors import KV_DTYPES
from attnd.v1 import backend_pb2, cache_pb2, tensor_pb2
from attnd_server.attention.config import AttentionConfig
from attnd_server.kv.cache_shape import CacheShape


def config_message(shape: CacheShape[AttentionConfig]) -> cache_pb2.CacheConfig:
    """That of a cache, with every default filled in: as it was asked for, with layer groups or without."""
    config = shape.common
    message = cache_pb2.CacheConfig(
        num_layers=shape.num_layers,
        dtype=_dtype(config.dtype),
        layout=cache_pb2.Layout.Value(f"LAYOUT_{config.layout.name}"),
        backend=backend_pb2.Backend.Value(f"BACKEND_{config.backend.name}"),
        precision=cache_pb2.Precision.Value(f"PRECISION_{config.precision.name}"),
        kv_split=cache_pb2.KvSplit(**asdict(config.kv_split)),
    )
    if shape.is_flat:
        message.MergeFrom(cache_pb2.CacheConfig(**_geometry(config)))
        return message
    for group, layers in zip(shape.groups, shape.layers, strict=True):
        geometry, numbers = _geometry(group), int32_tensor(layers, "layers")
        message.groups.add(layers=numbers, window=group.window, latent=group.latent, **geometry)
    return message


def _geometry(config: AttentionConfig) -> dict[str, Any]:
    """What a group has of its own, by fields that messages of caches and of groups have alike."""
    return {
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "head_dim_v": config.head_dim_v,
        "page_size": config.page_size,
        "num_pages": config.num_pages,
        "kv_dtype": _dtype(config.kv_dtype),
        "v_dtype": _dtype(config.v_dtype) if config.v_dtype != config.kv_dtype else None,
        "k_scales": float32_tensor(config.k_scales, "k_scales") if config.k_is_quantised else None,
        "v_scales": float32_tensor(config.v_scales, "v_scales") if config.v_is_quantised else None,
    }


def _dtype(dtype: object) -> tensor_pb2.Dtype.ValueType:
    return KV_DTYPES[str(dtype).removeprefix("torch.")]
