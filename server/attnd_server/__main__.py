"""The command `attnd`, also as `python -m attnd_server`. Says in one line which extra is missing, if one is."""

from __future__ import annotations

import signal
import sys

# By a command, the extra that brings all that it needs; others need no more than `cli`.
_EXTRAS = {"serve": "server", "demo": "demo", "chat": "demo"}


def main() -> int:
    """Runs the command line. Returns the exit code."""
    # Ctrl-C ends the process at once and without a traceback, until something has begun that must be ended well.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from attnd_server.cli.streams import guarded

    return guarded(_run, "attnd")


def _run() -> int:
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    try:
        from attnd_server.cli.main import app

        # That of a server comes when it serves.
        if command != "serve" and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        app(prog_name="attnd")
    except ModuleNotFoundError as error:
        from attnd.extras import missing

        why = missing(error, _EXTRAS.get(command, ""))
        if why is None:
            raise
        print(f"attnd: {why}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
