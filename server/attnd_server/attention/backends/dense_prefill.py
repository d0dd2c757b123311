"""Steps that need neither pages nor masks: prefill of whole prompts, as parts for torch's fastest kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnd_server.attention.backends import plain_masks
from attnd_server.attention.backends.gather import PLAIN_ROWS, Part
from attnd_server.attention.backends.part_rows import rows_of
from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions

# Most elements per head of torch's FlashAttention and cuDNN.
MAX_HEAD_DIM = 256
# What serves it on a GPU, the fastest first: each takes grouped heads and a causal flag, but no mask.
_KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
_WITHOUT_CUDNN = _KERNELS[1:]


def is_dense_prefill(
    config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions, device: torch.device
) -> bool:
    """Whether a step has no context, and each request a mask that torch's kernels know without being given any.

    On a GPU only if the step is in a type and head dim for which torch has a kernel that does not hold all scores.
    """
    if metadata.max_context_len or metadata.cache_only or not metadata.is_plain or config.head_dim != config.head_dim_v:
        return False
    if device.type != "cpu":
        dtype = config.precision.dtype(config.dtype)
        if dtype not in (torch.float16, torch.bfloat16) or config.head_dim > MAX_HEAD_DIM:
            return False
    if options.window and max(metadata.query_lens, default=0) > options.window:
        return False
    is_plain = plain_masks.causal(metadata) | plain_masks.bidirectional(metadata)
    return plain_masks.all_valid(metadata) and bool(is_plain.all())


def dense_prefill(
    config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions, device: torch.device
) -> list[Part] | None:
    """A part for each number of new tokens and mask of a dense prefill, or None: the step is another one."""
    if not is_dense_prefill(config, metadata, options, device):
        return None
    on_processor = device.type == "cpu"
    if on_processor and max(metadata.query_lens, default=0) > PLAIN_ROWS:
        return None  # torch would compute a whole prompt at once, however long that takes
    is_causal = plain_masks.causal(metadata)
    groups: dict[tuple[int, bool], list[int]] = {}
    for request, (num_rows, causal) in enumerate(zip(metadata.query_lens, is_causal.tolist(), strict=True)):
        if num_rows:
            # Of one token, the mask does not matter, and torch is faster without.
            groups.setdefault((num_rows, causal and num_rows > 1), []).append(request)
    parts = []
    for (num_rows, causal), requests in groups.items():
        most = max(1, PLAIN_ROWS**2 // num_rows**2) if on_processor else len(requests)
        for first in range(0, len(requests), most):
            parts.append(_part(metadata, requests[first : first + most], num_rows, causal, device))
    return parts


def dense_kernels() -> AbstractContextManager[None]:
    """A block in which torch attends with what is fastest for dense prefill on a GPU.

    Without cuDNN's where that is off: torch would turn it on in the block, and a server with cuda planes must not have
    it, see `first_uses`.
    """
    is_cudnn_on = torch.backends.cuda.cudnn_sdp_enabled()
    return sdpa_kernel(_KERNELS if is_cudnn_on else _WITHOUT_CUDNN, set_priority=True)


def _part(
    metadata: AttentionMetadata, requests: list[int], num_rows: int, is_causal: bool, device: torch.device
) -> Part:
    rows = rows_of(metadata, requests, torch.arange(num_rows), device)
    return Part(
        num_reqs=len(requests),
        rows=rows,
        new_rows=rows,
        num_cached=0,
        slots=None,
        unused=None,
        mask=None,
        is_causal=is_causal,
        blind=None,
    )
