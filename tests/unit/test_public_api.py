"""What the packages export, pinned: a change here is a change for users."""

from __future__ import annotations

import subprocess
import sys

import attnd
import attnd_server


def test_client_exports() -> None:
    assert attnd.__all__ == sorted(attnd.__all__)
    assert all(getattr(attnd, name) is not None for name in attnd.__all__)


def test_server_exports_the_names_that_people_know() -> None:
    known = {
        "AttentionBackend",
        "AttentionConfig",
        "AttentionKernel",
        "AttentionMetadata",
        "KVSplitConfig",
        "NaiveAttention",
        "PrecisionMode",
        "SlidingWindowAttention",
        "TritonAttentionOps",
        "TritonPagedAttention",
    }
    assert known <= set(attnd_server.__all__)
    assert attnd_server.__all__ == sorted(attnd_server.__all__)
    assert all(getattr(attnd_server, name) is not None for name in attnd_server.__all__)


def test_importing_the_client_loads_neither_torch_nor_the_server() -> None:
    program = "import sys, attnd; print(sorted({'torch', 'triton', 'numpy', 'attnd_server'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
