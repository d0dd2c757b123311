"""Head dims of the layers of a cache, as the server says that it made it."""

from __future__ import annotations

from attnd.v1 import cache_pb2


def most_head_dim_v(config: cache_pb2.CacheConfig) -> int:
    """The most elements per head of an output that a cache's layers have."""
    groups = config.groups or [config]
    return max(group.head_dim_v or group.head_dim for group in groups)


def head_dim_v_of(config: cache_pb2.CacheConfig, layer: int) -> int:
    """Elements per head of an output of a layer; 0: the cache has no such layer."""
    if not config.groups:
        return config.head_dim_v or config.head_dim
    for group in config.groups:
        if layer in memoryview(group.layers.data).cast("i"):
            return group.head_dim_v or group.head_dim
    return 0


def only_group(config: cache_pb2.CacheConfig) -> cache_pb2.CacheConfig | cache_pb2.LayerGroup | None:
    """What has the geometry of all layers of a cache; None: they differ, or have no V of their own."""
    if not config.groups:
        return config
    group = config.groups[0]
    return None if len(config.groups) > 1 or group.latent else group
