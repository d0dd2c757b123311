"""What a launch brings and may lack, as bits of one number: kernels need not be compiled for each choice.

A pointer that is not given is some other one, of the same type, through which nothing is read or written.
"""

from __future__ import annotations

import torch
import triton.language as tl

LSE, SINKS, SLOPES, NEW_TOKENS, K_SCALES, V_SCALES, SEEN_TOKENS, NEW_IS_SCALED = (
    tl.constexpr(1 << bit) for bit in range(8)
)


# Arguments of the attention kernels by name: numbers that they are not compiled for, and pointers through which nothing
# is read or written that is wide enough for its alignment to matter.
RUN_TIME_NUMBERS = (
    "group", "group_inverse", "num_heads", "heads", "heads_inverse", "groups", "groups_inverse", "kv_heads",
    "window", "new_mask", "given", "num_tokens",
)  # fmt: skip
NARROW = (
    "lse", "partial_lse", "counters", "page_tables", "items", "merges", "alibi_slopes", "sinks", "k_scales", "v_scales",
    "seen_tokens", "slot_mapping",
)  # fmt: skip
_BITS = {
    "lse": LSE,
    "sinks": SINKS,
    "slopes": SLOPES,
    "new_tokens": NEW_TOKENS,
    "k_scales": K_SCALES,
    "v_scales": V_SCALES,
    "seen_tokens": SEEN_TOKENS,
    "new_is_scaled": NEW_IS_SCALED,
}


def bits_of(**given: torch.Tensor | bool | None) -> int:
    """The number that says which of these there are, by name; None and False are not."""
    return sum(_BITS[name].value for name, value in given.items() if value is not None and value is not False)


def some(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """The tensor if it is given, else another one."""
    return other if tensor is None else tensor


def has_options(alibi_slopes: torch.Tensor | None, softcap: float, window: int) -> bool:
    """Whether there is an option without which a kernel is compiled to have less to do."""
    return alibi_slopes is not None or softcap > 0 or window > 0
