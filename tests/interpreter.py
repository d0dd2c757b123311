"""Triton without a GPU: its interpreter runs the kernels on the processor, slowly, in float32 and float16.

Triton decides when it is imported whether its own library is compiled or interpreted. So this module must be imported
before anything else imports triton; `ready` says whether it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch

_FLAG = "TRITON_INTERPRET"


@contextmanager
def interpreter() -> Iterator[str]:
    """Gives the device to run Triton's kernels on; without a GPU, triton interprets as long as the context lasts."""
    if torch.cuda.is_available():
        yield "cuda"
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(_FLAG, "1")
        yield "cpu"


def reason_against() -> str | None:
    """None if triton's kernels can run here, or why not."""
    if not find_spec("triton"):
        return "triton is not installed"
    if torch.cuda.is_available():
        return None
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    assert isinstance(tl.cdiv, InterpretedFunction), "tests.interpreter must be imported before anything imports triton"
    return None


with interpreter():
    if find_spec("triton"):
        import triton  # noqa: F401
