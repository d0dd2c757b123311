"""What a call costs, known before it starts: from lengths and heads alone, whatever pages it names.

The unit is one product of two numbers. What takes time without products counts as many as take as long, roughly.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from attnd.errors import Exhausted
from attnd_server.attention.backends.sdpa import missing_option
from attnd_server.attention.backends.window import first_visible_positions
from attnd_server.attention.config import AttentionBackend, AttentionConfig
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions
from attnd_server.attention.tiles import EXP_PRODUCTS
from attnd_server.config import ServerConfig

# Work of a small call: some milliseconds of two cores, with what scores take there beside their products, and half a
# millisecond of a GPU.
SMALL_WORK, SMALL_GPU_WORK = 1 << 27, 1 << 34
# Bytes that a small call brings and gets.
SMALL_BYTES = 8 << 20
# Work from which a call on a processor runs in pieces, and others have turns between: a tenth of a second of two cores.
LONG_WORK = 1 << 31
# Of a number of K or V that is gathered, a number of q, k, v or output, and a request that is looked at alone.
GATHERED_WORK, COPIED_WORK, REQUEST_WORK = 8, 16, 1 << 21
# Pairs of a row and a key up to which an upper bound is good enough.
FEW_PAIRS = 4_096
# The least head dim that kernels of a GPU compute with, and how much longer torch takes there than kernels of ours.
MIN_GPU_DIM, PLAIN_GPU_FACTOR = 16, 8
# Most work of a call of the specification there: half a second of an H200. It is thousands of short launches from
# Python, which wait for the interpreter where other threads are busy: 1.6 s alone were 28 s on a server under attack.
NAIVE_GPU_WORK = 1 << 38
# Work of a second: more than a core does, so that nothing is refused that could end in time, and less than a GPU does.
CORE_WORK_S, GPU_WORK_S = 1 << 37, 1 << 40


class Cost(NamedTuple):
    """The cost of one call.

    Attributes:
        work: in products of two numbers.
        is_small: whether it takes no longer than a few switches of thread, so that it may run on a thread that others
            wait for.
        is_long: whether it runs in pieces, if its backend can.
    """

    work: int
    is_small: bool
    is_long: bool


def cost_of(
    config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions, device: torch.device
) -> Cost:
    """The cost of a call of a step with these options.

    Args:
        config: of the cache.
        metadata: of the step.
        options: of the layer.
        device: where it runs.

    Raises:
        Exhausted: the specification was asked for on a GPU, and would have it for too long.
    """
    on_processor, num_tokens = device.type == "cpu", metadata.num_tokens
    least = 0 if on_processor else MIN_GPU_DIM
    k_dims, v_dims = max(config.head_dim, least), max(config.head_dim_v, least)
    dims = k_dims + v_dims
    kv_dims = k_dims if config.latent else dims  # V comes with K's row
    heads, kv_heads = options.num_heads, config.num_kv_heads
    pairs, keys = _pairs_and_keys(metadata, options)
    copied = num_tokens * (dims * heads + kv_dims * 2 * kv_heads)
    backend = options.backend or config.backend
    work = dims * pairs * heads + kv_dims * GATHERED_WORK * keys * kv_heads + COPIED_WORK * copied
    if not on_processor and backend in (AttentionBackend.NAIVE, AttentionBackend.SDPA):
        work *= PLAIN_GPU_FACTOR
    if backend is AttentionBackend.NAIVE or (on_processor and missing_option(options)):  # which naive serves then
        work += REQUEST_WORK * metadata.num_reqs
    if not on_processor and backend is AttentionBackend.NAIVE and work > NAIVE_GPU_WORK:
        raise too_costly(work, NAIVE_GPU_WORK)
    # How long a processor takes: of few dims a score costs more than its products.
    lasts = work + EXP_PRODUCTS * pairs * heads if on_processor else work
    is_small = lasts <= (SMALL_WORK if on_processor else SMALL_GPU_WORK)
    is_small = is_small and copied * config.dtype.itemsize <= SMALL_BYTES
    return Cost(work, is_small, on_processor and lasts > LONG_WORK)


def _pairs_and_keys(metadata: AttentionMetadata, options: AttentionOptions) -> tuple[int, int]:
    """Pairs of a new token and a key that it may see, and keys of all requests; upper bounds for small steps."""
    if metadata.store_only:
        return 0, 0
    most = metadata.max_context_len + metadata.num_tokens
    if metadata.num_tokens * most <= FEW_PAIRS:
        return metadata.num_tokens * most, metadata.num_reqs * most
    rows = torch.diff(metadata.cu_seqlens_q)
    spans = metadata.context_lens - first_visible_positions(metadata.context_lens, options.window)
    new = torch.zeros_like(rows) if metadata.cache_only else rows
    return int((rows * (spans + new)).sum()), int((spans + new).sum())


def most_work(config: ServerConfig, device: torch.device, num_threads: int, *, has_kernels: bool) -> float:
    """Work that one call may ask for.

    Args:
        config: the time that calls may take.
        device: where they run.
        num_threads: of a call on a processor.
        has_kernels: whether a GPU has kernels of ours.
    """
    if device.type == "cpu":
        return config.max_call_s * num_threads * CORE_WORK_S
    # Half, because others' launches may come before it: whoever waits too long for a GPU takes it for broken.
    most = config.device_timeout_s / 2 * GPU_WORK_S / (1 if has_kernels else PLAIN_GPU_FACTOR)
    return most or math.inf


def too_costly(work: int, most: float) -> Exhausted:
    """What a caller is told whose call asks for more than the `most` work."""
    return Exhausted(
        f"q asks for {work} products (new tokens x keys x heads x dims, roughly), but a call may ask for {most:.0f}, "
        "which its backend does not compute here in the time that a call has; send fewer tokens at once",
        field="q",
    )
