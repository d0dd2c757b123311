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
# Bytes that a step takes beside its arrays; bytes of the arrays for each of its requests, in `AttentionMetadata` and
# for checking them: seven int64 and seven int32, lengths as Python's numbers, and bounds.
_STEP_BYTES, _REQUEST_BYTES = 8 << 10, 160


def step_bytes(message: step_pb2.Step, limits: ServerConfig, num_groups: int = 1) -> int:
    """Bytes that a step takes once it is checked; what is greater than `limits` allow is refused then.

    Args:
        message: the step.
        limits: the server's.
        num_groups: layer groups of its cache.
    """
    # Of tensors the sizes of their messages, which are little more: to ask for their data would copy it.
    num_reqs = min(message.cu_seqlens_q.ByteSize() // 4, limits.max_step_reqs + 1)
    arrays = 0
    for part in _parts(message, num_groups):  # more are refused
        arrays += 4 * min(_table_elements(part, num_reqs), limits.max_page_table_elements)
        arrays += 8 * min(part.slot_mapping.ByteSize() // 4, 2 * limits.max_step_tokens)
    return (_STEP_BYTES + _REQUEST_BYTES * num_reqs) * num_groups + arrays


def _table_elements(part: step_pb2.Step | step_pb2.StepGroup, num_reqs: int) -> int:
    """Elements of the page tables of a step or of one of its groups, sent or made by a delta of a few bytes."""
    return max(part.page_tables.ByteSize() // 4, num_reqs * part.page_table_delta.max_pages)


def _parts(message: step_pb2.Step, most_groups: int | None = None) -> list[step_pb2.Step | step_pb2.StepGroup]:
    """What may have page tables: a step, and what it says of each layer group."""
    return [message, *message.groups[:most_groups]]


def is_big(message: step_pb2.Step) -> bool:
    """Whether the page tables of all layer groups are large, as sent or as deltas of a few bytes may make them."""
    num_reqs = len(message.cu_seqlens_q.data) // 4
    sizes = (
        max(len(part.page_tables.data) // 4, num_reqs * part.page_table_delta.max_pages) for part in _parts(message)
    )
    return sum(sizes) > BIG_STEP_ELEMENTS


def bases_of(message: step_pb2.Step) -> set[int]:
    """The ids of the steps on which one builds."""
    return {part.page_table_delta.base_step_id for part in _parts(message) if part.HasField("page_table_delta")}


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
