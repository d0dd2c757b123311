"""`python -m tests.soak.resident_metadata --blocks 1000000`: hostile metadata of resident steps, GPU beside host.

The kernels that check resident steps take blocks of lengths and page tables, right ones and wrong ones of all kinds.
Their verdict must be that of the host's validation, each time. What is accepted must be the step that the host makes of
it. What is refused must have stored nothing. Nothing outside of the private buffers may have changed. A quarter of the
blocks is rewritten in the worker's memory while it is copied: then the host is asked about the private copy.

Without a GPU Triton interprets the kernels, some blocks a second. Ends with exit code 1 at the first block that
differs, which it prints whole; 130: by Ctrl-C, with what came out until then.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tests import interpreter
from tests.hostile_metadata import CLASSES, NAMES
from tests.soak.resident_metadata.verdicts import Outcome, Plan

console = Console(stderr=True)
# Blocks before a look at what came out, at most. An interpreter takes some seconds for so many.
ON_GPU, INTERPRETED = 512, 4
# Rewritten blocks of which one at least must have been rewritten in time, or the run shows nothing of that.
MANY = 1000


def main(
    blocks: Annotated[
        int, typer.Option(min=0, help="How many, at least: batches are whole; 0: a million, or 40 without a GPU.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="The same gives the same blocks; -1 takes another each time.")] = -1,
    processes: Annotated[
        int, typer.Option(min=-1, help="That ask the host's rule; 0: this one, -1: a core each but one.")
    ] = -1,
    launches_per_read: Annotated[
        int,
        typer.Option(min=0, help=f"Most blocks before a look; 0: {ON_GPU}, or {INTERPRETED} without a GPU."),
    ] = 0,
    device: Annotated[str, typer.Option(help="torch's name; without a GPU it is cpu.")] = "cuda:0",
    out: Annotated[Path | None, typer.Option("--json", help="File for the result; it is printed as well.")] = None,
) -> None:
    """Takes hostile metadata of resident steps on the GPU, and compares with the host."""
    seed = seed if seed >= 0 else random.SystemRandom().getrandbits(32)
    if torch.cuda.is_available():
        torch.cuda.set_device(device)
    else:
        device = "cpu"
    blocks = blocks or (40 if device == "cpu" else 1_000_000)
    most = launches_per_read or (INTERPRETED if device == "cpu" else ON_GPU)
    plan = Plan(seed, max(1, min(most, blocks // (2 * len(CLASSES)))))  # each class, as it is and rewritten
    num_batches = -(-blocks // plan.num_blocks)
    if processes < 0:
        processes = max(1, len(os.sched_getaffinity(0)) - 1)
    console.print(f"seed {seed}, {num_batches} batches of {plan.num_blocks} blocks on {device}, {processes} processes")
    began, outcome = time.perf_counter(), Outcome()
    ended = _soak(plan, num_batches, device, processes, outcome)
    result = {"seed": seed, "device": device, "processes": processes} | _summary(plan, outcome)
    result |= {"ended": ended, "seconds": round(time.perf_counter() - began, 1)}
    for name, value in (outcome.disagreement or {}).items():
        console.print(f"{name}: {json.dumps(value)}", markup=False, highlight=False, soft_wrap=True)
    print(json.dumps(result, indent=2))
    if out is not None:
        out.write_text(json.dumps(result | {"disagreement": outcome.disagreement}, indent=2) + "\n")
    raise typer.Exit(130 if ended == "by Ctrl-C" else int(ended != "well"))


def _soak(plan: Plan, num_batches: int, device: str, processes: int, outcome: Outcome) -> str:
    """Runs it, and says how it ended. `outcome` has what came out until then."""
    columns = (TextColumn("blocks"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with interpreter.interpreter(), Progress(*columns, console=console) as progress:
        from tests.soak.resident_metadata.soak import Here, Processes, soak

        task = progress.add_task("", total=num_batches * plan.num_blocks)

        def told() -> None:
            progress.update(task, completed=outcome.verdicts.total())

        try:
            with Processes(processes) if processes else Here() as pool:
                soak(plan, num_batches, device, pool, outcome, told)
        except KeyboardInterrupt:
            return "by Ctrl-C"
    if outcome.disagreement:
        return "at a block that differs"
    if outcome.num_rewritten >= MANY and not outcome.num_mixed:
        return "without a block that was rewritten while it was copied"
    return "well"


def _summary(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """What was counted."""
    verdicts, total = outcome.verdicts, outcome.verdicts.total()
    return {
        "blocks_of_a_batch": plan.num_blocks,
        "blocks": total,
        **{verdict: sum(verdicts[name, verdict] for name in NAMES) for verdict in ("accepted", "refused")},
        "rewritten": outcome.num_rewritten,
        "mixed": outcome.num_mixed,
        "host_us_per_block": round(outcome.host_s / max(1, total) * 1e6, 1),
        "ways": {name: {verdict: verdicts[name, verdict] for verdict in ("accepted", "refused")} for name in NAMES},
    }


if __name__ == "__main__":
    typer.run(main)
