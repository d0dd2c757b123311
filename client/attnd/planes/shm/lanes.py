"""The calls under way on a shm plane: the lane of each, and its place in the region."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from attnd.errors import Exhausted
from attnd.protocol.loose import Sendable
from attnd.protocol.regions import aligned
from attnd.protocol.requests import MAX_CALLS_UNDER_WAY
from attnd.protocol.shm.placed_tensors import PlacedTensors

# In the place of a lane: what was sent is a step.
_NO_LANE = -1
_LSE_BYTES = 4  # of an element, float32


class PlacedCall(NamedTuple):
    """A call whose tensors lie in the region.

    Attributes:
        lane: that it takes.
        options: encoded; as its tensors' kinds and shapes, what it has in common with calls that say it is meant again.
        tensors: where they lie.
        place: bytes of the region from its first tensor to the end of its reply.
    """

    lane: int
    options: bytes
    tensors: PlacedTensors
    place: range


class Lanes:
    """Which lanes and bytes of a region are taken, from a call's sending to its answer; answers come in order.

    A call takes the lowest lane that is free and the first place that is. So calls that alternate, or that wait for
    each other, find the lane of the call before and lie where that lay.
    """

    def __init__(self, num_bytes: int, head_dim_v: int) -> None:
        """All of a region of `num_bytes` is free, for calls whose outputs have up to `head_dim_v` elements per head."""
        self._num_bytes = num_bytes
        self._head_dim_v = head_dim_v
        self._last: dict[int, PlacedCall] = {}  # sent last, by lane
        self._taken: deque[int] = deque()  # lanes of calls under way, in the order of their answers; _NO_LANE: a step

    @property
    def oldest(self) -> int:
        """The lane of what will be answered next; -1 for a step, or for nothing."""
        return self._taken[0] if self._taken else _NO_LANE

    def repeatable(self) -> PlacedCall | None:
        """The last call of the lane that is next, if its place is free."""
        if not self._taken:
            return self._last.get(0)
        last = self._last.get(self._free_lane())
        return last if last is not None and self._is_free(last.place) else None

    def place(self, arrays: Mapping[str, Sendable], *, return_lse: bool) -> tuple[int, range]:
        """A lane and a place for a call with these tensors and its reply.

        Raises:
            Exhausted: those under way leave no lane or no room for it. A call that is alone always has its place;
                whether it fits there, the region and the server say.
        """
        lane = self._free_lane()
        if lane == MAX_CALLS_UNDER_WAY:
            raise Exhausted(f"{lane} calls of the session are under way, which is the limit; wait for one first")
        num_bytes = self._call_bytes(arrays, return_lse)
        taken = self._places()
        for start in sorted([0, *(place.stop for place in taken)]):
            place = range(start, start + num_bytes)
            if not taken or (place.stop <= self._num_bytes and self._is_free(place)):
                return lane, place
        places = " and ".join(f"{place.start}..{place.stop - 1}" for place in taken)
        raise Exhausted(
            f"call needs {num_bytes} bytes of the plane's region of {self._num_bytes}, but calls under way have bytes "
            f"{places}: wait for one first; the server's --region-bytes gives more room",
            field="call",
        )

    def sent(self, call: PlacedCall | None) -> None:
        """A call, or if None a step, is under way."""
        if call is None:
            self._taken.append(_NO_LANE)
        else:
            self._last[call.lane] = call
            self._taken.append(call.lane)

    def answered(self) -> int:
        """What was sent first is not under way any more; returns its lane, -1 for a step or for nothing."""
        return self._taken.popleft() if self._taken else _NO_LANE

    def forget(self) -> None:
        """The region has gone."""
        self._last.clear()
        self._taken.clear()

    def _free_lane(self) -> int:
        return next((lane for lane in range(MAX_CALLS_UNDER_WAY) if lane not in self._taken), MAX_CALLS_UNDER_WAY)

    def _places(self) -> list[range]:
        """Where the calls under way lie."""
        return [self._last[lane].place for lane in self._taken if lane != _NO_LANE]

    def _is_free(self, place: range) -> bool:
        return all(place.stop <= other.start or other.stop <= place.start for other in self._places())

    def _call_bytes(self, arrays: Mapping[str, Sendable], return_lse: bool) -> int:
        """Bytes from the first tensor of a call to the end of its reply; places begin aligned, and so they end."""
        num_bytes = sum(aligned(array.num_bytes) for array in arrays.values())
        q = arrays.get("q")
        if q is not None:
            num_rows = math.prod(q.shape[:-1])
            item_size = q.num_bytes // max(1, math.prod(q.shape))
            num_bytes += aligned(num_rows * self._head_dim_v * item_size)
            num_bytes += aligned(num_rows * _LSE_BYTES) if return_lse else 0
        return num_bytes
