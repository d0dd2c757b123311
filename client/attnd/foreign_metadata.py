"""Diffulex's metadata as an attnd step.

Objects are read by their attributes alone: every strategy of Diffulex has a class of its own, and hangs plain
attributes on it that `dataclasses.asdict` would miss. What each one means was read in Diffulex at 184ba97.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from attnd.errors import InvalidRequest
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.packing import ints
from attnd.protocol.step_metadata import StepMetadata


class _Batch(NamedTuple):
    """The requests of a step, without those that only pad a CUDA graph: trailing ones that have no new token.

    Attributes:
        starts: first row of each request in q, k and v.
        query_lens: new tokens of each request.
        context_lens: cached tokens of each request.
        valid_lens: new tokens of each request that count.
        page_tables: `[num_reqs, max_pages]`, as the engine holds them.
        slot_mapping: `[num_tokens]`, or None: nothing is stored.
        decoding: for each request, whether it decodes.
    """

    starts: list[int]
    query_lens: list[int]
    context_lens: list[int]
    valid_lens: list[int]
    page_tables: Any
    slot_mapping: Any
    decoding: list[bool]


class RefinedStep(StepMetadata):
    """A step whose new tokens are not where they stand in it: they replace cached ones, and come behind the context.

    The sums are the same, unless a layer looks at positions; see `check_options`.
    """


def check_options(metadata: StepMetadata, options: AttentionOptions) -> None:
    """Refuses a layer that looks at positions in a step whose tokens are elsewhere, before anything is sent.

    Raises:
        InvalidRequest: the step is a `RefinedStep`, and the layer has a window or ALiBi slopes.
    """
    if not isinstance(metadata, RefinedStep):
        return
    for field, value in (("window", options.window or None), ("alibi_slopes", options.alibi_slopes)):
        if value is not None:
            shown = f"{field} is {value}" if field == "window" else f"{field} are given"
            raise InvalidRequest(
                f"{shown}, but must be absent in a step with fdv2_cache_only that stores: its new tokens replace "
                "cached ones, and are seen behind the context",
                field=field,
            )


def as_step_metadata(metadata: Any) -> StepMetadata:
    """`metadata` itself, or what an object with the attributes of Diffulex's metadata means."""
    return metadata if isinstance(metadata, StepMetadata) else from_diffulex(metadata)


def from_diffulex(metadata: Any) -> StepMetadata:
    """The step that a Diffulex-like metadata object describes.

    Tensors may be on any device; each that is on a GPU costs one copy to the host. Attributes that are missing have
    Diffulex's defaults; an object without `is_block_causal` is autoregressive.

    Diffulex compares blocks of a diffusion by position, as attnd does, so a context may end inside of a block. But for
    `is_prefix_full` it counts `prefix_lens` and `padded_prefix_lens` from the first new token, and attnd from the first
    cached one: such requests get theirs with the context's length added.

    A step with `fdv2_cache_only` stores new tokens into their places among the cached ones, and then reads them from
    there. attnd stores after it has read, so the step that comes out hides the old tokens of these places and sees the
    new ones directly, at the end of the context: a `RefinedStep`, which layers that look at positions refuse.

    Raises:
        InvalidRequest: an attribute is missing, of the wrong length, or means what no step can say.
    """
    batch = _batch(metadata)
    if getattr(metadata, "fdv2_cache_only", False) and batch.slot_mapping is not None:
        slots = ints(batch.slot_mapping, "slot_mapping")
        if max(slots, default=-1) >= 0:
            return _refined_in_place(metadata, batch, slots)
    return _step(metadata, batch)


def _batch(metadata: Any) -> _Batch:
    if getattr(metadata, "cu_seqlens_q", None) is None:
        raise InvalidRequest("cu_seqlens_q is None, but must say where each request starts", field="cu_seqlens_q")
    bounds = ints(metadata.cu_seqlens_q, "cu_seqlens_q")
    if not bounds or bounds[0] != 0:
        raise InvalidRequest(f"cu_seqlens_q starts with {bounds[:1]}, but must start with 0", field="cu_seqlens_q")
    while len(bounds) > 1 and bounds[-1] == bounds[-2]:
        bounds.pop()
    starts, query_lens = bounds[:-1], [end - start for start, end in pairwise(bounds)]
    num_reqs = len(starts)
    valid_ends = _per_request(metadata, "valid_slices", num_reqs)
    page_tables = getattr(metadata, "page_tables", None)
    return _Batch(
        starts=starts,
        query_lens=query_lens,
        context_lens=_per_request(metadata, "context_lens", num_reqs) or [0] * num_reqs,
        valid_lens=[end - start for start, end in zip(starts, valid_ends or bounds[1:], strict=True)],
        page_tables=[[]] * num_reqs if page_tables is None else page_tables[:num_reqs],
        slot_mapping=_slots(metadata, bounds[-1]),
        decoding=_decoding(metadata, num_reqs),
    )


