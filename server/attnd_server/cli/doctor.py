"""`attnd doctor`: opens every plane from this process to a server, compares what comes back, and times a call."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import attnd
from attnd._version import __version__
from attnd.errors import AttndError
from attnd.planes.choice import plane_refusals

# The best first. "auto" takes the first that works, after cuda, which is only for who asks for it.
PLANES = ("cuda", "shm", "inline")
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


def run_doctor(
    address: str,
    socket_dir: str,
    timeout_s: float,
    console: Console,
    errors: Console,
    credentials: attnd.Credentials | None = None,
) -> int:
    """Examines the way to the server at `address` and prints what it found.

    Args:
        address: "host:port".
        socket_dir: the folder of the server's sockets as this process sees it; "": as the server does.
        timeout_s: how long to wait for the server, and for each answer, in seconds.
        console: where findings go.
        errors: where the one line goes if the server does not answer or takes no cache.
        credentials: what to show the server.

    Returns:
        The exit code: 0; 1 if the server cannot be used; 2 if a plane gave a wrong answer.
    """
    try:
        with attnd.connect(
            address,
            timeout_s=timeout_s,
            connect_timeout_s=timeout_s,
            socket_dir=socket_dir,
            credentials=credentials,
        ) as client:
            findings = _examine(client, console)
    except AttndError as error:
        # gRPC's details may come on several lines.
        errors.print(f"attnd doctor: {escape(' '.join(str(error).split()))}", style="red", soft_wrap=True)
        return 1
    console.print(_table(findings))
    for plane, finding in findings.items():
        if why := finding.fault or finding.reason or finding.hint:
            console.print(f"[bold]{plane}[/]: {escape(why)}", highlight=False, soft_wrap=True)
    best = next((plane for plane in PLANES[1:] if findings[plane].call_us), None)
    if best:
        console.print(f"A session from here takes [bold]{best}[/], unless it asks for another plane.")
    return 2 if any(finding.fault for finding in findings.values()) else 0


def _examine(client: attnd.Client, console: Console) -> dict[str, Finding]:
    capabilities = client.capabilities()
    version, device = capabilities.version, capabilities.devices[0]
    console.print(
        f"server: attnd {escape(version)}, epoch {capabilities.epoch}, on {escape(device.name)}", highlight=False
    )
    if capabilities.version != __version__:
        console.print(f"[yellow]this is attnd {__version__}: use the same version on both sides[/]", highlight=False)
    started = time.perf_counter()
    client.capabilities()
    console.print(f"an empty RPC: {(time.perf_counter() - started) * 1e6:.0f} us", highlight=False)

    case = _Case()
    findings = {plane: Finding(reason) for plane, reason in plane_refusals(capabilities).items()}
    with client.create_cache(
        num_layers=1,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        num_pages=case.num_pages,
        page_size=PAGE_SIZE,
        dtype="float32",
        name="attnd doctor",
    ) as cache:
        cache.store_kv(0, case.slots(), case.k_pages.flatten(0, 1), case.v_pages.flatten(0, 1))
        for plane in PLANES:
            if plane not in findings:
                with console.status(f"trying {plane}"):
                    findings[plane] = _try(cache, plane, case)
    return {plane: findings[plane] for plane in PLANES}


class _Case:
    """Random requests, each on pages of its own in random order."""

    def __init__(self) -> None:
        most = max(NUM_REQS)
        self.num_pages = most * PAGES_PER_REQUEST
        self.page_tables = torch.randperm(self.num_pages, dtype=torch.int32).view(most, PAGES_PER_REQUEST)
        self.k_pages, self.v_pages = torch.randn(2, self.num_pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
        self.q = torch.randn(most, NUM_HEADS, HEAD_DIM)
        self.k, self.v = torch.randn(2, most, NUM_KV_HEADS, HEAD_DIM)

    def slots(self) -> torch.Tensor:
        return torch.arange(self.num_pages * PAGE_SIZE)

    def metadata(self, num_reqs: int) -> attnd.StepMetadata:
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


def _try(cache: attnd.Cache, plane: str, case: _Case) -> Finding:
    finding = Finding()
    try:
        with cache.session(plane=plane) as session:
            for num_reqs in NUM_REQS:
                finding.call_us[num_reqs] = _time(session, num_reqs, case, finding)
    except AttndError as error:
        finding.reason = str(error)
    return finding


def _time(session: attnd.Session | attnd.CudaSession, num_reqs: int, case: _Case, finding: Finding) -> float:
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


def _time_steps(session: attnd.CudaSession, num_reqs: int, case: _Case, finding: Finding) -> float:
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


def _table(findings: dict[str, Finding]) -> Table:
    table = Table(show_header=True, box=None, pad_edge=False)
    table.add_column("plane")
    table.add_column("works")
    for num_reqs in NUM_REQS:
        table.add_column(f"{num_reqs} tokens" if num_reqs > 1 else "1 token", justify="right")
    for plane, finding in findings.items():
        works = "[red]wrong[/]" if finding.fault else "[green]yes[/]" if not finding.reason else "[yellow]no[/]"
        times = [f"{finding.call_us[n]:.0f} us" if n in finding.call_us else "" for n in NUM_REQS]
        table.add_row(plane, works, *times)
    return table
