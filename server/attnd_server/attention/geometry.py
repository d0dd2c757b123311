"""Geometry and choices of a cache in plain Python: what the server has, and what commands without torch have of it."""

from __future__ import annotations

import enum
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from attnd.errors import InvalidRequest

if TYPE_CHECKING:
    import torch

G = TypeVar("G", bound="Geometry")

FP8_NAME = "float8_e4m3fn"
# Bytes of an element, by the name that torch and the wire have for its type.
ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, FP8_NAME: 1}

_PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# Of a normal float32.
_MIN_SCALE, _MAX_SCALE = 2.0**-126, (2 - 2.0**-23) * 2.0**127
# Tokens: far beyond use, and what is computed from it still fits int32.
_MAX_CHUNK_SIZE = 1 << 20
# What the wire has room for.
_MAX_WINDOW = 2**32 - 1
# Elements of a head: of most caches, and of a latent one.
_MAX_HEAD_DIM, _MAX_LATENT_DIM = 512, 1024


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
        """The type to multiply in, for q, k and v of type `tensors`, of whatever has them: torch."""
        name = _PRECISIONS.get(self.value)
        return tensors if name is None else getattr(sys.modules["torch"], name)


class Layout(enum.Enum):
    """How K and V lie in the pages of a layer."""

    UNIFIED = "unified"
    """K and V `[num_pages, page_size, num_kv_heads, head_dim]`."""
    DISTINCT = "distinct"
    """K `[num_pages, num_kv_heads, head_dim // 8, page_size, 8]`,
    V `[num_pages, num_kv_heads, head_dim_v, page_size]`."""


DISTINCT_LANES = 8
"""Innermost extent of K in the distinct layout, in elements."""


