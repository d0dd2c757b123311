"""Geometry and choices of a cache, and limits of a server. Frozen: a value that exists is a valid one."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from attnd.errors import InvalidRequest
from attnd.wire import MAX_MESSAGE_BYTES


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


@dataclass(frozen=True)
class PrincipalLimits:
    """What one principal may take of a server, so that something is left for the others.

    Attributes:
        kv_bytes: bytes of all its caches, with the buffers of their warm-ups.
        caches: caches at one time.
        sessions: streams and planes at one time.
        queue_depth: calls that may wait for the executor.
    """

    kv_bytes: int
    caches: int
    sessions: int
    queue_depth: int


@dataclass(frozen=True)
class ServerConfig:
    """What one server process takes and gives.

    Attributes:
        host: address to listen on.
        port: TCP port; 0 lets the system pick.
        device: torch's name of the device that holds the caches, or "auto": the first GPU, else the processor.
        kv_bytes: bytes that all caches may take; 0 means 80% of the GPU's free memory or 25% of the processor's.
        threads: threads of one attention call on the processor; 0 takes half of the cores and leaves a worker on
            the same machine the others, and with a GPU one.
        max_step_tokens: new tokens of one step.
        max_step_reqs: requests of one step.
        max_page_table_elements: requests times pages of one step.
        max_context_len: cached tokens of one request.
        max_caches: caches at one time.
        max_message_bytes: of one gRPC message to the server; at most `wire.MAX_MESSAGE_BYTES`, which clients take.
        max_sessions: Attend, StoreKv and ReadKv streams, and planes, at one time.
        max_connection_rpcs: RPCs of one connection at one time; more wait in their client.
        max_queue_depth: calls that may wait for the executor.
        max_cache_queue_depth: of these, calls of one cache.
        principal_kv_bytes: of `kv_bytes`, what one principal may take. Here and below 0 is half of the server's where
            it asks who calls, so that nobody alone can take everything, and else all of it: there everybody is one
            principal.
        principal_caches: of `max_caches`.
        principal_sessions: of `max_sessions`.
        principal_queue_depth: of `max_queue_depth`.
        default_ttl_s: lease of a cache that asks for none, in seconds.
        max_ttl_s: longest lease, in seconds.
        device_timeout_s: seconds after which a GPU that has not ended a piece of work counts as failed; 0: never.
        drain_s: seconds that running calls have to finish after SIGTERM.
        keepalive_s: seconds after which a client that answers no ping is taken for gone, and its streams end.
        metrics: address for Prometheus, "host:port", where port 0 lets the system pick; "" is none.
        socket_dir: folder of the Unix socket over which clients on this host get shared memory; "": there is none.
        socket_uids: users besides the server's own who may connect there.
        region_bytes: shared memory of one session; what is never written to takes none, but with a GPU it is pinned
            whole.
        max_planes: sessions with shared memory at one time.
        cuda_region_bytes: memory of the GPU that a session with a cuda plane takes for its tensors.
        max_cuda_planes: sessions with a cuda plane at one time. Each has a stream that waits, and a GPU has 32 hardware
            queues for streams: one that shares the queue of a waiting one waits too.
        tls_cert: file of the server's certificate, PEM; "": nothing is encrypted.
        tls_key: file of its key.
        tls_client_ca: file of the authorities that sign clients' certificates; "": clients need none.
        tokens: file of bearer tokens and whose they are; "": nobody needs one.
        verify: fraction of the calls that are computed a second time, and compared; see `shadow`. Not on cuda planes.
        verify_action: what a wrong output leads to: "log", or "refuse": it is not sent.
        snapshot_dir: folder into which the server writes its caches when it has drained; "": they end with it.
        restore: also serve what an earlier server wrote there.
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
    max_message_bytes: int = MAX_MESSAGE_BYTES
    max_sessions: int = 256
    max_connection_rpcs: int = 1_024
    max_queue_depth: int = 1_024
    max_cache_queue_depth: int = 128
    principal_kv_bytes: int = 0
    principal_caches: int = 0
    principal_sessions: int = 0
    principal_queue_depth: int = 0
    default_ttl_s: float = 60.0
    max_ttl_s: float = 86_400.0
    device_timeout_s: float = 600.0
    drain_s: float = 10.0
    keepalive_s: float = 10.0
    metrics: str = ""
    socket_dir: str = ""
    socket_uids: frozenset[int] = frozenset()
    region_bytes: int = 512 << 20
    max_planes: int = 64
    cuda_region_bytes: int = 64 << 20
    max_cuda_planes: int = 16
    tls_cert: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    tokens: str = ""
    verify: float = 0.0
    verify_action: str = "log"
    snapshot_dir: str = ""
    restore: bool = False

    @property
    def asks_who_calls(self) -> bool:
        """Whether there can be more than one principal."""
        return bool(self.tokens or self.tls_client_ca)

    @property
    def max_header_bytes(self) -> int:
        """Bytes of a message beside the tensors of a call: a little more than the largest step can have.

        Its page tables, or the indices and pages of a delta; an int64 slot of each token; six int32 of each request.
        """
        most = 8 * self.max_page_table_elements + 8 * self.max_step_tokens + 24 * self.max_step_reqs
        return most + _MAX_OTHER_HEADER_BYTES

    def principal_limits(self, kv_bytes: int) -> PrincipalLimits:
        """What one principal may take of a server whose caches may take `kv_bytes`."""

        def share(asked: int, whole: int) -> int:
            return min(asked or (-(-whole // 2) if self.asks_who_calls else whole), whole)

        return PrincipalLimits(
            kv_bytes=share(self.principal_kv_bytes, kv_bytes),
            caches=share(self.principal_caches, self.max_caches),
            sessions=share(self.principal_sessions, self.max_sessions),
            queue_depth=share(self.principal_queue_depth, self.max_queue_depth),
        )


# Options of a call with slopes and sinks of 1024 heads, many times over.
_MAX_OTHER_HEADER_BYTES = 256 << 10
