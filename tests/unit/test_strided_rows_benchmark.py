"""The benchmark of rows that lie apart: it says what it timed, and times nothing that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnd.protocol import loose, regions
from benchmarks import strided_rows

ARGUMENTS = ["--tokens", "1", "3", "--seconds", "0.01", "--out"]


def test_every_way_of_both_planes_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert strided_rows.main([*ARGUMENTS, str(tmp_path)]) == 0
    written = json.loads((tmp_path / "strided-rows.json").read_text())
    ways = [strided_rows.DENSE, strided_rows.LOOSE, strided_rows.MADE_DENSE]
    expected = [(tokens, plane, way) for tokens in (1, 3) for plane in ("shm", "inline") for way in ways]
    assert [(row["tokens"], row["plane"], row["way"]) for row in written["rows"]] == expected
    assert all(row["p50_us"] > 0 and row["calls"] >= 3 for row in written["rows"])
    assert "loose, made dense" in capsys.readouterr().out


@pytest.mark.parametrize("plane", ["shm", "inline"])
def test_a_wrong_byte_ends_it(
    plane: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(value: loose.Sendable, target: memoryview) -> None:
        copy(value, target)
        target[0] ^= 1

    copy = loose.copy_elements
    monkeypatch.setattr(regions if plane == "shm" else loose, "copy_elements", wrong)
    assert strided_rows.main([*ARGUMENTS, str(tmp_path)]) == 1
    assert f"wrong result: {plane}, " in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
