"""What the Triton kernels do in a step, laid out on the host: a work list, and what is merged afterwards.

Every choice depends on the request's own lengths alone, never on the batch: that is what makes outputs batch-invariant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from attnd_server.backends.window import first_visible_positions
from attnd_server.config import KVSplitConfig
from attnd_server.kernels.launch_shapes import CLASSES, class_of
from attnd_server.metadata import AttentionMetadata

# New tokens of an item of a request whose keys are not split.
ITEM_TOKENS = 64
# A split of a request with n new tokens is at least that many times n keys long. Each split writes and reads n rows of
# partial results; this keeps them at a few per cent of the KV that it reads.
_KEYS_PER_NEW_TOKEN = 64
# Greater than any position (see MAX_CONTEXT_LEN of `triton`), and the sum with one fits int32.
_EVERYTHING = 1 << 30


@dataclass
class Launch:
    """One launch of the attention kernel.

    Attributes:
        tile_class: index in CLASSES of its requests.
        item_tokens: most new tokens of an item.
        items: rows of `ITEM_FIELDS` numbers.
    """

    tile_class: int
    item_tokens: int = 0
    items: list[tuple[int, ...]] = field(default_factory=list)


@dataclass
class Schedule:
    """The launches of a step.

    Attributes:
        launches: of the attention kernel, at most one for each launch shape.
        merges: rows of `MERGE_FIELDS` numbers, one for each request whose keys are split.
        merge_tokens: most new tokens of a merge.
        num_partial_rows: rows of the partial results.
    """

    launches: list[Launch]
    merges: list[tuple[int, ...]] = field(default_factory=list)
    merge_tokens: int = 0
    num_partial_rows: int = 0


def schedule(metadata: AttentionMetadata, kv_split: KVSplitConfig, window: int) -> Schedule:
    """Cuts the step into items: by new tokens where a request has many, else by keys."""
    launches = [Launch(index) for index in range(len(CLASSES))]
    result = Schedule(launches)
    first_keys = first_visible_positions(metadata.context_lens, window).tolist()
    num_keys = metadata.context_lens if metadata.cache_only else metadata.context_lens + metadata.valid_lens
    columns = (metadata.cu_seqlens_q.tolist(), metadata.query_lens, first_keys, num_keys.tolist())
    for request, (row, num_new, first_key, end_key) in enumerate(zip(*columns, strict=False)):
        if not num_new:
            continue
        launch = launches[class_of(num_new)]
        if launch.tile_class == len(CLASSES) - 1:
            launch.item_tokens = ITEM_TOKENS
            launch.items += [(request, token, first_key, end_key, -1) for token in range(0, num_new, ITEM_TOKENS)]
            continue
        launch.item_tokens = max(launch.item_tokens, num_new)
        chunk_size, num_splits = split(kv_split, end_key - first_key, num_new)
        partial = result.num_partial_rows
        for index in range(num_splits):
            start = first_key + index * chunk_size
            partial_row = partial + index * num_new if num_splits > 1 else -1
            launch.items.append((request, 0, start, min(start + chunk_size, end_key), partial_row))
        if num_splits > 1:
            result.merges.append((row, num_new, partial, num_splits))
            result.merge_tokens = max(result.merge_tokens, num_new)
            result.num_partial_rows += num_splits * num_new
    result.launches = [launch for launch in launches if launch.items]
    return result


def split(kv_split: KVSplitConfig, num_keys: int, num_new: int) -> tuple[int, int]:
    """`(chunk_size, num_splits)` of a request with `num_new` new tokens that see up to `num_keys` keys."""
    chunk_size, num_splits = kv_split.splits(num_keys)
    if not kv_split.chunk_size:
        while chunk_size < _KEYS_PER_NEW_TOKEN * num_new:
            chunk_size *= 2
        num_splits = max(1, math.ceil(num_keys / chunk_size))
    return chunk_size, num_splits


def request_table(metadata: AttentionMetadata) -> torch.Tensor:
    """The kernel's `requests`: int64 `[num_reqs, REQUEST_FIELDS]` on the host, every number within int32."""
    bidirectional = metadata.block_sizes == 0
    columns = (
        metadata.cu_seqlens_q[:-1],
        torch.diff(metadata.cu_seqlens_q),
        metadata.valid_lens,
        metadata.context_lens,
        metadata.block_sizes.masked_fill(bidirectional, _EVERYTHING),
        metadata.prefix_lens.masked_fill(bidirectional, 0),
        metadata.padded_prefix_lens.masked_fill(bidirectional, 0),
        metadata.hole_starts,
        metadata.hole_ends,
    )
    return torch.stack(columns, dim=1).clamp(max=_EVERYTHING)