def dtype_name(dtype: object) -> str:
    """The name of a type of torch's, or of one that is a name already."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class KVSplitRule:
    """How the KV of a request is cut into chunks, as `KVSplitConfig` has it."""

    chunk_size: int = 0
    max_splits: int = 128
    batch_invariant: bool | None = None

    def __post_init__(self) -> None:
        in_range = 16 <= self.chunk_size <= _MAX_CHUNK_SIZE
        if self.chunk_size and (not in_range or self.chunk_size & (self.chunk_size - 1)):
            rule = f"0 or a power of two in 16..{_MAX_CHUNK_SIZE}"
            raise InvalidRequest(f"chunk_size is {self.chunk_size}, but must be {rule}", field="chunk_size")
        if not 1 <= self.max_splits <= 1024:
            raise InvalidRequest(f"max_splits is {self.max_splits}, but must be 1..1024", field="max_splits")


@dataclass(frozen=True)
class Geometry:
    """Geometry and choices of a cache, as `AttentionConfig` has them; types are names here, as "bfloat16"."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_pages: int
    page_size: int = 16
    head_dim_v: int = 0
    dtype: Any = "bfloat16"
    layout: Layout = Layout.UNIFIED
    backend: AttentionBackend = AttentionBackend.AUTO
    precision: PrecisionMode = PrecisionMode.AUTO
    kv_split: KVSplitRule = field(default_factory=KVSplitRule)
    kv_dtype: Any = None
    k_scales: tuple[float, ...] = (1.0,)
    v_scales: tuple[float, ...] = (1.0,)
    v_dtype: Any = None
    window: int = 0
    latent: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "head_dim_v", self.head_dim_v or self.head_dim)
        object.__setattr__(self, "kv_dtype", self.kv_dtype or self.dtype)
        object.__setattr__(self, "v_dtype", self.v_dtype or self.kv_dtype)
        _in_range("num_layers", self.num_layers, 1, 1024)
        _in_range("num_kv_heads", self.num_kv_heads, 1, 1024)
        _in_range("page_size", self.page_size, 1, 1024)
        _in_range("num_pages", self.num_pages, 1, 2**31 - 1)
        _in_range("window", self.window, 0, _MAX_WINDOW)
        for name in ("head_dim", "head_dim_v"):
            _in_range(name, getattr(self, name), 8, _MAX_LATENT_DIM if self.latent else _MAX_HEAD_DIM)
            if getattr(self, name) % DISTINCT_LANES:
                raise InvalidRequest(
                    f"{name} is {getattr(self, name)}, but must be a multiple of {DISTINCT_LANES}", field=name
                )
        if dtype_name(self.dtype) not in ITEM_SIZES or dtype_name(self.dtype) == FP8_NAME:
            raise InvalidRequest(f"dtype is {self.dtype}, but must be float32, float16 or bfloat16", field="dtype")
        for name in ("kv_dtype", "v_dtype"):
            if dtype_name(getattr(self, name)) not in (dtype_name(self.dtype), FP8_NAME):
                rule = f"{self.dtype} as dtype, or {FP8_NAME}"
                raise InvalidRequest(f"{name} is {getattr(self, name)}, but must be {rule}", field=name)
        if self.latent:
            self._check_latent()
        self._check_scales("k_scales", self.k_scales, "kv_dtype", self.k_is_quantised)
        self._check_scales("v_scales", self.v_scales, "v_dtype", self.v_is_quantised)

    @classmethod
    def of_names(
        cls: type[G], *, dtype: str, kv_dtype: str, kv_split: dict[str, Any], v_dtype: str = "", **more: Any
    ) -> G:
        """One whose types are given by name, and the cut of its KV by its fields.

        Raises:
            InvalidRequest: a value is out of its range.
            KeyError: there is no such type.
            TypeError: a field is missing, odd or of another type.
        """
        for name in (dtype, kv_dtype, v_dtype or kv_dtype):
            ITEM_SIZES[name]
        return cls(dtype=dtype, kv_dtype=kv_dtype, v_dtype=v_dtype, kv_split=KVSplitRule(**kv_split), **more)

    def _check_latent(self) -> None:
        """Refuses what a row of K that has V in it cannot be, and takes K's scales for V's where these are absent."""
        if self.num_kv_heads != 1:
            raise InvalidRequest(
                f"num_kv_heads is {self.num_kv_heads}, but must be 1 of a latent cache", field="num_kv_heads"
            )
        if self.layout is not Layout.UNIFIED:
            rule = "must be unified of a latent cache"
            raise InvalidRequest(f"layout is {self.layout.value}, but {rule}", field="layout")
        if self.head_dim_v > self.head_dim:
            rule = f"must be at most head_dim, {self.head_dim}, of a latent cache"
            raise InvalidRequest(f"head_dim_v is {self.head_dim_v}, but {rule}", field="head_dim_v")
        if dtype_name(self.v_dtype) != dtype_name(self.kv_dtype):
            rule = f"must be {self.kv_dtype} as kv_dtype of a latent cache"
            raise InvalidRequest(f"v_dtype is {self.v_dtype}, but {rule}", field="v_dtype")
        if self.v_scales == (1.0,):
            object.__setattr__(self, "v_scales", self.k_scales)
        if self.v_scales != self.k_scales:
            given, rule = (", ".join(f"{scale:g}" for scale in scales) for scales in (self.v_scales, self.k_scales))
            rule = f"must be {rule} as k_scales of a latent cache, or absent"
            raise InvalidRequest(f"v_scales is {given}, but {rule}", field="v_scales")

    def _check_scales(self, name: str, scales: tuple[float, ...], dtype_field: str, is_quantised: bool) -> None:
        if not is_quantised and scales != (1.0,):
            raise InvalidRequest(f"{name} is given, but must be absent unless {dtype_field} is {FP8_NAME}", field=name)
        if len(scales) not in (1, self.num_kv_heads):
            rule = f"1, or one for each of the {self.num_kv_heads} KV heads"
            raise InvalidRequest(f"{name} has {len(scales)} elements, but must have {rule}", field=name)
        for index, scale in enumerate(scales):
            if not _MIN_SCALE <= scale <= _MAX_SCALE:  # subnormal numbers are zero to some devices
                rule = "must be positive, finite and a normal float32"
                raise InvalidRequest(f"{name}[{index}] is {scale:g}, but {rule}", field=name)

    @property
    def k_is_quantised(self) -> bool:
        """Whether K's pages hold FP8 and have scales."""
        return dtype_name(self.kv_dtype) == FP8_NAME

    @property
    def v_is_quantised(self) -> bool:
        """Whether V's pages hold FP8 and have scales."""
        return dtype_name(self.v_dtype) == FP8_NAME

    @property
    def is_quantised(self) -> bool:
        """Whether pages hold FP8, of K, of V or of both."""
        return self.k_is_quantised or self.v_is_quantised

    @property
    def is_uniform(self) -> bool:
        """Whether K and V have a type in common, and memory of their own each: what most kernels serve."""
        return self.v_dtype == self.kv_dtype and not self.latent

    @property
    def num_slots(self) -> int:
        """Token slots of the cache."""
        return self.num_pages * self.page_size

    @property
    def num_bytes(self) -> int:
        """Bytes of KV memory."""
        of_head = self.head_dim * ITEM_SIZES[dtype_name(self.kv_dtype)]
        if not self.latent:
            of_head += self.head_dim_v * ITEM_SIZES[dtype_name(self.v_dtype)]
        return self.num_slots * self.num_layers * self.num_kv_heads * of_head

    @property
    def k_shape(self) -> tuple[int, ...]:
        """Shape of one layer's K pages."""
        if self.layout is Layout.UNIFIED:
            return (self.num_pages, self.page_size, self.num_kv_heads, self.head_dim)
        lanes = DISTINCT_LANES
        return (self.num_pages, self.num_kv_heads, self.head_dim // lanes, self.page_size, lanes)

    @property
    def v_shape(self) -> tuple[int, ...]:
        """Shape of one layer's V pages; of a latent cache, of the part of K's that is V."""
        if self.layout is Layout.UNIFIED:
            return (self.num_pages, self.page_size, self.num_kv_heads, self.head_dim_v)
        return (self.num_pages, self.num_kv_heads, self.head_dim_v, self.page_size)


def _in_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidRequest(f"{name} is {value}, but must be {low}..{high}", field=name)
