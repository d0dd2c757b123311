"""What a server says on its standard output: one line. It serves all the same where nobody can hear it."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

log = logging.getLogger(__name__)


def say(line: str) -> None:
    """Prints a line; an output that is full or closed is one in the log, and takes nothing any more."""
    try:
        print(line, flush=True)
    except OSError as error:
        log.warning("standard output cannot be written to: %s", error.strerror)
        to_nowhere(sys.stdout)


def to_nowhere(stream: TextIO) -> None:
    """Lets a stream take what is written to it, and what is left in its buffer, and keep nothing."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
