"""Files that may change while the server runs. What is broken when it is read again changes nothing."""

from __future__ import annotations

import logging
import os
import stat
from abc import ABC, abstractmethod
from typing import NamedTuple

log = logging.getLogger(__name__)

# More than tokens and certificates ever take; a device file or somebody's mistake ends here.
MAX_FILE_BYTES = 4 << 20


class FileRefused(RuntimeError):
    """A file cannot be used; the message names it, what is wrong, and the rule."""


class WatchedFile(NamedTuple):
    """One file.

    Attributes:
        option: of the server's configuration that names it.
        path: where it is.
        is_private: whether other users may neither read nor write it.
    """

    option: str
    path: str
    is_private: bool

    def read(self) -> bytes:
        """What it holds.

        Raises:
            FileRefused: it cannot be read, is too large, or others may read it.
        """
        try:
            with open(self.path, "rb") as file:
                mode = os.fstat(file.fileno()).st_mode  # of what is read, whatever the name means by then
                data = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise FileRefused(f"{self.option} is {self.path}, which cannot be read: {error.strerror}") from None
        # A group may read it: that is how Kubernetes gives a secret to a process that is not root.
        if self.is_private and mode & 0o027:
            raise FileRefused(
                f"{self.option} is {self.path}, whose mode is {stat.S_IMODE(mode):04o}, but must give others nothing "
                "and its group at most reading: 0600, 0640 or less"
            )
        if len(data) > MAX_FILE_BYTES:
            raise FileRefused(f"{self.option} is {self.path}, which must have at most {MAX_FILE_BYTES} bytes")
        return data


class WatchedFiles(ABC):
    """What some files say together."""

    def __init__(self, *files: WatchedFile) -> None:
        """Reads them.

        Raises:
            FileRefused: one cannot be used.
        """
        self._files = files
        self._complaint = ""
        self._contents = self._read()
        self._load(self._contents)

    def reload(self) -> None:
        """Reads them again, and logs what came of it if they have changed. They are small: no need to ask for dates."""
        names = ", ".join(file.path for file in self._files)
        try:
            contents = self._read()
            if contents == self._contents:
                self._complaint = ""
                return
            self._load(contents)
        except FileRefused as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.warning("a changed file is not used, what it said before is still valid: %s", error)
            return
        self._contents, self._complaint = contents, ""
        log.info("read again", extra={"files": names})

    def _read(self) -> list[bytes]:
        return [file.read() for file in self._files]

    @abstractmethod
    def _load(self, contents: list[bytes]) -> None:
        """Takes what the files hold, or raises FileRefused and changes nothing."""
