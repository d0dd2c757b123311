"""Folders of sockets and snapshots: nobody else decides what lies there."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from attnd_server.identity.own_folder import is_still, own_folder
from attnd_server.planes.socket_folder import SocketFolder


def opened(path: Path, **how: bool) -> str:
    real, descriptor = own_folder(str(path), **how)
    os.close(descriptor)
    return real


def test_a_folder_is_made_for_this_user_alone(tmp_path: Path) -> None:
    assert opened(tmp_path / "a" / "b") == str(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert opened(tmp_path / "a" / "b") == str(tmp_path / "a" / "b")  # again


def test_a_link_is_refused_and_one_above_is_followed_once_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "real").mkdir(0o700)
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(PermissionError, match="is a symbolic link to real, but must be the folder itself"):
        opened(tmp_path / "link")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(PermissionError, match="is a symbolic link to nowhere"):
        opened(tmp_path / "dangling")
    assert not (tmp_path / "nowhere").exists()
    assert opened(tmp_path / "link" / "sub") == str(tmp_path / "real" / "sub")
    assert "lies behind a link" in caplog.text


@pytest.mark.parametrize(("mode", "is_taken", "is_taken_if_shared"), [
    (0o700, True, True),
    (0o755, True, True),
    (0o770, False, False),
    (0o777, False, False),
    (0o1777, False, True),
])  # fmt: skip
def test_others_must_not_write_there(tmp_path: Path, mode: int, is_taken: bool, is_taken_if_shared: bool) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(mode)
    for may_be_shared, taken in ((False, is_taken), (True, is_taken_if_shared)):
        if taken:
            assert opened(folder, may_be_shared=may_be_shared) == str(folder)
        else:
            with pytest.raises(PermissionError, match=f"has mode {mode:04o}, but must let nobody else write"):
                opened(folder, may_be_shared=may_be_shared)


def test_another_users_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fstat", lambda descriptor: os.stat_result((0o040700, 0, 0, 1, 12345, 0, *[0] * 4)))
    with pytest.raises(PermissionError, match=r"is user 12345's, but must be this process' user \d+'s or root's"):
        opened(tmp_path)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="file"):
            opened(path)


def test_a_folder_is_still_there_or_is_not(tmp_path: Path) -> None:
    real, descriptor = own_folder(str(tmp_path / "one"))
    assert is_still(real, descriptor)
    (tmp_path / "one").rename(tmp_path / "two")
    assert not is_still(real, descriptor)
    (tmp_path / "one").symlink_to("two")
    assert not is_still(real, descriptor)
    os.close(descriptor)


def test_sockets_lie_in_such_a_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(0o700)
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(OSError, match="is a symbolic link"):
        SocketFolder(str(tmp_path / "link"))
    listener = SocketFolder(str(tmp_path / "link" / "sub")).listen(for_others=False)
    assert listener.getsockname().startswith(str(tmp_path / "real" / "sub"))
    listener.close()
