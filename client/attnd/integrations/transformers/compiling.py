"""What torch.compile is not to look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def hidden(function: Function) -> Function:
    """`function`, called as it is where a compiled model comes to it: it keeps books, and asks a server."""
    return cast(Function, torch.compiler.disable(function))
