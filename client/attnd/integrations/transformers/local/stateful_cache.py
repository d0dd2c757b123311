"""The part of a cache that models with convolutions and recurrences ask: each access is seen by the pass under way."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from attnd.errors import Unsupported
from attnd.integrations.transformers.cache_layers import layers_of
from attnd.integrations.transformers.compiling import hidden
from attnd.integrations.transformers.geometry import Geometry
from attnd.integrations.transformers.local.states import States
from attnd.integrations.transformers.rows import Rows


class StatefulCache(Cache):
    """A cache with states that stay here.

    Attributes:
        geometry: of the model.
        rows: which tokens there are, and the passes that add to them.
    """

    geometry: Geometry
    rows: Rows

    def begin(self: Any, geometry: Geometry) -> States:
        """Makes the layers. Gives the states that stay here.

        Raises:
            Unsupported: this version of transformers has no cache for them.
        """
        layers = layers_of(self, geometry)
        states = _put_local(layers, self, geometry) if geometry.num_states else States()
        Cache.__init__(self, layers=layers)
        self.geometry = geometry
        return states

    @hidden
    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """A layer's states of a convolution; None: there are none yet."""
        self.rows.touch(layer_idx, state_idx, "get_conv_state")
        return super().get_conv_state(layer_idx, state_idx)

    @hidden
    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """A layer's state of a recurrence; None: there is none yet."""
        self.rows.touch(layer_idx, state_idx, "get_recurrent_state")
        return super().get_recurrent_state(layer_idx, state_idx)

    @hidden
    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Adds to a layer's states of a convolution, and gives them with those before."""
        self.rows.touch(layer_idx, state_idx, "update_conv_state")
        return super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)

    @hidden
    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Keeps a layer's state of a recurrence, and gives it back."""
        self.rows.touch(layer_idx, state_idx, "update_recurrent_state")
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)

    @property
    def is_linear(self) -> list[bool]:
        """Of each layer, whether it has states and no keys."""
        states, served = self.geometry.num_states, self.geometry.served
        return [number in states and number not in served for number in range(len(self.layers))]


def _put_local(layers: list[Any], owner: Any, geometry: Geometry) -> States:
    try:
        from attnd.integrations.transformers.local.layers import put_local
    except ImportError:
        rule = "transformers of this version has no cache for them: it must be newer"
        raise Unsupported(f"layer {min(geometry.num_states)} has a convolution or a recurrence, but {rule}") from None
    return put_local(layers, owner, geometry)
