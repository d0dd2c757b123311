"""What one tenant's attacks cost another tenant: its calls with and without them, and the server's memory meanwhile.

The victim runs decode steps on one server. Attackers, processes of another principal and of nobody, do the worst they
can: to the victim's server ("own"), or to a second one beside it ("other"), which shows what they cost by the cores
alone. Rounds of these kinds and of quiet take turns.

`python -m benchmarks.under_attack --help`. The outputs of the victim are compared with float64 before and after each
attack; the first wrong one ends the benchmark.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console

import attnd
from attnd_server.identity.tokens import add_token
from benchmarks import report
from benchmarks.attackers import ATTACKS
from benchmarks.servers import START_TIMEOUT_S, Child, started
from benchmarks.way import Way
from benchmarks.way_timing import Samples
from benchmarks.ways import plane_way, warm_up
from benchmarks.workload import LLAMA_8B, DecodeStep

QUIET, OWN, OTHER = "quiet", "own", "other"
# Time that attackers have to reach full force before the victim's calls count.
RAMP_S = 2.0
# Time in which all attackers together have used each kernel once, so that a GPU's are compiled before anything counts.
COMPILE_S = 20.0
COLUMNS = {
    "attack": "attack",
    "plane": "plane",
    "quiet_p99_us": "p99 quiet",
    "other_p99_us": "p99 other",
    "own_p99_us": "p99 own",
    "ratio": "own/quiet",
    "control_ratio": "own/other",
    "own_p50_us": "p50 own",
    "memory_mib": "MiB",
    "limit_us": "limit",
    "holds": "holds",
}
CAPTION = """Times in us. quiet: nobody attacks; other: a second server is attacked; own: the victim's server is.
MiB: most resident memory of the victim's server beyond that at rest. limit: 2 x p99 of quiet (or of other, where it is
more) and one launch."""
ALL_CORES = os.sched_getaffinity(0)


@contextmanager
def on_cores(cores: Sequence[int] | None) -> Iterator[None]:
    """What starts in this block stays on these cores; None: on any that this process had."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores or ALL_CORES)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Server:
    """A server process with tokens."""

    def __init__(self, stack: ExitStack, folder: Path, options: Sequence[str], cores: Sequence[int] | None) -> None:
        """Starts it; `stack` ends it."""
        folder.mkdir()
        tokens = str(folder / "tokens")
        self.tokens = {name: add_token(tokens, name) for name in ("victim", "attacker")}
        command = ["serve", "--port", "0", "--tokens", tokens, "--socket-dir", str(folder / "sockets"), *options]
        with on_cores(cores):
            child = stack.enter_context(started("attnd_server", *command))
        self.address = child.address()
        self.process = psutil.Process(child.pid)

    @property
    def resident_bytes(self) -> int:
        """Of its memory."""
        return int(self.process.memory_info().rss)


class MemoryWatch:
    """The most resident memory of a server within a block, looked at every 20 ms."""

    def __init__(self, server: Server) -> None:
        """Watches nothing yet."""
        self._server = server
        self._done = threading.Event()
        self.most_bytes = 0

    def __enter__(self) -> MemoryWatch:
        """Begins."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends."""
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(0.02):
            self.most_bytes = max(self.most_bytes, self._server.resident_bytes)


class Victim:
    """Sessions of one principal, one on each plane, with the same step."""

    def __init__(
        self, stack: ExitStack, server: Server, step: DecodeStep, planes: Sequence[str], device: torch.device
    ) -> None:
        """Opens them and stores their context."""
        credentials = attnd.Credentials(server.tokens["victim"], tls=False)
        client = stack.enter_context(attnd.connect(server.address, credentials=credentials, timeout_s=60))
        self.step = step
        self._cache = stack.enter_context(client.create_cache(**step.geometry))
        step.fill(self._cache)
        warm_up(step, self._cache, device)
        self.ways: dict[str, Way] = {}
        for plane in planes:
            session = stack.enter_context(self._cache.session(plane=plane))
            self.ways[plane] = plane_way(plane, step, session, device)

    def check(self) -> None:
        """Raises WrongResult unless every plane gives what it must."""
        for plane, way in self.ways.items():
            self.step.check(plane, self._cache, way.open())
            if way.finish is not None:
                way.finish()

    def run(self, plane: str, seconds: float) -> list[float]:
        """Microseconds of each call of some seconds of steps."""
        samples, end = Samples(), time.perf_counter() + seconds
        while time.perf_counter() < end:
            samples.add_step(self.ways[plane], len(self.step.layers))
        return samples.call_us


@contextmanager
def attacked(
    server: Server, attacks: Sequence[str], cores: Sequence[int] | None, told: dict[str, Any]
) -> Iterator[None]:
    """Attackers at work; what came of it goes to `told`."""
    with ExitStack() as stack:
        children: list[tuple[str, Child]] = []
        with on_cores(cores):
            for attack in attacks:
                command = (server.address, attack, "--token", server.tokens["attacker"])
                children.append((attack, stack.enter_context(started("benchmarks.attackers", *command))))
        for _, child in children:
            child.read(rb"^ready", START_TIMEOUT_S)
        time.sleep(RAMP_S)
        yield
        for attack, child in children:
            child.terminate()
            told[attack] = json.loads(child.read(rb"^\{", START_TIMEOUT_S).string)


def p99(values: Sequence[float]) -> float:
    """The 99th percentile."""
    return statistics.quantiles(values, n=100)[98]


