"""The folder in which compiled kernels are kept, and through which Triton stores and finds them.

What lies there is run: code for the GPU, and libraries that this process loads. So nobody else may decide what it is.
Below the folder is one for each set of versions, and in it one for each kind of GPU; there Triton's own keys name
folders: of a kernel's source, what it calls, its options, the GPU, and Triton itself. Files are written whole or not at
all, each with a digest beside it: one that is not as it was written is not there, and is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from attnd._version import __version__
from attnd_server.device.kernels.spec import hash_callees_first
from attnd_server.identity.own_folder import own_folder, refuse_if_not_own

log = logging.getLogger(__name__)

# Bytes of kernels that are kept when a server starts, and days that those of other versions are.
MOST_BYTES = 1 << 30
OTHER_VERSIONS_DAYS = 30
# Unfinished files of processes that ended while they wrote.
_UNFINISHED, _UNFINISHED_S = "tmp.", 3600.0
_DIGEST = ".sha256"
# Triton stores it beside every kernel, and nothing here reads it.
_NOT_KEPT = ".source"


def versions() -> str:
    """The name of the folder of what these versions compile."""
    found = []
    for package in ("triton", "torch"):
        try:
            found.append(f"{package}-{version(package)}")
        except PackageNotFoundError:
            found.append(f"no-{package}")
    return "-".join([f"attnd-{__version__}", *found])


def shipped_folder() -> Path:
    """Where an installation has kernels that were compiled when it was made, as an image has them."""
    return Path(sys.prefix, "share/attnd/kernels")


@dataclass(frozen=True)
class KernelFolder:
    """Kernels for one kind of GPU. It can be pickled, so that other processes use it too.

    Attributes:
        path: where they are written to and read from.
        others: where they are read from if they are not there.
        spare: where they are written to while `path` takes none: a folder of this process, or "".
    """

    path: str
    others: tuple[str, ...] = ()
    spare: str = ""

    @classmethod
    def open(cls, folder: str, gpu: str) -> KernelFolder:
        """Makes a folder ready for use, and removes from it what has not been used for long.

        Args:
            folder: `--kernel-cache`; "": the one of this user, or where that cannot be used a folder until this
                process ends.
            gpu: the kind of GPU: sm_90.

        Raises:
            OSError: it cannot be made, or others may decide what lies in it; the text says path, value and rule.
        """
        spare = tempfile.mkdtemp(prefix="attnd-kernels-")
        _remove_at_exit(spare)
        try:
            path = _made(folder or default_folder(), gpu)
        except OSError as error:
            if folder:
                raise
            log.warning("compiled kernels are not kept", extra={"reason": str(error)})
            path = spare
        shipped, others = shipped_folder() / versions() / gpu, []
        if shipped.is_dir():
            try:
                check(shipped)
                others.append(str(shipped))
            except OSError as error:
                log.warning("the kernels that came with the installation are not used", extra={"reason": str(error)})
        return cls(str(path), tuple(others), "" if path == spare else spare)

    def install(self) -> None:
        """Has Triton use it in this process, for all that is compiled from now on."""
        from triton import knobs

        hash_callees_first()
        knobs.cache.manager_class = partial(_Entry, self)
        # It is part of Triton's keys, and so must be the same for all who share a folder.
        if "TRITON_DISABLE_LINE_INFO" not in os.environ:
            knobs.compilation.disable_line_info = True
        # What the stages before the last leave is ten times as much, and is for people who look into a kernel.
        knobs.compilation.store_binary_only = True

    @property
    def places(self) -> Iterator[str]:
        """Where to look, in turn."""
        yield self.path
        yield from self.others
        if self.spare:
            yield self.spare


def default_folder() -> str:
    """The folder of this user: Triton's where TRITON_CACHE_DIR names one, else one of the user's caches."""
    if given := os.environ.get("TRITON_CACHE_DIR"):
        return os.path.join(given, "attnd")
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(caches, "attnd", "kernels")


def _made(folder: str, gpu: str) -> str:
    """The folder in `folder` for these versions and a kind of GPU, looked through."""
    real, descriptor = own_folder(folder)
    os.close(descriptor)
    mine = Path(real, versions())
    for each in (mine, mine / gpu):
        if each.is_symlink():
            raise PermissionError(f"{each} is a symbolic link to {os.readlink(each)}, but must be the folder itself")
        each.mkdir(mode=0o700, exist_ok=True)
    check(mine)
    os.utime(mine)
    _remove_old(Path(real), mine)
    return str(mine / gpu)


def check(folder: Path) -> None:
    """Looks at a folder and everything in it.

    Raises:
        PermissionError: something is neither this user's nor root's, or others may write to it, or it is a link or
            has another name elsewhere, or is neither a file nor a folder.
    """
    waiting = [folder]
    while waiting:
        path = waiting.pop()
        try:
            found = path.lstat()
            waiting += path.iterdir() if stat.S_ISDIR(found.st_mode) else ()
        except FileNotFoundError:
            continue  # another server has just removed it
        if stat.S_ISLNK(found.st_mode):
            raise PermissionError(f"{path} is a symbolic link to {os.readlink(path)}, but must be no link")
        refuse_if_not_own(found, str(path))
        if not stat.S_ISDIR(found.st_mode) and not stat.S_ISREG(found.st_mode):
            raise PermissionError(f"{path} is neither a file nor a folder, but must be one of them")
        if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
            raise PermissionError(f"{path} has {found.st_nlink} names (hard links), but must have one: copy it")


def _remove_old(root: Path, mine: Path) -> None:
    """Removes other versions that no server has used for long, what was never finished, and what is too much."""
    now = time.time()
    for each in root.glob("attnd-*"):
        if each != mine and now - _changed_s(each) > OTHER_VERSIONS_DAYS * 86_400:
            shutil.rmtree(each, ignore_errors=True)
    for unfinished in mine.glob(f"*/*/{_UNFINISHED}*"):
        if now - _changed_s(unfinished) > _UNFINISHED_S:
            unfinished.unlink(missing_ok=True)
    kept = 0
    for entry in sorted(mine.glob("*/*"), key=_changed_s, reverse=True):
        kept += sum(_num_bytes(each) for each in entry.glob("*"))
        if kept > MOST_BYTES:
            shutil.rmtree(entry, ignore_errors=True)


def _changed_s(path: Path) -> float:
    """When something was changed; now, if another server has just removed it."""
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return time.time()


def _num_bytes(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def _remove_at_exit(folder: str) -> None:
    import atexit

    made_by = os.getpid()

    def remove() -> None:
        if os.getpid() == made_by:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)


class _Entry:
    """Files under one of Triton's keys: what Triton calls a cache manager."""

    def __init__(self, folder: KernelFolder, key: str, override: bool = False, dump: bool = False) -> None:
        self._folder, self._key = folder, key

    def has_file(self, filename: str) -> bool:
        """Whether a file is there, as it was written."""
        return self.get_file(filename) is not None

    def get_file(self, filename: str) -> str | None:
        """The path of a file, if it is there as it was written."""
        paths = (os.path.join(place, self._key, filename) for place in self._folder.places)
        return next(filter(_is_whole, paths), None)

    def get_group(self, filename: str) -> dict[str, str] | None:
        """The paths of files that were stored together, if all of them are there, by their names."""
        group = self.get_file(_group_name(filename))
        if group is None:
            return None
        folder = os.path.dirname(group)
        paths = {name: os.path.join(folder, name) for name in json.loads(Path(group).read_text())}
        if not all(map(_is_whole, paths.values())):
            return None
        try:
            os.utime(folder)  # it is used: see `_remove_old`
        except OSError:
            pass  # it is root's
        return paths

    def put_group(self, filename: str, group: dict[str, str]) -> str:
        """Says that files belong together."""
        return self.put(json.dumps(sorted(group)), _group_name(filename), binary=False)

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        """Writes a file whole, and returns its path."""
        content = data if isinstance(data, bytes) else str(data).encode()
        if filename.endswith(_NOT_KEPT):
            content = b""
        try:
            return _write(os.path.join(self._folder.path, self._key), filename, content)
        except OSError as error:
            if not self._folder.spare:
                raise
            log.warning("a compiled kernel is not kept", extra={"reason": str(error)})
            return _write(os.path.join(self._folder.spare, self._key), filename, content)


def _group_name(filename: str) -> str:
    return f"group.{filename}"


def _is_whole(path: str) -> bool:
    """Whether a file is there and is what was written."""
    try:
        content, digest = Path(path).read_bytes(), Path(path + _DIGEST).read_text()
    except (OSError, ValueError):
        return False
    return hashlib.sha256(content).hexdigest() == digest


def _write(folder: str, filename: str, content: bytes) -> str:
    os.makedirs(folder, mode=0o755, exist_ok=True)
    path = os.path.join(folder, filename)
    for target, data in ((path, content), (path + _DIGEST, hashlib.sha256(content).hexdigest().encode())):
        descriptor, unfinished = tempfile.mkstemp(prefix=_UNFINISHED, dir=folder)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
            os.replace(unfinished, target)
        except BaseException:
            os.unlink(unfinished)
            raise
    return path
