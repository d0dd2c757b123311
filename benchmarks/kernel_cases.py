"""Steps that kernels are timed on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from attnd_server.attention.config import AttentionBackend
from attnd_server.attention.masks import new_token_limits
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions

FP8 = torch.float8_e4m3fn
K = 1024
CPU_DIVISOR = 64
"""On a processor cells are that many times shorter: there they show that the benchmark works, and no speed."""


@dataclass(frozen=True)
class Case:
    """A cell of a benchmark: one step of attention over pages in random order.

    Attributes:
        group: heading that the cell stands under.
        name: of the cell.
        context_lens: cached tokens of each request.
        query_lens: new tokens of each request.
        block_size: of the mask: 1 is causal, 0 is bidirectional.
        page_size: token slots per page.
        num_heads: query heads.
        num_kv_heads: KV heads.
        head_dim: elements per head.
        dtype: of q, k, v and the output.
        kv_dtype: of the pages; None means `dtype`.
    """

    group: str
    name: str
    context_lens: tuple[int, ...]
    query_lens: tuple[int, ...]
    block_size: int = 1
    page_size: int = 16
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        return f"{self.group} {self.name}"

    @property
    def num_reqs(self) -> int:
        """Requests of the step."""
        return len(self.context_lens)

    @property
    def num_tokens(self) -> int:
        """New tokens of the step."""
        return sum(self.query_lens)

    @property
    def seq_lens(self) -> list[int]:
        """Cached and new tokens of each request."""
        return [context + new for context, new in zip(self.context_lens, self.query_lens, strict=True)]

    @property
    def scale(self) -> float:
        """Factor of q.k."""
        return self.head_dim**-0.5

    @property
    def sees_all(self) -> bool:
        """Whether each new token sees all tokens of its request: bidirectional, or one aligned block, or one token."""
        return all(
            self.block_size == 0
            or new == 1
            or (context % self.block_size == 0 and new <= self.block_size and self.block_size > 1)
            for context, new in zip(self.context_lens, self.query_lens, strict=True)
        )

    @property
    def is_dense(self) -> bool:
        """Whether there is no context and all requests have one length."""
        return not any(self.context_lens) and len(set(self.query_lens)) == 1

    @cached_property
    def operations(self) -> int:
        """Multiplications and additions of q.k and weights.v, of visible pairs only."""
        pairs = 0
        for (context, new), count in _counted(zip(self.context_lens, self.query_lens, strict=True)):
            limits = new_token_limits(torch.arange(context, context + new), self.block_size, 0, 0)
            pairs += count * int(limits.clamp(max=context + new).sum())
        return 4 * self.num_heads * self.head_dim * pairs

    @property
    def num_bytes(self) -> int:
        """What must be moved at least: context, q, k, v and output, each once."""
        kv_elements = 2 * self.num_kv_heads * self.head_dim
        context = sum(self.context_lens) * kv_elements * (self.kv_dtype or self.dtype).itemsize
        return context + self.num_tokens * (kv_elements + 2 * self.num_heads * self.head_dim) * self.dtype.itemsize

    @cached_property
    def page_tables(self) -> torch.Tensor:
        """int64 `[num_reqs, max_pages]`, with pages for the new tokens too; -1 is no page."""
        counts = [-(-seq_len // self.page_size) for seq_len in self.seq_lens]
        tables = torch.full((len(counts), max(counts)), -1)
        for table, pages in zip(tables, torch.randperm(sum(counts)).split(counts), strict=True):
            table[: len(pages)] = pages
        return tables

    @property
    def new_slots(self) -> torch.Tensor:
        """int64 `[num_tokens]`: where peers want the new tokens, behind the context."""
        slots = []
        for table, context, seq_len in zip(self.page_tables, self.context_lens, self.seq_lens, strict=True):
            positions = torch.arange(context, seq_len)
            slots.append(table[positions // self.page_size] * self.page_size + positions % self.page_size)
        return torch.cat(slots)

    @cached_property
    def cu_seqlens_q(self) -> torch.Tensor:
        """int64 `[num_reqs + 1]`."""
        return torch.tensor([0, *self.query_lens]).cumsum(0)

    def metadata(self) -> AttentionMetadata:
        """The step for our backends; it stores nothing."""
        query_lens, zeros = torch.tensor(self.query_lens), torch.zeros(self.num_reqs, dtype=torch.int64)
        return AttentionMetadata(
            is_decode=len(set(self.query_lens)) == 1 and any(self.context_lens) and self.query_lens[0] <= 256,
            num_tokens=self.num_tokens,
            cu_seqlens_q=self.cu_seqlens_q,
            context_lens=torch.tensor(self.context_lens),
            page_tables=self.page_tables.int(),  # as validation gives them
            slot_mapping=None,
            valid_lens=query_lens,
            block_sizes=torch.full_like(zeros, self.block_size),
            prefix_lens=zeros,
            padded_prefix_lens=zeros,
            hole_starts=zeros,
            hole_ends=zeros,
        )

    def options(self, backend: AttentionBackend | None = None) -> AttentionOptions:
        """No option but the scale."""
        return AttentionOptions(num_heads=self.num_heads, scale=self.scale, backend=backend)

    def small(self) -> Case:
        """The cell for a processor: shorter by `CPU_DIVISOR`, and in float32."""

        def shorter(length: int) -> int:
            return length if length <= CPU_DIVISOR else max(CPU_DIVISOR // 2, length // CPU_DIVISOR)

        return replace(
            self,
            context_lens=tuple(map(shorter, self.context_lens)),
            query_lens=tuple(map(shorter, self.query_lens)),
            dtype=torch.float32,
        )


def _counted(pairs: Iterable[tuple[int, int]]) -> Iterable[tuple[tuple[int, int], int]]:
    counts: dict[tuple[int, int], int] = {}
    for pair in pairs:
        counts[pair] = counts.get(pair, 0) + 1
    return counts.items()


def short(length: int) -> str:
    """8192 as "8k"."""
    return f"{length // K}k" if length % K == 0 and length else str(length)
