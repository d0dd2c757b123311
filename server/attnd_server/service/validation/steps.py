"""A step's metadata, of each layer group of its cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from attnd.errors import InvalidRequest
from attnd.v1 import step_pb2
from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.metadata import AttentionMetadata
from attnd_server.config import ServerConfig
from attnd_server.service.validation.arrays import (
    INT32_OR_INT64,
    check_range,
    refuse,
    refuse_first,
    view,
)
from attnd_server.service.validation.page_tables import GroupMessage, checked_page_tables, page_tables_of
from attnd_server.service.validation.pages import Int64s, Read, check_stores
from attnd_server.service.validation.step_lengths import StepLengths, step_lengths

OpenSteps = Mapping[int, Sequence[AttentionMetadata]]
"""By its id the metadata of each step that page tables may be told by, a piece for each layer group."""

# Of a unary request, which stands alone.
NO_STEPS: OpenSteps = MappingProxyType({})
# What a step of a cache with layer groups says in each of these instead.
_GROUP_FIELDS: tuple[Literal["page_tables", "page_table_delta", "slot_mapping"], ...] = (
    "page_tables",
    "page_table_delta",
    "slot_mapping",
)


def step(
    message: step_pb2.Step, config: AttentionConfig, limits: ServerConfig, open_steps: OpenSteps = NO_STEPS
) -> AttentionMetadata:
    """As `steps`, of a cache that has no layer groups."""
    (metadata,) = steps(message, [config], limits, open_steps)
    return metadata


def steps(
    message: step_pb2.Step, configs: Sequence[AttentionConfig], limits: ServerConfig, open_steps: OpenSteps = NO_STEPS
) -> list[AttentionMetadata]:
    """A step's metadata for each layer group, every tensor in memory of its own.

    Args:
        message: the step; its id and cache are the caller's business.
        configs: of the layer groups of the cache that it names.
        limits: what one step may take.
        open_steps: those of its stream, which its page tables may be told by.

    Raises:
        InvalidRequest: the step breaks a rule of step.proto.
    """
    _check_flags(message)
    if not message.groups and len(configs) == 1:
        lengths = step_lengths(message, limits)
        return [_metadata(message, message, configs[0], lengths, limits, open_steps, 0)]
    _check_groups(message, len(configs))
    lengths = step_lengths(message, limits)
    checked: list[AttentionMetadata] = []
    for index, (group, config) in enumerate(zip(message.groups, configs, strict=True)):
        try:
            source = _source(message, index, configs)
            shared = checked[group.tables_of] if group.HasField("tables_of") else None
            checked.append(_metadata(message, source, config, lengths, limits, open_steps, index, group.window, shared))
        except InvalidRequest as error:
            raise InvalidRequest(f"groups[{index}].{error}", field=f"groups[{index}].{error.field}") from None
    return checked


def _check_flags(message: step_pb2.Step) -> None:
    if message.kind not in (step_pb2.STEP_KIND_PREFILL, step_pb2.STEP_KIND_DECODE):
        refuse("kind", f"kind is {message.kind or 'unspecified'}, but must be STEP_KIND_PREFILL or STEP_KIND_DECODE")
    if message.cache_only and message.store_only:
        refuse("store_only", "store_only is true, but must be false in a cache-only step")
    for kind, is_so in (("cache-only", message.cache_only), ("store-only", message.store_only)):
        if is_so and message.store_first:
            refuse("store_first", f"store_first is true, but must be false in a {kind} step")
        if is_so and message.HasField("attend_new"):
            refuse("attend_new", f"attend_new is given, but must be absent in a {kind} step")


def _check_groups(message: step_pb2.Step, num_groups: int) -> None:
    """Refuses a step that does not say for each layer group what is of it alone."""
    if len(message.groups) != num_groups:
        rule = f"must have {num_groups}: one for each layer group of the cache"
        refuse("groups", f"groups has {len(message.groups)} elements, but {rule}")
    for field in _GROUP_FIELDS:
        if message.HasField(field):
            refuse(field, f"{field} is given, but must be absent where groups is given")
    if message.window:
        refuse("window", f"window is {message.window}, but must be absent where groups is given")


def _source(message: step_pb2.Step, index: int, configs: Sequence[AttentionConfig]) -> step_pb2.StepGroup:
    """The group that gives the page tables and slots of another."""
    group = message.groups[index]
    if not group.HasField("tables_of"):
        return group
    for field in _GROUP_FIELDS:
        if group.HasField(field):
            refuse(field, f"{field} is given, but must be absent where tables_of is given")
    source = group.tables_of
    if source >= index or message.groups[source].HasField("tables_of"):
        refuse("tables_of", f"tables_of is {source}, but must be an earlier group that gives page_tables")
    if configs[source].page_size != configs[index].page_size:
        sizes = f"pages of {configs[source].page_size} tokens, and this one of {configs[index].page_size}"
        refuse("tables_of", f"tables_of is {source}, but must be a group with pages of the same size: it has {sizes}")
    return message.groups[source]


def _metadata(
    message: step_pb2.Step,
    group: GroupMessage,
    config: AttentionConfig,
    lengths: StepLengths,
    limits: ServerConfig,
    open_steps: OpenSteps,
    index: int,
    window: int | None = None,
    shared: AttentionMetadata | None = None,
) -> AttentionMetadata:
    """The metadata of layer group `index`; `shared`: of the group that has the same page tables."""
    window = _window(group.window if window is None else window, config)
    if message.store_only and not group.HasField("slot_mapping"):
        refuse("slot_mapping", "slot_mapping is absent, but must be given in a store-only step")
    if message.cache_only and group.HasField("slot_mapping"):
        refuse("slot_mapping", "slot_mapping is given, but must be absent in a cache-only step")
    if shared is None:
        sent = page_tables_of(group, len(lengths.query_lens), limits, open_steps, index)
    else:
        sent = shared.tables_as_sent.numpy()
    page_tables = checked_page_tables(sent, lengths.context_lens, window, config)
    slot_mapping = _slot_mapping(group, lengths, config)
    is_conflict = False
    if slot_mapping is not None:
        context_lens = lengths.context_lens
        if not lengths.all_have_tokens:
            context_lens = context_lens * (lengths.query_lens > 0)
        read = Read(page_tables, context_lens, lengths.hole_starts, lengths.hole_ends, window)
        is_conflict = check_stores(
            slot_mapping, None if message.store_only else read, config, may_read=message.store_first
        )
    seen_new, without_sinks = _seen(message, lengths, slot_mapping)
    # In a decode step all others have equally many new tokens.
    drops = message.kind == step_pb2.STEP_KIND_DECODE and not lengths.all_have_tokens
    kept = np.flatnonzero(lengths.query_lens) if drops else None

    def of_requests(values: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(values if kept is None else values[kept])

    starts = lengths.cu_seqlens_q if kept is None else np.append(lengths.cu_seqlens_q[kept], lengths.num_tokens)

    metadata = AttentionMetadata(
        is_decode=message.kind == step_pb2.STEP_KIND_DECODE,
        num_tokens=lengths.num_tokens,
        cu_seqlens_q=torch.from_numpy(starts),
        context_lens=of_requests(lengths.context_lens),
        page_tables=of_requests(page_tables),
        slot_mapping=None if slot_mapping is None else torch.from_numpy(slot_mapping),
        valid_lens=of_requests(lengths.valid_lens),
        block_sizes=of_requests(lengths.block_sizes),
        prefix_lens=of_requests(lengths.prefix_lens),
        padded_prefix_lens=of_requests(lengths.padded_prefix_lens),
        hole_starts=of_requests(lengths.hole_starts),
        hole_ends=of_requests(lengths.hole_ends),
        cache_only=message.cache_only,
        store_only=message.store_only,
        store_first=message.store_first,
        reads_stored=is_conflict,
        window=window,
        seen_new=seen_new,
        without_sinks=None if without_sinks is None else of_requests(without_sinks),
        sent_page_tables=None if page_tables is sent and kept is None else torch.from_numpy(sent),
    )
    # Made here, where steps are checked side by side, and not where they wait for each other.
    _ = metadata.columns, metadata.max_context_len, metadata.first_absent_pages
    return metadata


def _window(window: int, config: AttentionConfig) -> int:
    """The window of every call of the group, in tokens; 0: each has its own."""
    if config.window and window not in (0, config.window):
        refuse("window", f"window is {window}, but must be 0 or {config.window}, that of the cache's layer group")
    return window or config.window


def _slot_mapping(group: GroupMessage, lengths: StepLengths, config: AttentionConfig) -> Int64s | None:
    if not group.HasField("slot_mapping"):
        return None
    values = view(group.slot_mapping, "slot_mapping", INT32_OR_INT64, (lengths.num_tokens,))
    rule = f"the cache has slots 0..{config.num_slots - 1}, and -1 is not stored"
    check_range(values, -1, config.num_slots - 1, "slot_mapping", rule)
    if lengths.is_padded is not None:
        wrong = np.repeat(lengths.is_padded, lengths.query_lens) & (values >= 0)
        if wrong.any():
            refuse_first(wrong, values, "slot_mapping", "must be -1: its request has no tokens, and pads the batch")
    return values.astype(np.int64)


def _seen(
    message: step_pb2.Step, lengths: StepLengths, slot_mapping: Int64s | None
) -> tuple[torch.Tensor | None, npt.NDArray[np.bool_] | None]:
    """`AttentionMetadata.seen_new` and `without_sinks`."""
    if not message.store_first and lengths.attend_new is None:
        return None, None
    seen = np.ones(lengths.num_tokens, np.bool_)
    if message.store_first:
        seen = np.zeros_like(seen) if slot_mapping is None else slot_mapping >= 0
    without_sinks = None
    if lengths.attend_new is not None:
        without_sinks = ~lengths.attend_new
        seen = seen & np.repeat(lengths.attend_new, lengths.query_lens)
    if not seen.all():
        tokens = np.arange(lengths.num_tokens) - np.repeat(lengths.cu_seqlens_q[:-1], lengths.query_lens)
        is_valid = tokens < np.repeat(lengths.valid_lens, lengths.query_lens)
        if (is_valid & ~seen).any():
            return torch.from_numpy(seen), without_sinks
    return None, without_sinks
