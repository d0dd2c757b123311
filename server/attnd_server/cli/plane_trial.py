"""One plane, tried by `attnd doctor`: what a few random calls give, and how long they take."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

import torch

import attnd
from attnd.errors import AttndError

# Requests of a call, each with one new token after so many.
NUM_REQS, CONTEXT_LEN = (1, 16), 64
# Heads of an 8B model.
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
PAGE_SIZE = 16
PAGES_PER_REQUEST = -(-(CONTEXT_LEN + 1) // PAGE_SIZE)
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


class Case:
    """Random requests, each on pages of its own in random order."""

    def __init__(self) -> None:
        """Draws them."""
        most = max(NUM_REQS)
        self.num_pages = most * PAGES_PER_REQUEST
        self.page_tables = torch.randperm(self.num_pages, dtype=torch.int32).view(most, PAGES_PER_REQUEST)
        self.k_pages, self.v_pages = torch.randn(2, self.num_pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
        self.q = torch.randn(most, NUM_HEADS, HEAD_DIM)
        self.k, self.v = torch.randn(2, most, NUM_KV_HEADS, HEAD_DIM)

    def slots(self) -> torch.Tensor:
        """Int64, those of all pages, in order."""
        return torch.arange(self.num_pages * PAGE_SIZE)

    def metadata(self, num_reqs: int) -> attnd.StepMetadata:
        """A decode step of the first requests."""
        new_page, offset = divmod(CONTEXT_LEN, PAGE_SIZE)
        tables = self.page_tables[:num_reqs]
        slots = tables[:, new_page].long() * PAGE_SIZE + offset
        return attnd.StepMetadata([1] * num_reqs, [CONTEXT_LEN] * num_reqs, tables, slots, kind="decode")

    def expected(self, num_reqs: int) -> torch.Tensor:
        """Float64 `[num_reqs, NUM_HEADS, HEAD_DIM]`."""
        tables = self.page_tables[:num_reqs].long()
        k, v = (
            torch.cat([pages[tables].flatten(1, 2)[:, :CONTEXT_LEN], new[:num_reqs, None]], 1).double()
            for pages, new in ((self.k_pages, self.k), (self.v_pages, self.v))
        )
        q = self.q[:num_reqs].double().unflatten(1, (NUM_KV_HEADS, -1))
        scores = torch.einsum("rhgd,rkhd->rhgk", q, k) * HEAD_DIM**-0.5
        return torch.einsum("rhgk,rkhd->rhgd", scores.softmax(-1), v).flatten(1, 2)


def try_plane(cache: attnd.Cache, plane: str, case: Case) -> Finding:
    """Opens a session of `cache` on a plane, and compares and times calls of each size."""
    finding = Finding()
    try:
        with cache.session(plane=plane) as session:
            for num_reqs in NUM_REQS:
                finding.call_us[num_reqs] = _time(session, num_reqs, case, finding)
    except AttndError as error:
        finding.reason = str(error)
    return finding


def _time(session: attnd.Session | attnd.CudaSession, num_reqs: int, case: Case, finding: Finding) -> float:
    if isinstance(session, attnd.CudaSession):
        return _time_steps(session, num_reqs, case, finding)
    q, k, v = (tensor[:num_reqs].contiguous() for tensor in (case.q, case.k, case.v))
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
    if not torch.cuda.is_available():
        raise attnd.Unsupported("plane is cuda, but this process has no torch with a GPU", field="plane")
    q, k, v = (tensor[:num_reqs].cuda() for tensor in (case.q, case.k, case.v))
    expected = case.expected(num_reqs)
    call_us = []
    for _ in range(NUM_STEPS + NUM_CALLS):
        started = time.perf_counter()
        step = session.step(case.metadata(num_reqs), num_heads=NUM_HEADS)
        output = step.attend(0, q, k, v)
        step.finish()
        call_us.append((time.perf_counter() - started) * 1e6)
        _compare(output.cpu(), expected, num_reqs, finding)
    if session.takes_turns:
        finding.hint = TURNS
    return statistics.median(call_us)


def _compare(output: torch.Tensor, expected: torch.Tensor, num_reqs: int, finding: Finding) -> None:
    error = ((output - expected).norm() / expected.norm()).item()
    if not error < MAX_ERROR:  # NaN too
        finding.fault = f"{num_reqs} requests: off by {error:.1e}, but at most {MAX_ERROR:g} is right"
