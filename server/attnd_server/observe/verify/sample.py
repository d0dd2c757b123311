"""A part of a call and everything that its result depends on, copied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from attnd_server.attention.config import AttentionBackend, AttentionConfig, Layout
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions
from attnd_server.execution.step import Call, Result
from attnd_server.observe.verify.choice import Choice, Rows


@dataclass(frozen=True, eq=False)
class Sample:
    """Copies, which nobody writes to. The pages are on the caches' device, the rest on the host.

    Attributes:
        backend: what computed the output.
        layer: of the call, by its number in the cache.
        seed: of the choice.
        choice: what of the call this is.
        step: the whole step.
        config: of a cache with the pages and KV heads that were copied.
        metadata: of a step with the requests that were chosen, whose page tables name the copied pages.
        options: with the query heads of these KV heads.
        q: `[rows of all requests, num_heads, head_dim]`, only those that were chosen.
        k: `[new tokens of the requests, num_kv_heads, head_dim]`; None in a cache-only step.
        v: likewise.
        output: for q.
        lse: likewise, if the call has it.
        pages: of the layer, as all of them were before the call where it read them.
        copied: on a GPU: when the pages are there.
        is_wanted: whether anybody wants the verdict yet.
    """

    backend: AttentionBackend
    layer: int
    seed: int
    choice: Choice
    step: AttentionMetadata
    config: AttentionConfig
    metadata: AttentionMetadata
    options: AttentionOptions
    q: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor | None
    output: torch.Tensor
    lse: torch.Tensor | None
    pages: LayerPages
    copied: torch.cuda.Event | None
    is_wanted: Callable[[], bool] = lambda: True


def sample_of(call: Call, result: Result, choice: Choice, seed: int) -> Sample:
    """Copies a part of a call that has run and has an output.

    With the device, before anything else runs. The pages are then still what the call read: a step never
    stores into a slot that it reads, or has stored before it read.
    """
    step, layer, options, q, k, v = call[:6]
    group, metadata = step.group, step.metadata
    config, output, backend = group.config, result.output, result.backend
    assert q is not None
    assert output is not None
    assert backend is not None
    per_kv_head = options.num_heads // config.num_kv_heads
    first, end = choice.first_kv_head, choice.first_kv_head + choice.num_kv_heads
    kv_heads, heads = slice(first, end), slice(first * per_kv_head, end * per_kv_head)
    tables, page_ids = _page_tables(metadata, choice.rows)
    ids = page_ids.to(group.device)
    head_axis = 2 if config.layout is Layout.UNIFIED else 1
    pages = group.layers[layer]
    k_pages, v_pages = (_picked(each.narrow(head_axis, first, choice.num_kv_heads), ids) for each in (pages.k, pages.v))
    scales = (None if each is None else each[kv_heads] for each in (pages.k_scales, pages.v_scales))
    bounds = metadata.cu_seqlens_q.tolist()
    rows = [slice(bounds[r.request] + r.first_row, bounds[r.request] + r.first_row + r.num_rows) for r in choice.rows]
    tokens = [slice(bounds[r.request], bounds[r.request + 1]) for r in choice.rows]
    return Sample(
        backend=backend,
        layer=group.layer_numbers[layer],
        seed=seed,
        choice=choice,
        step=metadata,
        config=replace(
            config,
            num_layers=1,
            num_kv_heads=choice.num_kv_heads,
            num_pages=max(1, len(page_ids)),
            k_scales=(1.0,),
            v_scales=(1.0,),
        ),
        metadata=_requests(metadata, [r.request for r in choice.rows], tables),
        options=replace(
            options,
            num_heads=choice.num_kv_heads * per_kv_head,
            alibi_slopes=None if options.alibi_slopes is None else options.alibi_slopes[heads],
            sinks=None if options.sinks is None else options.sinks[heads],
        ),
        q=torch.cat([q[part, heads] for part in rows]),
        k=None if k is None else torch.cat([k[part, kv_heads] for part in tokens]),
        v=None if v is None else torch.cat([v[part, kv_heads] for part in tokens]),
        output=torch.cat([output[part, heads] for part in rows]),
        lse=None if result.lse is None else torch.cat([result.lse[part, heads] for part in rows]),
        pages=LayerPages(k_pages, v_pages, *scales),
        copied=_mark(group.device),
    )


def on_host(sample: Sample, stream: torch.cuda.Stream | None) -> Sample:
    """The sample with all of it on the host, brought there on a stream that delays no other."""
    if stream is None or sample.copied is None:
        return sample
    stream.wait_event(sample.copied)
    k, v, *scales = sample.pages
    with torch.cuda.stream(stream):
        return replace(
            sample,
            pages=LayerPages(k.cpu(), v.cpu(), *(None if each is None else each.cpu() for each in scales)),
            copied=None,
        )


def _mark(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _picked(pages: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Copies of pages; FP8 as plain bytes, for which torch has every operation."""
    if pages.dtype.itemsize > 1:
        return pages.index_select(0, ids)
    return pages.view(torch.uint8).index_select(0, ids).view(pages.dtype)


def _page_tables(metadata: AttentionMetadata, rows: list[Rows]) -> tuple[torch.Tensor, torch.Tensor]:
    """Page tables that name the pages to be copied by their place among them, and the ids of these: int64 `[num]`."""
    width = max(1, *(each.end_page for each in rows))
    tables = torch.full((len(rows), width), -1, dtype=torch.int64)
    page_ids: list[torch.Tensor] = []
    count = 0
    for table, each in zip(tables, rows, strict=True):
        read = metadata.page_tables[each.request, each.first_page : each.end_page].long()
        is_there = read >= 0
        num = int(is_there.sum())
        table[each.first_page : each.end_page][is_there] = torch.arange(count, count + num)
        page_ids.append(read[is_there])
        count += num
    return tables, torch.cat(page_ids) if count else torch.zeros(1, dtype=torch.int64)


def _requests(metadata: AttentionMetadata, chosen: list[int], tables: torch.Tensor) -> AttentionMetadata:
    """Some requests of a step as a step that stores nothing."""
    index = torch.tensor(chosen)
    lens = torch.tensor([metadata.query_lens[request] for request in chosen])
    bounds = metadata.cu_seqlens_q.tolist()
    tokens = [slice(bounds[request], bounds[request + 1]) for request in chosen]
    names = ("context_lens", "valid_lens", "block_sizes", "prefix_lens", "padded_prefix_lens", "hole_starts")
    columns = {name: getattr(metadata, name)[index] for name in (*names, "hole_ends")}
    return AttentionMetadata(
        is_decode=metadata.is_decode,
        num_tokens=int(lens.sum()),
        cu_seqlens_q=torch.cat([torch.zeros(1, dtype=torch.int64), lens.cumsum(0)]),
        page_tables=tables,
        slot_mapping=None,
        cache_only=metadata.cache_only,
        store_first=metadata.store_first,
        seen_new=None if metadata.seen_new is None else torch.cat([metadata.seen_new[part] for part in tokens]),
        without_sinks=None if metadata.without_sinks is None else metadata.without_sinks[index],
        **columns,
    )
