"""The packages of FlashAttention behind one call: which of them is installed and runs here, and how each is called.

Signatures, and what they mean, from github.com/Dao-AILab/flash-attention: `flash_attn/flash_attn_interface.py` (2),
`hopper/flash_attn_interface.py` (3), `flash_attn/cute/interface.py` (4). In all of them causal masks and windows are
aligned to the bottom right: row i of n stands at key position `num_keys - n + i`; a window (left, right) lets it see
`left` keys before and `right` keys after that; lse is natural and `[num_heads, num_tokens]`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from attnd_server.attention.backends.two_parts import Lengths, Partial


class FlashCall(NamedTuple):
    """One attention of several requests.

    Attributes:
        queries: rows of q of each request.
        keys: keys of each request.
        page_tables: int32 `[num_reqs, max_pages]`, k and v are pages; or None: their rows follow each other as q's do.
        scale: factor of q.k.
        is_causal: see above.
        window: (left, right); -1 is no limit.
        softcap: 0 is off.
    """

    queries: Lengths
    keys: Lengths
    page_tables: torch.Tensor | None
    scale: float
    is_causal: bool
    window: tuple[int, int]
    softcap: float


class FlashLibrary(Protocol):
    """A package.

    Attributes:
        package: its name on the package index.
        capabilities: major compute capabilities that it runs on.
        page_multiple: pages must hold a multiple of so many tokens.
        whole_pages: it may read pages of at least that many tokens past the context's end, where anything may lie, and
            lets a NaN there into the output; 0: never.
    """

    package: str
    capabilities: tuple[int, ...]
    page_multiple: int
    whole_pages: int

    def head_dims_refusal(self, head_dim: int, head_dim_v: int) -> str | None:
        """None, or the rule that the head dims break."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: FlashCall) -> Partial:
        """Output and lse of `[num_tokens, num_heads, head_dim]` over pages or rows of k and v."""


class FlashAttention2:
    """Package flash-attn, from 2.6 on (before, lse was padded).

    Args:
        varlen: its `flash_attn_varlen_func`.
    """

    package = "flash-attn"
    capabilities: tuple[int, ...] = (8, 9, 10, 11, 12)
    page_multiple = 256
    whole_pages = 0

    def __init__(self, varlen: Callable[..., Any]) -> None:
        self.varlen = varlen

    @classmethod
    def load(cls, capability: tuple[int, int]) -> FlashAttention2:
        """Imports the package."""
        varlen = importlib.import_module("flash_attn").flash_attn_varlen_func
        return cls(_with_arguments(varlen, "block_table", "softcap"))

    def head_dims_refusal(self, head_dim: int, head_dim_v: int) -> str | None:
        """See `FlashLibrary`."""
        return _equal_head_dims(head_dim, head_dim_v, 256)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: FlashCall) -> Partial:
        """See `FlashLibrary`. Lengths of paged keys are given by their running sum too."""
        output, lse, _ = self.varlen(
            q,
            k,
            v,
            cu_seqlens_q=call.queries.ends,
            cu_seqlens_k=call.keys.ends,
            max_seqlen_q=call.queries.longest,
            max_seqlen_k=call.keys.longest,
            softmax_scale=call.scale,
            causal=call.is_causal,
            window_size=call.window,
            softcap=call.softcap,
            return_attn_probs=True,
            block_table=call.page_tables,
        )
        return output, lse


class FlashAttention3:
    """Module flash_attn_interface, for Hopper.

    Args:
        varlen: its `flash_attn_varlen_func`, for rows.
        with_kvcache: its `flash_attn_with_kvcache`, for pages.
    """

    package = "flash-attn-3"
    capabilities: tuple[int, ...] = (9,)
    page_multiple = 1
    whole_pages = 64

    def __init__(self, varlen: Callable[..., Any], with_kvcache: Callable[..., Any]) -> None:
        self.varlen = varlen
        self.with_kvcache = with_kvcache

    @classmethod
    def load(cls, capability: tuple[int, int]) -> FlashAttention3:
        """Imports the module."""
        module = importlib.import_module("flash_attn_interface")
        return cls(
            _with_arguments(module.flash_attn_varlen_func, "return_attn_probs", "softcap"),
            _with_arguments(module.flash_attn_with_kvcache, "page_table", "return_softmax_lse"),
        )

    def head_dims_refusal(self, head_dim: int, head_dim_v: int) -> str | None:
        """See `FlashLibrary`. Multi-head latent attention's 192 and 128 are the one pair that differs."""
        if (head_dim, head_dim_v) == (192, 128):
            return None
        return _equal_head_dims(head_dim, head_dim_v, 256)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: FlashCall) -> Partial:
        """See `FlashLibrary`."""
        common = {
            "cu_seqlens_q": call.queries.ends,
            "max_seqlen_q": call.queries.longest,
            "softmax_scale": call.scale,
            "causal": call.is_causal,
            "window_size": call.window,
            "softcap": call.softcap,
        }
        if call.page_tables is None:
            lens = {"cu_seqlens_k": call.keys.ends, "max_seqlen_k": call.keys.longest}
            output, lse, *_ = self.varlen(q, k, v, **lens, **common, return_attn_probs=True)
        else:
            pages = {"cache_seqlens": call.keys.on_device, "page_table": call.page_tables}
            output, lse, *_ = self.with_kvcache(q, k, v, **pages, **common, return_softmax_lse=True)
        return output, lse


