"""Which kernel and launch shape a request of a step gets."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

from attnd_server.attention.backends.triton.work import Ints
from attnd_server.attention.config import FP8, AttentionConfig, Layout
from attnd_server.attention.kernels.cuts import EVERYTHING
from attnd_server.attention.kernels.items import HAS_ABSENT_PAGES, NUM_NEW
from attnd_server.attention.kernels.launch_shapes import (
    FEW_NEW_TOKENS,
    HOPPER_DECODE_ROWS,
    HOPPER_ROWS,
    MAX_SPLIT_TOKENS,
    Tile,
    fits_hopper_fp8,
    launch_shape,
)
from attnd_server.attention.metadata import ALL_SEEN, NONE_SEEN, SOME_SEEN, AttentionMetadata

log = logging.getLogger(__name__)

HOPPER_DIMS, HOPPER_FP8_DIMS = (64, 128, 256), (128, 256)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few for Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@lru_cache
def _hopper_kernels_load(device: torch.device) -> bool:
    """Whether the device is a Hopper GPU and triton new enough to have its language."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        import attnd_server.attention.kernels.hopper.attention  # noqa: F401
    except (AttributeError, ImportError) as error:
        log.warning("triton has no kernels for Hopper: %s", error)
        return False
    return True


def fits_hopper(config: AttentionConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether Hopper's kernels serve a cache: what its units take, on a device that has them. Of FP8, decode alone."""
    return device.type == "cuda" and _hopper_kernels_load(device) and hopper_serves(config, dtype)


def hopper_serves(config: AttentionConfig, dtype: torch.dtype) -> bool:
    """Whether Hopper's kernels serve a cache on a Hopper GPU, multiplying in `dtype`."""
    return (
        dtype in (torch.float16, torch.bfloat16)
        and dtype == config.dtype
        and config.kv_dtype in (dtype, FP8)
        and config.is_uniform
        and config.layout is Layout.UNIFIED
        and config.page_size % 16 == 0
        and config.head_dim in (HOPPER_FP8_DIMS if config.is_quantised else HOPPER_DIMS)
        and config.head_dim_v == config.head_dim  # others compile, but did not run on a device yet
    )


class Keys(NamedTuple):
    """What requests of a launch see beside their context.

    Attributes:
        new: NONE_SEEN, SOME_SEEN or ALL_SEEN of their new tokens.
        sinks: whether they have those of the options.
    """

    new: int = ALL_SEEN
    sinks: bool = True


class LaunchShape(NamedTuple):
    """Of a launch.

    Attributes:
        tile: its launch shape; None: Hopper's kernels.
        rows: of a program.
        is_few: whether no request has more than FEW_NEW_TOKENS new tokens.
        keys: what its requests see.
    """

    tile: Tile | None
    rows: int
    is_few: bool
    keys: Keys


def launches_of(
    table: Ints,
    config: AttentionConfig,
    group: int,
    dtype: torch.dtype,
    hopper: bool,
    metadata: AttentionMetadata | None = None,
) -> Iterator[tuple[LaunchShape, Ints]]:
    """The shape of each launch, and its requests.

    A request's launch shape depends on nothing but itself, so that its bits do not depend on the batch either.

    Args:
        table: the requests of a step.
        config: of the cache.
        group: query heads that share a program.
        dtype: to multiply in.
        hopper: whether Hopper's kernels serve the cache.
        metadata: the step; None: one of which every valid new token is a key.
    """
    if metadata is not None and metadata.reads_rounded(config):
        hopper = False
    num_new = table[:, NUM_NEW.value]
    has_absent_pages = table[:, HAS_ABSENT_PAGES.value] != 0
    least, most = num_new.min(initial=EVERYTHING), num_new.max(initial=0)
    is_plain = metadata is None or metadata.is_plain
    if is_plain and least == most > 0 and not has_absent_pages.any():
        keys = Keys(NONE_SEEN if metadata is not None and metadata.cache_only else ALL_SEEN)
        yield _launch(int(most), False, keys, config, group, dtype, hopper), table
        return
    # By launch shape, in an order that does not matter.
    alike: dict[LaunchShape, list[int]] = {}
    keys_of = _keys_of(len(table), metadata)
    for request, (new, absent) in enumerate(zip(num_new.tolist(), has_absent_pages.tolist(), strict=True)):
        if new:
            shape = _launch(new, absent, keys_of[request], config, group, dtype, hopper)
            alike.setdefault(shape, []).append(request)
    for shape, requests in alike.items():
        yield shape, table[requests]


def _keys_of(num_reqs: int, metadata: AttentionMetadata | None) -> list[Keys]:
    """What each request sees beside its context."""
    if metadata is None:
        return [Keys()] * num_reqs
    without = metadata.without_sinks
    sinks = [True] * num_reqs if without is None else (~without).tolist()
    return list(map(Keys, metadata.new_keys.tolist(), sinks))


def _launch(
    num_new: int,
    has_absent_pages: bool,
    keys: Keys,
    config: AttentionConfig,
    group: int,
    dtype: torch.dtype,
    hopper: bool,
) -> LaunchShape:
    """The launch shape of a request.

    Hopper's kernels take every page id for one of a page, and see all new tokens or none, as calls bring them.
    """
    hopper = hopper and keys.new != SOME_SEEN
    few = num_new <= FEW_NEW_TOKENS
    rows = min(max(16, 1 << (num_new * group - 1).bit_length()), HOPPER_ROWS)
    if hopper and not has_absent_pages and not config.is_quantised:
        fits_decode = rows <= HOPPER_DECODE_ROWS and max(config.head_dim, config.head_dim_v) <= 128
        return LaunchShape(None, rows if fits_decode else HOPPER_ROWS, few, keys)
    if hopper and not has_absent_pages and few and fits_hopper_fp8(rows, config.head_dim):
        return LaunchShape(None, rows, few, keys)
    dims = max(16, 1 << (max(config.head_dim, config.head_dim_v) - 1).bit_length())
    both = config.k_is_quantised and config.v_is_quantised
    tile = launch_shape(num_new, group, dims, 1 if both else dtype.itemsize)
    return LaunchShape(tile, tile.rows, few, keys)


def shapes_of(config: AttentionConfig, hopper: bool) -> Iterator[LaunchShape]:
    """Every launch shape that requests of a cache can get, each once: those of few tokens and of Hopper's first."""
    dtype, seen = config.precision.dtype(config.dtype), set()
    # Rows of one token are query heads of a KV head, and those of more are as many or more.
    requests = [(1, 1 << bit) for bit in range(4, HOPPER_ROWS.bit_length())]
    requests += [(FEW_NEW_TOKENS + 1, 1), (FEW_NEW_TOKENS + 1, HOPPER_ROWS), (MAX_SPLIT_TOKENS + 1, 1)]
    for has_absent_pages in (False, True):
        for num_new, group in requests:
            shape = _launch(num_new, has_absent_pages, Keys(), config, group, dtype, hopper)
            if (shape.tile, shape.rows) not in seen:
                seen.add((shape.tile, shape.rows))
                yield shape
