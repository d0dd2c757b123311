"""What a caller of `benchmarks.callers` does once it is ready: it runs steps for as long as it is told."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable


def run_as_told(run_step: Callable[[list[float]], object], rest: Callable[[], None] = lambda: None) -> None:
    """Says `ready`. Then each line of the input is a number of seconds, and is answered by a line of JSON.

    Whole steps are run for at least as long, and at least one. One more comes first: it opens what `rest` has closed.

    Args:
        run_step: runs a step, and adds the microseconds of each of its calls.
        rest: called after the steps of each line.
    """
    print("ready", flush=True)
    for line in sys.stdin:
        run_step([])
        call_us: list[float] = []
        num_steps, started = 0, time.perf_counter()
        while not num_steps or time.perf_counter() - started < float(line):
            run_step(call_us)
            num_steps += 1
        seconds = time.perf_counter() - started
        rest()
        p50_us, p99_us = statistics.median(call_us), statistics.quantiles(call_us, n=100)[98]
        print(json.dumps({"steps": num_steps, "seconds": seconds, "p50_us": p50_us, "p99_us": p99_us}), flush=True)
