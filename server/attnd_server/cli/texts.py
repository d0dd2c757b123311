"""What is shown to people: names that somebody else chose, amounts of memory, errors."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console
from rich.text import Text


def shown(text: object) -> Text:
    """What somebody else named, for a table or a line: no markup, no emoji, no control characters."""
    from attnd.protocol.printable import printable

    return Text(printable(str(text)))


def told(errors: Console, command: str, error: object, *, style: str = "red") -> None:
    """Prints an error in one line."""
    # gRPC's details may come on several lines.
    line = shown(f"attnd {command}: {' '.join(str(error).split())}")
    errors.print(line, style=style, soft_wrap=True, highlight=False)


def bytes_text(value: float) -> str:
    """`value` bytes with a unit that keeps the number short: 512 B, 1.5 KiB, 12.0 GiB."""
    if value < 1024:
        return f"{value:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} TiB"


def enum_name(enum: Any, value: int) -> str:
    """The end of an enum value's name, as people type it: BACKEND_TRITON_GROUPED is triton_grouped."""
    if value not in enum.values():
        return str(value)
    name: str = enum.Name(value)
    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.DESCRIPTOR.name).upper()
    return name.removeprefix(f"{prefix}_").lower()