def _per_request(metadata: Any, field: str, num_reqs: int) -> list[int] | None:
    """The first `num_reqs` elements of an attribute; None if it is missing."""
    values = getattr(metadata, field, None)
    if values is None:
        return None
    if len(values) < num_reqs:
        raise InvalidRequest(
            f"{field} has {len(values)} elements, but must have {num_reqs}, one a request", field=field
        )
    return ints(values[:num_reqs], field)


def _slots(metadata: Any, num_tokens: int) -> Any:
    """The slots of the step's tokens; None if nothing is stored."""
    slots = getattr(metadata, "slot_mapping", None)
    if slots is None or not getattr(metadata, "need_kv_cache_store", True):
        return None
    if len(slots) > num_tokens and max(ints(slots[num_tokens:], "slot_mapping")) >= 0:
        raise InvalidRequest(
            f"slot_mapping has {len(slots)} elements, but must be -1 past the step's {num_tokens} tokens",
            field="slot_mapping",
        )
    return slots[:num_tokens]


def _decoding(metadata: Any, num_reqs: int) -> list[bool]:
    status = _per_request(metadata, "status_table", num_reqs)
    if status is not None:
        return [value != 0 for value in status]
    is_prefill = getattr(metadata, "is_prefill", False)
    flags = [bool(flag) for flag in is_prefill] if isinstance(is_prefill, Iterable) else [bool(is_prefill)]
    return [not flag for flag in flags] if len(flags) == num_reqs else [not any(flags)] * num_reqs


def _step(metadata: Any, batch: _Batch) -> StepMetadata:
    masks = [_mask(metadata, decoding) for decoding in batch.decoding]
    in_blocks = "block_causal" in masks or "prefix_full" in masks
    hole = bool(getattr(metadata, "mask_prefix_hole", False))
    prefix_lens, padded_prefix_lens = _prefixes(metadata, batch, masks)
    cache_only = bool(getattr(metadata, "fdv2_cache_only", False))
    return StepMetadata(
        query_lens=batch.query_lens,
        context_lens=batch.context_lens,
        page_tables=batch.page_tables,
        slot_mapping=None if cache_only else batch.slot_mapping,
        kind=_kind(batch),
        mask=masks[0] if len(set(masks)) == 1 else masks or "causal",
        block_size=getattr(metadata, "block_size", 32) if in_blocks else 0,
        valid_lens=_valid_lens(batch),
        prefix_lens=prefix_lens,
        padded_prefix_lens=padded_prefix_lens,
        mask_prefix_hole=hole,
        cache_only=cache_only,
    )


def _mask(metadata: Any, decoding: bool) -> str:
    """The mask of one request; the order of the questions is the engine's."""
    if getattr(metadata, "prefix_causal", False) and not decoding:
        return "causal"
    in_blocks = getattr(metadata, "is_block_causal", None)
    if in_blocks is None:
        return "causal"
    if not in_blocks:
        return "bidirectional"
    return "prefix_full" if getattr(metadata, "is_prefix_full", False) and not decoding else "block_causal"


