"""Which extra of the package brings a module that is not installed, in one line for people."""

from __future__ import annotations

# By a module's top name, the smallest extra that brings it.
EXTRAS = {
    "accelerate": "demo",
    "cachetools": "server",
    "cuda": "cuda",
    "gguf": "demo",
    "grpc_health": "server",
    "grpc_reflection": "server",
    "numpy": "server",
    "opentelemetry": "otel",
    "prometheus_client": "server",
    "rich": "cli",
    "torch": "torch",
    "transformers": "transformers",
    "typer": "cli",
}
# Extras that no other brings along.
_APART = ("cuda", "otel")


def missing(error: ModuleNotFoundError, extra: str = "") -> str | None:
    """What to install; None: no extra brings what is missing.

    Args:
        error: what its import raised.
        extra: the one that brings all that is needed here; "": the smallest that brings the module.
    """
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        return None
    own = EXTRAS[module]
    return f"{module} is not installed, {where(own if own in _APART else extra or own)}"


def where(extra: str) -> str:
    """How one gets what an extra brings."""
    return f"which comes with attnd[{extra}]; in a checkout: pip install '.[{extra}]'"


def as_missing(error: ModuleNotFoundError, what: str, extra: str = "") -> ModuleNotFoundError:
    """`error`, or one that says what to install for `what`; `extra` as `missing` has it."""
    why = missing(error, extra)
    return ModuleNotFoundError(f"{what} cannot be had: {why}", name=error.name) if why else error
