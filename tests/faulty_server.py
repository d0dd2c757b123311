"""`attnd serve` whose device fails when a call's scale says so: what a GPU does of its own accord, on a processor.

A call with the scale `FAULT` raises what torch raises then; one with `BUG` what a bug raises; one with
`WRONG` is answered wrongly.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from attnd_server.__main__ import main
from attnd_server.attention.backends.naive import NaiveAttention
from attnd_server.device import faults as device_faults

FAULT, BUG, WRONG = 1313.0, 1414.0, 1515.0
MESSAGE = "CUDA error: an illegal memory access was encountered"
# Torch's advice names other things that are none.
ADVICE = "\nCUDA kernel errors might be asynchronously reported at some other API call: out of memory"
# Long enough to look at a server that ends.
device_faults.EXIT_AFTER_S = 2.0

_run = NaiveAttention.run


def _run_or_fail(kernel: NaiveAttention, plan: Any, *tensors: Any) -> Any:
    scale = plan.options.scale
    if scale == FAULT:
        raise torch.AcceleratorError(MESSAGE + ADVICE)
    if scale == BUG:
        raise RuntimeError("a bug")
    output, lse = _run(kernel, plan, *tensors)
    return (output + 1 if scale == WRONG else output), lse


if __name__ == "__main__":
    NaiveAttention.run = _run_or_fail  # type: ignore[method-assign]
    sys.exit(main())
