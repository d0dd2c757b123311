"""The README's code runs as it stands there, against a real server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [line for language, code in BLOCKS if language == "sh" for line in code.splitlines()]


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_block_runs_and_prints_what_it_says(number: int, server_address: str, tmp_path: Path) -> None:
    code = PYTHON[number]
    if "transformers" in code:
        pytest.importorskip("transformers")
    promised = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert promised, "a block shows its result"
    script = tmp_path / "block.py"
    script.write_text(code.replace("localhost:7411", server_address))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.strip()
    assert shown == promised[0] or (promised[0].startswith("sixteen ones") and shown == f"({', '.join(['1.0'] * 16)})")


def test_there_are_all_the_blocks() -> None:
    assert len(PYTHON) == 4
    twelve_lines = [line for line in PYTHON[0].splitlines() if line.strip()]
    assert len(twelve_lines) == 12


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("make ")])
def test_make_target_exists(line: str) -> None:
    target = line.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("attnd ")])
def test_command_and_its_options_exist(line: str) -> None:
    words = line.partition("#")[0].split()
    done = subprocess.run(
        [sys.executable, "-m", "attnd_server", words[1], "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    for option in (word for word in words if word.startswith("--")):
        assert option in done.stdout


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_link_leads_somewhere(link: str) -> None:
    assert (ROOT / link).exists()
