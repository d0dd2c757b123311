"""The folder of compiled kernels: who may write there, what is not used, what is removed."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from attnd_server.device.kernels import folder as folders
from attnd_server.device.kernels.folder import KernelFolder, check, default_folder, versions
from attnd_server.device.kernels.folder import _Entry as Entry

GPU = "sm_90"
KEY = "ABC"


@pytest.fixture(autouse=True)
def no_shipped_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for kernels that come with the installation, where there are none."""
    shipped = tmp_path / "shipped"
    monkeypatch.setattr(folders, "shipped_folder", lambda: shipped)
    return shipped


def opened(path: Path) -> KernelFolder:
    """A folder that a server uses."""
    return KernelFolder.open(str(path), GPU)


def store(folder: KernelFolder, key: str = KEY, content: bytes = b"code") -> Path:
    """Stores a kernel as Triton does; returns where it lies."""
    entry = Entry(folder, key)
    group = {"kernel.cubin": entry.put(content, "kernel.cubin"), "kernel.json": entry.put("{}", "kernel.json")}
    entry.put_group("kernel.json", group)
    return Path(group["kernel.cubin"]).parent


def has(folder: KernelFolder, key: str = KEY) -> bool:
    """Whether Triton finds it, so that it does not compile."""
    return Entry(folder, key).get_group("kernel.json") is not None


def test_a_folder_is_made_for_this_user_alone(tmp_path: Path) -> None:
    folder = opened(tmp_path / "kernels")
    assert (tmp_path / "kernels").stat().st_mode & 0o777 == 0o700
    assert Path(folder.path) == tmp_path / "kernels" / versions() / GPU


def test_a_kernel_is_found_by_who_opens_the_folder_later(tmp_path: Path) -> None:
    store(opened(tmp_path / "kernels"))
    later = opened(tmp_path / "kernels")
    assert has(later)
    assert not has(later, "DEF")
    group = Entry(later, KEY).get_group("kernel.json")
    assert group is not None
    assert Path(group["kernel.cubin"]).read_bytes() == b"code"


def test_a_folder_can_be_moved(tmp_path: Path) -> None:
    store(opened(tmp_path / "kernels"))
    (tmp_path / "kernels").rename(tmp_path / "elsewhere")
    assert has(opened(tmp_path / "elsewhere"))


def test_another_kind_of_gpu_has_its_own(tmp_path: Path) -> None:
    store(opened(tmp_path / "kernels"))
    assert not has(KernelFolder.open(str(tmp_path / "kernels"), "sm_80"))


def group_writable(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o020)


def writable_by_all(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o002)


def replace_by_link(path: Path) -> None:
    target = path.with_name(f"{path.name}.target")
    path.rename(target)
    path.symlink_to(target)


def link_hard(path: Path) -> None:
    os.link(path, path.with_name(f"{path.name}.again"))


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


FOLDER = lambda entry: entry.parents[2]  # noqa: E731
VERSIONS = lambda entry: entry.parents[1]  # noqa: E731
ENTRY = lambda entry: entry  # noqa: E731
FILE = lambda entry: entry / "kernel.cubin"  # noqa: E731


@pytest.mark.parametrize(
    ("which", "spoil", "rule"),
    [
        (FOLDER, group_writable, "has mode 0720, but must let nobody else write"),
        (FOLDER, replace_by_link, "is a symbolic link to .*, but must be the folder itself"),
        (VERSIONS, writable_by_all, "has mode 0702, but must let nobody else write"),
        (VERSIONS, replace_by_link, "is a symbolic link to .*, but must be the folder itself"),
        (ENTRY, group_writable, "has mode 0775, but must let nobody else write"),
        (ENTRY, replace_by_link, "is a symbolic link to .*, but must be no link"),
        (FILE, group_writable, "has mode 0620, but must let nobody else write"),
        (FILE, replace_by_link, "is a symbolic link to .*, but must be no link"),
        (FILE, link_hard, r"has 2 names \(hard links\), but must have one"),
        (FILE, replace_by_pipe, "is neither a file nor a folder"),
    ],
)
def test_what_others_may_have_had_a_hand_in_is_refused(
    tmp_path: Path, which: Callable[[Path], Path], spoil: Callable[[Path], None], rule: str
) -> None:
    """With path, value and rule."""
    spoilt = which(store(opened(tmp_path / "kernels")))
    spoil(spoilt)
    with pytest.raises(PermissionError, match=rf"{re.escape(str(spoilt))}\S* {rule}"):
        opened(tmp_path / "kernels")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("which", [FOLDER, VERSIONS, ENTRY, FILE])
