"""Which kernel and launch shape a request of a step gets."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import lru_cache

import torch

from attnd_server.attention.backends.triton.work import Ints
from attnd_server.attention.config import FP8, AttentionConfig, Layout
from attnd_server.attention.kernels.cuts import EVERYTHING
from attnd_server.attention.kernels.items import HAS_ABSENT_PAGES, NUM_NEW
from attnd_server.attention.kernels.launch_shapes import (
    FEW_NEW_TOKENS,
    HOPPER_DECODE_ROWS,
    HOPPER_ROWS,
    Tile,
    fits_hopper_fp8,
    launch_shape,
)

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
    return (
        device.type == "cuda"
        and _hopper_kernels_load(device)
        and dtype in (torch.float16, torch.bfloat16)
        and dtype == config.dtype
        and config.kv_dtype in (dtype, FP8)
        and config.layout is Layout.UNIFIED
        and config.page_size % 16 == 0
        and config.head_dim in (HOPPER_FP8_DIMS if config.is_quantised else HOPPER_DIMS)
        and config.head_dim_v == config.head_dim  # others compile, but did not run on a device yet
    )


def launches_of(
    table: Ints, config: AttentionConfig, group: int, dtype: torch.dtype, hopper: bool
) -> Iterator[tuple[Tile | None, int, bool, Ints]]:
    """Launch shape (None: Hopper's kernels), rows, whether new tokens are few, and requests of each launch.

    A request's launch shape depends on nothing but itself, so that its bits do not depend on the batch either.
    """
    num_new = table[:, NUM_NEW.value]
    has_absent_pages = table[:, HAS_ABSENT_PAGES.value] != 0
    least, most = num_new.min(initial=EVERYTHING), num_new.max(initial=0)
    if least == most > 0 and not has_absent_pages.any():
        yield (*_launch(int(most), False, config, group, dtype, hopper), table)
        return
    # By launch shape, in an order that does not matter.
    alike: dict[tuple[Tile | None, int, bool], list[int]] = {}
    for request, (new, absent) in enumerate(zip(num_new.tolist(), has_absent_pages.tolist(), strict=True)):
        if new:
            alike.setdefault(_launch(new, absent, config, group, dtype, hopper), []).append(request)
    for launch, requests in alike.items():
        yield (*launch, table[requests])


def _launch(
    num_new: int, has_absent_pages: bool, config: AttentionConfig, group: int, dtype: torch.dtype, hopper: bool
) -> tuple[Tile | None, int, bool]:
    """Launch shape, rows and whether new tokens are few, for a request.

    Hopper's kernels take every page id for one of a page.
    """
    few = num_new <= FEW_NEW_TOKENS
    rows = min(max(16, 1 << (num_new * group - 1).bit_length()), HOPPER_ROWS)
    if hopper and not has_absent_pages and not config.is_quantised:
        fits_decode = rows <= HOPPER_DECODE_ROWS and max(config.head_dim, config.head_dim_v) <= 128
        return None, rows if fits_decode else HOPPER_ROWS, few
    if hopper and not has_absent_pages and few and fits_hopper_fp8(rows, config.head_dim):
        return None, rows, few
    dims = max(16, 1 << (max(config.head_dim, config.head_dim_v) - 1).bit_length())
    tile = launch_shape(num_new, group, dims, 1 if config.is_quantised else dtype.itemsize)
    return tile, tile.rows, few
