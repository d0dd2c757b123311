"""The Python of the pages runs as it stands there, against a real server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documentation import Block, blocks


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_block_runs_and_prints_what_it_says(block: Block, server_address: str, tmp_path: Path) -> None:
    if "transformers" in block.text:
        pytest.importorskip("transformers", reason="needs transformers")
    if "TRITON_INTERPRET" in block.text:
        pytest.importorskip("triton", reason="needs triton")
    promised = re.findall(r"^print\(.*\)  # (.*)$", block.text, re.MULTILINE)
    assert promised, "a block shows its result"
    script = tmp_path / "block.py"
    script.write_text(block.text.replace("localhost:7411", server_address))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.strip()
    assert shown == promised[0] or (promised[0].startswith("sixteen ones") and shown == f"({', '.join(['1.0'] * 16)})")
