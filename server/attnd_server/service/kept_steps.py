"""The steps that a stream keeps, and the bytes that those of a principal and of everybody may take."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence

from attnd.errors import Exhausted
from attnd.v1 import step_pb2
from attnd_server.attention.metadata import AttentionMetadata
from attnd_server.config import ServerConfig
from attnd_server.execution.step import Step

# Steps that a stream keeps however large they are: as many calls of a session may be under way, each of another step,
# and the client builds upon the last ones.
LEAST_OPEN_STEPS = 4
# Of these it lets older ones go for a new one where there is no more room: those that build upon each other stay.
LAST_STEPS = 3
# Bytes up to which it keeps more.
MANY_STEPS_BYTES = 4 << 20
# Elements of page tables from which checking a step takes milliseconds, tens of them at worst: others than whoever sent
# it should not wait for that.
BIG_STEP_ELEMENTS = 1 << 17
# What a layer group and a new token of one cost to be checked, as so many of these elements.
_GROUP_ELEMENTS, _SLOT_ELEMENTS = 1 << 12, 8
# Bytes that a step takes beside its arrays; bytes of the arrays for each of its requests, in `AttentionMetadata` and
# for checking them: seven int64 and seven int32, lengths as Python's numbers, and bounds.
_STEP_BYTES, _REQUEST_BYTES = 8 << 10, 160
# Of a tensor's message beside its elements, at the most, if its shape is that of a step's.
_MAX_HEADER_BYTES = 64

_Part = step_pb2.Step | step_pb2.StepGroup
"""What has page tables and slots: a step, or what it says of a layer group."""


def step_bytes(message: step_pb2.Step, limits: ServerConfig, windows: Sequence[int] = (0,)) -> int:
    """Bytes that a step takes once it is checked; what is greater than `limits` allow is refused then.

    Args:
        message: the step.
        limits: the server's.
        windows: of the layer groups of its cache, in tokens; 0: there is none.
    """
    # Of tensors the sizes of their messages, which are little more: to ask for their data would copy it.
    num_reqs = min(message.cu_seqlens_q.ByteSize() // 4, limits.max_step_reqs + 1)
    is_decode, marks_tokens = message.kind == step_pb2.STEP_KIND_DECODE, message.HasField("attend_new")
    num_tokens, drops = _tokens(message, limits) if is_decode or marks_tokens or message.store_first else (0, False)
    of_group = _STEP_BYTES + _REQUEST_BYTES * num_reqs + num_tokens
    if not message.groups:
        tables_and_slots = _part_bytes(message, num_reqs, limits, 1 + bool(drops or message.window or any(windows)))
        return of_group * len(windows) + tables_and_slots
    groups = message.groups[: len(windows)]  # more are refused
    arrays = 0
    for part, source, window in zip(groups, _sources(groups), windows, strict=False):
        # Tables are kept as they came, unless another group has them, and without requests that have no new tokens and
        # what a window hides, if there are any.
        num_tables = (source is part) + bool(drops or part.window or window)
        arrays += _part_bytes(source, num_reqs, limits, num_tables)
    return of_group * len(windows) + arrays


def _part_bytes(part: _Part, num_reqs: int, limits: ServerConfig, num_tables: int) -> int:
    """Bytes of page tables, which are kept so many times, and of slots."""
    elements = min(_table_elements(part, num_reqs), limits.max_page_table_elements)
    return 4 * elements * num_tables + 8 * min(part.slot_mapping.ByteSize() // 4, 2 * limits.max_step_tokens)


def _tokens(message: step_pb2.Step, limits: ServerConfig) -> tuple[int, bool]:
    """The new tokens of a step, and whether a decode step has requests without any: those are left out."""
    if message.cu_seqlens_q.ByteSize() > 4 * (limits.max_step_reqs + 1) + _MAX_HEADER_BYTES:
        return 0, False  # it is refused
    ends = message.cu_seqlens_q.data
    num_tokens = int.from_bytes(ends[-4:], "little", signed=True)
    if not 0 <= num_tokens <= limits.max_step_tokens:
        return 0, False  # likewise
    # In a decode step all that have new tokens have as many as the first one that has.
    of_first = int.from_bytes(ends[4:8], "little", signed=True)
    all_have = of_first * (len(ends) // 4 - 1) == num_tokens > 0
    return num_tokens, message.kind == step_pb2.STEP_KIND_DECODE and not all_have


def _table_elements(part: _Part, num_reqs: int) -> int:
    """Elements of the page tables of a step or of one of its groups, sent or made by a delta of a few bytes."""
    return max(part.page_tables.ByteSize() // 4, num_reqs * part.page_table_delta.max_pages)


def _sources(groups: Sequence[step_pb2.StepGroup]) -> list[step_pb2.StepGroup]:
    """What gives the tables and slots of each group: the group itself, or another one."""
    # One that names none is refused before there is anything of it.
    return [
        groups[group.tables_of] if group.HasField("tables_of") and group.tables_of < len(groups) else group
        for group in groups
    ]


def is_big(message: step_pb2.Step) -> bool:
    """Whether the page tables of all layer groups are large, as sent or as deltas of a few bytes may make them.

    Each group counts, with another's tables too: they are checked against its own pages and window.
    """
    num_reqs = len(message.cu_seqlens_q.data) // 4
    groups = list(message.groups)
    if not groups:
        made = num_reqs * message.page_table_delta.max_pages
        return max(len(message.page_tables.data) // 4, made) > BIG_STEP_ELEMENTS
    sizes = (
        _GROUP_ELEMENTS + _table_elements(source, num_reqs) + _SLOT_ELEMENTS * (source.slot_mapping.ByteSize() // 4)
        for source in _sources(groups)
    )
    return sum(sizes) > BIG_STEP_ELEMENTS


def bases_of(message: step_pb2.Step) -> set[int]:
    """The ids of the steps on which one builds."""
    parts: list[_Part] = [message, *message.groups]
    return {part.page_table_delta.base_step_id for part in parts if part.HasField("page_table_delta")}


class HeldBytes:
    """Bytes of a `StepRoom`, held for as long as this object lives: whoever forgets its step gives them back.

    Attributes:
        num_bytes: how many.
    """

    __slots__ = ("_principal", "_room", "num_bytes")

    def __init__(self, room: StepRoom, principal: str, num_bytes: int) -> None:
        """Made by `StepRoom.take`."""
        self._room, self._principal, self.num_bytes = room, principal, num_bytes

    def __del__(self) -> None:
        """Gives them back."""
        self._room.give_back(self._principal, self.num_bytes)


class StepRoom:
    """Bytes that all steps take which are open, or have calls that wait. Any thread may call it."""

    def __init__(self, limit: int, principal_limit: int) -> None:
        """Nothing is taken.

        Args:
            limit: most bytes of everybody.
            principal_limit: of these, most of one principal.
        """
        self._limit, self._principal_limit = limit, principal_limit
        self._held: Counter[str] = Counter()  # by principal; none is 0
        self._num_bytes = 0
        self._lock = threading.RLock()  # a collection of garbage gives bytes back wherever it happens

    @property
    def num_bytes(self) -> int:
        """Bytes that are taken."""
        return self._num_bytes

    def take(self, principal: str, num_bytes: int) -> HeldBytes:
        """Room for a step of a principal.

        Raises:
            Exhausted: there is not so much left, of the principal's share or of the server's.
        """
        with self._lock:
            own = self._held[principal]
            if self._num_bytes + num_bytes > self._limit:
                used, whose = self._num_bytes, f"the server's limit is {self._limit}"
            elif own + num_bytes > self._principal_limit:
                used, whose = own, f"a principal's limit is {self._principal_limit}"
            else:
                self._held[principal] = own + num_bytes
                self._num_bytes += num_bytes
                return HeldBytes(self, principal, num_bytes)
            if not own:
                del self._held[principal]
        raise Exhausted(
            f"the step takes {num_bytes} bytes, and open steps take {used}, but {whose}: close a session, or open "
            "steps with smaller page tables"
        )

    def give_back(self, principal: str, num_bytes: int) -> None:
        """Takes back what `take` gave."""
        with self._lock:
            self._num_bytes -= num_bytes
            self._held[principal] -= num_bytes
            if not self._held[principal]:
                del self._held[principal]


class KeptSteps(OrderedDict[int, tuple[Step, ...]]):
    """The steps of one stream by their ids: those that its calls may name, and its later steps may build upon.

    Each is there as one for every layer group of its cache.
    """

    def __init__(self, room: StepRoom, principal: str, most: int) -> None:
        """None yet. At most so many, which take `room` as steps of `principal`."""
        super().__init__()
        self._room = room
        self._most = most
        self._principal = principal
        self._num_bytes = 0

    def __str__(self) -> str:
        """Their ids, for people."""
        return ", ".join(map(str, self)) or "none"

    def metadata(self) -> Mapping[int, Sequence[AttentionMetadata]]:
        """Of the layer groups of each by its id."""
        return {step_id: [step.metadata for step in steps] for step_id, steps in self.items()}

    def take(
        self, base_ids: Collection[int], num_bytes: int, forget: Callable[[list[int]], None] = lambda step_ids: None
    ) -> HeldBytes:
        """Room for one more, for which older ones go if need be.

        Args:
            base_ids: of the steps on which it builds, which do not go.
            num_bytes: that it takes.
            forget: told the ids of those that go: whatever else holds a step holds its room.

        Raises:
            Exhausted: see `StepRoom.take`.
        """
        while True:
            try:
                return self._room.take(self._principal, num_bytes)
            except Exhausted:
                if len(self) < LAST_STEPS or next(iter(self)) in base_ids:
                    raise
            forget([self._drop()])

    def add(self, steps: tuple[Step, ...]) -> list[int]:
        """Keeps one more, which holds its room. Returns the ids of those that are not kept any more."""
        self[steps[0].id] = steps
        self._num_bytes += _bytes_of(steps)
        dropped = []
        while (count := len(self)) > self._most or (count > LEAST_OPEN_STEPS and self._num_bytes > MANY_STEPS_BYTES):
            dropped.append(self._drop())
        return dropped

    def _drop(self) -> int:
        step_id, steps = self.popitem(last=False)
        self._num_bytes -= _bytes_of(steps)
        return step_id

    def clear(self) -> None:
        """Keeps none any more."""
        super().clear()
        self._num_bytes = 0


def _bytes_of(steps: tuple[Step, ...]) -> int:
    held = steps[0].held  # one for all groups
    return held.num_bytes if isinstance(held, HeldBytes) else 0
