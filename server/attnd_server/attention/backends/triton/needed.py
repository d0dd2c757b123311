"""What calls of a cache can launch in Triton: each kernel once, as its own launcher launches it.

So that kernels can be compiled before a call needs them. The tensors have no data and nothing is computed: run what
this gives in `collecting()`, or with a driver that only compiles, on a machine without a GPU too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from attnd_server.attention.backends.triton.launches import LaunchShape, hopper_serves, shapes_of
from attnd_server.attention.backends.triton.plan import Launch, TritonPlan
from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.kernels.decode_items import SLOTS, decode_items
from attnd_server.attention.kernels.gather import read_kv
from attnd_server.attention.kernels.items import ITEM_FIELDS, MERGE_FIELDS
from attnd_server.attention.kernels.joined import JoinedCalls, JoinedTensors, give_results, take_calls
from attnd_server.attention.kernels.launch_shapes import HOPPER_ROWS, MAX_SPLIT_TOKENS
from attnd_server.attention.kernels.store import store_kv
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.attention.metadata import AttentionOptions

# The first GPUs that have FP8.
_FP8_ARCH = 89
# Query heads of a KV head for which Hopper's kernel of many rows is there before a call: those of most models.
GROUPS_AHEAD = (4, 8, 1)


def needed_launches(
    config: AttentionConfig, is_hopper: bool, device: torch.device | None = None
) -> Iterator[Callable[[], None]]:
    """What makes every launch that calls of a cache can need, the most likely first.

    Numbers of query heads, lengths and most options are no part of a kernel, and so neither of what is needed; KV heads
    and page size are. But Hopper's kernel of many rows is compiled for each group and each option. Those without
    options are here, for GROUPS_AHEAD; others are too many: a first call brings them, or a warm-up.

    Args:
        config: of the cache.
        is_hopper: whether the GPU is one that Hopper's kernels are for.
        device: on which the kernels will run; None: that of Triton's driver.
    """
    from triton.runtime import driver

    with _on(device):
        arch = driver.active.get_current_target().arch
    if config.latent or (config.is_quantised and arch < _FP8_ARCH):
        return
    hopper = is_hopper and hopper_serves(config, config.precision.dtype(config.dtype))
    for launch in _launches(config, hopper):
        yield partial(_run, launch, device)


def without_data(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor that has a shape and a type, and as far as a launch can see, an aligned address."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _run(launch: Callable[[], object], device: torch.device | None) -> None:
    with _on(device):
        launch()


def _on(device: torch.device | None) -> AbstractContextManager[object]:
    """Makes a GPU the one that launches are for. Tensors without data are on none."""
    return torch.cuda.device(device) if device is not None and device.type == "cuda" else nullcontext()


def _launches(config: AttentionConfig, hopper: bool) -> Iterator[Callable[[], object]]:
    """One after the other."""
    pages, slots = _pages(config), without_data(1, dtype=torch.int64)
    k = without_data(1, config.num_kv_heads, config.head_dim, dtype=config.dtype)
    v = without_data(1, config.num_kv_heads, config.head_dim_v, dtype=config.dtype)
    shapes = list(shapes_of(config, hopper))
    yield partial(store_kv, pages, k, v, slots, config.layout)
    if hopper:
        yield from (partial(_lay_out, config, SLOTS[0], even) for even in (False, True))
    # All other attention kernels are compiled once more for options.
    for softcap in (0.0, 1.0):
        for shape in shapes:
            if shape.tile is not None or shape.rows != HOPPER_ROWS:
                yield from (
                    partial(_attend, config, shape, softcap, 1, split, pages) for split in _splits(config, shape)
                )
            elif not softcap:
                for group in GROUPS_AHEAD:
                    yield from (partial(_attend, config, shape, 0.0, group, split, pages) for split in (False, True))
        if not softcap:
            yield partial(read_kv, pages, slots, config.layout, config.dtype)
        if hopper and not softcap:
            yield from (partial(_lay_out, config, most, even) for most in SLOTS[1:] for even in (False, True))
            yield partial(_join, config)


def _splits(config: AttentionConfig, shape: LaunchShape) -> tuple[bool, ...]:
    """Whether requests are in several chunks, if the kernel is another one then; see `paged_attention`."""
    has_both = shape.tile is not None and shape.tile.most_tokens == MAX_SPLIT_TOKENS
    return (False, True) if has_both and not config.kv_split.batch_invariant else (True,)


def _pages(config: AttentionConfig) -> LayerPages:
    """Of a layer."""
    k_dtype = config.kv_dtype or config.dtype
    k = without_data(1, *config.k_shape[1:], dtype=k_dtype)
    v = without_data(1, *config.v_shape[1:], dtype=config.v_dtype or k_dtype)
    scales = [
        without_data(config.num_kv_heads, dtype=torch.float32) if is_quantised else None
        for is_quantised in (config.k_is_quantised, config.v_is_quantised)
    ]
    return LayerPages(k, v, *scales)


def _attend(
    config: AttentionConfig, shape: LaunchShape, softcap: float, group: int, split: bool, pages: LayerPages
) -> None:
    """A layer of a step in one launch, of one token, and what merges its parts if it is split."""
    heads = config.num_kv_heads * group
    q = without_data(1, heads, config.head_dim, dtype=config.dtype)
    k = without_data(1, config.num_kv_heads, config.head_dim, dtype=config.dtype)
    v = without_data(1, config.num_kv_heads, config.head_dim_v, dtype=config.dtype)
    partials = (
        without_data(2, heads, config.head_dim_v, dtype=torch.float32),
        without_data(2, heads, dtype=torch.float32),
    )
    items, merges = without_data(1, ITEM_FIELDS, dtype=torch.int32), without_data(1, MERGE_FIELDS, dtype=torch.int32)
    TritonPlan(
        config=config,
        options=AttentionOptions(num_heads=heads, scale=1.0, softcap=softcap),
        group=group,
        launches=[Launch(shape, 2 * split, items, merges, without_data(heads, dtype=torch.int32), 1)],
        page_tables=without_data(1, dtype=torch.int32),
        alibi_slopes=None,
        sinks=None,
        partials={0: partials},
    ).launch(without_data(1, heads, config.head_dim_v, dtype=config.dtype), None, q, k, v, pages)


def _lay_out(config: AttentionConfig, num_slots: int, even: bool) -> None:
    """Lays out a decode step of up to so many requests."""
    decode_items(
        without_data(1, ITEM_FIELDS, dtype=torch.int32),
        without_data(num_slots, MERGE_FIELDS, dtype=torch.int32),
        without_data(1, dtype=torch.int32),
        query_len=1,
        group=1,
        num_groups=config.num_kv_heads,
        rows=16,
        num_multiprocessors=1,
        num_looked_at=1,
        kv_split=config.kv_split,
        is_chunked=True,
        is_even=even,
        window=0,
    )


def _join(config: AttentionConfig) -> None:
    """Brings requests of one new token from several calls together, and their results back."""
    q = without_data(1, config.num_kv_heads, config.head_dim, dtype=config.dtype)
    output = without_data(1, config.num_kv_heads, config.head_dim_v, dtype=config.dtype)
    numbers, slots = without_data(1, dtype=torch.int32), without_data(1, dtype=torch.int64)
    calls = JoinedCalls(numbers, slots, without_data(1, dtype=torch.uint8), without_data(1, 1, dtype=torch.int32))
    tensors = JoinedTensors(numbers, without_data(1, 1, dtype=torch.int32), slots, q, q, output, output, None)
    take_calls(calls, tensors, query_len=1, page_size=config.page_size)
    give_results(calls, tensors)
