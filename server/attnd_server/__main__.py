"""The command `attnd`, also as `python -m attnd_server`. Says in one line which extra is missing, if one is."""

from __future__ import annotations

import sys

from attnd_server.cli import streams

# By a command, the extra that brings all that it needs; others need no more than `cli`.
_EXTRAS = {"serve": "server", "demo": "demo", "chat": "demo"}


def main() -> int:
    """Runs the command line. Returns the exit code."""
    streams.end_at_interrupts()
    return streams.guarded(_run, "attnd")


def _run() -> int:
    try:
        from attnd_server.cli.main import app

        streams.raise_at_interrupts()
        app(prog_name="attnd")
    except ModuleNotFoundError as error:
        from attnd.extras import missing

        why = missing(error, _EXTRAS.get(sys.argv[1] if len(sys.argv) > 1 else "", ""))
        if why is None:
            raise
        print(f"attnd: {why}", file=sys.stderr)
        return streams.FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
