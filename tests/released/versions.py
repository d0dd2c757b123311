"""The wheels of released versions, and their processes, in which nothing of this checkout is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from tests.servers import ROOT, ServerProcess

WHEELS = {path.parent.name: path for path in sorted((ROOT / "tests" / "data").glob("*/*.whl"))}
TIMEOUT_S = 120


def unpack(version: str, folder: Path) -> Path:
    """The folder with the packages of a version."""
    with zipfile.ZipFile(WHEELS[version]) as wheel:
        wheel.extractall(folder)
    return folder


def environment(packages: Path) -> dict[str, str]:
    """In which `packages` are found, what they need, and no other attnd."""
    others = [path for path in sys.path if path and not (Path(path) / "attnd").exists()]
    others = [path for path in others if not (Path(path) / "attnd_server").exists()]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(packages), *others])}


def make_calls(packages: Path, address: str) -> dict[str, Any]:
    """What `tests.released.calls` of a released client's process has found."""
    command = [sys.executable, "-m", "tests.released.calls", address]
    ended = subprocess.run(
        command, env=environment(packages), cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    assert Path(found["file"]).is_relative_to(packages), found["file"]
    return found


class ReleasedServer(ServerProcess):
    """`attnd serve` of a released version."""

    def __init__(self, packages: Path, log_path: Path, *options: str, port: int = 0) -> None:
        """Of the version that lies in `packages`."""
        self._packages = packages
        super().__init__(log_path, *options, port=port)

    def environment(self) -> dict[str, str]:  # type: ignore[override]
        """In which it runs."""
        return environment(self._packages)
