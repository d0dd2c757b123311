"""Geometry and choices of a cache, and limits of a server. Frozen: a value that exists is a valid one."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class KVSplitConfig:
    """How decode splits the KV of a request over programs.

    Attributes:
        chunk_size: tokens of KV per program, a power of two from 16; 0 chooses by the request's own length.
        max_splits: most programs for one request and KV head.
    """

    chunk_size: int = 0
    max_splits: int = 128

    def __post_init__(self) -> None:
        if self.chunk_size and (self.chunk_size < 16 or self.chunk_size & (self.chunk_size - 1)):
            raise InvalidRequest(
                f"chunk_size is {self.chunk_size}, but must be 0 or a power of two from 16", field="chunk_size"
            )
        if self.max_splits < 1:
            raise InvalidRequest(f"max_splits is {self.max_splits}, but must be at least 1", field="max_splits")

    def splits(self, num_tokens: int) -> tuple[int, int]:
        """`(chunk_size, num_splits)` for a request with `num_tokens` of KV; depends on nothing else of the batch."""
        chunk = self.chunk_size or min(max(256, _power_of_two(num_tokens // 16)), 4096)
        while math.ceil(num_tokens / chunk) > self.max_splits:
            chunk *= 2
        return chunk, max(1, math.ceil(num_tokens / chunk))


def _power_of_two(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


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
        dtype: type of the pages and of a call's tensors.
        layout: how K and V lie in the pages.
        backend: backend of calls that name none.
        precision: type in which backends multiply.
        kv_split: how decode splits KV.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "head_dim_v", self.head_dim_v or self.head_dim)
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

    @property
    def num_slots(self) -> int:
        """Token slots of the cache."""
        return self.num_pages * self.page_size

    @property
    def num_bytes(self) -> int:
        """Bytes of KV memory."""
        per_slot = self.num_layers * self.num_kv_heads * (self.head_dim + self.head_dim_v) * self.dtype.itemsize
        return self.num_slots * per_slot

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


@dataclass(frozen=True)
class ServerConfig:
    """What one server process takes and gives.

    Attributes:
        host: address to listen on.
        port: TCP port; 0 lets the system pick.
        device: torch's name of the device that holds the caches, or "auto": the first GPU, else the processor.
        kv_bytes: bytes that all caches may take; 0 means 80% of the GPU's free memory or 25% of the processor's.
        threads: threads of one attention call on the processor; 0 takes half of the cores and leaves a worker on
            the same machine the others.
        max_step_tokens: new tokens of one step.
        max_step_reqs: requests of one step.
        max_page_table_elements: requests times pages of one step.
        max_context_len: cached tokens of one request.
        max_caches: caches at one time.
        max_queue_depth: calls that may wait for the executor.
        default_ttl_s: lease of a cache that asks for none, in seconds.
        max_ttl_s: longest lease, in seconds.
        drain_s: seconds that running calls have to finish after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 7411
    device: str = "auto"
    kv_bytes: int = 0
    threads: int = 0
    max_step_tokens: int = 65_536
    max_step_reqs: int = 4_096
    max_page_table_elements: int = 1 << 21
    max_context_len: int = 1 << 20
    max_caches: int = 256
    max_queue_depth: int = 1_024
    default_ttl_s: float = 60.0
    max_ttl_s: float = 86_400.0
    drain_s: float = 10.0