def benchmark(console: Console, options: argparse.Namespace) -> None:
    """Runs every attack in turn, then all of them together."""
    device = torch.device(options.device)
    torch.set_num_threads(max(1, options.threads))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    step = DecodeStep(1, options.context, dtype, LLAMA_8B, device, 32 << 20)
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="attnd-")))
        common = ["--device", options.device, "--threads", str(options.threads), "--kv-bytes", options.kv_bytes]
        own = Server(stack, folder / OWN, common, options.server_cores)
        other = Server(stack, folder / OTHER, common, options.attacker_cores) if options.control else None
        stack.enter_context(on_cores(options.victim_cores))
        victim = Victim(stack, own, step, options.planes, device)
        victim.check()
        at_rest = own.resident_bytes
        if device.type == "cuda":
            for server in filter(None, (own, other)):
                with attacked(server, options.attacks, options.attacker_cores, {}):
                    time.sleep(COMPILE_S)
        single = [] if options.together else [(attack, [attack]) for attack in options.attacks]
        for name, attacks in (*single, ("all", list(options.attacks))):
            new = attack_rows(console, name, attacks, victim, own, other, at_rest, options)
            console.print(*new)  # what was measured is not lost if the run is ended
            rows += new
            victim.check()
    console.print(report.table("Calls of one tenant while another attacks", CAPTION, rows, COLUMNS))
    report.write_json(options.out / "under_attack.json", "under_attack", {"context": options.context}, rows)
    bars = {
        plane: [
            report.Bar(row["attack"], row["own_p99_us"], {"quiet": row["quiet_p99_us"]})
            for row in rows
            if row["plane"] == plane
        ]
        for plane in options.planes
    }
    report.plot(options.out / "under_attack.png", "p99 of a tenant's calls under another's attacks", "us", bars)


def attack_rows(
    console: Console,
    name: str,
    attacks: Sequence[str],
    victim: Victim,
    own: Server,
    other: Server | None,
    at_rest: int,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """A row for each plane."""
    calls: dict[tuple[str, str], list[float]] = defaultdict(list)
    told: dict[str, Any] = {}
    most_bytes = 0
    targets = {QUIET: None, **({OTHER: other} if other is not None else {}), OWN: own}
    for _, (kind, target) in itertools.product(range(options.rounds), targets.items()):
        with ExitStack() as stack:
            watch = stack.enter_context(MemoryWatch(own))
            if target is not None:
                stack.enter_context(attacked(target, attacks, options.attacker_cores, told if kind == OWN else {}))
            for plane in options.planes:
                calls[kind, plane] += victim.run(plane, options.seconds)
        if kind == OWN:
            most_bytes = max(most_bytes, watch.most_bytes)
    console.print(f"{name}: {told}")
    return [row(name, plane, calls, most_bytes - at_rest, options.launch_us) for plane in options.planes]


def row(
    attack: str, plane: str, calls: Mapping[tuple[str, str], Sequence[float]], num_bytes: int, launch_us: float
) -> dict[str, Any]:
    """What an attack costs the calls of one plane.

    Args:
        attack: its name.
        plane: of the calls.
        calls: microseconds by kind and plane; `other` may have none.
        num_bytes: of the server's memory beyond that at rest.
        launch_us: longest launch that a server takes from anybody.
    """
    tails = {kind: p99(calls[kind, plane]) for kind in (QUIET, OTHER, OWN) if calls.get((kind, plane))}
    base = max(tails[QUIET], tails.get(OTHER, 0.0))
    limit = 2 * base + launch_us
    return {
        "attack": attack,
        "plane": plane,
        **{f"{kind}_p99_us": tail for kind, tail in tails.items()},
        "ratio": tails[OWN] / tails[QUIET],
        "control_ratio": tails[OWN] / tails[OTHER] if OTHER in tails else None,
        "own_p50_us": statistics.median(calls[OWN, plane]),
        "memory_mib": num_bytes / 2**20,
        "limit_us": limit,
        "holds": "yes" if tails[OWN] <= limit else "no",
    }


def cores(text: str) -> list[int]:
    """Cores as taskset has them: 0-3,6."""
    parts = [part.partition("-") for part in text.split(",")]
    return [core for low, _, high in parts for core in range(int(low), int(high or low) + 1)]


def main() -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.under_attack", description=__doc__)
    parser.add_argument("--device", default="cpu", help="on a GPU the attackers' kernels are compiled first")
    parser.add_argument("--context", type=int, default=512, help="tokens of context of the victim; default: 512")
    parser.add_argument("--threads", type=int, default=1, help="of a call on a processor; default: 1")
    parser.add_argument("--kv-bytes", default="256MiB", help="of each server; default: 256MiB")
    parser.add_argument("--planes", nargs="+", default=["inline", "shm"])
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=ATTACKS)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a plane in a round; default: 3")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--launch-us", type=float, default=0.0, help="longest launch that the server takes from anybody"
    )
    parser.add_argument("--together", action="store_true", help="all attacks at once, and none by itself")
    parser.add_argument("--no-control", dest="control", action="store_false", help="no second server beside it")
    for who in ("server", "victim", "attacker"):
        parser.add_argument(f"--{who}-cores", type=cores, help="as taskset has them; default: any")
    parser.add_argument("--out", type=Path, default=report.ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    return report.exit_code(lambda console: benchmark(console, options))


if __name__ == "__main__":
    sys.exit(main())
