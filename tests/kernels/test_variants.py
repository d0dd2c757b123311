"""What a cache is said to need is all that calls of it launch; of one kernel only what a cache can know."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")


@pytest.mark.parametrize("arch", [80, 89, 90])
def test_random_calls_launch_what_their_caches_need(arch: int) -> None:
    # Fails for each variant of a kernel that was not foreseen. Hopper's of many rows may have another group than those
    # ahead, and options; nothing else, and without options and with a group ahead not even that.
    # In a process of its own: others interpret Triton's kernels.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / name) for name in ("client", "server"))
    command = [sys.executable, "-m", "benchmarks.variants", "--count-only", "--calls", "150", "--arch", str(arch)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "paged_attention_kernel" in process.stdout
    assert ("hopper_attention_kernel" in process.stdout) == (arch == 90)
