"""What AUTO tries for each kind of step on each device, the fastest first: one table.

Each row is for the kind of step that one benchmark times: `python -m benchmarks.decode` (or blocks, prefill, chunked),
whose figures on an H200 stand in docs/benchmarks.md. Of what is installed there beside the kernels written for paged
steps only torch's cuDNN serves one of these kinds, prefill without context, and well only prompts of one length: from
256 to 2k tokens it takes a half to a tenth less time than ours, for 4k as much, for 8k and more it takes longer.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import torch

from attnd_server.attention.backends.dense_prefill import is_dense_prefill
from attnd_server.attention.config import AttentionBackend, AttentionConfig
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions

BLOCK_TOKENS = 256
"""Most new tokens of a request in a step of kind BLOCKS."""
EVEN_TOKENS = 4096
"""Most tokens of a prompt in a step of kind EVEN_PREFILL."""


class StepKind(enum.Enum):
    """What decides which backend is fastest."""

    DECODE = "decode"
    """One new token for each request."""
    BLOCKS = "blocks"
    """At most BLOCK_TOKENS new tokens for each request, on some context or equally many for all."""
    PREFILL = "prefill"
    """No context."""
    EVEN_PREFILL = "even prefill"
    """The same, of prompts of one length up to EVEN_TOKENS with plain masks, see `is_dense_prefill`; cuDNN is on."""
    CHUNKED = "chunked"
    """Anything else: more new tokens, on some context."""


class Choice(NamedTuple):
    """A row of the table: it holds from compute capability `capability` on (0.0 on a processor)."""

    device_type: str
    capability: tuple[int, int]
    kind: StepKind
    order: tuple[AttentionBackend, ...]


_NAIVE, _SDPA, _FLASH = AttentionBackend.NAIVE, AttentionBackend.SDPA, AttentionBackend.FLASH_ATTN
_GROUPED = AttentionBackend.TRITON_GROUPED

# The first row of a device and kind holds, so newer devices come first. The last backend of an order supports every
# step. Triton is not tried on a processor even where its interpreter could run: that is for tests.
CHOICES = (
    Choice("cuda", (0, 0), StepKind.DECODE, (_GROUPED, _FLASH, _SDPA, _NAIVE)),
    Choice("cuda", (0, 0), StepKind.BLOCKS, (_GROUPED, _FLASH, _SDPA, _NAIVE)),
    Choice("cuda", (0, 0), StepKind.PREFILL, (_GROUPED, _FLASH, _SDPA, _NAIVE)),
    Choice("cuda", (9, 0), StepKind.EVEN_PREFILL, (_SDPA, _GROUPED, _FLASH, _NAIVE)),
    Choice("cuda", (0, 0), StepKind.EVEN_PREFILL, (_GROUPED, _FLASH, _SDPA, _NAIVE)),
    Choice("cuda", (0, 0), StepKind.CHUNKED, (_GROUPED, _FLASH, _SDPA, _NAIVE)),
    Choice("cpu", (0, 0), StepKind.DECODE, (_SDPA, _NAIVE)),
    Choice("cpu", (0, 0), StepKind.BLOCKS, (_SDPA, _NAIVE)),
    Choice("cpu", (0, 0), StepKind.PREFILL, (_SDPA, _NAIVE)),
    Choice("cpu", (0, 0), StepKind.EVEN_PREFILL, (_SDPA, _NAIVE)),
    Choice("cpu", (0, 0), StepKind.CHUNKED, (_SDPA, _NAIVE)),
)


def kind_of(
    config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions, device: torch.device
) -> StepKind:
    """The kind of a step."""
    if metadata.is_decode and metadata.num_tokens == metadata.num_reqs:
        return StepKind.DECODE
    has_context = metadata.max_context_len > 0
    if (has_context or metadata.is_decode) and max(metadata.query_lens, default=0) <= BLOCK_TOKENS:
        return StepKind.BLOCKS
    if has_context:
        return StepKind.CHUNKED
    is_even = len(set(metadata.query_lens)) == 1 and metadata.query_lens[0] <= EVEN_TOKENS
    # How torch computes a prompt may depend on how many there are.
    may_depend = not config.kv_split.batch_invariant
    # Servers with cuda planes have it off, see `first_uses`; torch's other kernels are slower than ours.
    has_cudnn = device.type == "cpu" or torch.backends.cuda.cudnn_sdp_enabled()
    if is_even and may_depend and has_cudnn and is_dense_prefill(config, metadata, options, device):
        return StepKind.EVEN_PREFILL
    return StepKind.PREFILL


def orders_for(
    device: torch.device, capability: tuple[int, int], choices: tuple[Choice, ...] = CHOICES
) -> dict[StepKind, tuple[AttentionBackend, ...]]:
    """The backends to try for each kind of step on a device.

    Args:
        device: where pages and tensors lie.
        capability: its compute capability; (0, 0) on a processor.
        choices: the table.

    Raises:
        ValueError: the table has no row for the device's type.
    """
    orders: dict[StepKind, tuple[AttentionBackend, ...]] = {}
    for choice in choices:
        if choice.device_type == device.type and choice.capability <= capability:
            orders.setdefault(choice.kind, choice.order)
    if not orders:
        types = " or ".join(sorted({choice.device_type for choice in choices}))
        raise ValueError(f"device is {device}, but must be of type {types}")
    return orders
