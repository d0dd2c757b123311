"""What TLS and tokens add to a decode call: p50 with each of them and both beside the same server without, in one run.

`python -m benchmarks.security --help`; README.md beside this file says how to read the result. Needs `openssl`.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

import attnd
from attnd_server.identity.tokens import add_token
from benchmarks import report
from benchmarks.servers import running
from benchmarks.way import Way
from benchmarks.way_timing import Samples, time_ways
from benchmarks.ways import session_way, unary_way
from benchmarks.workload import LLAMA_8B, NUM_CALLS, DecodeStep

NUM_TOKENS = (1, 16)
COLUMNS = {
    "tokens": "tokens",
    "way": "way",
    "p50_us": "p50",
    "p99_us": "p99",
    "layer_us": f"step/{NUM_CALLS}",
    "ratio": "ratio",
}
CAPTION = f"""Times in us. step/{NUM_CALLS}: a step of {NUM_CALLS} calls with its opening, per call.
ratio: p50 / p50 of the same way of calling the server that has neither TLS nor tokens."""


@contextmanager
def clients(device: str, num_threads: int) -> Iterator[dict[str, attnd.Client]]:
    """A server each without anything, with tokens, with TLS and with both, and a client of it, by what it has."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="attnd-")))
        cert, key, tokens = (str(folder / name) for name in ("cert.pem", "key.pem", "tokens"))
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        command += ["-subj", "/CN=attnd", "-addext", "subjectAltName=IP:127.0.0.1", "-out", cert, "-keyout", key]
        subprocess.run(command, check=True, capture_output=True)
        token = add_token(tokens, "benchmark")
        with_tls, with_tokens = ["--tls-cert", cert, "--tls-key", key], ["--tokens", tokens]
        common = ["--port", "0", "--device", device, "--threads", str(num_threads)]
        servers: dict[str, tuple[list[str], attnd.Credentials | None]] = {
            "plain": ([], None),
            "tokens": (with_tokens, attnd.Credentials(token, tls=False)),
            "TLS": (with_tls, attnd.Credentials(ca=cert)),
            "TLS, tokens": (with_tls + with_tokens, attnd.Credentials(token, ca=cert)),
        }
        yield {
            name: stack.enter_context(
                attnd.connect(
                    stack.enter_context(running("attnd_server", "serve", *common, *options)), credentials=credentials
                )
            )
            for name, (options, credentials) in servers.items()
        }


@contextmanager
def ways(step: DecodeStep, connected: dict[str, attnd.Client]) -> Iterator[list[Way]]:
    """The stream and the unary call of each server, filled; their caches go with the block."""
    with ExitStack() as stack:
        found = []
        for name, client in connected.items():
            cache = stack.enter_context(client.create_cache(**step.geometry))
            session = stack.enter_context(cache.session(plane="inline"))
            step.fill(cache)
            found.append(session_way(f"stream, {name}", step, session, ("stream, plain",)))
            found.append(unary_way(f"unary, {name}", step, cache, client, ("unary, plain",)))
        yield found


def rows(all_ways: Sequence[Way], samples: Mapping[str, Samples]) -> list[dict[str, Any]]:
    """What a call of each way took, and beside its floor."""
    p50 = {name: statistics.median(sample.call_us) for name, sample in samples.items()}
    return [
        {
            "way": way.name,
            "p50_us": p50[way.name],
            "p99_us": statistics.quantiles(samples[way.name].call_us, n=100)[98],
            "layer_us": statistics.median(samples[way.name].step_us) / NUM_CALLS,
            "ratio": p50[way.name] / sum(p50[name] for name in way.floor),
            "calls": len(samples[way.name].call_us),
        }
        for way in all_ways
    ]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.security", description=description)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--context", type=int, default=64, metavar="N", help="tokens in each context; default: 64")
    parser.add_argument("--tokens", type=int, nargs="+", default=NUM_TOKENS, metavar="N", help="default: 1 16")
    parser.add_argument("--seconds", type=float, default=20.0, metavar="S", help="for each number of tokens")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of a call on a CPU; default: 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the rows")
    return parser.parse_args(arguments)


@torch.inference_mode()
def run(options: argparse.Namespace, console: Console) -> None:
    """Checks every way, times them in turn, prints and writes."""
    attnd.tune_process()
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    results: list[dict[str, Any]] = []
    columns = TextColumn("{task.description:>10}"), BarColumn(), TimeElapsedColumn()
    progress = Progress(*columns, console=console, auto_refresh=False, transient=True)
    with clients(options.device, options.threads) as connected, progress:
        for num_tokens in options.tokens:
            step = DecodeStep(num_tokens, options.context, dtype)
            task = progress.add_task(f"{num_tokens} tokens", total=1.0)

            def tick(done: float, task: TaskID = task) -> None:
                progress.update(task, completed=done)
                progress.refresh()

            with ways(step, connected) as all_ways:
                for way in all_ways:
                    step.check(way.name, way.cache, way.open())
                samples = time_ways(all_ways, len(step.layers), options.seconds, tick)
                results += [{"tokens": num_tokens, **row} for row in rows(all_ways, samples)]
    title = f"decode call, {LLAMA_8B}, context {options.context}, {options.device}, {options.threads} threads"
    console.print(report.table(title, CAPTION, results, COLUMNS))
    if options.json:
        parameters = {"heads": str(LLAMA_8B), **{k: v for k, v in vars(options).items() if k != "json"}}
        report.write_json(options.json, "security", parameters, results)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    return report.exit_code(lambda console: run(parse(arguments), console))


if __name__ == "__main__":
    sys.exit(main())
