"""`attnd kernels` compiles without a GPU what a server then finds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.test_compile import reason_against

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(reason_against() is not None, reason=str(reason_against())),
]

NARROW = ["--target", "sm_80", "--head-dim", "64", "--dtype", "bfloat16"]


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The command, with a folder."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "120"}
    command = [sys.executable, "-m", "attnd_server", "kernels", "--kernel-cache", str(folder), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def numbers(ended: subprocess.CompletedProcess[str]) -> list[int]:
    """Of the one row of its table: kernels, compiled now, failed."""
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (row,) = (line for line in ended.stdout.splitlines() if "sm_80" in line)
    return [int(each) for each in row.split("│")[2:5]]


def test_kernels_are_compiled_once(tmp_path: Path) -> None:
    ended = run(tmp_path / "kernels", *NARROW)
    num, compiled, failed = numbers(ended)
    assert num > 5
    progress = [line for line in ended.stderr.splitlines() if line.startswith("sm_80: ")]
    assert 1 < len(progress) <= 10
    assert progress[-1] == f"sm_80: {num} of {num} kernels"
    assert (compiled, failed) == (num, 0)
    assert len(list((tmp_path / "kernels").rglob("*.cubin"))) == num
    assert numbers(run(tmp_path / "kernels", *NARROW)) == [num, 0, 0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", "hopper"], "it is 'hopper', but must be like sm_90"),
        (["--dtype", "int8"], "it is 'int8', but must be one of bfloat16, float16, float32"),
        (["--head-dim", "1000"], "it is 1000, but must be"),
    ],
)
def test_wrong_options_are_told(tmp_path: Path, options: list[str], said: str) -> None:
    ended = run(tmp_path / "kernels", *options)
    assert ended.returncode == 2
    assert said in " ".join(ended.stderr.replace("│", " ").split())


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.joinpath("kernels").mkdir()
    tmp_path.joinpath("kernels").chmod(0o777)
    ended = run(tmp_path / "kernels", *NARROW)
    assert ended.returncode == 2
    assert "has mode 0777, but must let nobody else write" in " ".join(ended.stderr.replace("│", " ").split())


@pytest.mark.parametrize("fails", ["every time", "for want of headers"])
def test_without_a_c_compiler_it_says_what_is_needed(
    tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cc"
    only = "" if fails == "every time" else 'case "$*" in *cuda_utils*) ;; *) exec gcc "$@" ;; esac\n'
    compiler.write_text(f"#!/bin/sh\n{only}exit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    ended = run(tmp_path / "kernels", *NARROW)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        f"attnd kernels: {compiler} ended with 3; kernels need a C compiler that works (CC, or gcc) and the headers of "
        "this Python (python3-dev)"
    )
