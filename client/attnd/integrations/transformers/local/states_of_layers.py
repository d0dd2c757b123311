"""The states of layers that do not attend: of convolutions and recurrences. They stay here, and cannot be cut in time.

A layer changes them in place, so what a pass was stopped in the middle of is only undone with a copy from before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer

from attnd.errors import Unsupported
from attnd.integrations.transformers.local.states import States

_TENSORS = ("conv_states", "recurrent_states")
_FLAGS = ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state", "conv_kernel_size")


class LocalStates(States):
    """The states of some layers of a cache, and what they were before the pass under way."""

    def __init__(self, layers: Mapping[int, LinearAttentionLayer]) -> None:
        """Of a cache whose layers, by their numbers, these are."""
        self._layers = layers
        self._before: dict[int, dict[str, Any]] = {}

    @property
    def numbers(self) -> set[tuple[int, int]]:
        """Layer and number of each state."""
        return {(number, state) for number, layer in self._layers.items() for state in range(layer.number_of_states)}

    def note(self, number: int) -> None:
        """A layer is about to read or change its states: keeps what they are, unless the pass under way has."""
        if number not in self._before:
            self._before[number] = _copy(self._layers[number])

    def commit(self) -> None:
        """The pass under way counts."""
        self._before.clear()

    def take_back(self) -> None:
        """The pass under way never was. May be stopped, and done again."""
        for number in list(self._before):
            self._layers[number].__dict__.update(self._before[number])
            del self._before[number]

    def clear(self) -> None:
        """Forgets all of them; the next pass may have another number of rows."""
        self._before.clear()
        for layer in self._layers.values():
            record_past = layer.record_past
            LinearAttentionLayer.__init__(layer, number_of_states=layer.number_of_states)
            layer.record_past = record_past

    def select(self, rows: Sequence[int]) -> None:
        """Makes row `rows[i]` row i."""
        for layer in self._layers.values():
            for states in (layer.conv_states, layer.recurrent_states):
                for index, state in states.items():
                    if state is not None:
                        states[index] = state.index_select(0, torch.tensor(rows, device=state.device))

    def check_crop(self, num_removed: int, num_columns: int) -> None:
        """Raises Unsupported if the last `num_removed` tokens cannot be taken out, so that `num_columns` are left."""
        if not num_removed:
            return
        rule = "reset() and prefill what is to stay"
        for number, layer in self._layers.items():
            if any(state is not None for state in layer.recurrent_states.values()):
                raise Unsupported(
                    f"layer {number} has a recurrence, from which no token can be taken out again: {rule}"
                )
            for index, state in layer.conv_states.items():
                kept = 0 if state is None else state.shape[-1] - num_removed
                if not layer.record_past or (kept < (layer.conv_kernel_size[index] or 0) and kept != num_columns):
                    raise Unsupported(
                        f"layer {number} has a convolution that has not recorded the last {num_removed} tokens: "
                        f"activate_past_recording() before they come, or {rule}"
                    )

    def crop(self, num_removed: int) -> None:
        """Takes out the last `num_removed` tokens; `check_crop` said that it can be done."""
        for layer in self._layers.values():
            if layer.record_past and any(layer.is_conv_states_initialized.values()):
                LinearAttentionLayer.crop(layer, -num_removed)

    def copy_to(self, other: States) -> None:
        """Makes those of a fork the same."""
        assert isinstance(other, LocalStates)
        for number, layer in self._layers.items():
            other._layers[number].__dict__.update(_copy(layer) | {"record_past": layer.record_past})


def _copy(layer: LinearAttentionLayer) -> dict[str, Any]:
    """Attributes of a layer, with tensors of their own."""
    copied: dict[str, Any] = {name: dict(getattr(layer, name)) for name in _FLAGS}
    for name in _TENSORS:
        states = getattr(layer, name)
        copied[name] = {index: None if state is None else state.clone() for index, state in states.items()}
    return copied | {name: getattr(layer, name) for name in ("device", "dtype")}
