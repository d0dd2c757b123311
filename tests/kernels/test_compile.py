"""The kernels compile for GPUs that are not here, fit their shared memory, and spill few registers.

For the oldest GPU and for Hopper; for all with `make compile`, which names them in COMPUTE_CAPABILITIES.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "compile_kernels.py"
# Bytes that a program may have: the CUDA C++ programming guide's table of compute capabilities, less the 1 KiB that
# the system keeps of each program.
EVERY_SHARED_BYTES = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}
NAMED = map(int, os.environ.get("COMPUTE_CAPABILITIES", "80 90").split())
SHARED_BYTES = {capability: EVERY_SHARED_BYTES[capability] for capability in NAMED}
# Bytes of a stack frame: 192 registers of 4 bytes of each thread, as options may need.
STACK_BYTES = 768
# float32 has no tensor cores: a tile's operands lie in registers whole, and those of long heads do not fit them.
LONG_STACKS = {"paged: fp32, dim 256, 1 x 4 rows, unified, split": 4096}

Results = dict[int, dict[str, Any]]


def reason_against() -> str | None:
    """None if kernels can be compiled here, or why not."""
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        return "triton is not installed"
    programs = Path(triton.origin).parent / "backends/nvidia/bin"
    missing = [name for name in ("ptxas", "cuobjdump") if not (programs / name).exists()]
    return f"triton comes without {' and '.join(missing)}" if missing else None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(reason_against() is not None, reason=str(reason_against())),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What `compile_kernels.py` says for each capability."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "TRITON_DISABLE_LINE_INFO": "1"}

    def compiled(capability: int) -> dict[str, Any]:
        command = [sys.executable, str(SCRIPT), str(capability)]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
        assert process.returncode == 0, process.stderr
        found: dict[str, Any] = json.loads(process.stdout)
        return found

    with ThreadPoolExecutor(max_workers=2) as threads:
        return dict(zip(SHARED_BYTES, threads.map(compiled, SHARED_BYTES), strict=True))


EVERY_GPU = pytest.mark.parametrize("capability", SHARED_BYTES)


@EVERY_GPU
def test_every_kernel_compiles(results: Results, capability: int) -> None:
    assert results[capability]
    assert {name: found["error"] for name, found in results[capability].items() if "error" in found} == {}


@EVERY_GPU
def test_shared_memory_fits(results: Results, capability: int) -> None:
    used = {name: found["shared"] for name, found in results[capability].items() if "shared" in found}
    assert {name: shared for name, shared in used.items() if shared > SHARED_BYTES[capability]} == {}


@EVERY_GPU
def test_few_registers_spill(results: Results, capability: int) -> None:
    used = {name: found["stack"] for name, found in results[capability].items() if "stack" in found}
    assert {name: stack for name, stack in used.items() if stack > LONG_STACKS.get(name, STACK_BYTES)} == {}


def test_fp8_pages_and_hopper_kernels_are_among_the_cases(results: Results) -> None:
    with_fp8 = {capability for capability, found in results.items() if any("fp8 pages" in name for name in found)}
    on_hopper = {capability for capability, found in results.items() if any("hopper" in name for name in found)}
    assert (with_fp8, on_hopper) == (set(SHARED_BYTES) - {80}, set(SHARED_BYTES) & {90})
