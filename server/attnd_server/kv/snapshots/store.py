"""The folder in which a server leaves its caches, and in which the next one finds them."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from attnd.errors import Exhausted
from attnd_server.attention.config import AttentionConfig
from attnd_server.identity.own_folder import is_still, own_folder
from attnd_server.kv.cache import Cache
from attnd_server.kv.caches import CacheTable
from attnd_server.kv.restored import Restored
from attnd_server.kv.snapshots.folder import (
    TENSORS,
    UNFINISHED,
    SnapshotRefused,
    open_regular,
    read_manifest,
    refuse_if_others_have_a_hand_in_it,
    refused,
    sync_folder,
    write_folder,
)
from attnd_server.kv.snapshots.manifest import Manifest
from attnd_server.kv.snapshots.page_ids import TensorFileRefused
from attnd_server.kv.snapshots.progress import Progress
from attnd_server.kv.snapshots.tensor_file import read_tensors, write_tensors
from attnd_server.kv.snapshots.tensor_layout import Part, TensorLayout

log = logging.getLogger(__name__)

# What a snapshot is called once it was restored, until it is gone.
_CONSUMED = ".restored-"
# id and epoch of the cache.
_NAME = re.compile(r"([0-9a-f]{32})-([0-9a-f]{16})")


class SnapshotStore:
    """One folder of snapshots, for one server at a time.

    Attributes:
        folder: where they are.
        written: ids of the caches of which one is there, whole.
    """

    def __init__(self, folder: str) -> None:
        """Takes the folder, or makes it, and tries whether it can be written to.

        Raises:
            SnapshotRefused: it cannot, another server has it, or other users decide what lies there.
        """
        self.written: set[bytes] = set()
        self._restored: list[Path] = []
        try:
            path, self._lock = own_folder(folder)
            self.folder = Path(path)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (self.folder / f"{UNFINISHED}trial").mkdir(0o700, exist_ok=True)
            self._remove_rests()
        except BlockingIOError:
            os.close(self._lock)
            raise SnapshotRefused(f"snapshot_dir is {folder}, which another server has: give each its own") from None
        except OSError as error:
            raise SnapshotRefused(
                f"snapshot_dir is {folder}, but must be a folder that can be written to: {error}"
            ) from None

    def close(self) -> None:
        """Lets another server have it."""
        os.close(self._lock)

    def found(self) -> list[Path]:
        """The snapshots that are there. What else is there is left alone."""
        snapshots = []
        for path in sorted(self.folder.iterdir()):
            if _NAME.fullmatch(path.name):
                snapshots.append(path)
            else:
                log.warning("no snapshot, left alone", extra={"path": str(path)})
        return snapshots

    def restore(
        self, caches: CacheTable, max_ttl_s: float, refuse_if_stopped: Callable[[], None] = lambda: None
    ) -> None:
        """Loads every snapshot into a cache of its own.

        Args:
            caches: get them.
            max_ttl_s: longest lease, in seconds.
            refuse_if_stopped: called every few megabytes. Raises RestoreStopped.

        Raises:
            SnapshotRefused: one cannot be used, or not all fit. Caches that were loaded before it are in the table.
            RestoreStopped: `refuse_if_stopped` says so.
        """
        snapshots = {path: self._checked(path) for path in self.found()}
        by_id: dict[str, Path] = {}
        for path, (manifest, _) in snapshots.items():
            other = by_id.setdefault(manifest.id, path)
            if other is not path:
                raise refused(path, f"{other.name} is of the same cache in another epoch, and one of them is stale")
        for path, (manifest, layout) in snapshots.items():
            self._load(path, manifest, layout, caches, max_ttl_s, refuse_if_stopped)
            self._restored.append(path)

    def consume(self) -> None:
        """Removes what was restored: from now on the caches change, and it is stale. Raises SnapshotRefused."""
        try:
            self._refuse_if_moved()
            for path in self._restored:
                path.rename(path.with_name(_CONSUMED + path.name))
            sync_folder(self.folder)
        except OSError as error:
            raise SnapshotRefused(
                f"snapshot_dir is {self.folder}, but what was restored must be removed and cannot be: {error}"
            ) from None
        self._restored.clear()
        self._remove_rests()

    def write(self, caches: Sequence[Cache]) -> list[Cache]:
        """Writes each cache, when nothing touches them any more. Returns those that could not be written."""
        lost = []
        for cache in caches:
            try:
                self._write(cache)
                self.written.add(cache.id)
            except Exception as error:
                lost.append(cache)
                told = {**_fields(cache), "num_pages": cache.num_pages_written, "num_bytes": cache.shape.num_bytes}
                log.error("cache lost: its snapshot cannot be written: %s", error, extra=told)
        return lost

    def _refuse_if_moved(self) -> None:
        if not is_still(str(self.folder), self._lock):
            raise OSError("the folder was moved or replaced since the server was started")

    def _write(self, cache: Cache) -> None:
        self._refuse_if_moved()
        pages = [group.written_pages for group in cache.groups]
        num_pages = tuple(map(len, pages))
        layout = TensorLayout(cache.shape, num_pages)
        progress = Progress("writing a snapshot", layout.num_bytes, **_fields(cache))

        def write(file: BinaryIO) -> Manifest:
            sha256 = write_tensors(file, layout, pages, lambda part, ids: _read_pages(cache, part, ids), progress)
            return Manifest(
                id=cache.id.hex(),
                epochs=cache.epochs,
                principal=str(cache.principal),
                name=cache.name,
                ttl_s=cache.ttl_s,
                shape=cache.shape,
                num_pages=num_pages,
                num_bytes=layout.num_bytes,
                sha256=sha256,
            )

        write_folder(self.folder / f"{cache.id.hex()}-{cache.epoch:016x}", write)
        log.info(
            "snapshot written", extra={**_fields(cache), "num_pages": sum(num_pages), "num_bytes": layout.num_bytes}
        )

    def _checked(self, path: Path) -> tuple[Manifest, TensorLayout]:
        refuse_if_others_have_a_hand_in_it(path)
        manifest, layout = read_manifest(path, AttentionConfig)
        if path.name != f"{manifest.id}-{manifest.epochs[-1]:016x}":
            raise refused(path, f"its manifest is of cache {manifest.id} and epoch {manifest.epochs[-1]}")
        return manifest, layout

    def _load(
        self,
        path: Path,
        manifest: Manifest,
        layout: TensorLayout,
        caches: CacheTable,
        max_ttl_s: float,
        refuse_if_stopped: Callable[[], None],
    ) -> None:
        refuse_if_stopped()
        if manifest.principal is None:
            raise refused(path, "principal is absent, as in a client's export: see attnd cache import")
        try:
            cache = caches.create(
                manifest.shape,
                principal=manifest.principal,
                ttl_s=min(manifest.ttl_s, max_ttl_s),
                name=manifest.name,
                restored=Restored(bytes.fromhex(manifest.id), manifest.epochs),
            )
        except Exhausted as error:
            raise refused(path, f"this server cannot hold it: {error}") from None
        progress = Progress("restoring a snapshot", layout.num_bytes, **_fields(cache))

        def store(part: Part, ids: torch.Tensor, data: torch.Tensor) -> None:
            refuse_if_stopped()
            _layer_bytes(cache, part).index_copy_(0, ids.to(cache.device), data.to(cache.device))
            cache.groups[part.group].mark_pages_written(ids)

        with open_regular(path / TENSORS) as file:
            try:
                sha256 = read_tensors(file, layout, manifest.shape, store, progress)
            except TensorFileRefused as error:
                raise refused(path / TENSORS, str(error)) from None
            if sha256 != manifest.sha256 or file.read(1):
                raise refused(path / TENSORS, f"its sha256 is {sha256}, but must be the manifest's {manifest.sha256}")
        cache.filled()
        cache.renew()
        log.info("cache restored", extra={**_fields(cache), "num_pages": sum(layout.num_pages)})

    def _remove_rests(self) -> None:
        for path in self.folder.iterdir():
            if path.name.startswith((UNFINISHED, _CONSUMED)):
                shutil.rmtree(path, ignore_errors=True)


def _fields(cache: Cache) -> dict[str, object]:
    return {"cache": cache.id.hex(), "label": cache.name, "principal": str(cache.principal)}


def _read_pages(cache: Cache, part: Part, pages: torch.Tensor) -> torch.Tensor:
    return _layer_bytes(cache, part).index_select(0, pages.to(cache.device)).cpu()


def _layer_bytes(cache: Cache, part: Part) -> torch.Tensor:
    """Uint8 `[num_pages, part.page_bytes]`, the pages of one layer, sharing memory."""
    group = cache.groups[part.group]
    pages = group.layers[part.layer].k if part.is_k else group.layers[part.layer].v
    return pages.view(len(pages), -1).view(torch.uint8)
