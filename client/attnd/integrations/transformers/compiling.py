"""What torch.compile is not to look into."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def hidden(function: Function) -> Function:
    """`function`, called as it is where a compiled model comes to it: it keeps books, and asks a server."""
    return cast(Function, torch.compiler.disable(function))


def is_compiled(frame: FrameType | None) -> bool:
    """Whether a frame is that of a compiled function's call."""
    code = None if frame is None else frame.f_code
    return code is not None and code.co_name == "compile_wrapper" and code.co_filename.endswith("eval_frame.py")


def leave_out(module: torch.nn.Module) -> None:
    """Has torch.compile take no `forward` of a module's class any more, but what that calls.

    Such a `forward` hands its layer's number to the cache, so that it would be compiled again for each layer.
    """
    from torch._dynamo.eval_frame import skip_code  # nothing public leaves out a function, but not what that calls

    skip_code(inspect.unwrap(type(module).forward).__code__)
