"""The page tables of a step: sent in full, or as what they differ in from those of an open step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from google.protobuf.message import Message

from attnd.v1 import step_pb2
from attnd_server.attention.backends.window import first_visible_pages
from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.metadata import AttentionMetadata
from attnd_server.config import ServerConfig
from attnd_server.service.validation.arrays import INT32, check_range, refuse, refuse_first, required, view
from attnd_server.service.validation.pages import Int32s, Int64s

OpenTables = Mapping[int, Sequence[AttentionMetadata]]


GroupMessage = step_pb2.Step | step_pb2.StepGroup
"""What gives page tables and slots: a step, or a layer group of one."""


def page_tables_of(
    group: GroupMessage, num_reqs: int, limits: ServerConfig, open_steps: OpenTables, index: int
) -> Int32s:
    """The page tables of a layer group as they are meant, or those of another step that it has in common.

    Args:
        group: the step, or what it says of the group.
        num_reqs: of the step.
        limits: what one step may take.
        open_steps: by id, the steps that a delta may name.
        index: of the layer group.

    Returns:
        int32 `[num_reqs, max_pages]`, any numbers.

    Raises:
        InvalidRequest: the step breaks a rule of step.proto.
    """
    if not group.HasField("page_table_delta"):
        return _sent(group, num_reqs, limits)
    if group.HasField("page_tables"):
        refuse("page_table_delta", "page_table_delta is given, but must be absent where page_tables is given")
    return _changed(group.page_table_delta, num_reqs, limits, open_steps, index)


def checked_page_tables(sent: Int32s, context_lens: Int64s, window: int, config: AttentionConfig) -> Int32s:
    """Page tables that kernels may follow; the same rules hold however they were sent.

    Args:
        sent: int32 `[num_reqs, max_pages]`.
        context_lens: `[num_reqs]`.
        window: tokens of every call's window; 0: anything may be read.
        config: of the layer group.

    Returns:
        int32 `[num_reqs, max_pages]`: `-1 <= id < config.num_pages`, and the context is covered. `sent` itself, unless
        there are other numbers, or -1, before the window: these are 0.

    Raises:
        InvalidRequest: an entry that may be read is no page of the cache, or the context is not covered.
    """
    tables = _without_hidden(sent, context_lens, window, config)
    rule = f"the cache has pages 0..{config.num_pages - 1}, and -1 is no page"
    check_range(tables, -1, config.num_pages - 1, "page_tables", rule)
    num_covered = tables.shape[1] * config.page_size
    rule = f"page_tables covers {num_covered}: {tables.shape[1]} pages of {config.page_size} tokens"
    check_range(context_lens, 0, num_covered, "context_lens", rule)
    return tables


def _without_hidden(sent: Int32s, context_lens: Int64s, window: int, config: AttentionConfig) -> Int32s:
    """The page tables with page 0 for what is no page and lies before the window of all new tokens."""
    if not window or not sent.size:
        return sent
    first_pages = first_visible_pages(torch.from_numpy(context_lens), window, config.page_size).numpy()
    num_columns = min(int(first_pages.max()), sent.shape[1])
    hidden = sent[:, :num_columns]
    if not hidden.size or (hidden.min() >= 0 and hidden.max() < config.num_pages):
        return sent
    no_page = (hidden < 0) | (hidden >= config.num_pages)
    tables = sent.copy()
    tables[:, :num_columns][no_page & (np.arange(num_columns) < first_pages[:, None])] = 0
    return tables


def _sent(group: GroupMessage, num_reqs: int, limits: ServerConfig) -> Int32s:
    values = view(required(group, "page_tables"), "page_tables", INT32, (num_reqs, "max_pages"))
    if values.size > limits.max_page_table_elements:
        rule = f"must have at most {limits.max_page_table_elements}"
        refuse("page_tables", f"page_tables has {values.size} elements, but {rule}")
    return values.astype(np.int32)


def _changed(
    delta: step_pb2.PageTableDelta, num_reqs: int, limits: ServerConfig, open_steps: OpenTables, index: int
) -> Int32s:
    """What the delta gives. A few bytes may ask for a large table, so its size is checked before there is one."""
    base_step = open_steps.get(delta.base_step_id)
    if base_step is None:
        known = ", ".join(map(str, open_steps)) or "none"
        refuse(
            "page_table_delta.base_step_id",
            f"page_table_delta.base_step_id is {delta.base_step_id}, but the stream's open steps are: {known}; "
            "send page_tables instead",
        )
    most_pages = limits.max_page_table_elements // num_reqs
    if delta.max_pages > most_pages:
        rule = f"must be at most {most_pages}: page tables have at most {limits.max_page_table_elements} elements"
        refuse("page_table_delta.max_pages", f"page_table_delta.max_pages is {delta.max_pages}, but {rule}")
    if index >= len(base_step):
        rule = f"must be a step with layer group {index}: its cache has groups 0..{len(base_step) - 1}"
        refuse(
            "page_table_delta.base_step_id",
            f"page_table_delta.base_step_id is {delta.base_step_id}, but {rule}",
        )
    base: Int32s = base_step[index].tables_as_sent.numpy()
    rows = _part(delta, "source_rows", num_reqs)
    rule = f"the table of step {delta.base_step_id} has rows 0..{len(base) - 1}, and -1 is no row"
    check_range(rows, -1, len(base) - 1, "page_table_delta.source_rows", rule)
    indices = _part(delta, "indices", "num_changes")
    num_elements = num_reqs * delta.max_pages
    rule = f"the table has elements 0..{num_elements - 1}"
    check_range(indices, 0, num_elements - 1, "page_table_delta.indices", rule)
    falls = indices[1:] <= indices[:-1]
    if falls.any():
        before = int(falls.argmax())
        rule = f"must be greater than {indices[before]}, the element before it"
        refuse_first(np.append(False, falls), indices, "page_table_delta.indices", rule)
    pages = _part(delta, "pages", len(indices))
    if not len(indices) and base.shape == (num_reqs, delta.max_pages) and (rows == np.arange(num_reqs)).all():
        return base  # most steps change nothing, and nobody writes to it

    tables = np.empty((num_reqs, delta.max_pages), np.int32)
    num_kept = min(delta.max_pages, base.shape[1])
    tables[:, :num_kept] = base[rows, :num_kept]  # row -1 is the last one for now
    tables[:, num_kept:] = -1
    tables[rows < 0] = -1
    tables.reshape(-1)[indices] = pages
    return tables


def _part(delta: Message, field: str, length: int | str) -> Int32s:
    """The required int32 `[length]` tensor `field`; its name in errors is that within the step."""
    path = f"page_table_delta.{field}"
    if not delta.HasField(field):
        refuse(path, f"{path} is absent, but must be given")
    return view(getattr(delta, field), path, INT32, (length,))
