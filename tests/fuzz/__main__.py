"""`python -m tests.fuzz --requests 1000000`: generated requests against the servicer, with every byte of KV watched.

Each request is valid, almost valid or wild, and goes through the server's own handlers, as on a stream, on a shm plane
or alone. After each RPC all pages of all caches, another principal's among them, are compared with what they must hold.
It ends with exit code 1 at the first answer INTERNAL, the first byte that nobody should have changed, and the first
message that the hand-framed decoder and protobuf read differently. Then atheris fuzzes that decoder, if it is there.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tests.fuzz.attack import Attack, attack
from tests.fuzz.world import World

console = Console(stderr=True)


def main(
    requests: Annotated[int, typer.Option(min=1, help="Requests to send.")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="The same gives the same requests; -1 takes another each time.")] = -1,
    decoder_seconds: Annotated[int, typer.Option(min=0, help="How long atheris then fuzzes the decoder.")] = 60,
    out: Annotated[Path | None, typer.Option(help="File for the result, JSON; it is printed as well.")] = None,
) -> None:
    """Attacks the server's borders with generated requests."""
    seed = seed if seed >= 0 else random.SystemRandom().getrandbits(32)
    console.print(f"seed {seed}")
    result = {"seed": seed, "requests": 0, **_attack(requests, seed)}
    result["decoder"] = _fuzz_decoder(decoder_seconds)
    text = json.dumps(result, indent=2)
    print(text)
    if out is not None:
        out.write_text(text + "\n")
    raise typer.Exit(0 if result["passed"] and result["decoder"] != "failed" else 1)


def _attack(num_requests: int, seed: int) -> dict[str, Any]:
    started = time.perf_counter()
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    passed = True
    with (
        World() as world,
        Attack(world, random.Random(seed)) as attack_,
        Progress(*columns, console=console) as progress,
    ):
        task = progress.add_task("", total=num_requests)
        try:
            asyncio.run(attack(attack_, num_requests, lambda done: progress.update(task, completed=done)))
        except Exception:
            passed = False
            traceback.print_exc()
    outcomes: Counter[str] = Counter()
    for (_, outcome), count in attack_.outcomes.items():
        outcomes["done" if outcome == "done" else "refused"] += count
    return {
        "passed": passed,
        "requests": attack_.num_requests,
        **outcomes,
        "internal": len(world.faults),
        "seconds": round(time.perf_counter() - started, 1),
        "outcomes": {f"{method} {outcome}": count for (method, outcome), count in sorted(attack_.outcomes.items())},
    }


def _fuzz_decoder(seconds: int) -> str:
    if not seconds:
        return "left out"
    if importlib.util.find_spec("atheris") is None:
        console.print("atheris is not installed (pip install atheris), so the decoder is not fuzzed with coverage")
        return "left out: no atheris"
    with tempfile.TemporaryDirectory(prefix="attnd-fuzz-") as folder:
        command = [sys.executable, "-m", "tests.fuzz.decoder_target", folder]
        command += [f"-artifact_prefix={folder}/", f"-max_total_time={seconds}", "-max_len=400"]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
    if done.returncode:
        console.print(done.stderr[-3000:])
        return "failed"
    return last


if __name__ == "__main__":
    typer.run(main)
