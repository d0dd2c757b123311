"""A forward pass that a server attends, with transformers' shapes on the one side and a session's on the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from attnd.integrations.transformers.parts import Part
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.step_metadata import StepMetadata


class Steps(Protocol):
    """What runs steps: a session."""

    def step(self, metadata: StepMetadata) -> Any:
        """Opens a step."""


class ServedPass:
    """The parts of one pass, opened by its first layer and shared by the others."""

    def __init__(self, session: Steps, parts: Sequence[Part]) -> None:
        """Sends nothing yet."""
        self._session = session
        self._parts = parts
        self._steps: list[Any] = []
        self._positions: list[torch.Tensor] = []

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        """One layer.

        Args:
            layer: of the server's cache.
            query: `[batch_size, num_heads, num_new, head_dim]`.
            key: `[batch_size, num_kv_heads, num_new, head_dim]`.
            value: `[batch_size, num_kv_heads, num_new, head_dim_v]`.
            options: of the layer.

        Returns:
            `[batch_size, num_new, num_heads, head_dim_v]`, zeros for padding that sees nothing.
        """
        if len(self._steps) < len(self._parts):
            self._steps = [self._session.step(part.metadata) for part in self._parts]
        batch_size, num_heads, num_new, _ = query.shape
        shape = (batch_size, num_new, num_heads, value.shape[-1])
        q, k, v = (_tokens(tensor) for tensor in (query, key, value))
        if len(self._parts) == 1 and self._parts[0].positions is None:
            output: torch.Tensor = self._steps[0].attend(layer, q, k, v, options)
            return output.view(shape)
        flat = query.new_zeros((batch_size * num_new, *shape[2:]))
        for part, step, at in zip(self._parts, self._steps, self._positions_on(query.device), strict=True):
            new = (None, None) if part.metadata.cache_only else (k[at], v[at])
            flat[at] = step.attend(layer, q[at], *new, options)
        return flat.view(shape)

    def reopen(self) -> None:
        """The steps were lost: the next layer sends them again."""
        self._steps = []

    def _positions_on(self, device: torch.device) -> list[torch.Tensor]:
        if not self._positions or self._positions[0].device != device:
            every = [part.positions for part in self._parts]
            self._positions = [at.to(device) for at in every if at is not None]
        return self._positions


def _tokens(tensor: torch.Tensor) -> torch.Tensor:
    """`[B, H, T, D]` as `[B * T, H, D]`. Of one token of each row nothing changes places: one operation, not two."""
    return tensor.squeeze(2) if tensor.shape[2] == 1 else tensor.transpose(1, 2).flatten(0, 1)
