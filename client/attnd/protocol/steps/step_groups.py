"""What a step says of each layer group of its cache: page tables, slots and window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from attnd.errors import InvalidRequest
from attnd.protocol.packing import slots_tensor, tensor, uint32
from attnd.protocol.page_table_deltas import SentPageTables
from attnd.protocol.steps.page_tables import page_tables_array
from attnd.protocol.tensors import Array
from attnd.v1 import step_pb2, tensor_pb2


@dataclass(frozen=True, eq=False)
class StepGroup:
    """What differs between the layer groups of a cache in one step. Fields as those of `StepMetadata`.

    Groups with the same page tables and slots are told once, whether `tables_of` says so or not.

    Attributes:
        page_tables: `[num_reqs, max_pages]`.
        slot_mapping: `[num_tokens]`, or None: nothing is stored.
        window: tokens of the sliding window; 0 is that of the layer group.
        tables_of: index of an earlier group whose page tables and slots this one has, instead of its own.
    """

    page_tables: Any = None
    slot_mapping: Any = None
    window: int = 0
    tables_of: int | None = None


class _Tables(NamedTuple):
    """Page tables and slots that a group gives; `data` has the elements of the tables, which compare fast as bytes."""

    group: StepGroup
    page_tables: Array
    data: bytes
    slot_mapping: tensor_pb2.Tensor | None

    def are_equal(self, other: _Tables) -> bool:
        """Whether both say the same."""
        is_same_table = self.page_tables.shape == other.page_tables.shape and self.data == other.data
        return is_same_table and self.slot_mapping == other.slot_mapping


def group_messages(
    groups: Sequence[StepGroup], num_tokens: int, step_id: int, sent_tables: SentPageTables | None
) -> list[step_pb2.StepGroup]:
    """The wire's form of the groups of a step.

    Args:
        groups: in the cache's order.
        num_tokens: of the step.
        step_id: of the step.
        sent_tables: page tables of the stream; None: they are sent in full.

    Raises:
        InvalidRequest: a field holds what the wire cannot carry, or `tables_of` names no earlier group.
    """
    given: dict[int, _Tables] = {}
    roots: list[int] = []  # of each group, the one that gives its tables
    messages: list[step_pb2.StepGroup] = []
    for index, group in enumerate(groups):
        field = f"groups[{index}]"
        if not isinstance(group, StepGroup):
            raise InvalidRequest(f"{field} is a {type(group).__name__}, but must be a StepGroup", field=field)
        root = _earlier(group, index, given, roots, field)
        messages.append(step_pb2.StepGroup(window=uint32(group.window, f"{field}.window")))
        if root is None:
            tables = _tables(group, num_tokens, field)
            root = next((other for other, theirs in given.items() if tables.are_equal(theirs)), index)
        if root == index:
            given[index] = tables
            _tell(messages[index], tables, step_id, index, sent_tables)
        else:
            messages[index].tables_of = root
        roots.append(root)
    return messages


def _earlier(group: StepGroup, index: int, given: dict[int, _Tables], roots: list[int], field: str) -> int | None:
    """The group before that gives the tables of `group`, as far as that is plain without a look at elements."""
    if group.tables_of is None:
        for other, theirs in given.items():
            of = theirs.group
            if group.page_tables is of.page_tables and group.slot_mapping is of.slot_mapping:
                return other
        return None
    tables_of = uint32(group.tables_of, f"{field}.tables_of")
    if tables_of >= index:
        rule = f"must be an earlier group, less than {index}"
        raise InvalidRequest(f"{field}.tables_of is {tables_of}, but {rule}", field=f"{field}.tables_of")
    for name in ("page_tables", "slot_mapping"):
        if getattr(group, name) is not None:
            rule = "must be absent where tables_of is"
            raise InvalidRequest(f"{field}.{name} is given, but {rule}", field=f"{field}.{name}")
    return roots[tables_of]


def _tables(group: StepGroup, num_tokens: int, field: str) -> _Tables:
    if group.page_tables is None:
        name = f"{field}.page_tables"
        raise InvalidRequest(f"{name} is None, but must be given where tables_of is not", field=name)
    slots = slots_tensor(group.slot_mapping, f"{field}.slot_mapping", num_tokens)
    page_tables = page_tables_array(group.page_tables, f"{field}.page_tables")
    return _Tables(group, page_tables, bytes(page_tables.data), slots)


def _tell(
    message: step_pb2.StepGroup, tables: _Tables, step_id: int, index: int, sent_tables: SentPageTables | None
) -> None:
    delta = None if sent_tables is None else sent_tables.delta(step_id, tables.page_tables, index)
    if delta is None:
        message.page_tables.CopyFrom(tensor(tables.page_tables))
    else:
        message.page_table_delta.CopyFrom(delta)
    if tables.slot_mapping is not None:
        message.slot_mapping.CopyFrom(tables.slot_mapping)
