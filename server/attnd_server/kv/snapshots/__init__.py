"""Caches as files: what a server writes when it ends, and what `attnd cache export` writes.

A snapshot is a folder with two files. `kv.safetensors` holds the pages that were written to, as their bytes are in
whatever layout; `manifest.json` says whose they were and in which geometry, and has the checksums. A snapshot is used
whole or refused whole.

Commands export and import without torch, which the server's own store needs: it is loaded when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnd_server.kv.snapshots.folder import (
    MANIFEST,
    TENSORS,
    RestoreStopped,
    SnapshotRefused,
    read_manifest,
    write_folder,
)
from attnd_server.kv.snapshots.manifest import Manifest
from attnd_server.kv.snapshots.progress import Progress
from attnd_server.kv.snapshots.tensor_layout import TensorLayout

if TYPE_CHECKING:
    from attnd_server.kv.snapshots.store import SnapshotStore

__all__ = [
    "MANIFEST",
    "TENSORS",
    "Manifest",
    "Progress",
    "RestoreStopped",
    "SnapshotRefused",
    "SnapshotStore",
    "TensorLayout",
    "read_manifest",
    "write_folder",
]


def __getattr__(name: str) -> Any:
    if name == "SnapshotStore":
        from attnd_server.kv.snapshots.store import SnapshotStore

        return SnapshotStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
