"""What a process has open, while it may close some of it."""

from __future__ import annotations

import os
from pathlib import Path


def open_links(pid: int) -> list[str]:
    """What each descriptor of a process refers to, but for those that are closed meanwhile."""
    links = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.append(os.readlink(path))
        except FileNotFoundError:  # that of the listing itself, for one
            pass
    return links
