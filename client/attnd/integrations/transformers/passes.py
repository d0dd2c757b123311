"""One forward pass of a model, as a cache sees it: which layers have attended, with which masks, and who runs it."""

from __future__ import annotations

import torch

from attnd.errors import InvalidRequest, Unsupported
from attnd.integrations.transformers.running import RunningCall
from attnd.integrations.transformers.served_pass import ServedPass


class Pass:
    """A pass that was begun.

    Attributes:
        served: its steps.
        numbers: of the modules that have attended, in order.
        is_dead: whether it cannot go on: an exception came through a layer's attention.
        is_finished: whether its last layer has attended.
    """

    def __init__(
        self,
        call: RunningCall,
        served: ServedPass,
        mask: torch.Tensor | None,
        real: torch.Tensor | None,
        num_new: int,
    ) -> None:
        """A pass whose first layer is about to attend.

        Args:
            call: of the model.
            served: runs its steps.
            mask: that the first layer was given.
            real: bool `[batch_size, num_columns]` on the host, what that mask says; None: all tokens are real.
            num_new: its columns.
        """
        self.call = call
        self.served = served
        self.numbers: list[int] = []
        self.is_dead = False
        self.is_finished = False
        self._masks = [mask]
        self._real = real
        self._num_new = num_new
        self._windows = {0}  # that were found to mean the same in columns and in real tokens

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

    def check_alone(self) -> None:
        """Raises InvalidRequest if another thread is in the middle of this pass."""
        if not self.is_finished and not self.is_dead and self.call.is_anothers and self.call.is_running:
            rule = "one pass at a time may use it: wait for that one, or give each thread a RemoteCache of its own"
            raise InvalidRequest(f"another thread is in the middle of a pass with this cache, but {rule}")

    def check_mask(self, number: int, mask: torch.Tensor | None, real: torch.Tensor | None) -> None:
        """Raises InvalidRequest if a layer's mask says something else than those of the layers before."""
        if real is None or self._real is None:
            given = real if self._real is None else self._real
            is_same = given is None or bool(given.all())
        else:
            is_same = torch.equal(real, self._real)
        if not is_same:
            rule = "must say the same, as the layers share their pages"
            raise InvalidRequest(
                f"attention_mask of layer {number} is another than that of layer {self.numbers[0]}, but {rule}",
                field="attention_mask",
            )
        self._masks.append(mask)

    def knows(self, mask: torch.Tensor | None) -> bool:
        """Whether a mask was looked at already."""
        return any(mask is known for known in self._masks)

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
