"""One plane, tried by `attnd doctor`: what a few random calls give, and how long they take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import attnd
from attnd.errors import AttndError
from attnd.extras import where
from attnd_server.cli.plane_case import NUM_HEADS, NUM_REQS, Case, error_of

# Of each size: steps, and calls of a step as of a model's layers.
NUM_STEPS, NUM_CALLS = 5, 30
TURNS = (
    "this process and the server take turns on one GPU, which costs each layer about 0.3 ms; run both under CUDA's "
    "Multi-Process Service: nvidia-cuda-mps-control -d, before either starts"
)
# Relative to float64, of float32 or what a GPU makes of it.
MAX_ERROR = 1e-2


@dataclass
class Finding:
    """What came of one plane.

    Attributes:
        reason: why it cannot be had, and how to repair that; "" if it can be had.
        fault: what was wrong with what it gave; "" if nothing.
        hint: how it could be faster; "" if nothing is known.
        call_us: by the number of requests, microseconds of a call, median.
    """

    reason: str = ""
    fault: str = ""
    hint: str = ""
    call_us: dict[int, float] = field(default_factory=dict)


def try_plane(cache: attnd.Cache, plane: str, case: Case) -> Finding:
    """Opens a session of `cache` on a plane, and compares and times calls of each size."""
    finding = Finding(why_no_cuda() if plane == "cuda" else "")
    if finding.reason:
        return finding
    try:
        with cache.session(plane=plane) as session:
            for num_reqs in NUM_REQS:
                finding.call_us[num_reqs] = _time(session, num_reqs, case, finding)
    except AttndError as error:
        finding.reason = str(error)
    return finding


def why_no_cuda() -> str:
    """Why this process cannot try a cuda plane; "": it can."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return f"skipped: this process has no torch, {where('torch')}, and no cuda-bindings, {where('cuda')}"
    return "" if torch.cuda.is_available() else "skipped: this process has no torch with a GPU"


def _time(session: attnd.Session | attnd.CudaSession, num_reqs: int, case: Case, finding: Finding) -> float:
    if isinstance(session, attnd.CudaSession):
        return _time_steps(session, num_reqs, case, finding)
    q, k, v = case.call(num_reqs)
    expected = case.expected(num_reqs)
    call_us = []
    for _ in range(NUM_STEPS):
        step = session.step(case.metadata(num_reqs))
        output = step.attend(0, q, k, v)  # the step's first call waits for its planning
        _compare(output, expected, num_reqs, finding)
        for _ in range(NUM_CALLS):
            started = time.perf_counter()
            step.attend(0, q, k, v)
            call_us.append((time.perf_counter() - started) * 1e6)
    return statistics.median(call_us)


def _time_steps(session: attnd.CudaSession, num_reqs: int, case: Case, finding: Finding) -> float:
    """The same on a cuda plane, where each call is a step of its own, its message and its answer included."""
    import torch

    from attnd.protocol.tensors import to_array, torch_tensor

    q, k, v = (torch_tensor(array).cuda() for array in case.call(num_reqs))
    expected = case.expected(num_reqs)
    call_us = []
    for _ in range(NUM_STEPS + NUM_CALLS):
        started = time.perf_counter()
        step = session.step(case.metadata(num_reqs), num_heads=NUM_HEADS)
        output = step.attend(0, q, k, v)
        step.finish()
        call_us.append((time.perf_counter() - started) * 1e6)
        assert isinstance(output, torch.Tensor)
        _compare(to_array(output.cpu(), "output"), expected, num_reqs, finding)
    if session.takes_turns:
        finding.hint = TURNS
    return statistics.median(call_us)


def _compare(output: attnd.Array, expected: Sequence[float], num_reqs: int, finding: Finding) -> None:
    error = error_of(output, expected)
    if not error < MAX_ERROR:  # NaN too
        finding.fault = f"{num_reqs} requests: off by {error:.1e}, but at most {MAX_ERROR:g} is right"
