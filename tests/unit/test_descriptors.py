"""The tests' own look at what a process has open."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.descriptors import open_links


def test_what_is_closed_meanwhile_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "kept").open("w") as kept, (tmp_path / "closed").open("w") as closed:
        look, is_gone = os.readlink, f"/proc/{os.getpid()}/fd/{closed.fileno()}"

        def readlink(path: Path) -> str:
            if str(path) == is_gone:
                closed.close()
            return look(path)

        monkeypatch.setattr(os, "readlink", readlink)
        links = open_links(os.getpid())
        assert str(tmp_path / "closed") not in links
        assert kept.name in links
