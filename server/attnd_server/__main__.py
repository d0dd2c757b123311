"""The command `attnd`, also as `python -m attnd_server`. Says in one line which extra is missing, if one is."""

from __future__ import annotations

import sys

# What installs a module that may be missing: the extra of the package, by the module's top name.
_EXTRAS = {
    "accelerate": "demo",
    "cachetools": "server",
    "gguf": "demo",
    "grpc_health": "server",
    "grpc_reflection": "server",
    "numpy": "server",
    "prometheus_client": "server",
    "rich": "server",
    "torch": "server",
    "transformers": "demo",
    "typer": "server",
}


def main() -> int:
    """Runs the command line. Returns the exit code, or exits with it."""
    try:
        from attnd_server.cli.main import app

        app(prog_name="attnd")
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in _EXTRAS:
            raise
        print(f"attnd: {module} is not installed; try: pip install 'attnd[{_EXTRAS[module]}]'", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
