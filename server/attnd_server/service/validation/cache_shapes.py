"""A cache that somebody asks for: its layer groups, its lease and its name."""

from __future__ import annotations

import math
from typing import Literal

from attnd.errors import InvalidRequest
from attnd.v1 import cache_pb2
from attnd_server.attention.config import AttentionConfig
from attnd_server.config import ServerConfig
from attnd_server.kv.cache_shape import COMMON, MAX_LAYERS, CacheShape, check_layers
from attnd_server.service.validation.arrays import INT32, refuse, required, view
from attnd_server.service.validation.caches import cache_config

MAX_NAME_CHARACTERS = 128
MAX_KEY_BYTES = 64
# Of CacheConfig and of LayerGroup, with equal names.
_NUMBERS = ("num_kv_heads", "head_dim", "head_dim_v", "page_size", "num_pages", "kv_dtype", "v_dtype")
_TENSORS: tuple[Literal["k_scales", "v_scales"], ...] = ("k_scales", "v_scales")


def create_cache(
    message: cache_pb2.CreateCacheRequest, config: ServerConfig
) -> tuple[CacheShape[AttentionConfig], float, str]:
    """Layer groups, lease in seconds and name of a cache to be created.

    Raises:
        InvalidRequest: the configuration is absent or wrong, or the lease, the name or the key is out of its range.
    """
    shape = cache_shape(required(message, "config"))
    ttl_s = message.ttl_s or config.default_ttl_s
    if not (math.isfinite(ttl_s) and 1.0 <= ttl_s <= config.max_ttl_s):
        refuse("ttl_s", f"ttl_s is {ttl_s:g}, but must be 0 or 1..{config.max_ttl_s:g} seconds")
    if len(message.name) > MAX_NAME_CHARACTERS:
        rule = f"at most {MAX_NAME_CHARACTERS}"
        refuse("name", f"name has {len(message.name)} characters, but must have {rule}")
    if len(message.key) > MAX_KEY_BYTES:
        refuse("key", f"key has {len(message.key)} bytes, but must have at most {MAX_KEY_BYTES}")
    return shape, ttl_s, message.name


def cache_shape(message: cache_pb2.CacheConfig) -> CacheShape[AttentionConfig]:
    """The layer groups of a cache, with every default filled in; one alone where none are given.

    Raises:
        InvalidRequest: see `cache_config`; or a layer is in no group or in several, or a field is given beside groups
            that each of them has.
    """
    if not message.groups:
        return CacheShape.of(cache_config(message))
    _refuse_given_twice(message)
    if not 1 <= message.num_layers <= MAX_LAYERS:
        refuse("num_layers", f"num_layers is {message.num_layers}, but must be 1..{MAX_LAYERS}")
    if len(message.groups) > message.num_layers:
        rule = f"must have at most {message.num_layers}, as many as layers"
        refuse("groups", f"groups has {len(message.groups)} elements, but {rule}")
    layers = [_layers(group, f"groups[{index}].layers", message) for index, group in enumerate(message.groups)]
    check_layers(layers, message.num_layers)
    configs = [_config(message, index, len(numbers)) for index, numbers in enumerate(layers)]
    return CacheShape(tuple(configs), tuple(map(tuple, layers)))


def _refuse_given_twice(message: cache_pb2.CacheConfig) -> None:
    rule = "must be absent where groups are given"
    for field in _NUMBERS:
        if getattr(message, field):
            refuse(field, f"{field} is {getattr(message, field)}, but {rule}")
    for field in _TENSORS:
        if message.HasField(field):
            refuse(field, f"{field} is given, but {rule}")


def _layers(group: cache_pb2.LayerGroup, field: str, message: cache_pb2.CacheConfig) -> list[int]:
    if not group.HasField("layers"):
        refuse(field, f"{field} is absent, but must be given")
    values = view(group.layers, field, INT32, ("num_layers",))
    if len(values) > message.num_layers:
        rule = f"must have at most {message.num_layers}, the layers of the cache"
        refuse(field, f"{field} has {len(values)} elements, but {rule}")
    layers: list[int] = values.tolist()
    return layers


def _config(message: cache_pb2.CacheConfig, index: int, num_layers: int) -> AttentionConfig:
    """The geometry of a group: that of a cache with its layers alone."""
    group = message.groups[index]
    alone = cache_pb2.CacheConfig(
        num_layers=num_layers,
        **{field: getattr(message, field) for field in COMMON if field != "kv_split"},
        kv_split=message.kv_split if message.HasField("kv_split") else None,
        **{field: getattr(group, field) for field in _NUMBERS},
        **{field: getattr(group, field) for field in _TENSORS if group.HasField(field)},
    )
    try:
        return cache_config(alone, group.window, group.latent)
    except InvalidRequest as error:
        if error.field.partition(".")[0] in COMMON:
            raise
        raise InvalidRequest(f"groups[{index}].{error}", field=f"groups[{index}].{error.field}") from None
