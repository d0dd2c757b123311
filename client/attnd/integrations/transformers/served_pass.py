"""A forward pass that a server attends, with transformers' shapes on the one side and a session's on the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from attnd.integrations.model_session import ModelSession
from attnd.integrations.transformers.parts import Part
from attnd.protocol.attention_options import AttentionOptions


class Attending(Protocol):
    """What attends one layer after the other: a pass of a session, or a part of one."""

    def attend(self, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions) -> Any:
        """As `Step.attend`."""

    def finish(self) -> None:
        """Waits until the server has done it."""


class ServedPass:
    """The parts of one pass, begun by its first layer and shared by the others."""

    def __init__(self, session: ModelSession, parts: Sequence[Part]) -> None:
        """Sends nothing yet."""
        self._session = session
        self._parts = parts
        self._begun: Sequence[Attending] = ()
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
        if len(self._begun) < len(self._parts):
            self._begun = self._begin()
        batch_size, num_heads, num_new, _ = query.shape
        shape = (batch_size, num_new, num_heads, value.shape[-1])
        q, k, v = (_tokens(tensor) for tensor in (query, key, value))
        if len(self._parts) == 1 and self._parts[0].positions is None:
            output: torch.Tensor = self._begun[0].attend(layer, q, k, v, options)
            return output.view(shape)
        flat = query.new_zeros((batch_size * num_new, *shape[2:]))
        for part, begun, at in zip(self._parts, self._begun, self._positions_on(query.device), strict=True):
            is_new = not part.metadata.cache_only
            flat[at] = begun.attend(layer, q[at], k[at] if is_new else None, v[at] if is_new else None, options)
        return flat.view(shape)

    def finish(self) -> None:
        """Waits until the server has done the whole pass. Raises AttndError: it failed, its outputs mean nothing."""
        for begun in self._begun:
            begun.finish()

    def reopen(self) -> None:
        """What was begun is lost: the next layer begins again."""
        self._begun = ()

    def _begin(self) -> Sequence[Attending]:
        if len(self._parts) == 1:
            return [self._session.begin(self._parts[0].metadata)]
        return self._session.begin_apart([part.metadata for part in self._parts])

    def _positions_on(self, device: torch.device) -> list[torch.Tensor]:
        if not self._positions or self._positions[0].device != device:
            every = [part.positions for part in self._parts]
            self._positions = [at.to(device) for at in every if at is not None]
        return self._positions


def _tokens(tensor: torch.Tensor) -> torch.Tensor:
    """`[B, H, T, D]` as `[B * T, H, D]`. Of one token of each row nothing changes places: one operation, not two."""
    return tensor.squeeze(2) if tensor.shape[2] == 1 else tensor.transpose(1, 2).flatten(0, 1)
