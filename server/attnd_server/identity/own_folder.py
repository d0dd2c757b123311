"""Folders that the server reads from and writes to: what they must be, so that nobody else decides what lies there."""

from __future__ import annotations

import logging
import os
import stat

log = logging.getLogger(__name__)


def own_folder(path: str, *, may_be_shared: bool = False) -> tuple[str, int]:
    """Opens a folder, or makes it for this user alone.

    It may lie behind links, which are followed once, now. It must not be one itself: whoever may change a link decides
    where the server writes.

    Args:
        path: of the folder.
        may_be_shared: whether others may write there if they cannot remove what is not theirs, as in `/tmp`.

    Returns:
        Where it is, without links, and its descriptor, which the caller closes.

    Raises:
        OSError: it cannot be made or opened, is a link, is another user's, or others may write there.
    """
    given = os.path.abspath(path)
    os.makedirs(os.path.dirname(given), exist_ok=True)
    real = os.path.join(os.path.realpath(os.path.dirname(given)), os.path.basename(given))
    if os.path.islink(real):
        raise PermissionError(f"{path} is a symbolic link to {os.readlink(real)}, but must be the folder itself")
    try:
        os.mkdir(real, 0o700)
    except FileExistsError:
        pass
    descriptor = os.open(real, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        refuse_if_not_own(os.fstat(descriptor), path, may_be_shared=may_be_shared)
    except BaseException:
        os.close(descriptor)
        raise
    if real != given:
        log.info("a folder lies behind a link, and is used where that leads now", extra={"path": path, "is_at": real})
    return real, descriptor


def refuse_if_not_own(found: os.stat_result, path: str, *, may_be_shared: bool = False) -> None:
    """Raises PermissionError: what was found at a path is neither this user's nor root's, or others may write to it."""
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid not in (os.geteuid(), 0):
        rule = f"must be this process' user {os.geteuid()}'s or root's"
        raise PermissionError(f"{path} is user {found.st_uid}'s, but {rule}")
    if mode & 0o022 and not (may_be_shared and mode & stat.S_ISVTX):
        raise PermissionError(f"{path} has mode {mode:04o}, but must let nobody else write: chmod go-w")


def is_still(path: str, descriptor: int) -> bool:
    """Whether a path leads to the folder that is open under a descriptor."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except OSError:
        return False