def _prefixes(metadata: Any, batch: _Batch, masks: list[str]) -> tuple[list[int] | None, list[int] | None]:
    """The positions at which prefixes and their padding end; None, None: the step needs none.

    Raises:
        InvalidRequest: a request counts them from its first new token, and hides cached positions by them too.
    """
    if "prefix_full" not in masks and not getattr(metadata, "mask_prefix_hole", False):
        return None, None
    ends = [_per_request(metadata, field, len(masks)) for field in ("prefix_lens", "padded_prefix_lens")]
    from_new = [request for request, mask in enumerate(masks) if mask == "prefix_full" and batch.context_lens[request]]
    for request, (start, end) in enumerate(_holes(metadata, batch)):
        if start < end and request in from_new:
            raise InvalidRequest(
                f"mask_prefix_hole hides [{start}, {end}) of request {request}, but must hide nothing of a request in "
                "prefill with is_prefix_full and a context: its prefix_lens count new tokens",
                field="mask_prefix_hole",
            )
    added = [context if request in from_new else 0 for request, context in enumerate(batch.context_lens)]
    prefix_lens, padded_prefix_lens = (
        None if each is None else [end + context for end, context in zip(each, added, strict=True)] for each in ends
    )
    return prefix_lens, padded_prefix_lens


def _holes(metadata: Any, batch: _Batch) -> list[tuple[int, int]]:
    """Of each request, the cached positions that the prefix hole hides; an end before the start: none."""
    num_reqs = len(batch.starts)
    if not getattr(metadata, "mask_prefix_hole", False):
        return [(0, 0)] * num_reqs
    starts = _per_request(metadata, "prefix_lens", num_reqs) or [0] * num_reqs
    ends = _per_request(metadata, "padded_prefix_lens", num_reqs) or [0] * num_reqs
    return [(start, min(end, context)) for start, end, context in zip(starts, ends, batch.context_lens, strict=True)]


def _kind(batch: _Batch) -> str:
    same_length = len(set(batch.query_lens)) == 1
    return "decode" if same_length and all(batch.decoding) else "prefill"


def _valid_lens(batch: _Batch) -> list[int] | None:
    return None if batch.valid_lens == batch.query_lens else batch.valid_lens


def _refined_in_place(metadata: Any, batch: _Batch, slots: list[int]) -> RefinedStep:
    """A cache-only step that stores first, as one that attends its new tokens in place of the cached ones."""
    _check_no_other_hole(metadata, batch)
    tables = batch.page_tables.tolist() if hasattr(batch.page_tables, "tolist") else batch.page_tables
    page_size = getattr(metadata, "page_size", 32)
    starts = [_refined_start(batch, slots, request, table, page_size) for request, table in enumerate(tables)]
    return RefinedStep(
        query_lens=batch.query_lens,
        context_lens=batch.context_lens,
        page_tables=batch.page_tables,
        slot_mapping=slots,
        kind=_kind(batch),
        mask="bidirectional",
        valid_lens=_valid_lens(batch),
        prefix_lens=starts,
        padded_prefix_lens=[start + valid for start, valid in zip(starts, batch.valid_lens, strict=True)],
        mask_prefix_hole=True,
    )


def _refined_start(batch: _Batch, slots: list[int], request: int, table: Sequence[int], page_size: int) -> int:
    """The cached position into which a request's first new token is stored; the other valid ones follow it.

    Raises:
        InvalidRequest: the slots are not contiguous positions of the request's context, or not its valid tokens'.
    """
    row, valid = batch.starts[request], batch.valid_lens[request]
    given = [max(slot, -1) for slot in slots[row : row + batch.query_lens[request]]]
    page = given[0] // page_size if valid and given[0] >= 0 else -1
    start = list(table).index(page) * page_size + given[0] % page_size if page >= 0 and page in table else 0
    end = min(start + valid, batch.context_lens[request], len(table) * page_size)
    expected = [table[position // page_size] * page_size + position % page_size for position in range(start, end)]
    expected += [-1] * (len(given) - len(expected))
    if given == expected and end == start + valid:
        return start
    wrong = next((i for i, slot in enumerate(given) if slot != expected[i]), valid - 1)
    raise InvalidRequest(
        f"slot_mapping[{row + wrong}] is {given[wrong]}, but in a step with fdv2_cache_only must put the {valid} valid "
        f"tokens of request {request}, and no others, into contiguous positions of its context",
        field="slot_mapping",
    )


def _check_no_other_hole(metadata: Any, batch: _Batch) -> None:
    """A step has one hole a request, and the refined tokens take it."""
    for request, (start, end) in enumerate(_holes(metadata, batch)):
        if start < end:
            raise InvalidRequest(
                f"mask_prefix_hole hides [{start}, {end}) of request {request}, but must hide nothing in a step with "
                "fdv2_cache_only that stores",
                field="mask_prefix_hole",
            )
