"""Layers of a cache whose states stay here: those of convolutions and recurrences."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import LinearAttentionLayer

from attnd.integrations.transformers.cache_layers import Owner, RemoteLayer
from attnd.integrations.transformers.geometry import Geometry
from attnd.integrations.transformers.local.states_of_layers import LocalStates


class HybridLayer(LinearAttentionLayer, RemoteLayer):  # type: ignore[no-untyped-call,override]  # transformers' own
    """A layer with keys and values on the server, and states that stay here."""

    is_compileable = False

    def __init__(self, owner: Owner, index: int, num_states: int) -> None:
        RemoteLayer.__init__(self, owner, index)
        LinearAttentionLayer.__init__(self, number_of_states=num_states)


def put_local(layers: list[Any], owner: Owner, geometry: Geometry) -> LocalStates:
    """Puts the layers that have states here in their places among those of a cache."""
    local: dict[int, LinearAttentionLayer] = {}
    for number, count in geometry.num_states.items():
        if number in geometry.served:
            local[number] = HybridLayer(owner, number, count)
        else:
            local[number] = LinearAttentionLayer(number_of_states=count)
        layers[number] = local[number]
    return LocalStates(local)
