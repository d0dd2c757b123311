"""The folder of a server's Unix socket, and nothing left in it by servers that were killed."""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from attnd_server.identity.own_folder import own_folder

_PREFIX, _SUFFIX = "attnd-", ".sock"
# Connections that wait to be accepted.
_BACKLOG = 128


class SocketFolder:
    """Where servers put their sockets, each under a name of its own. Several servers may share it."""

    def __init__(self, path: str) -> None:
        """Makes the folder, for this process' user alone, if there is none.

        Raises:
            OSError: it cannot be made, is no folder, or others decide what lies there: see `own_folder`.
        """
        self.path, descriptor = own_folder(path, may_be_shared=True)
        os.close(descriptor)

    def listen(self, for_others: bool) -> socket.socket:
        """A socket that listens under a new name, its `getsockname()`. Removes those that nobody listens to any more.

        Args:
            for_others: whether other users than this process' may connect; they are checked all the same.

        Raises:
            OSError: there can be no socket here.
        """
        path = os.path.join(self.path, f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}")
        listener = socket.socket(socket.AF_UNIX)
        try:
            with self._locked():
                self._sweep()
                listener.bind(path)
                os.chmod(path, 0o666 if for_others else 0o600)  # before anybody can connect
                listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
        return listener

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """So that no server takes for dead what another has bound and does not listen to yet."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _sweep(self) -> None:
        for name in os.listdir(self.path):
            path = os.path.join(self.path, name)
            if name.startswith(_PREFIX) and name.endswith(_SUFFIX) and stat.S_ISSOCK(os.lstat(path).st_mode):
                with socket.socket(socket.AF_UNIX) as probe:
                    try:
                        probe.setblocking(False)
                        probe.connect(path)
                    except ConnectionRefusedError:
                        os.unlink(path)
                    except OSError:
                        pass  # somebody listens and is busy, or it is not ours
