"""Plans a step for the Triton backends: lays out its work on the host and copies it to the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from attnd_server.attention.backends.triton.hopper_schedule import hopper_schedule
from attnd_server.attention.backends.triton.launches import fits_hopper, launches_of, multiprocessors
from attnd_server.attention.backends.triton.plan import Launch, TritonPlan
from attnd_server.attention.backends.triton.split_schedule import split_schedule
from attnd_server.attention.backends.triton.work import Ints, Rows, request_table
from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.kernels.items import NUM_NEW
from attnd_server.attention.kernels.launch_shapes import HOPPER_KEYS
from attnd_server.attention.kernels.softmax import LOG2E
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions


def make_plan(
    config: AttentionConfig,
    metadata: AttentionMetadata,
    options: AttentionOptions,
    is_grouped: bool,
    device: torch.device,
) -> TritonPlan:
    """Lays out the work of a step and copies it to the device."""
    query_group = options.num_heads // config.num_kv_heads
    group = query_group if is_grouped else 1
    dtype = config.precision.dtype(config.dtype)
    hopper = is_grouped and fits_hopper(config, dtype, device)
    num_pages = max(1, -(-metadata.max_context_len // config.page_size))
    tables = metadata.page_tables[:, :num_pages].numpy()
    table = request_table(metadata, tables, config.page_size)
    chosen = list(launches_of(table, config, group, dtype, hopper, metadata))
    works = []
    for shape, requests in chosen:
        keys = HOPPER_KEYS if shape.tile is None else shape.tile.keys
        rows = Rows(group, options.num_heads // group, shape.rows, keys, multiprocessors(device))
        schedule = hopper_schedule if shape.tile is None else split_schedule
        works.append(schedule(requests, config.kv_split, options.window, rows))
    seen_new = None if metadata.seen_new is None else metadata.seen_new.numpy().astype(np.int32)
    # Page tables first: kernels prefetch a little past their end.
    host: list[Ints | None] = [tables, _bits(options.alibi_slopes), _bits(options.sinks), seen_new]
    for work in works:
        counters = np.zeros(work.num_counters * (options.num_heads // group), np.int32) if work.num_counters else None
        host += [work.items, work.merges if len(work.merges) else None, counters]
    page_tables, slopes, sinks, seen_new, *arrays = _upload(host, device)
    assert page_tables is not None
    return TritonPlan(
        config=config,
        options=options,
        group=group,
        launches=[
            Launch(
                shape,
                work.num_partial_rows,
                items,
                merges,
                counters,
                int(requests[:, NUM_NEW.value].max()),
            )
            for (shape, requests), work, items, merges, counters in zip(
                chosen, works, arrays[0::3], arrays[1::3], arrays[2::3], strict=True
            )
        ],
        page_tables=page_tables,
        alibi_slopes=None if slopes is None else slopes.view(torch.float32),
        sinks=None if sinks is None else sinks.view(torch.float32),
        seen_new=seen_new,
        reads_rounded=metadata.reads_rounded(config),
    )


def _bits(per_head: torch.Tensor | None) -> Ints | None:
    """A float32 tensor in units of log2, as integers."""
    return None if per_head is None else (per_head.float() * LOG2E).numpy().view(np.int32)


def _upload(parts: Sequence[Ints | None], device: torch.device) -> list[Any]:
    """Host arrays on the device as int32, by one copy that does not wait."""
    # Aligned to 16 bytes, because Triton compiles anew for a pointer that is not.
    sizes = [0 if part is None else -(-part.size // 4) * 4 for part in parts]
    host = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
    array, start = host.numpy(), 0
    for part, size in zip(parts, sizes, strict=True):
        if part is not None:
            array[start : start + part.size].reshape(part.shape)[...] = part
        start += size
    uploaded = host.to(device, non_blocking=True)
    result, start = [], 0
    for part, size in zip(parts, sizes, strict=True):
        result.append(None if part is None else uploaded[start : start + part.size].view(part.shape))
        start += size
    return result