def test_what_is_another_users_is_refused(tmp_path: Path, which: Callable[[Path], Path]) -> None:
    spoilt = which(store(opened(tmp_path / "kernels")))
    os.chown(spoilt, 12345, -1)
    with pytest.raises(PermissionError, match=f"{re.escape(str(spoilt))} is user 12345's, but must be"):
        opened(tmp_path / "kernels")


@pytest.mark.parametrize("name", ["kernel.cubin", "kernel.json", "group.kernel.json", "kernel.cubin.sha256"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff"], ids=["gone", "empty", "cut", "odd"])
def test_what_is_not_as_it_was_written_is_compiled_again(tmp_path: Path, name: str, content: bytes | None) -> None:
    folder = opened(tmp_path / "kernels")
    path = store(folder) / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    assert not has(opened(tmp_path / "kernels"))
    store(folder)
    assert has(folder)


def test_shipped_kernels_are_found_and_stay_as_they_are(tmp_path: Path, no_shipped_kernels: Path) -> None:
    store(opened(no_shipped_kernels))
    before = sorted(no_shipped_kernels.rglob("*"))
    folder = opened(tmp_path / "kernels")
    assert has(folder)
    store(folder, "DEF")
    assert has(folder, "DEF")
    assert sorted(no_shipped_kernels.rglob("*")) == before


def test_shipped_kernels_that_others_may_write_are_not_used(tmp_path: Path, no_shipped_kernels: Path) -> None:
    group_writable(store(opened(no_shipped_kernels)))
    assert not has(opened(tmp_path / "kernels"))


def test_a_spoilt_shipped_kernel_is_made_again(tmp_path: Path, no_shipped_kernels: Path) -> None:
    (store(opened(no_shipped_kernels)) / "kernel.cubin").write_bytes(b"")
    folder = opened(tmp_path / "kernels")
    assert not has(folder)
    store(folder)
    assert has(folder)


def test_a_full_disk_keeps_kernels_for_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = opened(tmp_path / "kernels")
    shutil.rmtree(folder.path)
    Path(folder.path).write_bytes(b"")  # nothing can be made in it, not even by root
    store(folder)
    assert has(folder)


def test_a_folder_of_ones_own_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        opened(tmp_path / "file" / "kernels")


def test_without_a_folder_kernels_are_kept_for_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    folder = KernelFolder.open("", GPU)
    store(folder)
    assert has(folder)
    assert folder.path.startswith(str(Path(os.environ.get("TMPDIR", "/tmp"))))


def test_the_folder_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRITON_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/anne")
    assert default_folder() == "/home/anne/.cache/attnd/kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_folder() == "/caches/attnd/kernels"
    monkeypatch.setenv("TRITON_CACHE_DIR", "/triton")
    assert default_folder() == "/triton/attnd"


def test_what_nobody_uses_is_removed(tmp_path: Path) -> None:
    """Other versions after a month, unfinished files after an hour."""
    entry = store(opened(tmp_path / "kernels"))
    now = time.time()
    for name, days in (("attnd-0.0.1-old", 40), ("attnd-0.0.1-new", 20), ("something-else", 40)):
        (tmp_path / "kernels" / name / GPU).mkdir(parents=True)
        os.utime(tmp_path / "kernels" / name, (now, now - days * 86_400))
    for name, hours in (("tmp.old", 2), ("tmp.new", 0)):
        (entry / name).touch()
        os.utime(entry / name, (now, now - hours * 3600))
    folder = opened(tmp_path / "kernels")
    left = {each.name for each in (tmp_path / "kernels").iterdir()}
    assert left == {versions(), "attnd-0.0.1-new", "something-else"}
    assert {each.name for each in entry.glob("tmp.*")} == {"tmp.new"}
    assert has(folder)


def test_what_was_used_longest_ago_is_removed_when_there_is_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found counts as used."""
    folder = opened(tmp_path / "kernels")
    for age, key in enumerate("ABC"):
        entry = store(folder, key, bytes(1000))
        os.utime(entry, (0, time.time() - 1000 * (age + 1)))
    assert has(folder, "C")
    monkeypatch.setattr(folders, "MOST_BYTES", 2_900)
    folder = opened(tmp_path / "kernels")
    assert [has(folder, key) for key in "ABC"] == [True, False, True]


def test_looking_through_a_folder_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir(mode=0o700)
    (tmp_path / "kernels" / "to-root").symlink_to("/")
    with pytest.raises(PermissionError, match="must be no link"):
        check(tmp_path / "kernels")
