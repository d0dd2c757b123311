"""Which part of a call is verified: all of a small one, some requests, rows and heads of a big one."""

from __future__ import annotations

import random
from dataclasses import dataclass

from attnd_server.attention.backends.window import first_visible_pages
from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions

# Requests of a call: each costs the call's thread some microseconds.
MAX_REQS = 8
# Scores of one request, all rows and keys of a head: a second or two of one core, for 32 heads.
MAX_SCORES = 1 << 20


@dataclass(frozen=True)
class Rows:
    """What is verified of one request.

    Attributes:
        request: its index in the step.
        first_row: of its new tokens.
        num_rows: from there on.
        first_page: the first column of its page table that is read.
        end_page: the column where its context ends.
    """

    request: int
    first_row: int
    num_rows: int
    first_page: int
    end_page: int


@dataclass(frozen=True)
class Choice:
    """What is verified of one call.

    Attributes:
        rows: of some requests.
        first_kv_head: of all of them.
        num_kv_heads: from there on.
        num_bytes: what a copy of all that takes.
    """

    rows: list[Rows]
    first_kv_head: int
    num_kv_heads: int
    num_bytes: int


def choose(
    metadata: AttentionMetadata, config: AttentionConfig, options: AttentionOptions, seed: int, max_bytes: int
) -> Choice | None:
    """The part of a call that `seed` picks, of at most `max_bytes`; None: not one head of a request is so small.

    Every row of every head has a chance, whatever the call's size, unless its context alone is too long.
    """
    picked = random.Random(seed)
    first_pages = first_visible_pages(metadata.context_lens, options.window, config.page_size).tolist()
    rows: list[Rows] = []
    num_bytes, num_heads, first_head = 0, config.num_kv_heads, 0
    for request in picked.sample(range(metadata.num_reqs), metadata.num_reqs):
        query_len = metadata.query_lens[request]
        if not query_len:
            continue
        end_page = -(-int(metadata.context_lens[request]) // config.page_size)
        num_cached = (end_page - first_pages[request]) * config.page_size
        num_rows = min(query_len, max(1, MAX_SCORES // (num_cached + query_len)))
        head_bytes = _head_bytes(config, options, num_cached, query_len, num_rows)
        if not rows:
            num_heads = min(config.num_kv_heads, max_bytes // head_bytes)
            if not num_heads:
                continue
            first_head = picked.randint(0, config.num_kv_heads - num_heads)
        elif len(rows) == MAX_REQS or num_bytes + head_bytes * num_heads > max_bytes:
            break
        first_row = picked.randint(0, query_len - num_rows)
        rows.append(Rows(request, first_row, num_rows, first_pages[request], end_page))
        num_bytes += head_bytes * num_heads
    return Choice(rows, first_head, num_heads, num_bytes) if rows else None


def _head_bytes(
    config: AttentionConfig, options: AttentionOptions, num_cached: int, query_len: int, num_rows: int
) -> int:
    """Bytes of one KV head of a request: K and V, and its query heads' q, output and lse."""
    dims, itemsize = config.head_dim + config.head_dim_v, config.dtype.itemsize
    group = options.num_heads // config.num_kv_heads
    k_itemsize, v_itemsize = ((each or config.dtype).itemsize for each in (config.kv_dtype, config.v_dtype))
    cached = num_cached * (config.head_dim * k_itemsize + config.head_dim_v * v_itemsize)
    return cached + query_len * dims * itemsize + num_rows * group * (dims * itemsize + 4)
