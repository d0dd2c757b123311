"""`python -m tests.families`: every behaviour of every family, as lines, JSON and the table of the documentation."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers

import attnd
from attnd.integrations import transformers as integration
from tests.families.behaviours import behaviours_of
from tests.families.families import families
from tests.families.outcomes import ABSENT, EQUAL, REFUSED, Outcome, compare
from tests.families.table import markdown, write
from tests.families.ways import Attached, ByHand
from tests.servers import ROOT, ServerProcess


def main() -> None:
    """Runs what the arguments say; fails if a behaviour did."""
    options = _options()
    if options.read:
        outcomes = [Outcome(**fields) for path in options.read for fields in json.loads(path.read_text())]
    else:
        outcomes = []
        with _server(options.address) as address:
            for of_family in _run(options, address):
                outcomes += of_family
                if options.json:  # now and not at the end, which may never come
                    options.json.write_text(json.dumps([outcome._asdict() for outcome in outcomes], indent=1))
    if options.table:
        write(markdown(outcomes, f"transformers {transformers.__version__}, torch {torch.__version__}, {_commit()}"))
    failed = [outcome for outcome in outcomes if outcome.verdict not in (EQUAL, REFUSED, ABSENT)]
    print(f"{len(outcomes)} outcomes, {len(failed)} failed")
    raise SystemExit(bool(failed))


def _options() -> Any:
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("names", nargs="*", help="families; all of them if none is named")
    parser.add_argument("--behaviours", nargs="*", help="only these")
    parser.add_argument("--ways", nargs="*", default=["by hand", *(["attached"] if _can_attach() else [])])
    parser.add_argument("--address", help="of a server, or inproc://; without it one is started")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--json", type=Path, help="file that receives the outcomes")
    parser.add_argument("--read", type=Path, nargs="*", help="files with outcomes, instead of running")
    parser.add_argument("--table", action="store_true", help="writes the table into docs/integrations.md")
    return parser.parse_args()


def _run(options: Any, address: str) -> Iterator[list[Outcome]]:
    names = options.names or list(families())
    with ProcessPoolExecutor(options.workers) as pool:
        jobs = [pool.submit(_outcomes, name, address, options.ways, options.behaviours) for name in names]
        for name, job in zip(names, jobs, strict=True):
            outcomes, remark = job.result()
            yield outcomes
            print(f"{name}: {remark}", flush=True)
            for outcome in outcomes:
                if outcome.verdict not in (EQUAL, REFUSED, ABSENT):
                    print(f"    {outcome.behaviour}, {outcome.way}: {outcome.verdict}: {outcome.detail}", flush=True)


def _outcomes(name: str, address: str, labels: list[str], behaviours: list[str] | None) -> tuple[list[Outcome], str]:
    """Of one family, in a process of the pool."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    family = families()[name]
    with attnd.connect(address) as client, contextlib.redirect_stdout(io.StringIO()):  # some models print
        ways = {"by hand": lambda: ByHand(client), "attached": lambda: Attached(client)}
        try:
            chosen = behaviours or behaviours_of(family)
            outcomes = list(compare(family, {label: ways[label] for label in labels}, chosen))
        except Exception as error:  # its configuration needs an override
            return [], f"not built: {str(error).strip()[:150]}"
    counts = Counter(outcome.verdict for outcome in outcomes)
    return outcomes, ", ".join(f"{number} {verdict}" for verdict, number in counts.items())


@contextlib.contextmanager
def _server(address: str | None) -> Iterator[str]:
    if address:
        yield address
        return
    with tempfile.TemporaryDirectory() as folder:
        server = ServerProcess(Path(folder) / "log")
        try:
            yield server.address
        finally:
            server.terminate()
            server.wait()


def _can_attach() -> bool:
    return hasattr(integration, "attach")


def _commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
