"""`python -m tests.soak --minutes 10 --kills 200`: steady load, random kills, and everything checked.

Several client processes, every other one on shared memory, call a server process without end. Clients and server are
killed (SIGKILL, SIGTERM) and stopped (SIGSTOP) at random; who was killed is started again. Now and then another
principal attacks the server for a moment, in one of the ways of `benchmarks.attackers`. Each client compares every
answer with attention in float64 and reads back, bit for bit, what the server said was stored. In the last two fifths of
the time the server is not killed: what it then still holds when all its clients have gone is a leak.

Prints a row of the table in docs/security-runs.md, and the result as JSON; ends with exit code 1 if anything was wrong.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tests.soak.resources import lowest, slope_per_minute
from tests.soak.result import KILLS, Result
from tests.soak.supervisor import Soak

# Of the time, in which the server dies too.
SERVER_DIES = 0.6
# Descriptors and threads that gRPC may have more of from one moment to the next.
MARGIN = 4
# Growth of the resident memory that is none, in MiB a minute: what a fit through a few minutes cannot tell from noise.
FLAT_MIB_PER_MINUTE = 1.0
# Of a stretch of so many seconds the lowest sample counts: an attack holds memory for a moment.
STRETCH_S = 20.0

console = Console(stderr=True)


def main(
    minutes: Annotated[float, typer.Option(min=0, help="How long at least.")] = 10.0,
    kills: Annotated[int, typer.Option(min=0, help="How many kills at least; stops do not count.")] = 200,
    clients: Annotated[int, typer.Option(min=1, help="Client processes; every other one uses shared memory.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the order of faults and of all numbers; -1: another each time.")] = -1,
    snapshots: Annotated[
        bool, typer.Option(help="Servers keep their caches over SIGTERM, and clients adopt them.")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="File for the result, JSON; it is printed as well.")] = None,
) -> None:
    """Loads a server while its clients and it are killed, and checks everything that they say."""
    seed = seed if seed >= 0 else random.SystemRandom().getrandbits(32)
    console.print(f"seed {seed}")
    with tempfile.TemporaryDirectory(prefix="attnd-soak-") as folder:
        result = soak(Path(folder), minutes * 60, kills, clients, seed, snapshots)
        clients_log = Path(folder) / "clients.log"
        if clients_log.exists():
            console.print(clients_log.read_text()[-5000:], markup=False)
    summary = {"seed": seed, "clients": clients, **summarise(result)}
    print(json.dumps(summary, indent=2))
    print(row(summary))
    if out is not None:
        out.write_text(json.dumps(summary, indent=2) + "\n")
    raise typer.Exit(bool(summary["wrong"]))


def soak(folder: Path, seconds: float, num_kills: int, num_clients: int, seed: int, snapshots: bool) -> Result:
    """Runs it. Faults that kill the server come in the first part of the time only."""
    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"), TimeElapsedColumn())
    bar = Progress(*columns, console=console)
    with Soak(folder, num_clients, seed, snapshots) as running, bar as progress:
        result = running.result
        task = progress.add_task("soak", total=max(1.0, seconds), told="")

        def told() -> None:
            told = f"{result.num_kills} kills, {result.num_attacks} attacks, {result.faults.total()} faults"
            progress.update(task, completed=time.monotonic() - started, told=told)

        running.run(seconds * SERVER_DIES, int(num_kills * SERVER_DIES), True, told)
        running.renew_server()
        running.run(seconds - (time.monotonic() - started), num_kills, False, told)
        running.finish()
    result.seconds = time.monotonic() - started
    return result


def summarise(result: Result) -> dict[str, Any]:
    """What was counted; `wrong` names everything that must not be."""
    assert result.before is not None
    assert result.after is not None
    before, after = result.before, result.after
    leaked = {
        "descriptors": max(0, after.descriptors - before.descriptors - MARGIN),
        "threads": max(0, after.threads - before.threads - MARGIN),
        "regions": after.regions,
        "sockets": max(0, after.sockets - 1) + result.totals["sockets_left"],
        "caches": result.caches_left,
        "clients' regions": result.totals["leaks"],
    }
    slope = slope_per_minute(lowest(result.rss[len(result.rss) // 3 :], STRETCH_S))
    is_long = len(result.rss) >= 60
    wrong = {
        "wrong answers": result.totals["wrong_answers"],
        "lost completed writes": result.totals["lost_writes"],
        "leaked resources": sum(leaked.values()),
        "resident memory grows": int(is_long and slope > FLAT_MIB_PER_MINUTE),
        "caches lost without a cause": result.totals["caches_lost"],
        "errors that nothing explains": result.totals["unexpected"] + len(result.server_faults),
        "not recovered": result.not_recovered,
        "servers that did not end well": sum(count for code, count in result.exit_codes.items() if code),
    }
    everything = [seconds for each in result.recovery_s.values() for seconds in each]
    return {
        "seconds": round(result.seconds, 1),
        "faults": dict(result.faults),
        "kills": result.num_kills,
        "attacks": result.num_attacks,
        "steps": result.totals["steps"],
        "answers": result.totals["answers"],
        "writes_read_back": result.totals["writes"],
        "reconnects": result.totals["reconnects"],
        "adoptions": result.totals["adoptions"],
        "wrong": {name: count for name, count in wrong.items() if count},
        "wrong_answers": result.totals["wrong_answers"],
        "lost_completed_writes": result.totals["lost_writes"],
        "leaked": leaked,
        "before": asdict(before),
        "after": asdict(after),
        "rss_mib_per_minute": round(slope, 3),
        "recovery_s": {"all": _percentiles(everything)}
        | {name: _percentiles(seconds) for name, seconds in sorted(result.recovery_s.items())},
        "reconnect_s": _percentiles(result.reconnect_s),
        "server_faults": result.server_faults[:5],
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {"p50": round(sum(values), 3), "p99": round(sum(values), 3)}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49], 3), "p99": round(cuts[98], 3)}


def row(summary: dict[str, Any]) -> str:
    """The row of the table in docs/security-runs.md."""
    stops = sum(summary["faults"].values()) - summary["kills"] - summary["attacks"]
    kills = ", ".join(f"{summary['faults'].get(name, 0)} {name}" for name in KILLS)
    recovery, reconnect = summary["recovery_s"]["all"], summary["reconnect_s"]
    cells = [
        f"{summary['seconds'] / 60:.1f} min",
        f"{summary['kills']} kills ({kills}), {stops} stops, {summary['attacks']} attacks",
        f"{summary['answers']:,} answers, {summary['writes_read_back']:,} slots read back",
        summary["wrong_answers"],
        summary["lost_completed_writes"],
        f"{sum(summary['leaked'].values())}; RSS {summary['rss_mib_per_minute']:+.2f} MiB/min",
        f"p50 {recovery['p50']:.2f} s, p99 {recovery['p99']:.2f} s; "
        f"of a server that serves again p99 {reconnect['p99']:.2f} s",
    ]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    typer.run(main)