class FlashAttention4:
    """Package flash-attn-4, for Hopper and Blackwell; compiles at the first call of a kind.

    Args:
        varlen: its `flash_attn_varlen_func`.
        max_head_dim: on this device.
    """

    package = "flash-attn-4"
    capabilities: tuple[int, ...] = (9, 10, 11)
    page_multiple = 1
    whole_pages = 64

    def __init__(self, varlen: Callable[..., Any], max_head_dim: int) -> None:
        self.varlen = varlen
        self.max_head_dim = max_head_dim

    @classmethod
    def load(cls, capability: tuple[int, int]) -> FlashAttention4:
        """Imports the package."""
        varlen = importlib.import_module("flash_attn.cute").flash_attn_varlen_func
        max_head_dim = 256 if capability[0] == 9 else 128
        return cls(_with_arguments(varlen, "page_table", "return_lse"), max_head_dim)

    def head_dims_refusal(self, head_dim: int, head_dim_v: int) -> str | None:
        """See `FlashLibrary`."""
        return _equal_head_dims(head_dim, head_dim_v, self.max_head_dim)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: FlashCall) -> Partial:
        """See `FlashLibrary`. Lengths of paged keys come as they are, of rows as their running sum."""
        is_paged = call.page_tables is not None
        left, right = call.window
        output, lse = self.varlen(
            q,
            k,
            v,
            cu_seqlens_q=call.queries.ends,
            cu_seqlens_k=None if is_paged else call.keys.ends,
            max_seqlen_q=call.queries.longest,
            max_seqlen_k=call.keys.longest,
            seqused_k=call.keys.on_device if is_paged else None,
            page_table=call.page_tables,
            softmax_scale=call.scale,
            causal=call.is_causal,
            window_size=(None if left < 0 else left, None if right < 0 else right),
            softcap=call.softcap,
            return_lse=True,
        )
        return output, lse


_NEWEST_FIRST: tuple[type[FlashAttention4 | FlashAttention3 | FlashAttention2], ...] = (
    FlashAttention4,
    FlashAttention3,
    FlashAttention2,
)


def find(device: torch.device, capability: tuple[int, int]) -> FlashLibrary | str:
    """The newest package that is installed and runs on a device with this compute capability, or why there is none."""
    names = ", ".join(library.package for library in _NEWEST_FIRST)
    if device.type != "cuda":
        return f"the packages {names} need a CUDA device, but device is {device}"
    reasons = []
    for library in _NEWEST_FIRST:
        if capability[0] not in library.capabilities:
            majors = ", ".join(map(str, library.capabilities))
            reasons.append(f"{library.package} is for major compute capabilities {majors}, not {capability[0]}")
            continue
        try:
            return library.load(capability)
        except (ImportError, OSError, AttributeError) as error:  # absent, built for another torch, too old
            reasons.append(f"{library.package} cannot be loaded ({error})")
    return "; ".join(reasons)


def _with_arguments(function: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """The function, if it has these arguments."""
    missing = set(names) - set(inspect.signature(function).parameters)
    if missing:
        raise AttributeError(f"{function.__name__} is too old: it has no {' and no '.join(sorted(missing))}")
    return function


def _equal_head_dims(head_dim: int, head_dim_v: int, most: int) -> str | None:
    if head_dim != head_dim_v:
        return f"head_dim_v is {head_dim_v}, but must be head_dim, {head_dim}"
    return f"head_dim is {head_dim}, but must be at most {most}" if head_dim > most else None
