"""Geometry and choices of a cache. Frozen: a value that exists is a valid one."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import torch

from attnd.errors import InvalidRequest
from attnd_server.attention.kv_split import KVSplitConfig


class AttentionBackend(enum.Enum):
    """A backend by the name that people type."""

    AUTO = "auto"
    NAIVE = "naive"
    SDPA = "sdpa"
    TRITON = "triton"
    TRITON_GROUPED = "triton_grouped"
    FLASH_ATTN = "flash_attn"
    XFORMERS = "xformers"


class PrecisionMode(enum.Enum):
    """The type in which a backend multiplies; softmax and accumulation are float32 always."""

    AUTO = "auto"
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"

    def dtype(self, tensors: torch.dtype) -> torch.dtype:
        """The type to multiply in, for q, k and v of type `tensors`."""
        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}.get(self.value, tensors)


class Layout(enum.Enum):
    """How K and V lie in the pages of a layer."""

    UNIFIED = "unified"
    """K and V `[num_pages, page_size, num_kv_heads, head_dim]`."""
    DISTINCT = "distinct"
    """K `[num_pages, num_kv_heads, head_dim // 8, page_size, 8]`,
    V `[num_pages, num_kv_heads, head_dim_v, page_size]`."""


DISTINCT_LANES = 8
"""Innermost extent of K in the distinct layout, in elements."""

FP8 = torch.float8_e4m3fn
"""The type of quantised pages: a sign, 4 bits of exponent, 3 of mantissa, no infinities."""


@dataclass(frozen=True)
class AttentionConfig:
    """Geometry and choices of a cache.

    Attributes:
        num_layers: layers that share each page.
        num_kv_heads: KV heads per layer.
        head_dim: elements per head of q and k.
        num_pages: pages of the cache.
        page_size: token slots per page.
        head_dim_v: elements per head of v and of the output; 0 means `head_dim`.
        dtype: type of a call's tensors.
        layout: how K and V lie in the pages.
        backend: backend of calls that name none.
        precision: type in which backends multiply.
        kv_split: how decode splits KV.
        kv_dtype: type of the pages: `dtype`, or FP8; None means `dtype`.
        k_scales: of FP8 pages, one for all KV heads or one for each: K is stored as k / scale and read as the stored
            value times scale. 1.0 alone without FP8.
        v_scales: likewise for V.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_pages: int
    page_size: int = 16
    head_dim_v: int = 0
    dtype: torch.dtype = torch.bfloat16
    layout: Layout = Layout.UNIFIED
    backend: AttentionBackend = AttentionBackend.AUTO
    precision: PrecisionMode = PrecisionMode.AUTO
    kv_split: KVSplitConfig = field(default_factory=KVSplitConfig)
    kv_dtype: torch.dtype | None = None
    k_scales: tuple[float, ...] = (1.0,)
    v_scales: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "head_dim_v", self.head_dim_v or self.head_dim)
        object.__setattr__(self, "kv_dtype", self.kv_dtype or self.dtype)
        _in_range("num_layers", self.num_layers, 1, 1024)
        _in_range("num_kv_heads", self.num_kv_heads, 1, 1024)
        _in_range("page_size", self.page_size, 1, 1024)
        _in_range("num_pages", self.num_pages, 1, 2**31 - 1)
        for name in ("head_dim", "head_dim_v"):
            _in_range(name, getattr(self, name), 8, 512)
            if getattr(self, name) % DISTINCT_LANES:
                raise InvalidRequest(
                    f"{name} is {getattr(self, name)}, but must be a multiple of {DISTINCT_LANES}", field=name
                )
        if self.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise InvalidRequest(f"dtype is {self.dtype}, but must be float32, float16 or bfloat16", field="dtype")
        if self.kv_dtype not in (self.dtype, FP8):
            raise InvalidRequest(
                f"kv_dtype is {self.kv_dtype}, but must be {self.dtype} as dtype, or {FP8}", field="kv_dtype"
            )
        for name in ("k_scales", "v_scales"):
            self._check_scales(name, getattr(self, name))

    def _check_scales(self, name: str, scales: tuple[float, ...]) -> None:
        if not self.is_quantised and scales != (1.0,):
            raise InvalidRequest(f"{name} is given, but must be absent unless kv_dtype is {FP8}", field=name)
        if len(scales) not in (1, self.num_kv_heads):
            rule = f"1, or one for each of the {self.num_kv_heads} KV heads"
            raise InvalidRequest(f"{name} has {len(scales)} elements, but must have {rule}", field=name)
        limits = torch.finfo(torch.float32)
        for index, scale in enumerate(scales):
            if not limits.tiny <= scale <= limits.max:  # subnormal numbers are zero to some devices
                rule = "must be positive, finite and a normal float32"
                raise InvalidRequest(f"{name}[{index}] is {scale:g}, but {rule}", field=name)

    @property
    def is_quantised(self) -> bool:
        """Whether the pages hold FP8 and have scales."""
        return self.kv_dtype is FP8

    @property
    def num_slots(self) -> int:
        """Token slots of the cache."""
        return self.num_pages * self.page_size

    @property
    def num_bytes(self) -> int:
        """Bytes of KV memory."""
        itemsize = (self.kv_dtype or self.dtype).itemsize
        return self.num_slots * self.num_layers * self.num_kv_heads * (self.head_dim + self.head_dim_v) * itemsize

    @property
    def k_shape(self) -> tuple[int, ...]:
        """Shape of one layer's K pages."""
        if self.layout is Layout.UNIFIED:
            return (self.num_pages, self.page_size, self.num_kv_heads, self.head_dim)
        lanes = DISTINCT_LANES
        return (self.num_pages, self.num_kv_heads, self.head_dim // lanes, self.page_size, lanes)

    @property
    def v_shape(self) -> tuple[int, ...]:
        """Shape of one layer's V pages."""
        if self.layout is Layout.UNIFIED:
            return (self.num_pages, self.page_size, self.num_kv_heads, self.head_dim_v)
        return (self.num_pages, self.num_kv_heads, self.head_dim_v, self.page_size)


def _in_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidRequest(f"{name} is {value}, but must be {low}..{high}", field=name)
