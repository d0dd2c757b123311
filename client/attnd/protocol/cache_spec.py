"""What a cache is to be: the arguments of `create_cache`, once for both clients."""

from __future__ import annotations

import functools
import inspect
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

from attnd.errors import InvalidRequest
from attnd.protocol.kv_split import KVSplit
from attnd.protocol.layer_groups import LayerGroup, kv_dtype_number, scales_tensor
from attnd.protocol.packing import uint32
from attnd.protocol.tensors import dtype_of
from attnd.v1 import backend_pb2, cache_pb2


@dataclass(frozen=True, kw_only=True, eq=False)
class CacheSpec:
    """Geometry and lease of a cache.

    Attributes:
        num_layers: layers of the model; None: as many as `groups` names.
        num_kv_heads: KV heads per layer. None, as head_dim and num_pages may be: each of `groups` has its own.
        head_dim: elements per head of q and k, a multiple of 8.
        num_pages: pages of the cache; page ids are 0..num_pages-1.
        page_size: token slots per page.
        head_dim_v: elements per head of v and of the output; 0 means head_dim.
        dtype: "float32", "float16", "bfloat16" or torch's own; of q, k, v.
        layout: "unified" or "distinct".
        backend: "auto", or the name of the backend that calls use.
        precision: "auto", "fp32", "fp16" or "bf16": the type in which backends multiply.
        kv_dtype: "float8_e4m3fn" for pages of one byte per element, or None: pages have `dtype`.
        k_scales: of "float8_e4m3fn" pages, one number or one for each KV head: K is stored as k / scale, clamped to
            -448..448 and rounded, and read as the stored value times scale. None is 1.
        v_scales: likewise for V.
        kv_split: how the KV of a request is cut into chunks, and whether output bits may depend on the batch; None is
            automatic.
        ttl_s: seconds after the client's last sign of life when the server frees the cache.
        name: a label for people.
        renew: whether the client renews the lease in the background for as long as this process lives and the client is
            open, however idle it is. Without it only steps, calls, stores and the cache's `renew` do.
        v_dtype: of V's pages, where it is another than K's: "float8_e4m3fn", or `dtype`. None: `kv_dtype`.
        groups: layers that differ, and have page ids and page tables of their own; None: all layers are alike. What a
            group leaves out it takes from the fields here.
    """

    num_layers: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    num_pages: int | None = None
    page_size: int = 16
    head_dim_v: int = 0
    dtype: object = "bfloat16"
    layout: str = "unified"
    backend: str = "auto"
    precision: str = "auto"
    kv_dtype: object = None
    k_scales: Any = None
    v_scales: Any = None
    kv_split: KVSplit | None = None
    ttl_s: float = 60.0
    name: str = ""
    renew: bool = True
    v_dtype: object = None
    groups: Sequence[LayerGroup] | None = None

    def to_message(self) -> cache_pb2.CreateCacheRequest:
        """The request of CreateCache. It may be sent twice, and creates one cache.

        Raises:
            InvalidRequest: a field holds what the message cannot carry. Ranges are left to the server.
        """
        key = secrets.token_bytes(16)
        return cache_pb2.CreateCacheRequest(config=self._config(), ttl_s=self.ttl_s, name=self.name, key=key)

    def to_request(self) -> bytes:
        """The bytes of `to_message`."""
        return self.to_message().SerializeToString()

    def _config(self) -> cache_pb2.CacheConfig:
        config = self._geometry() if self.groups is None else self._grouped(self.groups)
        choices = cache_pb2.CacheConfig(
            dtype=dtype_of(self.dtype),
            layout=cache_pb2.Layout.ValueType(_number(cache_pb2.Layout, "LAYOUT", self.layout, "layout")),
            backend=backend_pb2.Backend.ValueType(_number(backend_pb2.Backend, "BACKEND", self.backend, "backend")),
            precision=cache_pb2.Precision.ValueType(
                _number(cache_pb2.Precision, "PRECISION", self.precision, "precision")
            ),
            kv_split=None if self.kv_split is None else self.kv_split.to_message(),
        )
        config.MergeFrom(choices)
        return config

    def _geometry(self) -> cache_pb2.CacheConfig:
        """That of layers that are all alike."""
        counts: dict[str, Any] = {}
        for field in ("num_layers", "num_kv_heads", "head_dim", "head_dim_v", "page_size", "num_pages"):
            value = getattr(self, field)
            if value is None:
                raise InvalidRequest(f"{field} is None, but must be given where groups is not", field=field)
            if not 0 <= value < 1 << 32:
                raise InvalidRequest(f"{field} is {value}, but must be 0..{(1 << 32) - 1}", field=field)
            counts[field] = value
        return cache_pb2.CacheConfig(
            **counts,
            kv_dtype=kv_dtype_number(self.kv_dtype, "kv_dtype"),
            v_dtype=kv_dtype_number(self.v_dtype, "v_dtype"),
            k_scales=scales_tensor(self.k_scales, "k_scales"),
            v_scales=scales_tensor(self.v_scales, "v_scales"),
        )

    def _grouped(self, groups: Sequence[LayerGroup]) -> cache_pb2.CacheConfig:
        """That of layers which differ."""
        own = LayerGroup(
            (),
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim_v,
            page_size=self.page_size,
            num_pages=self.num_pages,
            kv_dtype=self.kv_dtype,
            v_dtype=self.v_dtype,
            k_scales=self.k_scales,
            v_scales=self.v_scales,
        )
        messages = []
        for index, group in enumerate(groups):
            field = f"groups[{index}]"
            if not isinstance(group, LayerGroup):
                raise InvalidRequest(f"{field} is a {type(group).__name__}, but must be a LayerGroup", field=field)
            messages.append(group.to_message(own, field))
        if not messages:
            raise InvalidRequest("groups has 0 elements, but must have one, or be None", field="groups")
        named = sum(math.prod(message.layers.shape) for message in messages)
        num_layers = named if self.num_layers is None else uint32(self.num_layers, "num_layers")
        return cache_pb2.CacheConfig(num_layers=num_layers, groups=messages)


def _number(enum: Any, prefix: str, name: str, field: str) -> int:
    """The value of an enum by the short name that people type, such as "auto" for BACKEND_AUTO."""
    try:
        return int(enum.Value(f"{prefix}_{name.upper()}"))
    except ValueError:
        names = ", ".join(key.removeprefix(f"{prefix}_").lower() for key in enum.keys()[1:])
        raise InvalidRequest(f"{field} is {name!r}, but must be one of {names}", field=field) from None


Fields = ParamSpec("Fields")
Owner = TypeVar("Owner")
Result = TypeVar("Result")


def takes_fields_of(
    spec: Callable[Fields, CacheSpec],
) -> Callable[[Callable[[Owner, CacheSpec], Result]], Callable[Concatenate[Owner, Fields], Result]]:
    """Lets a method that takes a CacheSpec be called with its fields, which signature, types and help then name."""

    def decorate(method: Callable[[Owner, CacheSpec], Result]) -> Callable[Concatenate[Owner, Fields], Result]:
        @functools.wraps(method)
        def with_fields(owner: Owner, /, *args: Fields.args, **kwargs: Fields.kwargs) -> Result:
            return method(owner, spec(*args, **kwargs))

        fields, own = inspect.signature(spec), inspect.signature(method)
        parameters = [own.parameters["self"], *fields.parameters.values()]
        with_fields.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        attributes = inspect.cleandoc(spec.__doc__ or "").partition("Attributes:")[2]
        with_fields.__doc__ = inspect.cleandoc(method.__doc__ or "") + f"\n\nArgs:{attributes}"
        return with_fields

    return decorate
