"""`attnd doctor` against servers that have planes, have none, and do not answer."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from attnd_server.cli import doctor
from tests.servers import ServerProcess


def run(address: str, socket_dir: str = "") -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    code = doctor.run_doctor(address, socket_dir, 10, Console(file=out, width=80), Console(file=err))
    return code, out.getvalue(), err.getvalue()


def row(plane: str, output: str) -> list[str]:
    (line,) = [line for line in output.splitlines() if line.split()[:1] == [plane]]
    return line.split()


def test_every_plane_is_tried_and_timed(tmp_path: Path) -> None:
    sockets = str(tmp_path / "sockets")
    with ServerProcess(tmp_path / "log", "--device", "cpu", "--socket-dir", sockets) as server:
        code, output, errors = run(server.address)
        elsewhere = run(server.address, str(tmp_path / "elsewhere"))
    assert (code, errors) == (0, "")
    for plane in ("shm", "inline"):
        assert row(plane, output)[1] == "yes"
        assert all(float(us) > 0 for us in row(plane, output)[2::2])
    assert row("cuda", output) == ["cuda", "no"]
    assert "cuda: " in output
    assert "takes shm" in output
    # The folder is not where the server has it.
    assert elsewhere[0] == 0
    assert row("shm", elsewhere[1]) == ["shm", "no"]
    assert "elsewhere" in elsewhere[1]
    assert "takes inline" in elsewhere[1]


def test_a_wrong_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    right = doctor.Case.expected
    monkeypatch.setattr(doctor.Case, "expected", lambda case, num_reqs: [1.02 * each for each in right(case, num_reqs)])
    code, output, _ = run("inproc://")
    assert code == 2
    assert row("inline", output)[1] == "wrong"
    assert "inline: 16 requests: off by 2.0e-02, but at most 0.01 is right" in output


def test_no_server_is_one_line(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", "--device", "cpu") as server:
        address = server.address
    out, err = io.StringIO(), io.StringIO()
    assert doctor.run_doctor(address, "", 1, Console(file=out), Console(file=err, width=200)) == 1
    assert out.getvalue() == ""
    assert err.getvalue().startswith("attnd doctor: ")
    assert address in err.getvalue()
