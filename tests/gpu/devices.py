"""The GPUs of tests that have a server and a worker at work at once: one each, or one under CUDA's MPS."""

from __future__ import annotations

from typing import Any

import torch


def reason_against() -> str:
    """Why such tests cannot run here; "": they can."""
    count = torch.cuda.device_count()
    if count == 0:
        return "needs a GPU"
    return "" if count > 1 or has_mps() else "needs two GPUs, or one and CUDA's Multi-Process Service"


def has_mps() -> bool:
    """Whether kernels of several processes run at once on the first GPU."""
    from attnd.protocol.cuda.driver import device

    return device(0).has_mps


# Index of the worker's; the server has the first.
WORKER = 1 if torch.cuda.device_count() > 1 else 0

# How torch captures a graph in these tests: a server in this process loads kernels on threads of its own, and a capture
# that counts what other threads do would not survive that.
CAPTURE: dict[str, Any] = {"capture_error_mode": "thread_local"}
