"""Layers of a cache that differ from its others, as a worker asks for them."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

from attnd.errors import InvalidRequest
from attnd.protocol.packing import float32_tensor, int32_tensor, uint32
from attnd.protocol.tensors import KV_DTYPES, dtype_of
from attnd.v1 import cache_pb2, tensor_pb2

_COUNTS = ("num_kv_heads", "head_dim", "head_dim_v", "page_size", "num_pages")


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """Layers of a cache that have geometry, page tables and a window in common.

    A field that is None is the `CacheSpec`'s own. But who gives `kv_dtype` gets neither its `v_dtype` nor its scales,
    and who gives `v_dtype` not its `v_scales`.

    Attributes:
        layers: the layers of the cache that are in it, rising; each layer is in one group.
        num_kv_heads: KV heads per layer.
        head_dim: elements per head of q and k, a multiple of 8.
        head_dim_v: elements per head of v and of the output; 0 means head_dim.
        page_size: token slots per page.
        num_pages: pages of the group; page ids are 0..num_pages-1 of each group.
        kv_dtype: "float8_e4m3fn" for pages of one byte per element, or the CacheSpec's `dtype`.
        v_dtype: likewise of V's pages, where these have another type than K's.
        k_scales: of "float8_e4m3fn" pages of K, one number or one for each KV head.
        v_scales: likewise for V.
        window: tokens of the sliding window that all its layers have; 0: none. What the window hides from all tokens
            still to come is not read: the worker may use its pages again.
        latent: a token's row in the pages is K, and the first `head_dim_v` elements of it are V, as latent attention
            (MLA) has it: calls bring no v, and the group takes no memory for it. num_kv_heads is 1, head_dim may be up
            to 1024, and the layout is "unified".
    """

    layers: Any
    _: KW_ONLY
    num_kv_heads: int | None = None
    head_dim: int | None = None
    head_dim_v: int | None = None
    page_size: int | None = None
    num_pages: int | None = None
    kv_dtype: object = None
    v_dtype: object = None
    k_scales: Any = None
    v_scales: Any = None
    window: int = 0
    latent: bool = False

    def to_message(self, own: LayerGroup, field: str) -> cache_pb2.LayerGroup:
        """The wire's form.

        Args:
            own: what the cache's own fields say.
            field: the group's name in errors.

        Raises:
            InvalidRequest: a field is absent here and there, or holds what the message cannot carry.
        """
        counts = {}
        for name in _COUNTS:
            value = getattr(own if getattr(self, name) is None else self, name)
            if value is None:
                rule = "must be given, here or for the whole cache"
                raise InvalidRequest(f"{field}.{name} is None, but {rule}", field=f"{field}.{name}")
            counts[name] = uint32(value, f"{field}.{name}")
        layers = int32_tensor(self.layers, f"{field}.layers")
        if layers is None:
            raise InvalidRequest(f"{field}.layers is None, but must be given", field=f"{field}.layers")
        # Whose types and scales count, so that scales never meet a type that they were not given for.
        of_k = own if self.kv_dtype is None else self
        of_v = self if self.v_dtype is not None or self.latent else of_k
        return cache_pb2.LayerGroup(
            layers=layers,
            **counts,
            kv_dtype=kv_dtype_number(of_k.kv_dtype, f"{field}.kv_dtype"),
            v_dtype=kv_dtype_number(of_v.v_dtype, f"{field}.v_dtype"),
            k_scales=scales_tensor(_first(self.k_scales, of_k.k_scales), f"{field}.k_scales"),
            v_scales=scales_tensor(_first(self.v_scales, of_v.v_scales), f"{field}.v_scales"),
            window=uint32(self.window, f"{field}.window"),
            latent=self.latent,
        )


def kv_dtype_number(dtype: object, field: str) -> tensor_pb2.Dtype.ValueType:
    """The wire's number of a type of pages; None is not set."""
    return tensor_pb2.DTYPE_UNSPECIFIED if dtype is None else dtype_of(dtype, field, KV_DTYPES)


def scales_tensor(values: Any, field: str) -> tensor_pb2.Tensor | None:
    """Scales of one number, or of one for each head."""
    return float32_tensor([values] if isinstance(values, int | float) else values, field)


def _first(value: Any, other: Any) -> Any:
    return other if value is None else value
