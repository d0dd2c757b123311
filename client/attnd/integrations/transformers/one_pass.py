"""One forward pass of a model, as a cache sees it: which layers have attended, with which masks, and who runs it."""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

import torch

from attnd.errors import InvalidRequest, Unsupported
from attnd.integrations.transformers.masks import Reading
from attnd.integrations.transformers.running import RunningCall
from attnd.integrations.transformers.served_pass import ServedPass


class Touch(NamedTuple):
    """What a layer does with states of its own; once in a pass.

    Attributes:
        number: of the layer.
        state: number of the state.
        name: of the method of the cache.
    """

    number: int
    state: int
    name: str


class Pass:
    """A pass that was begun: by a layer that attends, or by one that has states of its own.

    Attributes:
        call: of the model.
        numbers: of the modules that have attended, in order.
        touched: what other layers have done.
        last_touch: the layer's call that did the last of it.
        has_attended: whether its last layer that attends has.
        has_crossed: whether that has attended to an encoder's output too.
        is_dead: whether it cannot go on: an exception came through a layer's attention.
        is_finished: whether it counts: no layer is missing.
    """

    def __init__(self, call: RunningCall) -> None:
        """Of the call of a model."""
        self.call = call
        self.numbers: list[int] = []
        self.touched: set[Touch] = set()
        self.last_touch: RunningCall | None = None
        self.has_attended = False
        self.has_crossed = False
        self.is_dead = False
        self.is_finished = False
        self._served: ServedPass | None = None
        self._masks: list[tuple[torch.Tensor | None, int]] = []  # that were read, and the windows of their layers
        self._real: torch.Tensor | None = None
        self._blocks: torch.Tensor | None = None
        self._num_new = 0
        self._windows = {0}  # that were found to mean the same in columns and in real tokens

    @property
    def is_open(self) -> bool:
        """Whether `open` was called."""
        return self._served is not None

    @property
    def served(self) -> ServedPass:
        """Its steps."""
        assert self._served is not None
        return self._served

    def open(self, served: ServedPass, mask: torch.Tensor | None, window: int, reading: Reading, num_new: int) -> None:
        """The first layer is about to attend.

        Args:
            served: runs its steps.
            mask: that the layer was given.
            window: of the layer.
            reading: what that mask says.
            num_new: its columns.
        """
        self._masks, self._num_new = [(mask, window)], num_new
        self._real, self._blocks = reading
        self._served = served

    def goes_on_with(self, number: int) -> bool:
        """Whether the module `number` of a layer belongs to this pass; False: it begins another.

        Raises:
            Unsupported: it has attended already, and the pass still runs.
        """
        if self.is_finished or self.is_dead:
            return False
        if number not in self.numbers:
            return True
        if self.call.is_running and not self.call.is_anothers:
            rule = "a RemoteCache serves one attention over its own keys for each layer"
            raise Unsupported(f"layer {number} attends twice in one pass of the model, but {rule}")
        return False

    @property
    def num_new(self) -> int:
        """Its columns."""
        return self._num_new

    def goes_on_to(self, touch: Touch) -> bool:
        """Whether what a layer does with its states belongs to this pass; False: it begins another."""
        return not self.is_finished and not self.is_dead and touch not in self.touched

    def has_touched(self, states: Set[tuple[int, int]]) -> bool:
        """Whether the layers of these states, `(layer, state)`, have done all that they do in a pass."""
        if self.call.has_returned:
            return True
        last = self.last_touch
        is_done = last is None or not last.is_known or last.has_returned
        return is_done and states <= {(touch.number, touch.state) for touch in self.touched}

    def check_alone(self) -> None:
        """Raises InvalidRequest if another thread is in the middle of this pass."""
        if not self.is_finished and not self.is_dead and self.call.is_anothers and self.call.is_running:
            rule = "one pass at a time may use it: wait for that one, or give each thread a RemoteCache of its own"
            raise InvalidRequest(f"another thread is in the middle of a pass with this cache, but {rule}")

    def check_mask(self, number: int, mask: torch.Tensor | None, window: int, reading: Reading) -> None:
        """Raises InvalidRequest if a layer's mask says something else than those of the layers before."""
        real, blocks = reading
        if real is None or self._real is None:
            given = real if self._real is None else self._real
            is_same = given is None or bool(given.all())
        else:
            is_same = torch.equal(real, self._real)
        if blocks is None or self._blocks is None:
            is_same = is_same and blocks is self._blocks
        else:
            is_same = is_same and torch.equal(blocks, self._blocks)
        if not is_same:
            rule = "must say the same, as the layers share their pages"
            raise InvalidRequest(
                f"attention_mask of layer {number} is another than that of layer {self.numbers[0]}, but {rule}",
                field="attention_mask",
            )
        self._masks.append((mask, window))

    def knows(self, mask: torch.Tensor | None, window: int) -> bool:
        """Whether a mask was read already, for a layer of that window."""
        return any(mask is known and window == of for known, of in self._masks)

    def check_window(self, number: int, window: int) -> None:
        """Checks that a sliding window means the same here, in real tokens, and in eager attention, in columns.

        Raises:
            Unsupported: padding between a row's tokens makes the difference.
        """
        if window in self._windows:
            return
        if self._real is not None and not bool(self._real.all()):
            count = torch.nn.functional.pad(self._real.int().cumsum(1), (1, 0))  # real tokens before each column
            first = self._real.shape[1] - self._num_new
            ends = torch.arange(first, self._real.shape[1]) + 1
            starts = (ends - window).clamp(min=0)
            inside = count[:, ends] - count[:, starts]
            # A query that is padding stands behind the last real token by the padding of this pass between.
            last = _last_real(self._real)[:, ends - 1]
            behind = ends - 1 - last.clamp(min=first - 1)
            expected = torch.minimum(count[:, ends], (window - behind).clamp(min=0))
            wrong = ((inside != expected) & (last >= 0)).nonzero()
            if len(wrong):
                row = int(wrong[0, 0])
                raise Unsupported(
                    f"attention_mask[{row}] has padding between tokens, but layer {number} has a sliding window of "
                    f"{window}, which counts columns with padding and would be counted in tokens here",
                    field="attention_mask",
                )
        self._windows.add(window)


def _last_real(real: torch.Tensor) -> torch.Tensor:
    """Int64 of `real`'s shape: the column of the last real token up to each; -1: there is none."""
    columns = torch.arange(real.shape[1]).expand_as(real)
    return torch.where(real, columns, -1).cummax(1).values
