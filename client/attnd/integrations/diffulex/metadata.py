"""Names that a Diffulex model runner knows: its metadata class, and the ambient function that fetches the metadata.

They mirror `diffulex.attention.metadata`, so a runner installs its fetch function once and replaces the metadata
object before each forward pass; `attnd.Attention` fetches it when a layer runs. The state is the process's, as there,
and after `attnd.integrations.diffulex.install()` it is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from attnd.errors import InvalidRequest
from attnd.foreign_metadata import from_diffulex
from attnd.protocol.warming_up import is_warming_up, reset_warming_up, set_warming_up

__all__ = [
    "AttnMetaDataBase",
    "FN_TYPE_AttnMetaDataFetch",
    "fetch_attn_metadata",
    "from_diffulex",
    "infer_prefill_flags",
    "is_warming_up",
    "reset_warming_up",
    "set_fetch_fn_for_attn_metadata",
    "set_warming_up",
]

if TYPE_CHECKING:
    WARMING_UP: bool  # of now, see `__getattr__`

FN_TYPE_AttnMetaDataFetch = Callable[[], Any]
"""What `set_fetch_fn_for_attn_metadata` takes."""


class Runner(Protocol):
    """Where a model runner of another package installs its fetch function."""

    def fetch_fn(self) -> FN_TYPE_AttnMetaDataFetch | None:
        """The function that is installed, if any."""

    def set_fetch_fn(self, fn: FN_TYPE_AttnMetaDataFetch) -> None:
        """Installs one."""


_fetch: FN_TYPE_AttnMetaDataFetch | None = None
_runner: Runner | None = None


@dataclass
class AttnMetaDataBase:
    """One forward pass of a Diffulex model. Plain, it is autoregressive; `init_multi_block` makes it block-diffusion.

    Arrays are torch tensors, numpy arrays or lists.

    Attributes:
        is_prefill: for each request, or one for all.
        enforce_eager: kept for the runner; attention does not look at it.
        cu_seqlens_q: `[num_reqs + 1]`, request r has the new tokens `[cu_seqlens_q[r], cu_seqlens_q[r + 1])`.
        cu_seqlens_k: kept for the runner.
        max_seqlen_q: kept for the runner.
        max_seqlen_k: kept for the runner.
        slot_mapping: `[num_tokens]`, slot of each new token, or -1: not stored.
        need_kv_cache_store_static: answers `need_kv_cache_store`, unless None.
        has_prefill_static: answers `has_prefill`, unless None.
        all_prefill_static: answers `all_prefill`, unless None.
        context_lens: `[num_reqs]`, cached tokens.
        page_tables: `[num_reqs, max_pages]`, padded with -1.
        status_table: `[num_reqs]`, 0 is prefill, anything else decode.
        mask_prefix_hole: cached positions in `[prefix_lens[r], padded_prefix_lens[r])` are not seen.
        prefix_causal: requests in prefill are causal.
        page_size: token slots per page.
        block_size: tokens of a diffusion block.
        kv_cache_layout: "unified" or "distinct".
        token_merge_enabled: this and the rest is the sampler's; attention does not look at it.
    """

    is_prefill: list[bool] | bool = field(default_factory=lambda: [False])
    enforce_eager: bool = False
    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    slot_mapping: Any = None
    need_kv_cache_store_static: bool | None = None
    has_prefill_static: bool | None = None
    all_prefill_static: bool | None = None
    context_lens: Any = None
    page_tables: Any = None
    status_table: Any = None
    mask_prefix_hole: bool = False
    prefix_causal: bool = False
    page_size: int = 32
    block_size: int = 32
    kv_cache_layout: str = "unified"
    token_merge_enabled: bool = False
    token_merge_mask: Any = None
    token_merge_topk_ids: Any = None
    token_merge_topk_probs: Any = None
    token_merge_residual_probs: Any = None
    token_merge_mask_token_id: int | None = None
    token_merge_renormalize: bool = True
    token_merge_mode: str = "dmax_topk"
    token_merge_weight: float = 1.0

    def init_multi_block(
        self,
        valid_slices: Any = None,
        buffer_size: int = 1,
        is_prefix_full: bool = False,
        status_table: Any = None,
        prefix_lens: Any = None,
        padded_prefix_lens: Any = None,
        mask_prefix_hole: bool = False,
        prefix_causal: bool = False,
    ) -> None:
        """Makes this the metadata of a block-diffusion step, by plain attributes as Diffulex's strategies do.

        Args:
            valid_slices: `[num_reqs]`, the row after each request's last valid new token: `cu_seqlens_q[r] + valid`.
            buffer_size: blocks that a request denoises at a time.
            is_prefix_full: requests in prefill see their whole prefix.
            status_table: as the attribute.
            prefix_lens: `[num_reqs]`, tokens of each prompt.
            padded_prefix_lens: `[num_reqs]`, the same rounded up to whole blocks.
            mask_prefix_hole: as the attribute.
            prefix_causal: as the attribute.
        """
        self.use_multi_block = True
        self.is_block_causal = True
        self.valid_slices = valid_slices
        self.buffer_size = buffer_size
        self.is_prefix_full = is_prefix_full
        self.status_table = status_table
        self.prefix_lens = prefix_lens
        self.padded_prefix_lens = padded_prefix_lens
        self.mask_prefix_hole = mask_prefix_hole
        self.prefix_causal = prefix_causal

    @property
    def num_reqs(self) -> int:
        """Requests of the step."""
        return len(self.cu_seqlens_q) - 1

    @property
    def chunk_size(self) -> int:
        """Tokens that a request denoises at a time: its buffer of blocks."""
        return self.block_size * getattr(self, "buffer_size", 1)

    @property
    def has_prefill(self) -> bool:
        """Whether any request is in prefill."""
        has, _ = infer_prefill_flags(self.is_prefill)
        return has if self.has_prefill_static is None else bool(self.has_prefill_static)

    @property
    def all_prefill(self) -> bool:
        """Whether there are requests and all are in prefill."""
        _, all_of_them = infer_prefill_flags(self.is_prefill)
        return all_of_them if self.all_prefill_static is None else bool(self.all_prefill_static)

    @property
    def need_kv_cache_store(self) -> bool:
        """Whether the step stores any new token."""
        if self.need_kv_cache_store_static is not None:
            return bool(self.need_kv_cache_store_static)
        return self.slot_mapping is not None and len(self.slot_mapping) > 0


def infer_prefill_flags(is_prefill: Iterable[Any] | bool) -> tuple[bool, bool]:
    """Whether any request is in prefill, and whether there are requests and all are.

    Args:
        is_prefill: for each request, or one for all.
    """
    flags = [bool(flag) for flag in is_prefill] if isinstance(is_prefill, Iterable) else [bool(is_prefill)]
    return any(flags), bool(flags) and all(flags)


def fetch_attn_metadata() -> Any:
    """The metadata of the forward pass that is running, from the function that the model runner installed.

    Raises:
        InvalidRequest: none was installed.
    """
    fetch = _fetch if _runner is None else _runner.fetch_fn()
    if fetch is None:
        raise InvalidRequest(
            "no function fetches attention metadata, but one must be installed: set_fetch_fn_for_attn_metadata(fn)"
        )
    return fetch()


def set_fetch_fn_for_attn_metadata(fn: FN_TYPE_AttnMetaDataFetch) -> None:
    """Installs the function that `fetch_attn_metadata` calls, for the whole process.

    Args:
        fn: returns the metadata of the current forward pass: an `attnd.StepMetadata` or a Diffulex-like object, a
            new one for each pass.
    """
    global _fetch
    if _runner is None:
        _fetch = fn
    else:
        _runner.set_fetch_fn(fn)


def fetch_from(runner: Runner | None) -> None:
    """Has another package hold the fetch function, this one's too unless it has one; None: it is held here again."""
    global _runner
    if runner is not None and _fetch is not None and runner.fetch_fn() is None:
        runner.set_fetch_fn(_fetch)
    _runner = runner


def __getattr__(name: str) -> Any:
    """WARMING_UP, as it is now: the state may be held elsewhere."""
    if name == "WARMING_UP":
        return is_warming_up()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
