"""Random steps of every kind, as plain integers and lists, for the oracle and for the server."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st

from attnd_server.attention.config import FP8, AttentionConfig, Layout, PrecisionMode
from attnd_server.attention.metadata import AttentionMetadata

CAUSAL, BLOCK_CAUSAL, BIDIRECTIONAL, PREFIX_FULL = "causal", "block_causal", "bidirectional", "prefix_full"
NUM_PAGES = 160  # more than 4 requests of 37 tokens fill with pages of 1
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Request:
    """One request of a step."""

    context_len: int
    query_len: int
    valid_len: int
    pages: list[int]
    mask: str = CAUSAL
    block_size: int = 1
    prefix_len: int = 0
    padded_prefix_len: int = 0
    # Which new tokens are keys; empty: all. And whether it has sinks and new keys at all.
    keys: tuple[bool, ...] = ()
    attend_new: bool = True

    def is_key(self, new: int) -> bool:
        """Whether new token `new` may be seen."""
        return self.attend_new and (not self.keys or self.keys[new])


@dataclass(frozen=True)
class Case:
    """A step with the options and geometry of one call; its tensors follow from `seed`."""

    requests: list[Request]
    num_kv_heads: int = 2
    group: int = 2
    head_dim: int = 32
    head_dim_v: int = 32
    num_pages: int = NUM_PAGES
    page_size: int = 16
    dtype: torch.dtype = torch.float32
    layout: Layout = Layout.UNIFIED
    precision: PrecisionMode = PrecisionMode.AUTO
    scale: float = 0.2
    softcap: float = 0.0
    window: int = 0
    alibi: bool = False
    sinks: bool = False
    return_lse: bool = False
    mask_prefix_hole: bool = False
    cache_only: bool = False
    store_first: bool = False
    kv_dtype: torch.dtype | None = None
    k_scales: tuple[float, ...] = (1.0,)
    v_scales: tuple[float, ...] = (1.0,)
    v_dtype: torch.dtype | None = None
    latent: bool = False
    poison: float = math.nan
    seed: int = 0

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def num_tokens(self) -> int:
        return sum(request.query_len for request in self.requests)

    @property
    def coarsest(self) -> torch.dtype:
        """The type whose tolerance holds."""
        precision = self.precision.dtype(self.dtype)
        return max(self.dtype, precision, key=lambda dtype: torch.finfo(dtype).eps)

    def of_type(self, dtype: torch.dtype, **changes: Any) -> Case:
        """The case with calls of another type, and pages of that where they are not FP8."""
        v_dtype = self.v_dtype if self.v_dtype in (None, FP8) else dtype
        return replace(self, dtype=dtype, v_dtype=v_dtype, **changes)

    def config(self) -> AttentionConfig:
        return AttentionConfig(
            num_layers=1,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim_v,
            num_pages=self.num_pages,
            page_size=self.page_size,
            dtype=self.dtype,
            layout=self.layout,
            precision=self.precision,
            kv_dtype=self.kv_dtype,
            k_scales=self.k_scales,
            v_scales=self.v_scales,
            v_dtype=self.v_dtype,
            latent=self.latent,
        )

    def metadata(self) -> AttentionMetadata:
        def column(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64)

        requests = self.requests
        lens = [request.query_len for request in requests]
        hole = self.mask_prefix_hole
        return AttentionMetadata(
            is_decode=len(set(lens)) == 1,
            num_tokens=sum(lens),
            cu_seqlens_q=column([sum(lens[:end]) for end in range(len(lens) + 1)]),
            context_lens=column([request.context_len for request in requests]),
            page_tables=column([request.pages for request in requests])
            .int()
            .reshape(len(requests), -1 if requests else 0),
            slot_mapping=None,
            valid_lens=column([request.valid_len for request in requests]),
            block_sizes=column([{CAUSAL: 1, BIDIRECTIONAL: 0}.get(r.mask, r.block_size) for r in requests]),
            prefix_lens=column([r.prefix_len if r.mask == PREFIX_FULL else 0 for r in requests]),
            padded_prefix_lens=column([r.padded_prefix_len if r.mask == PREFIX_FULL else 0 for r in requests]),
            hole_starts=column([request.prefix_len if hole else 0 for request in requests]),
            hole_ends=column([request.padded_prefix_len if hole else 0 for request in requests]),
            cache_only=self.cache_only,
            store_first=self.store_first,
            seen_new=self._seen_new(),
            without_sinks=None
            if all(request.attend_new for request in requests)
            else torch.tensor([not request.attend_new for request in requests]),
        )

    def _seen_new(self) -> torch.Tensor | None:
        seen = [request.is_key(new) for request in self.requests for new in range(request.query_len)]
        needed = [request.is_key(new) for request in self.requests for new in range(request.valid_len)]
        return None if all(needed) or self.cache_only else torch.tensor(seen)


@st.composite
def cases(draw: st.DrawFn, plain: bool = False) -> Case:
    """Whole steps of any kind.

    Args:
        draw: hypothesis's.
        plain: without softcap, ALiBi, sinks and lse, which not every backend has.
    """
    page_size = draw(st.sampled_from([1, 4, 16]))
    lens = st.sampled_from(sorted({0, 1, page_size - 1, page_size, page_size + 1, 2 * page_size + 3, 37}))
    num_reqs = draw(st.integers(1, 4))
    if draw(st.booleans()):
        query_lens = [draw(st.sampled_from([1, 1, 4]))] * num_reqs
    else:
        query_lens = [draw(st.sampled_from([0, 1, 2, 5, 17])) for _ in range(num_reqs)]
    context_lens = [draw(lens) for _ in range(num_reqs)]
    random_ = random.Random(draw(st.integers(0, 2**16)))
    hole = draw(st.booleans())
    gaps = draw(st.sampled_from([0.0, 0.0, 0.3, 1.0]))  # 1.0: no cached key is seen
    pages = random_.sample(range(NUM_PAGES), NUM_PAGES)
    columns = max(-(-length // page_size) for length in context_lens) + draw(st.integers(0, 2))
    block_size = draw(st.sampled_from([1, 2, 4, 32]))
    requests = []
    cache_only = draw(st.sampled_from([False, False, False, True]))
    store_first = not cache_only and draw(st.booleans())
    # Chances that a new token is no key, and that a request does not attend to its new ones.
    holes_in_new, elsewhere = (draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])) if store_first else 0.0 for _ in "ab")
    for context_len, query_len in zip(context_lens, query_lens, strict=True):
        used = -(-context_len // page_size)
        table = [pages.pop() for _ in range(used)]
        table = [-1 if random_.random() < gaps else page for page in table]
        table += [random_.choice([-1, random_.randrange(NUM_PAGES)]) for _ in range(columns - used)]
        prefix_len = random_.randint(0, context_len + query_len)
        requests.append(
            Request(
                context_len=context_len,
                query_len=query_len,
                valid_len=draw(st.sampled_from([query_len, query_len, random_.randint(0, query_len)])),
                pages=table,
                mask=draw(st.sampled_from([CAUSAL, BLOCK_CAUSAL, BIDIRECTIONAL, PREFIX_FULL])),
                block_size=block_size,
                prefix_len=prefix_len,
                padded_prefix_len=prefix_len + random_.randint(0, 6),
                keys=tuple(random_.random() >= holes_in_new for _ in range(query_len)),
                attend_new=random_.random() >= elsewhere,
            )
        )
    head_dim = draw(st.sampled_from([8, 32, 40, 64]))
    head_dim_v = draw(st.sampled_from([head_dim, head_dim, 16, 48]))
    dtype = draw(st.sampled_from(DTYPES))
    latent = draw(st.sampled_from([False] * 7 + [True]))
    num_kv_heads = 1 if latent else draw(st.integers(1, 3))
    kinds = [(dtype, dtype), (FP8, FP8)] + [(dtype, FP8), (FP8, dtype)] * (not latent)
    kv_dtype, v_dtype = draw(st.sampled_from(kinds[:1] * 4 + kinds[1:2] * 2 + kinds[2:]))
    # Of FP8 one for all heads, or one for each; some so small that numbers are clamped.
    k_scales, v_scales = (
        tuple(random_.choice([0.004, 0.1, 0.73]) for _ in range(draw(st.sampled_from([1, num_kv_heads]))))
        if pages is FP8
        else (1.0,)
        for pages in (kv_dtype, v_dtype)
    )
    flag = st.just(False) if plain else st.booleans()
    return Case(
        requests=requests,
        num_kv_heads=num_kv_heads,
        group=draw(st.sampled_from([1, 2, 3, 5, 7])),
        head_dim=head_dim,
        head_dim_v=min(head_dim, head_dim_v) if latent else head_dim_v,
        num_pages=NUM_PAGES,
        page_size=page_size,
        dtype=dtype,
        layout=Layout.UNIFIED if latent else draw(st.sampled_from(list(Layout))),
        precision=draw(st.sampled_from([PrecisionMode.AUTO] * 3 + list(PrecisionMode))),
        scale=draw(st.sampled_from([head_dim**-0.5, 0.05, 0.3, 0.0, -0.3])),
        softcap=5.0 if draw(flag) else 0.0,
        window=draw(st.sampled_from([0, 0, 1, 3, page_size, 2 * page_size + 1, 100, 2**30, 2**32 - 1])),
        alibi=draw(flag),
        sinks=draw(flag),
        return_lse=draw(flag),
        mask_prefix_hole=hole,
        cache_only=cache_only,
        store_first=store_first,
        kv_dtype=FP8 if kv_dtype is FP8 else None,
        k_scales=k_scales,
        v_scales=k_scales if latent else v_scales,
        v_dtype=None if v_dtype is kv_dtype else v_dtype,
        latent=latent,
        poison=draw(st.sampled_from([math.nan, math.inf, -math.inf])),
        seed=random_.randrange(2**16),
    )
