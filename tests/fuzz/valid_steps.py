"""Valid steps of one cache: small and shared pages, holes, slots beside the context, every mask, all that engines say.

A step of a cache with layer groups says for each its own tables, slots and window, or that they are another group's.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from attnd.v1 import cache_pb2, step_pb2
from tests.fuzz.parts import Part, parts_of
from tests.fuzz.tensors import ints

# Elements of a page table, requests times pages, that the world's limits let pass.
_MAX_TABLE = 24

Told = step_pb2.Step | step_pb2.StepGroup
"""What tells page tables, slots and a window: a step, or what it says of a layer group."""


def step(random_: random.Random, info: cache_pb2.CacheInfo, step_id: int = 0) -> step_pb2.Step:
    """A step that keeps every rule."""
    parts, num_reqs = parts_of(info.config), random_.randint(1, 3)
    lens = [random_.randint(0, 3) for _ in range(num_reqs)]
    is_decode = random_.random() < 0.5
    if is_decode or not any(lens):
        lens = [random_.randint(1, 2)] * num_reqs
    longest = random_.randint(0, 4) * parts[0].page_size
    longest = min([longest, *(part.page_size * (_MAX_TABLE // num_reqs) for part in parts)])
    prefix_lens = [random_.randint(0, 9) for _ in range(num_reqs)]
    padded = [prefix + random_.randint(0, 5) for prefix in prefix_lens]
    ends = [0]
    for length in lens:
        ends.append(ends[-1] + length)
    mode = random_.choice(("store", "store", "store", "store_only", "cache_only", "nothing"))
    message = step_pb2.Step(
        id=step_id,
        cache=info.cache,
        kind=step_pb2.STEP_KIND_DECODE if is_decode else step_pb2.STEP_KIND_PREFILL,
        cu_seqlens_q=ints(ends),
        context_lens=ints([random_.randint(0, longest) for _ in range(num_reqs)]),
        mask=step_pb2.Mask.ValueType(random_.randint(1, 4)),
        block_size=random_.choice((1, 4, 2**32 - 1)),
        prefix_lens=ints(prefix_lens),
        padded_prefix_lens=ints(padded),
        mask_prefix_hole=random_.random() < 0.3,
        cache_only=mode == "cache_only",
        store_only=mode == "store_only",
    )
    if random_.random() < 0.3:
        message.masks.CopyFrom(ints([random_.randint(1, 4) for _ in lens]))
    if random_.random() < 0.3:
        message.valid_lens.CopyFrom(ints([random_.randint(0, length) for length in lens]))
    if mode in ("store", "nothing"):
        _as_engines_say(random_, message)
    if random_.random() < 0.3:
        message.traceparent = f"00-{random_.getrandbits(128) | 1:032x}-{random_.getrandbits(64) | 1:016x}-01"
    _with_tables(random_, message, info.config, mode)
    return message


def _as_engines_say(random_: random.Random, message: step_pb2.Step) -> None:
    """At times stores first, has owners, first positions, and a row that pads the batch."""
    ends, num_reqs = array("i", message.cu_seqlens_q.data), message.context_lens.shape[0]
    message.store_first = random_.random() < 0.4
    if random_.random() < 0.3:
        message.attend_new.CopyFrom(ints([random_.randint(0, 1) for _ in range(num_reqs)]))
    in_blocks = {2, 4} & {message.mask, *array("i", message.masks.data)}
    if random_.random() < 0.3 and (not in_blocks or message.block_size <= 4):
        message.first_position.CopyFrom(
            ints([message.block_size * random_.randint(0, 3) % 2**20 for _ in range(num_reqs)])
        )
    if random_.random() < 0.2:
        context_lens = array("i", message.context_lens.data)
        context_lens[-1] = ends[-2] - ends[-1]
        message.context_lens.CopyFrom(ints(context_lens))


def _with_tables(random_: random.Random, message: step_pb2.Step, config: cache_pb2.CacheConfig, mode: str) -> None:
    """Tells page tables and slots: of the step, or of each layer group."""
    parts = parts_of(config)
    if not config.groups and random_.random() < 0.9:
        _tell(random_, message, message, parts[0], mode)
        return
    told: list[step_pb2.StepGroup] = []
    for part in parts:
        group = message.groups.add()
        alike = [index for index, other in enumerate(told) if _fits(message, other, parts[index], part)]
        if alike and random_.random() < 0.5:
            group.tables_of = random_.choice(alike)
            group.window = random_.choice((0, part.window))
        else:
            _tell(random_, message, group, part, mode)
        told.append(group)


def _fits(message: step_pb2.Step, other: step_pb2.StepGroup, its: Part, part: Part) -> bool:
    """Whether what is told of another group can be said of `part`, too, whatever its window hides."""
    if other.HasField("tables_of") or its.page_size != part.page_size:
        return False
    pages, slots = array("i", other.page_tables.data), _slots(other.slot_mapping)
    return all(-1 <= page < part.num_pages for page in pages) and all(slot < part.num_slots for slot in slots)


def _slots(tensor: Any) -> list[int]:
    return list(array("q" if len(tensor.data) == 8 * (tensor.shape or [0])[0] else "i", tensor.data))


def _tell(random_: random.Random, message: step_pb2.Step, told: Told, part: Part, mode: str) -> None:
    """A window, pages of which some are absent or shared, junk behind the window, and slots."""
    context_lens, ends = array("i", message.context_lens.data), array("i", message.cu_seqlens_q.data)
    num_reqs, least = len(context_lens), -(-max(0, *context_lens) // part.page_size)
    columns = random_.randint(least, max(least, min(least + 2, _MAX_TABLE // num_reqs)))
    table = [random_.randint(-1, part.num_pages - 1) for _ in range(num_reqs * columns)]
    if part.window:
        told.window = random_.choice((0, part.window))
    elif random_.random() < 0.3:
        told.window = random_.choice((1, 2, part.page_size, 2**31 - 1, 2**31, 2**32 - 1))
    window = told.window or part.window
    for request, context_len in enumerate(context_lens):
        if context_len < 0:
            table[request * columns : (request + 1) * columns] = [-1] * columns
        if window and random_.random() < 0.7:
            for column in range(max(0, context_len - window + 1) // part.page_size):
                table[request * columns + column] = random_.choice((-1, 0, part.num_pages, -(2**31), 2**31 - 1))
    told.page_tables.CopyFrom(ints(table, num_reqs, columns))
    if not mode.startswith("store"):
        return
    free = set(range(part.num_slots))
    if mode == "store" and not message.store_first:
        free -= _read_slots(context_lens, table, columns, part.page_size)
    choice = random_.sample(sorted(free), min(len(free), ends[-1]))
    slots = [choice.pop() if choice and random_.random() < 0.8 else -1 for _ in range(ends[-1])]
    for request, context_len in enumerate(context_lens):
        if context_len < 0:
            slots[ends[request] : ends[request + 1]] = [-1] * (ends[request + 1] - ends[request])
    told.slot_mapping.CopyFrom(ints(slots, wide=random_.random() < 0.5))


def _read_slots(context_lens: Sequence[int], table: Sequence[int], columns: int, page_size: int) -> set[int]:
    """Every slot that is read as context, holes included."""
    read = set()
    for request, context_len in enumerate(context_lens):
        for position in range(context_len):
            page = table[request * columns + position // page_size]
            read.add(page * page_size + position % page_size)
    return read


def told_of(message: step_pb2.Step, part: int) -> Told:
    """What tells the page tables and slots of a layer group, which may be another one."""
    if not message.groups:
        return message
    group = message.groups[part]
    return message.groups[group.tables_of] if group.HasField("tables_of") else group


class Sent(NamedTuple):
    """The page tables of a step that was sent, by layer group."""

    step_id: int
    tables: list[Any]

    @classmethod
    def of(cls, message: step_pb2.Step) -> Sent:
        """Those of a step that tells them in full."""
        tables = []
        for index in range(max(1, len(message.groups))):
            tensor = told_of(message, index).page_tables
            tables.append(np.frombuffer(tensor.data, "<i4").reshape(tuple(tensor.shape)))
        return cls(message.id, tables)


def with_deltas(random_: random.Random, message: step_pb2.Step, base: Sent) -> None:
    """Tells the page tables of a step by those of another, which must have as many layer groups to be valid."""
    for index, told in enumerate(message.groups or [message]):
        if told.HasField("page_tables") and random_.random() < 0.8:
            _with_delta(random_, told, base.step_id, base.tables[index % len(base.tables)])


def _with_delta(random_: random.Random, told: Told, base_id: int, base: Any) -> None:
    rows, columns = told.page_tables.shape
    source_rows = [random_.randint(-1, base.shape[0] - 1) for _ in range(rows)]
    table = np.frombuffer(told.page_tables.data, "<i4").reshape(rows, columns)
    start = np.full((rows, columns), -1, np.int32)
    for row, source in enumerate(source_rows):
        if source >= 0:
            width = min(columns, base.shape[1])
            start[row, :width] = base[source, :width]
    changed = np.flatnonzero(start.ravel() != table.ravel())
    told.page_table_delta.CopyFrom(
        step_pb2.PageTableDelta(
            base_step_id=base_id,
            source_rows=ints(source_rows),
            max_pages=columns,
            indices=ints(changed.tolist()),
            pages=ints(table.ravel()[changed].tolist()),
        )
    )
    told.ClearField("page_tables")
