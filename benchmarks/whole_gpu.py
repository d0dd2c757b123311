"""Which calls of CUDA wait for the whole GPU: each is made while a stream of the process waits there, and without.

`python -m benchmarks.whole_gpu --help`; README.md beside this file says how to read the result.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Before CUDA starts, as `attnd serve` has it.
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

import torch
from rich.console import Console

from benchmarks import report

# Seconds after which a call counts as one that waits: if it is known to, and if it is not.
HOLD_S, PATIENCE_S = 0.2, 1.0
# Seconds after that until the wait ends, whatever the thread does that should have ended it.
LET_GO_S = 3.0
# Seconds after that until the process ends, and says what each thread was at: a call that waits with Python's lock lets
# no thread open the gate. A server that made it would not answer either, and waits for its worker as long.
GIVE_UP_S = 20.0
COLUMNS = {
    "call": "call",
    "none_ms": "no wait",
    "words_ms": "stream waits",
    "spinning_ms": "kernel spins",
    "waits": "waits",
    "is_known": "as known",
}
CAPTION = f"""Times in ms. waits: it returned only once the wait was over, which it is after {HOLD_S * 1e3:g} ms if that
is expected, and else after {PATIENCE_S * 1e3:g} ms."""


class Outcome(NamedTuple):
    """What became of a call.

    Attributes:
        returned: whether it did while the gate held.
        seconds: that it took.
        error: that it raised; "": none.
    """

    returned: bool
    seconds: float
    error: str


def outcome(gate: Any, work: Callable[[], object], patience_s: float) -> Outcome:
    """Makes a call on a thread of its own, while a gate holds for so long at the most."""
    from attnd.protocol.cuda.driver import device
    from attnd_server.device.quiet import quiet_gpu

    is_over, error, seconds = threading.Event(), "", 0.0

    def run() -> None:
        nonlocal error, seconds
        torch.cuda.set_device(0)
        device(0).make_current()
        began = time.perf_counter()
        try:
            work()
        except Exception as failure:
            error = repr(failure)
        seconds = time.perf_counter() - began
        is_over.set()

    torch.cuda.synchronize()
    faulthandler.dump_traceback_later(patience_s + LET_GO_S + GIVE_UP_S, exit=True)
    with quiet_gpu(torch.device("cuda", 0)).waits():
        gate.hold()
        let_go = threading.Timer(patience_s + LET_GO_S, gate.open)
        let_go.start()
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        # Nothing is asked of CUDA while a call may be waiting: it would wait, too, and nobody would open the gate.
        returned = is_over.wait(patience_s) and (gate.is_holding() or gate.kind == "none")
        gate.release()
        thread.join()
        let_go.cancel()
    faulthandler.cancel_dump_traceback_later()
    return Outcome(returned, seconds, error)


def measured(each: Any, gates: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a call, a `GpuCall`, which is made once with each gate."""
    from benchmarks.gpu_calls import KINDS

    patience_s = HOLD_S if each.waits else PATIENCE_S
    outcomes = {kind: outcome(gate, each.prepare(), patience_s) for kind, gate in gates.items()}
    waits = {kind: not outcomes[kind].returned for kind in KINDS}
    return {
        "call": each.name,
        **{f"{kind}_ms": found.seconds * 1e3 for kind, found in outcomes.items()},
        "waits": "yes" if all(waits.values()) else ", ".join(kind for kind in KINDS if waits[kind]),
        "is_known": "yes" if set(waits.values()) == {each.waits} else "NO",
        "errors": [found.error for found in outcomes.values() if found.error],
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.whole_gpu", description=description)
    results = report.ROOT / "benchmarks" / "results"
    parser.add_argument("--out", type=Path, default=results, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--only", default="", metavar="TEXT", help="calls whose name has this text; default: all")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, console: Console) -> None:
    """Makes all calls, prints and writes."""
    if not torch.cuda.is_available():
        raise report.WrongResult("there is no GPU here")
    torch.cuda.set_device(0)

    from benchmarks.gpu_calls import KINDS, NONE, Gate, gpu_calls

    gates = {kind: Gate(kind) for kind in (*KINDS, NONE)}
    calls = [each for each in gpu_calls() if options.only in each.name]
    if not calls:
        raise report.WrongResult(f"no call has {options.only!r} in its name")
    rows = []
    for each in calls:
        console.print(each.name, end=": ", highlight=False)  # before, in case it never returns
        row = measured(each, gates)
        times = ", ".join(f"{kind} {row[f'{kind}_ms']:.2f} ms" for kind in (NONE, *KINDS))
        console.print(f"{times}; waits: {row['waits'] or 'no'}; as known: {row['is_known']}", highlight=False)
        rows.append(row)
    console.print(report.table("What waits for the whole GPU", CAPTION, rows, COLUMNS))
    path = options.out / "whole-gpu.json"
    report.write_json(path, "whole_gpu", {"hold_s": HOLD_S, "patience_s": PATIENCE_S}, rows)
    console.print(f"written: {path}", soft_wrap=True)
    for row in rows:
        for error in row["errors"]:
            raise report.WrongResult(f"{row['call']}: {error}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    return report.exit_code(lambda console: run(parse(arguments), console))


if __name__ == "__main__":
    sys.exit(main())
