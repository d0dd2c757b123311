"""`attnd doctor`: opens every plane from this process to a server, compares what comes back, and times a call."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

import attnd
from attnd._version import __version__
from attnd.errors import AttndError
from attnd.planes.choice import plane_refusals
from attnd_server.cli.plane_case import HEAD_DIM, NUM_KV_HEADS, NUM_REQS, PAGE_SIZE, Case
from attnd_server.cli.plane_trial import Finding, try_plane
from attnd_server.cli.texts import bytes_text, shown, told
from attnd_server.device.machine import memory_bytes, num_cores

# The best first. "auto" takes the first that works, after cuda, which is only for who asks for it.
PLANES = ("cuda", "shm", "inline")


@dataclass
class Report:
    """What was found out.

    Attributes:
        version: the server's.
        epoch: the server's.
        device: the server's.
        empty_rpc_us: microseconds of an RPC without tensors.
        findings: by plane, the best first.
    """

    version: str
    epoch: int
    device: str
    empty_rpc_us: float
    findings: dict[str, Finding]

    @property
    def takes(self) -> str:
        """The plane that a session takes by itself; "": none."""
        return next((plane for plane in PLANES[1:] if self.findings[plane].call_us), "")

    def to_json(self, address: str) -> dict[str, Any]:
        """As `--json` has it: see docs/operating.md."""
        return {
            "address": address,
            "version": self.version,
            "epoch": str(self.epoch),  # beyond what other readers of JSON take for whole numbers
            "device": self.device,
            "client": {"version": __version__, "num_cores": num_cores(), "memory_bytes": memory_bytes()},
            "empty_rpc_us": self.empty_rpc_us,
            "planes": {
                plane: {
                    "works": not (each.reason or each.fault),
                    "reason": each.reason,
                    "fault": each.fault,
                    "hint": each.hint,
                    "call_us": {str(num_reqs): us for num_reqs, us in each.call_us.items()},
                }
                for plane, each in self.findings.items()
            },
            "takes": self.takes,
        }


def run_doctor(
    address: str,
    socket_dir: str,
    timeout_s: float,
    console: Console,
    errors: Console,
    credentials: attnd.Credentials | None = None,
    *,
    as_json: bool = False,
) -> int:
    """Examines the way to the server at `address` and prints what it found.

    Args:
        address: of the server.
        socket_dir: the folder of the server's sockets as this process sees it; "": as the server does.
        timeout_s: how long to wait for the server, and for each answer, in seconds.
        console: where findings go.
        errors: where the one line goes if the server does not answer or takes no cache.
        credentials: what to show the server.
        as_json: whether findings are one JSON object and nothing else.

    Returns:
        The exit code: 0; 1 if the server cannot be used; 2 if a plane gave a wrong answer.
    """
    options: dict[str, Any] = {"socket_dir": socket_dir, "credentials": credentials}
    try:
        with attnd.connect(address, timeout_s=timeout_s, connect_timeout_s=timeout_s, **options) as client:
            report = _examine(client, nullcontext if as_json else console.status)
    except AttndError as error:
        told(errors, "doctor", error)
        return 1
    if as_json:
        console.file.write(json.dumps(report.to_json(address)) + "\n")
    else:
        _print(report, console)
    return 2 if any(finding.fault for finding in report.findings.values()) else 0


def _examine(client: attnd.Client, doing: Callable[[str], AbstractContextManager[Any]]) -> Report:
    capabilities = client.capabilities()
    started = time.perf_counter()
    client.capabilities()
    empty_rpc_us = (time.perf_counter() - started) * 1e6
    case = Case()
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
        cache.store_kv(0, *case.stored())
        for plane in PLANES:
            if plane not in findings:
                with doing(f"trying {plane}"):
                    findings[plane] = try_plane(cache, plane, case)
    device = capabilities.devices[0].name if capabilities.devices else ""
    by_plane = {plane: findings[plane] for plane in PLANES}
    return Report(capabilities.version, capabilities.epoch, device, empty_rpc_us, by_plane)


def _print(report: Report, console: Console) -> None:
    def line(text: str, style: str = "") -> None:
        console.print(shown(text), style=style, highlight=False, soft_wrap=True)

    line(f"server: attnd {report.version}, epoch {report.epoch}, on {report.device}")
    line(f"this process: attnd {__version__}, {num_cores()} cores, {bytes_text(memory_bytes())} of memory")
    if report.version != __version__:
        line(f"this is attnd {__version__}: use the same version on both sides", "yellow")
    line(f"an empty RPC: {report.empty_rpc_us:.0f} us")
    console.print(_table(report.findings))
    for plane, finding in report.findings.items():
        if why := finding.fault or finding.reason or finding.hint:
            line(f"{plane}: {why}")
    if report.takes:
        line(f"A session from here takes {report.takes}, unless it asks for another plane.")


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
