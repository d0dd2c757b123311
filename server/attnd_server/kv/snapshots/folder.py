"""A snapshot's folder: written whole or not at all, for this user alone."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from attnd_server.attention.geometry import Geometry
from attnd_server.identity.own_folder import refuse_if_not_own
from attnd_server.kv.snapshots.manifest import MAX_BYTES, Manifest, ManifestRefused
from attnd_server.kv.snapshots.tensor_layout import TensorLayout

MANIFEST, TENSORS = "manifest.json", "kv.safetensors"
# What the folder is called until it is whole.
UNFINISHED = ".writing-"


class SnapshotRefused(RuntimeError):
    """A snapshot cannot be used; the message names the file, what is wrong, and what to do."""


class RestoreStopped(Exception):
    """The server is to end before it serves. The snapshots are as they were."""


def write_folder(target: Path, write: Callable[[BinaryIO], Manifest]) -> Manifest:
    """Makes the folder `target`, which is there whole or not at all, whatever happens.

    Args:
        target: must not be there, or be an empty folder.
        write: writes the file with the tensors and says what it wrote.

    Raises:
        OSError: there is no room, or no permission, or `target` is there.
    """
    unfinished = target.parent / f"{UNFINISHED}{secrets.token_hex(8)}"
    unfinished.mkdir(0o700)
    try:
        with _create(unfinished / TENSORS) as file:
            manifest = write(file)
            _sync(file)
        with _create(unfinished / MANIFEST) as file:
            file.write(manifest.to_bytes())
            _sync(file)
        sync_folder(unfinished)
        os.rename(unfinished, target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    sync_folder(target.parent)
    return manifest


def read_manifest(folder: Path, config_type: type[Geometry] = Geometry) -> tuple[Manifest, TensorLayout]:
    """What a folder says it holds, and how, as far as can be told without reading the tensors.

    Args:
        folder: of the snapshot.
        config_type: what its geometry is given as.

    Raises:
        SnapshotRefused: a file is missing, not whole, too large or altered, or there is one too many.
    """
    try:
        entries = {entry.name for entry in os.scandir(folder)}
    except OSError as error:
        raise refused(folder, f"it cannot be read: {error.strerror}") from None
    if entries != {MANIFEST, TENSORS}:
        odd = ", ".join(sorted(entries ^ {MANIFEST, TENSORS}))
        raise refused(folder, f"a snapshot has {MANIFEST} and {TENSORS} and nothing else, but not so here: {odd}")
    with open_regular(folder / MANIFEST) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise refused(folder / MANIFEST, f"it is larger than {MAX_BYTES} bytes")
    try:
        manifest = Manifest.from_bytes(data, config_type)
    except ManifestRefused as error:
        raise refused(folder / MANIFEST, str(error)) from None
    layout = TensorLayout(manifest.shape, manifest.num_pages)
    with open_regular(folder / TENSORS) as file:
        num_bytes = os.fstat(file.fileno()).st_size
    if not num_bytes == manifest.num_bytes == layout.num_bytes:
        rule = f"the manifest's num_bytes, {manifest.num_bytes}, and {layout.num_bytes} by its geometry"
        raise refused(folder / TENSORS, f"it has {num_bytes} bytes, but must have {rule}")
    return manifest, layout


def refuse_if_others_have_a_hand_in_it(folder: Path) -> None:
    """What a server restores must be a folder of files that it, or root, has written.

    Raises:
        SnapshotRefused: it is a link or has one, is another user's, others may write there, or a file has another name.
    """
    path = folder
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise refused(folder, f"it cannot be opened as a folder that is no link: {error.strerror}") from None
    try:
        refuse_if_not_own(os.fstat(descriptor), "it")
        for name in os.listdir(descriptor):
            path, found = folder / name, os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            if stat.S_ISLNK(found.st_mode):
                raise PermissionError("it cannot be opened: it is a symbolic link")
            if not stat.S_ISREG(found.st_mode):
                raise PermissionError("it is no regular file")
            if found.st_nlink > 1:
                raise PermissionError("it has another name elsewhere (a hard link), but must have one: copy it")
            refuse_if_not_own(found, "it")
    except OSError as error:
        raise refused(path, str(error)) from None
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading, if it is one and no link. Raises SnapshotRefused."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise refused(path, f"it cannot be opened: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise refused(path, "it is no regular file")
    return os.fdopen(descriptor, "rb")


def refused(path: Path, why: str) -> SnapshotRefused:
    """The error of a file or folder."""
    return SnapshotRefused(
        f"{path} is refused: {why}; nothing of this snapshot is used. Put back the whole folder as it was written, or "
        "move it away to go on without it"
    )


def sync_folder(folder: Path) -> None:
    """Makes what was created and renamed in a folder outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _create(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w+b")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
