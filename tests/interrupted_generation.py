"""`generate` of transformers that Ctrl-C ends in the middle of a pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


class Seen:
    """A streamer that keeps the tokens, for whoever goes on with them."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens.extend(value.flatten().tolist())

    def end(self) -> None:
        raise AssertionError("it was interrupted")


def interrupted(layer: torch.nn.Module, pass_number: int, generate: Callable[[Seen], Any]) -> list[int]:
    """The tokens that there were when pass `pass_number`, from 0, was stopped before `layer` ran."""
    calls = iter(range(pass_number + 1))

    def stop(*_: object) -> None:
        if next(calls) == pass_number:
            raise KeyboardInterrupt

    seen = Seen()
    handle = layer.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        generate(seen)
    handle.remove()
    return seen.tokens
