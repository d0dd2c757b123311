"""A step and the options of a layer, after validation: shapes and ranges are facts from here on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from attnd_server.attention.config import AttentionBackend
from attnd_server.attention.geometry import Geometry

MOST_COLUMN = (1 << 30) - 1
"""Greatest number among the columns of a request; beyond any position, since contexts end at 2^29 tokens."""

MOST_WINDOW = (1 << 31) - 1
"""Greatest window: lengths are int32, so a wider one hides nothing."""

NONE_SEEN, SOME_SEEN, ALL_SEEN = 0, 1, 2
"""Of a request's new tokens, as keys."""

REQUEST_COLUMNS = (
    "valid_lens",
    "context_lens",
    "block_sizes",
    "prefix_lens",
    "padded_prefix_lens",
    "hole_starts",
    "hole_ends",
)


@dataclass(frozen=True, eq=False)
class AttentionMetadata:
    """A step's validated metadata, on the host.

    Everything in which masks differ is reduced to four numbers per request: `block_sizes`, `prefix_lens`,
    `padded_prefix_lens` and the hole. See `masks.new_token_limits`.

    Attributes:
        is_decode: every request has the same number of new tokens.
        num_tokens: rows of q, k and v.
        cu_seqlens_q: int64 `[num_reqs + 1]`; request r has the new tokens `[cu_seqlens_q[r], cu_seqlens_q[r + 1])`.
        context_lens: int64 `[num_reqs]`, cached tokens.
        page_tables: int32 or int64 `[num_reqs, max_pages]`; -1 is no page. Pages past the context may hold any id or
            -1.
        slot_mapping: int64 `[num_tokens]` with -1 for tokens that are not stored, or None: nothing is stored.
        valid_lens: int64 `[num_reqs]`, new tokens that count.
        block_sizes: int64 `[num_reqs]`; 1 is causal, 0 is bidirectional.
        prefix_lens: int64 `[num_reqs]`; 0 unless the request's mask is prefix-full.
        padded_prefix_lens: int64 `[num_reqs]`; likewise, at least prefix_lens.
        hole_starts: int64 `[num_reqs]`; cached positions in [hole_starts, hole_ends) are not seen.
        hole_ends: int64 `[num_reqs]`.
        cache_only: new tokens are neither seen nor stored; calls have q only.
        store_only: calls have k and v only and return nothing.
        store_first: keys are what lies in pages once all new tokens are stored. Of new tokens that is what calls bring,
            rounded if pages are FP8: see `kernels.pages.as_stored`.
        reads_stored: whether a request's context has a slot that the step stores, so that calls must store before they
            attend; in store-first steps alone.
        window: tokens of the window of every call, or 0: each call's own. Pages before it that were no page of the
            cache are page 0 in `page_tables`: kernels look at no position there.
        seen_new: bool `[num_tokens]`, whether a valid new token is a key; None: each is, unless the step is cache-only.
        without_sinks: bool `[num_reqs]`, whose rows have no sinks; None: none.
        sent_page_tables: int32 `[num_reqs_sent, max_pages]` as the client sent them; None: these are `page_tables`.
    """

    is_decode: bool
    num_tokens: int
    cu_seqlens_q: torch.Tensor
    context_lens: torch.Tensor
    page_tables: torch.Tensor
    slot_mapping: torch.Tensor | None
    valid_lens: torch.Tensor
    block_sizes: torch.Tensor
    prefix_lens: torch.Tensor
    padded_prefix_lens: torch.Tensor
    hole_starts: torch.Tensor
    hole_ends: torch.Tensor
    cache_only: bool = False
    store_only: bool = False
    store_first: bool = False
    reads_stored: bool = False
    window: int = 0
    seen_new: torch.Tensor | None = None
    without_sinks: torch.Tensor | None = None
    sent_page_tables: torch.Tensor | None = None

    @property
    def tables_as_sent(self) -> torch.Tensor:
        """The page tables that a later step may be told by."""
        return self.page_tables if self.sent_page_tables is None else self.sent_page_tables

    @property
    def is_plain(self) -> bool:
        """Whether every valid new token is a key, and every request has the sinks."""
        return self.seen_new is None and self.without_sinks is None

    def reads_rounded(self, config: Geometry) -> bool:
        """Whether new tokens are read as FP8 pages of `config` have them, not as calls bring them."""
        return self.store_first and config.is_quantised

    @cached_property
    def new_keys(self) -> npt.NDArray[np.int8]:
        """Of each request, which of its valid new tokens are keys: int8 `[num_reqs]`, of NONE, SOME and ALL."""
        if self.cache_only or self.seen_new is None:
            return np.full(self.num_reqs, NONE_SEEN if self.cache_only else ALL_SEEN, np.int8)
        starts, valid = self.cu_seqlens_q.numpy()[:-1], self.valid_lens.numpy()
        before = np.append(0, np.cumsum(self.seen_new.numpy()))
        counts = before[starts + valid] - before[starts]
        return np.where(counts == valid, ALL_SEEN, np.where(counts == 0, NONE_SEEN, SOME_SEEN)).astype(np.int8)

    @property
    def num_reqs(self) -> int:
        """Requests of the step."""
        return self.context_lens.shape[0]

    @cached_property
    def columns(self) -> npt.NDArray[np.int32]:
        """The numbers of each request that kernels go by: `[len(REQUEST_COLUMNS), num_reqs]`.

        None is greater than `MOST_COLUMN`, so that sums of two fit: greater ones mean the same, being past any token.
        """
        arrays = [getattr(self, name).numpy() for name in REQUEST_COLUMNS]
        columns: npt.NDArray[np.int64] = np.minimum(np.concatenate(arrays), MOST_COLUMN)
        return columns.astype(np.int32).reshape(len(arrays), -1)

    @cached_property
    def query_lens(self) -> list[int]:
        """New tokens of each request."""
        return torch.diff(self.cu_seqlens_q).tolist()

    @cached_property
    def max_context_len(self) -> int:
        """The longest context, in tokens; 0 if there is no request."""
        return int(self.context_lens.max()) if self.num_reqs else 0

    @cached_property
    def first_absent_pages(self) -> torch.Tensor | None:
        """The first column of each request's page table without a page: int64 `[num_reqs]`; None if none has any."""
        tables = self.page_tables.numpy()
        if not tables.size or tables.min() >= 0:
            return None
        is_absent = tables < 0
        first = is_absent.argmax(axis=1)  # 0 where there is none
        first[~is_absent[np.arange(len(first)), first]] = tables.shape[1]
        return torch.from_numpy(first)

    def has_absent_pages(self, page_size: int) -> bool:
        """Whether a page of `page_size` tokens that holds context is absent from the page tables."""
        first = self.first_absent_pages
        return first is not None and bool((first * page_size < self.context_lens).any())


