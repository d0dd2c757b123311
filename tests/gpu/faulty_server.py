"""`attnd serve` on a GPU that a call's scale breaks: a store to nowhere, an assertion, a kernel without end."""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
import triton.language as tl

from attnd_server.__main__ import main
from attnd_server.attention.backends.naive import NaiveAttention

ILLEGAL, ASSERTION, ENDLESS = 1313.0, 1414.0, 1515.0
# Bytes: far beyond what is mapped.
_NOWHERE = 1 << 44

_run = NaiveAttention.run


@triton.jit
def _store_kernel(pointer, offset):
    tl.store(pointer + offset, 1.0)


@triton.jit
def _wait_kernel(pointer):
    while tl.load(pointer, volatile=True) == 0:
        pass


def _run_and_break(kernel: NaiveAttention, plan: Any, q: torch.Tensor, *tensors: Any) -> Any:
    """As the real one, whose launches still succeed: the fault comes later, when somebody waits."""
    if plan.options.scale == ILLEGAL:
        _store_kernel[(1,)](torch.zeros(1, device=q.device), _NOWHERE)
    if plan.options.scale == ASSERTION:
        torch.zeros(1, device=q.device)[torch.full((1,), 1 << 40, device=q.device)]
    if plan.options.scale == ENDLESS:
        _wait_kernel[(1,)](torch.zeros(1, dtype=torch.int32, device=q.device))
    return _run(kernel, plan, q, *tensors)


if __name__ == "__main__":
    NaiveAttention.run = _run_and_break  # type: ignore[method-assign]
    sys.exit(main())
