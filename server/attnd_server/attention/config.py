"""Geometry and choices of a cache. Frozen: a value that exists is a valid one."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from attnd.errors import InvalidRequest


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
class KVSplitConfig:
    """How the KV of a request is cut into chunks, each of which gives a partial result that is merged afterwards.

    Attributes:
        chunk_size: tokens of KV in a chunk, a power of two in 16..1048576; 0 is automatic.
        max_splits: most chunks of a request, 1..1024; chunks are longer than `chunk_size` where there would be more.
        batch_invariant: cut by the request's own length alone, so that output bits never depend on what shares the
            batch; without it the cut follows the batch. None: with it for requests with one new token, without it for
            others, where it costs more (see docs/benchmarks.md).
    """

    chunk_size: int = 0
    max_splits: int = 128
    batch_invariant: bool | None = None

    def __post_init__(self) -> None:
        in_range = 16 <= self.chunk_size <= _MAX_CHUNK_SIZE
        if self.chunk_size and (not in_range or self.chunk_size & (self.chunk_size - 1)):
            rule = f"0 or a power of two in 16..{_MAX_CHUNK_SIZE}"
            raise InvalidRequest(f"chunk_size is {self.chunk_size}, but must be {rule}", field="chunk_size")
        _in_range("max_splits", self.max_splits, 1, 1024)

    def chunk_keys(self, num_keys: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Tokens of KV in a chunk of each request with `num_keys` of them; depends on nothing else of the batch."""
        if self.chunk_size:
            chunk = np.full_like(num_keys, self.chunk_size)
        else:
            chunk = _CHUNKS[np.searchsorted(_CHUNKED_LENGTHS, num_keys)]
        if (num_keys > chunk * self.max_splits).any():
            return np.maximum(chunk, power_of_two(-(-num_keys // self.max_splits)))
        return chunk


# Tokens: far beyond use, and what is computed from it still fits int32.
_MAX_CHUNK_SIZE = 1 << 20

# Tokens of KV in a chunk of requests with at most so many tokens, and of longer ones. Short chunks fill a chip with one
# request, long ones cost less with many; from decode of 1, 8 and 64 requests with chunks of each size on an H200.
CHUNKED_LENGTHS = (2048, 4096, 16384, 32768, 65536)
CHUNKS = (256, 512, 1024, 2048, 4096, 8192)
_CHUNKED_LENGTHS = np.array(CHUNKED_LENGTHS)
_CHUNKS = np.array(CHUNKS, dtype=np.int32)


def power_of_two(values: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """The least power of two that is not less than each value."""
    exponents = np.frexp(np.maximum(values - 1, 0).astype(np.float64))[1]
    return (1 << exponents).astype(np.int32)


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
