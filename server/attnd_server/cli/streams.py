"""The standard streams of a command: closed, full, of another encoding or cut off, and never a traceback for it.

Must not import torch, nor typer or rich: the health probe uses it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from attnd_server.observe.standard_output import to_nowhere

if TYPE_CHECKING:
    from rich.console import Console

# Exit codes as shells have them.
FAILED, INTERRUPTED = 1, 128 + signal.SIGINT


def output() -> Console:
    """Where results go, without emoji codes: what callers name must not turn into pictures."""
    from rich.console import Console

    return Console(emoji=False)


def errors() -> Console:
    """Where a line about an error goes."""
    from rich.console import Console

    return Console(stderr=True, emoji=False)


def guarded(run: Callable[[], int], name: str) -> int:
    """Runs a command, and tells in one line what the system refused it. Returns its exit code.

    Args:
        run: returns the exit code, or raises SystemExit.
        name: of the command, for that line.
    """
    open_closed()
    code = FAILED
    try:
        try:
            code = run()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else FAILED if ended.code else 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # whoever read has seen enough
        code = code or FAILED
    except OSError as error:
        # What has no name is the output: files of ours are told by those who open them.
        _tell(f"{name}: {error.filename or 'the output cannot be written'}: {error.strerror or error}")
        code = code or FAILED
    _forget_unwritten()
    return code


def open_closed() -> None:
    """Gives each standard stream that is closed its descriptor, which the next file or socket would get instead.

    To write results to a closed output fails, as to a full disk. There is nobody to tell errors to.
    """
    for number, name, flags in ((0, "stdin", os.O_RDONLY), (1, "stdout", os.O_RDONLY), (2, "stderr", os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            if os.open(os.devnull, flags) != number:  # cannot be: lower ones are open by now
                continue
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal's encoding has not
            stream.reconfigure(errors="backslashreplace")


def _tell(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        pass


def _forget_unwritten() -> None:
    """Lets the interpreter's own last flush fail nowhere."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            to_nowhere(stream)
