"""The geometry and choices of a cache."""

from __future__ import annotations

import torch
from google.protobuf.message import Message

from attnd.errors import InvalidRequest
from attnd.v1 import backend_pb2, cache_pb2, tensor_pb2
from attnd_server.attention.config import FP8, AttentionBackend, AttentionConfig, Layout, PrecisionMode
from attnd_server.attention.kv_split import KVSplitConfig
from attnd_server.service.validation.arrays import refuse, view

# As many as a cache can have KV heads.
MAX_SCALES = 1024

DTYPES: dict[int, torch.dtype] = {
    tensor_pb2.DTYPE_FLOAT32: torch.float32,
    tensor_pb2.DTYPE_FLOAT16: torch.float16,
    tensor_pb2.DTYPE_BFLOAT16: torch.bfloat16,
}
WIRE_DTYPES = {dtype: wire for wire, dtype in DTYPES.items()}
# Besides a cache's own dtype.
KV_DTYPES: dict[int, torch.dtype] = {tensor_pb2.DTYPE_FLOAT8_E4M3FN: FP8}

_LAYOUTS: dict[int, Layout] = {
    cache_pb2.LAYOUT_UNSPECIFIED: Layout.UNIFIED,
    cache_pb2.LAYOUT_UNIFIED: Layout.UNIFIED,
    cache_pb2.LAYOUT_DISTINCT: Layout.DISTINCT,
}
_PRECISIONS: dict[int, PrecisionMode] = {
    cache_pb2.PRECISION_UNSPECIFIED: PrecisionMode.AUTO,
    cache_pb2.PRECISION_AUTO: PrecisionMode.AUTO,
    cache_pb2.PRECISION_FP32: PrecisionMode.FP32,
    cache_pb2.PRECISION_FP16: PrecisionMode.FP16,
    cache_pb2.PRECISION_BF16: PrecisionMode.BF16,
}
_BACKENDS: dict[int, AttentionBackend] = {
    backend_pb2.BACKEND_AUTO: AttentionBackend.AUTO,
    backend_pb2.BACKEND_NAIVE: AttentionBackend.NAIVE,
    backend_pb2.BACKEND_SDPA: AttentionBackend.SDPA,
    backend_pb2.BACKEND_TRITON: AttentionBackend.TRITON,
    backend_pb2.BACKEND_TRITON_GROUPED: AttentionBackend.TRITON_GROUPED,
    backend_pb2.BACKEND_FLASH_ATTN: AttentionBackend.FLASH_ATTN,
    backend_pb2.BACKEND_XFORMERS: AttentionBackend.XFORMERS,
}


def backend(value: int, default: AttentionBackend) -> AttentionBackend:
    """The backend of the wire's number `value`; `default` where it is not set.

    Raises:
        InvalidRequest: no such backend.
    """
    if value == backend_pb2.BACKEND_UNSPECIFIED:
        return default
    if value not in _BACKENDS:
        refuse("backend", f"backend is {value}, but must be one of {', '.join(b.value for b in AttentionBackend)}")
    return _BACKENDS[value]


def cache_config(message: cache_pb2.CacheConfig, window: int = 0, latent: bool = False) -> AttentionConfig:
    """Geometry and choices of a cache without layer groups, or of one of these, with every default filled in.

    Raises:
        InvalidRequest: a number is out of its range, the dtype is not set, or the scales do not belong to the cache.
    """
    if message.dtype not in DTYPES:
        name = _dtype_name(message.dtype)
        refuse("dtype", f"dtype is {name}, but must be DTYPE_FLOAT32, DTYPE_FLOAT16 or DTYPE_BFLOAT16")
    kv_dtype = _kv_dtype("kv_dtype", message.kv_dtype, message.dtype, message.dtype)
    v_dtype = _kv_dtype("v_dtype", message.v_dtype, message.dtype, kv_dtype)
    if message.layout not in _LAYOUTS:
        refuse("layout", f"layout is {message.layout}, but must be LAYOUT_UNIFIED or LAYOUT_DISTINCT")
    if message.precision not in _PRECISIONS:
        refuse("precision", f"precision is {message.precision}, but must be a value of Precision")
    return AttentionConfig(
        num_layers=message.num_layers,
        num_kv_heads=message.num_kv_heads,
        head_dim=message.head_dim,
        head_dim_v=message.head_dim_v,
        page_size=message.page_size,
        num_pages=message.num_pages,
        dtype=DTYPES[message.dtype],
        layout=_LAYOUTS[message.layout],
        backend=backend(message.backend, AttentionBackend.AUTO),
        precision=_PRECISIONS[message.precision],
        window=window,
        latent=latent,
        kv_split=_kv_split(message.kv_split),
        kv_dtype=KV_DTYPES.get(kv_dtype) or DTYPES[kv_dtype],
        v_dtype=KV_DTYPES.get(v_dtype) or DTYPES[v_dtype],
        k_scales=_scales(message, "k_scales", "kv_dtype", kv_dtype in KV_DTYPES),
        v_scales=_scales(message, "v_scales", "v_dtype", v_dtype in KV_DTYPES),
    )


def _kv_dtype(field: str, value: int, dtype: int, default: int) -> int:
    """The wire's number of a type of pages: `dtype`, or one of KV_DTYPES."""
    if value not in (tensor_pb2.DTYPE_UNSPECIFIED, dtype, *KV_DTYPES):
        rule = f"{_dtype_name(dtype)} as dtype, or {' or '.join(map(_dtype_name, KV_DTYPES))}"
        refuse(field, f"{field} is {_dtype_name(value)}, but must be {rule}")
    return value or default


def _kv_split(message: cache_pb2.KvSplit) -> KVSplitConfig:
    try:
        return KVSplitConfig(
            chunk_size=message.chunk_size,
            max_splits=message.max_splits or KVSplitConfig.max_splits,
            batch_invariant=message.batch_invariant if message.HasField("batch_invariant") else None,
        )
    except InvalidRequest as error:
        raise InvalidRequest(f"kv_split.{error}", field=f"kv_split.{error.field}") from None


def _scales(message: Message, field: str, dtype_field: str, is_quantised: bool) -> tuple[float, ...]:
    if not message.HasField(field):
        return (1.0,)
    if not is_quantised:
        rule = f"must be absent unless {dtype_field} is {' or '.join(map(_dtype_name, KV_DTYPES))}"
        refuse(field, f"{field} is given, but {rule}")
    values = view(getattr(message, field), field, (tensor_pb2.DTYPE_FLOAT32,), ("num_scales",))
    if len(values) > MAX_SCALES:
        refuse(field, f"{field} has {len(values)} elements, but must have at most {MAX_SCALES}")
    return tuple(values.tolist())


def _dtype_name(value: int) -> str:
    if value not in tensor_pb2.Dtype.values():
        return str(value)
    return tensor_pb2.Dtype.Name(tensor_pb2.Dtype.ValueType(value))
