"""The last call of a lane, as long as what comes on it repeats that call in all but the layer."""

from __future__ import annotations

from collections.abc import Callable

from attnd_server.execution.joined.repeat import Repeat, Repeatable
from attnd_server.identity import is_revoked


class RepeatedLane:
    """Of no use any more once anything else came on the stream."""

    def __init__(self, of: Repeatable, lane: int, principal: str, called: Callable[[int], None]) -> None:
        """Of a call that was answered.

        Args:
            of: the call.
            lane: its lane.
            principal: whose it is.
            called: told the layer of a repeat that is answered.
        """
        step = of.call.step
        self._of, self._step_id, self._lane, self._principal, self._called = of, step.id, lane, principal, called
        self._indices = {layer: index for index, layer in enumerate(step.group.layer_numbers)}
        self._cache = step.cache

    def repeat(self, layer: int, step_id: int, lane: int) -> Repeat | None:
        """A request that has no message; None: it is to be looked at by itself."""
        index = self._indices.get(layer)
        if index is None or step_id != self._step_id or lane != self._lane or is_revoked(self._principal):
            return None
        return Repeat(self._of, index)

    def answered(self, layer: int) -> None:
        """A repeat has run, and its answer comes next."""
        self._cache.renew()
        self._called(layer)
