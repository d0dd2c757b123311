"""Where a server of one's own puts its socket: in a folder of this user alone, or nowhere."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from attnd_server.cli.demo.local_server import LocalServer

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")


def socket_dir(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str | None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    command = LocalServer()._command
    return command[command.index("--socket-dir") + 1] if "--socket-dir" in command else None


def test_the_folder_is_this_users_and_stays_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / f"attnd-{os.geteuid()}"
    assert socket_dir(monkeypatch, tmp_path) == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert socket_dir(monkeypatch, tmp_path) == str(folder)


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / f"attnd-{os.geteuid()}"
    folder.mkdir()
    folder.chmod(0o770)
    assert socket_dir(monkeypatch, tmp_path) is None
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    assert socket_dir(monkeypatch, tmp_path) is None
