"""What rows ask of whatever computes lost KV again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from attnd.integrations.transformers.one_pass import Pass
from attnd.integrations.transformers.served_pass import ServedPass


class Recovering(Protocol):
    """What computes lost KV again: a `Recovery`, which see."""

    is_computing: bool
    num_columns: int

    def begin(self, num_new: int, is_causal: bool) -> None:
        """A pass begins."""

    def commit(self) -> None:
        """It is over, and counts."""

    def attend(self, now: Pass, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A layer of it."""

    def served(self, number: int) -> ServedPass:
        """The steps of the pass that computes again."""

    def copy(self, call: Callable[[], None]) -> None:
        """Copies pages."""

    def crop(self, num_columns: int) -> None:
        """Keeps so many tokens of each row."""

    def select(self, rows: list[int]) -> None:
        """Makes row `rows[i]` row i."""

    def fork(self, rows: Any, owner: object) -> Recovering:
        """The same for a fork."""

    def clear(self) -> None:
        """Forgets all tokens."""

    def close(self) -> None:
        """Stops watching."""