@dataclass(frozen=True, eq=False)
class AttentionOptions:
    """What a layer computes besides softmax(scale * q k) v. Compared by identity, so that plans can be kept by it.

    Attributes:
        num_heads: query heads of the call.
        scale: factor of q.k.
        softcap: score becomes softcap * tanh(score / softcap); 0 is off.
        window: a token at p sees no position j with p - j >= window; 0 is off, and so is one past MOST_WINDOW.
        alibi_slopes: float32 `[num_heads]` on the host, or None.
        sinks: float32 `[num_heads]` on the host, or None.
        return_lse: also return lse.
        backend: backend of the call; None: the cache's.
    """

    num_heads: int
    scale: float
    softcap: float = 0.0
    window: int = 0
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    return_lse: bool = False
    backend: AttentionBackend | None = None

    def __post_init__(self) -> None:
        """Turns a window that hides nothing off, so that it fits the integers of kernels and costs nothing."""
        if self.window > MOST_WINDOW:
            object.__setattr__(self, "window", 0)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of its arrays."""
        return sum(array.nbytes for array in (self.alibi_slopes, self.sinks) if array is not None)

    @cached_property
    def sizes(self) -> list[tuple[str, float]]:
        """Each option that makes scores of any size: its name, and the size of its greatest finite number."""
        arrays = {"alibi_slopes": self.alibi_slopes, "sinks": self.sinks}
        sizes = [("scale", abs(self.scale))]
        for name, array in arrays.items():
            if array is not None and array.numel():
                sizes.append((name, float(array.abs().nan_to_num(0.0, 0.0).max())))
        return sizes

    @cached_property
    def key(self) -> tuple[object, ...]:
        """Equal for options that compute the same, and to be kept by where an object does not live long enough."""
        arrays = [None if array is None else array.numpy().tobytes() for array in (self.alibi_slopes, self.sinks)]
        scale = torch.tensor(self.scale, dtype=torch.float32).item()  # as it travels; a default did not
        return (self.num_heads, scale, self.softcap, self.window, *arrays, self.return_lse, self.backend)


def decode_step(num_reqs: int, query_len: int, context_len: int = 0, page_size: int = 1) -> AttentionMetadata:
    """A causal decode step that stores nothing, all requests alike and every page id 0: to plan and compile with.

    Its page tables take no memory, however long the context.
    """
    lens = torch.full((num_reqs,), query_len)
    zeros = torch.zeros(num_reqs, dtype=torch.int64)
    return AttentionMetadata(
        is_decode=True,
        num_tokens=num_reqs * query_len,
        cu_seqlens_q=torch.arange(num_reqs + 1) * query_len,
        context_lens=zeros + context_len,
        page_tables=torch.zeros(1, 1, dtype=torch.int64).expand(num_reqs, max(1, -(-context_len // page_size))),
        slot_mapping=None,
        valid_lens=lens,
        block_sizes=torch.ones_like(lens),
        prefix_lens=zeros,
        padded_prefix_lens=zeros,
        hole_starts=zeros,
        hole_ends=zeros,
    )
