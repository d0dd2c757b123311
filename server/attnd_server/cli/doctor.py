"""`attnd doctor`: opens every plane from this process to a server, compares what comes back, and times a call."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import attnd
from attnd._version import __version__
from attnd.errors import AttndError
from attnd.planes.choice import plane_refusals
from attnd_server.cli.plane_trial import HEAD_DIM, NUM_KV_HEADS, NUM_REQS, PAGE_SIZE, Case, Finding, try_plane

# The best first. "auto" takes the first that works, after cuda, which is only for who asks for it.
PLANES = ("cuda", "shm", "inline")


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
        cache.store_kv(0, case.slots(), case.k_pages.flatten(0, 1), case.v_pages.flatten(0, 1))
        for plane in PLANES:
            if plane not in findings:
                with console.status(f"trying {plane}"):
                    findings[plane] = try_plane(cache, plane, case)
    return {plane: findings[plane] for plane in PLANES}


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
