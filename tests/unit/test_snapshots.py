"""Snapshots: what is written comes back bit for bit, and what is not whole does not come back at all."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from attnd.errors import CacheLost, EpochMismatch
from attnd.v1 import cache_pb2
from attnd_server import build, ending
from attnd_server.attention.config import FP8, AttentionBackend, AttentionConfig, Layout, PrecisionMode
from attnd_server.attention.kernels.pages import StoredTokens
from attnd_server.attention.kv_split import KVSplitConfig
from attnd_server.config import ServerConfig
from attnd_server.execution.work import on_cache
from attnd_server.kv.cache import MAX_EPOCHS, Cache
from attnd_server.kv.cache_shape import CacheShape
from attnd_server.kv.caches import CacheTable
from attnd_server.kv.snapshots import (
    MANIFEST,
    TENSORS,
    Progress,
    SnapshotRefused,
    SnapshotStore,
    manifest,
    tensor_layout,
)
from attnd_server.kv.snapshots.manifest import Manifest

CPU = torch.device("cpu")
CONFIG = AttentionConfig(num_layers=2, num_kv_heads=2, head_dim=16, num_pages=9, page_size=4, dtype=torch.float32)
PAGES = [1, 2, 7]
GEOMETRIES = {
    "float32": CONFIG,
    "float16-distinct": replace(
        CONFIG, dtype=torch.float16, kv_dtype=None, v_dtype=None, layout=Layout.DISTINCT, head_dim_v=8
    ),
    "bfloat16": replace(CONFIG, dtype=torch.bfloat16, kv_dtype=None, v_dtype=None, precision=PrecisionMode.FP32),
    "fp8": replace(
        CONFIG, kv_dtype=FP8, v_dtype=None, k_scales=(0.1,), v_scales=(1e-3, 7.0), backend=AttentionBackend.NAIVE
    ),
    "fp8-distinct": replace(
        CONFIG,
        kv_dtype=FP8,
        v_dtype=None,
        dtype=torch.bfloat16,
        layout=Layout.DISTINCT,
        kv_split=KVSplitConfig(64, 3, True),
    ),
    "fp8-k": replace(CONFIG, kv_dtype=FP8, k_scales=(0.1, 0.2), window=7),
    "fp8-v-distinct": replace(CONFIG, v_dtype=FP8, v_scales=(0.1,), layout=Layout.DISTINCT, head_dim_v=8),
    "latent": replace(CONFIG, num_kv_heads=1, head_dim_v=8, latent=True),
    "latent-fp8": replace(CONFIG, num_kv_heads=1, kv_dtype=FP8, v_dtype=None, k_scales=(0.5,), latent=True),
}


def table(**limits: object) -> CacheTable:
    return CacheTable(ServerConfig(**limits), CPU, kv_bytes=1 << 20)


def filled(caches: CacheTable, config: AttentionConfig = CONFIG, pages: list[int] = PAGES, **lease: object) -> Cache:
    """A cache with random bits, NaNs among them, in some of its pages."""
    cache = caches.create(config, **{"principal": "alice", "ttl_s": 90.5, "name": "a b\u00e9\n"} | lease)
    (group,) = cache.groups
    for layer in range(config.num_layers):
        for part in (group.k_pages[layer],) if config.latent else (group.k_pages[layer], group.v_pages[layer]):
            part.view(config.num_pages, -1).view(torch.uint8)[pages] = torch.randint(
                256, (len(pages), part[0].nbytes), dtype=torch.uint8
            )
    group.mark_pages_written(torch.tensor(pages, dtype=torch.int64))
    return cache


def bits(cache: Cache) -> list[bytes]:
    return [
        pages.contiguous().view(torch.uint8).numpy().tobytes()
        for pages in (cache.groups[0].k_pages, cache.groups[0].v_pages)
    ]


@contextmanager
def opened(folder: Path) -> Iterator[SnapshotStore]:
    store = SnapshotStore(str(folder))
    yield store
    store.close()


def written(folder: Path, *caches: Cache) -> list[Path]:
    with opened(folder) as store:
        assert store.write(caches) == []
        return store.found()


def restored(folder: Path, caches: CacheTable | None = None, max_ttl_s: float = 99) -> list[Cache]:
    caches = caches or table()
    with opened(folder) as store:
        store.restore(caches, max_ttl_s)
        store.consume()
    return caches.all()


@pytest.mark.parametrize("config", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("chunk_bytes", [1, 1000, 16 << 20])
def test_everything_comes_back(tmp_path: Path, monkeypatch, config: AttentionConfig, chunk_bytes: int) -> None:
    monkeypatch.setattr(tensor_layout, "CHUNK_BYTES", chunk_bytes)
    before = filled(table(), config)
    written(tmp_path, before)
    (after,) = restored(tmp_path)
    assert after.shape == CacheShape.of(config)
    assert bits(after) == bits(before)
    assert (after.id, after.principal, after.name, after.ttl_s) == (before.id, "alice", before.name, 90.5)
    assert after.groups[0].written_pages.tolist() == PAGES
    assert after.epoch != before.epoch
    assert after.restored.epochs == (before.epoch,)
    assert 80 < after.info().expires_in_s <= 90.5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", GEOMETRIES.values(), ids=GEOMETRIES)
def test_the_file_is_safetensors(tmp_path: Path, config: AttentionConfig) -> None:
    cache = filled(table(), config)
    (folder,) = written(tmp_path, cache)
    tensors = load_file(folder / TENSORS)
    assert tensors.pop("pages").tolist() == PAGES
    (group,) = cache.groups
    kinds = [("k", group.k_pages, config.kv_dtype), ("v", group.v_pages, config.v_dtype)][: 1 if config.latent else 2]
    assert sorted(tensors) == [f"layers.{layer}.{name}" for layer in range(2) for name, _, _ in kinds]
    for layer in range(2):
        for name, pages, dtype in kinds:
            tensor = tensors[f"layers.{layer}.{name}"]
            assert tensor.dtype is dtype
            assert tensor.shape == (len(PAGES), *pages.shape[2:])
            assert torch.equal(tensor.view(torch.uint8), pages[layer].view(torch.uint8)[PAGES])


def test_size_follows_use_and_only_the_user_reads_it(tmp_path: Path) -> None:
    caches = table()
    big = filled(caches, replace(CONFIG, num_pages=200), pages=[0])
    (folder,) = written(tmp_path / "new" / "folder", big)
    assert (folder / TENSORS).stat().st_size < big.shape.num_bytes / 100
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (folder.parent, folder, *sorted(folder.iterdir()))]
    assert modes == [0o700, 0o700, 0o600, 0o600]


def test_an_unused_cache_and_none_at_all(tmp_path: Path) -> None:
    assert restored(tmp_path) == []
    (folder,) = written(tmp_path, filled(table(), pages=[]))
    with safetensors.safe_open(folder / TENSORS, "pt") as file:
        assert file.get_slice("layers.1.v").get_shape() == [0, *CONFIG.v_shape[1:]]
    (cache,) = restored(tmp_path)
    assert cache.num_pages_written == 0
    assert not cache.groups[0].k_pages.any()


def test_adoption_knows_the_epoch_and_the_principal(tmp_path: Path) -> None:
    before = filled(table())
    known = before.info().cache
    written(tmp_path, before)
    caches = table()
    restored(tmp_path, caches)
    assert [info.awaits_adoption for info in (cache.info() for cache in caches.all())] == [True]
    with pytest.raises(EpochMismatch, match=r"has restored this cache: adopt it .*cache\.adopt\(\)"):
        caches.get(known, "alice")
    with pytest.raises(EpochMismatch, match="the KV is gone"):
        caches.get(known, "bob")
    unknown = cache_pb2.CacheRef(id=bytes(16), epoch=known.epoch)
    answers = []
    for ref, who in ((known, "bob"), (unknown, "bob"), (unknown, "alice")):
        with pytest.raises(CacheLost) as lost:
            caches.adopt(ref, who)
        answers.append((type(lost.value), str(lost.value).replace(ref.id.hex(), "ID"), lost.value.field))
    assert set(answers) == {(CacheLost, answers[0][1], "cache.id")}
    now = caches.adopt(known, "alice").info().cache
    assert caches.adopt(known, "alice").info().cache == now  # an answer may get lost
    assert caches.adopt(now, "alice").info().cache == now
    assert caches.get(now, "alice").info().awaits_adoption is False
    with pytest.raises(EpochMismatch, match=f"restored from a snapshot of epoch {known.epoch}, which may be without"):
        caches.adopt(cache_pb2.CacheRef(id=known.id, epoch=7), "alice")


def store_at(cache: Cache, page: int) -> None:
    """As a call does it: marks, then stores."""
    (group,) = cache.groups
    config, slot = group.config, torch.tensor([page * group.config.page_size])
    group.mark_written(slot)
    ones = [torch.ones(1, config.num_kv_heads, dim) for dim in (config.head_dim, config.head_dim_v)]
    group.store(0, *(each.to(config.dtype) for each in ones), StoredTokens(slot))


@pytest.mark.parametrize("how", ["store", "copy"])
def test_an_epoch_is_used_up_once_a_page_of_it_was_changed(tmp_path: Path, how: str) -> None:
    """Two workers know the cache; the second comes when the first has gone on."""
    before = filled(table())
    known = before.info().cache
    had = before.groups[0].written_pages.tolist()
    free = next(page for page in range(before.shape.num_pages) if page not in had)
    written(tmp_path, before)
    caches = table()
    (cache,) = restored(tmp_path, caches)
    now = caches.adopt(known, "alice").info().cache
    store_at(caches.get(now, "alice"), free)
    assert caches.adopt(known, "alice").info().cache == now  # the second's pages are all there; or an answer was lost
    if how == "store":
        store_at(caches.get(now, "alice"), had[-1])
    else:
        caches.get(now, "alice").groups[0].copy_pages(torch.tensor([free]), torch.tensor(had[:1]))
    for _ in range(2):
        with pytest.raises(EpochMismatch, match="somebody has adopted it and stored into pages that it had"):
            caches.adopt(known, "alice")
    with pytest.raises(EpochMismatch, match="and the KV is gone"):
        caches.get(known, "alice")
    assert caches.adopt(now, "alice") is cache  # whoever went on has the new epoch, and may ask again
    with pytest.raises(CacheLost, match="no such cache exists"):
        caches.adopt(now, "bob")


def test_a_snapshot_without_pages_has_none_that_could_be_changed(tmp_path: Path) -> None:
    before = table().create(CONFIG, principal="alice", ttl_s=60, name="")
    written(tmp_path, before)
    caches = table()
    restored(tmp_path, caches)
    known = before.info().cache
    now = caches.adopt(known, "alice").info().cache
    store_at(caches.get(now, "alice"), 0)
    assert caches.adopt(known, "alice").info().cache == now


def test_nobody_used_it_between_two_restarts(tmp_path: Path) -> None:
    """Nor can it have changed: whoever knows it from either life goes on."""
    caches = table()
    known = [filled(caches).info().cache]
    for _ in range(MAX_EPOCHS + 2):
        written(tmp_path, *caches.all())
        caches = table()
        restored(tmp_path, caches)
        known.append(caches.adopt(known[-1], "alice").info().cache)  # and then says nothing more
    for ref in known[-MAX_EPOCHS:]:
        assert caches.adopt(ref, "alice").epoch == caches.epoch
    with pytest.raises(EpochMismatch):
        caches.adopt(known[0], "alice")


def test_a_stale_snapshot_is_not_taken_for_the_current_state(tmp_path: Path) -> None:
    first = filled(table())
    (folder,) = written(tmp_path / "snapshots", first)
    shutil.copytree(folder, tmp_path / "kept")
    caches = table()
    restored(tmp_path / "snapshots", caches)
    now = caches.adopt(first.info().cache, "alice").info().cache
    caches.get(now, "alice")  # stores something
    shutil.copytree(tmp_path / "kept", folder)  # the server was killed, and somebody puts the snapshot back
    later = table()
    restored(tmp_path / "snapshots", later)
    with pytest.raises(EpochMismatch, match="may be without what was stored since"):
        later.adopt(now, "alice")
    # Or it was asked to stop, and both are there.
    shutil.copytree(tmp_path / "kept", folder)
    written(tmp_path / "snapshots", *caches.all())
    with pytest.raises(SnapshotRefused, match="is of the same cache in another epoch, and one of them is stale"):
        restored(tmp_path / "snapshots")


def refusal(folder: Path) -> str:
    """Why the snapshots are refused. Nothing of them may be in the table or go from the folder."""
    before = sorted(folder.rglob("*"))
    with opened(folder) as store, pytest.raises(SnapshotRefused) as refused:
        store.restore(table(), 99)
    assert sorted(folder.rglob("*")) == before
    assert "move it away" in str(refused.value)
    return str(refused.value)


def link_of(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        target = folder / name if name else folder
        elsewhere = folder.parent.parent / "elsewhere"
        target.rename(elsewhere)
        target.symlink_to(elsewhere)

    return change


def hard_link(folder: Path) -> None:
    os.link(folder / TENSORS, folder.parent.parent / "another-name")


def pipe(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST, 0o600)


def mode_of(name: str, mode: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name if name else folder).chmod(mode)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (link_of(""), "it cannot be opened as a folder that is no link"),
        (link_of(TENSORS), "it is a symbolic link"),
        (link_of(MANIFEST), "it is a symbolic link"),
        (pipe, "it is no regular file"),
        (hard_link, "it has another name elsewhere"),
        (mode_of("", 0o770), "it has mode 0770, but must let nobody else write: chmod go-w"),
        (mode_of("", 0o707), "it has mode 0707"),
        (mode_of(TENSORS, 0o660), "it has mode 0660"),
        (mode_of(MANIFEST, 0o602), "it has mode 0602"),
    ],
)
def test_what_others_have_a_hand_in_is_refused(tmp_path: Path, change: Callable[[Path], None], why: str) -> None:
    (folder,) = written(tmp_path / "snapshots", filled(table()))
    change(folder)
    assert why in refusal(tmp_path / "snapshots")


def test_what_is_another_users_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder,) = written(tmp_path, filled(table()))
    if os.geteuid() == 0:
        os.chown(folder / TENSORS, 12345, -1)
    else:
        fstat = os.stat
        stranger = os.stat_result((0o100600, 0, 0, 1, 12345, 0, *[0] * 4))
        monkeypatch.setattr(os, "stat", lambda name, **how: stranger if how else fstat(name))
    assert "it is user 12345's, but must be this process' user" in refusal(tmp_path)


def test_a_folder_of_snapshots_must_not_be_a_link_and_lies_behind_one_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(SnapshotRefused, match=r"is a symbolic link to .*real, but must be the folder itself"):
        SnapshotStore(str(tmp_path / "link"))
    with opened(tmp_path / "link" / "below") as store:
        assert store.folder == tmp_path / "real" / "below"
        (tmp_path / "link").unlink()
        (tmp_path / "theirs" / "below").mkdir(0o700, parents=True)
        (tmp_path / "link").symlink_to(tmp_path / "theirs")
        assert store.write([filled(table())]) == []
        assert len(store.found()) == 1
    assert list((tmp_path / "theirs" / "below").iterdir()) == []


def test_a_folder_that_was_replaced_meanwhile_gets_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path / "snapshots") as store:
        (tmp_path / "snapshots").rename(tmp_path / "moved")
        (tmp_path / "snapshots").symlink_to(tmp_path / "moved")
        cache = filled(table())
        assert store.write([cache]) == [cache]
        assert "moved or replaced since the server was started" in caplog.text


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    (folder,) = written(tmp_path, filled(table()))
    for name in (MANIFEST, TENSORS):
        data = (folder / name).read_bytes()
        for position in {*range(0, len(data), 1 + len(data) // 150), len(data) - 1}:
            flipped = bytearray(data)
            flipped[position] ^= 1 << position % 8
            (folder / name).write_bytes(flipped)
            assert f"{folder / name} is refused" in refusal(tmp_path)
        (folder / name).write_bytes(data)
    assert len(restored(tmp_path)) == 1


def test_every_truncation_and_more_are_noticed(tmp_path: Path) -> None:
    (folder,) = written(tmp_path, filled(table()))
    for name in (MANIFEST, TENSORS):
        data = (folder / name).read_bytes()
        for size in (0, 1, 7, 8, len(data) // 2, len(data) - 1):
            (folder / name).write_bytes(data[:size])
            assert str(folder / name) in refusal(tmp_path)
        (folder / name).write_bytes(data + b"\n")
        assert str(folder / name) in refusal(tmp_path)
        (folder / name).write_bytes(data)
    assert len(restored(tmp_path)) == 1


def rewrite(**fields: object) -> Callable[[Path], None]:
    """A manifest that says something else, with a checksum that is right."""

    def change(folder: Path) -> None:
        said = json.loads((folder / MANIFEST).read_bytes()) | fields
        del said["checksum"]
        said["checksum"] = manifest._checksum(said)
        (folder / MANIFEST).write_bytes(manifest._dump(said))

    return change


def swap_pages(folder: Path) -> None:
    """Pages that do not rise, and a checksum that is right."""
    data = bytearray((folder / TENSORS).read_bytes())
    first = 8 + int.from_bytes(data[:8], "little")
    data[first : first + 4], data[first + 4 : first + 8] = data[first + 4 : first + 8], data[first : first + 4]
    (folder / TENSORS).write_bytes(data)


def to_link(folder: Path) -> None:
    (folder / TENSORS).rename(folder.parent / "elsewhere")
    (folder / TENSORS).symlink_to(folder.parent / "elsewhere")


ALTERED = {
    "version": (rewrite(version=3), "version is 3, but must be 1 or 2 for this version of attnd"),
    "version-of-groups": (rewrite(version=2), "a field is missing or of another type: KeyError\\('groups'\\)"),
    "format": (rewrite(format="other"), "format must be attnd-snapshot"),
    "another-id": (rewrite(id="0" * 32), f"its manifest is of cache {'0' * 32} and epoch"),
    "path-in-id": (rewrite(id="../" + "0" * 29), "id is .* but must be 32 hexadecimal digits"),
    "epochs": (rewrite(epochs=[]), r"epochs is \(\), but must be 64-bit numbers"),
    "epoch-type": (rewrite(epochs=[5]), "it is not written as attnd writes one"),
    "ttl": (rewrite(ttl_s=-1.0), r"ttl_s is -1\.0, but must be a positive number of seconds"),
    "num-pages": (rewrite(num_pages=10), "num_pages is 10, but must be one of the cache's"),
    "fewer-pages": (rewrite(num_pages=2), "bytes, but must have the manifest's num_bytes"),
    "sha256": (rewrite(sha256="0" * 64), f"its sha256 is [0-9a-f]+, but must be the manifest's {'0' * 64}"),
    "more-fields": (rewrite(file="../../etc/passwd"), "it is not written as attnd writes one"),
    "geometry": (
        rewrite(config=manifest._config_to_json(CONFIG) | {"head_dim": 7}),
        "config.head_dim is 7, but must be",
    ),
    "layout": (rewrite(config=manifest._config_to_json(CONFIG) | {"layout": "odd"}), "'odd' is not a valid Layout"),
    "header": (
        rewrite(config=manifest._config_to_json(replace(CONFIG, layout=Layout.DISTINCT))),
        "its header is not that of the manifest's geometry|bytes, but must have",  # which is longer
    ),
    "export": (rewrite(principal=None), "principal is absent, as in a client's export: see attnd cache import"),
    "pages": (swap_pages, r"pages must rise within 0\.\.8"),
    "no-tensors": (lambda folder: (folder / TENSORS).unlink(), "nothing else, but not so here: kv.safetensors"),
    "no-manifest": (lambda folder: (folder / MANIFEST).unlink(), "nothing else, but not so here: manifest.json"),
    "one-more": (lambda folder: (folder / "notes").touch(), "nothing else, but not so here: notes"),
    "link": (to_link, f"{TENSORS} is refused: it cannot be opened"),
    "huge-manifest": (
        lambda folder: (folder / MANIFEST).write_bytes(b" " * (manifest.MAX_BYTES + 1)),
        "it is larger than 67108864 bytes",
    ),
    "deep-manifest": (lambda folder: (folder / MANIFEST).write_bytes(b"[" * 100_000), "it is no JSON"),
    "list": (lambda folder: (folder / MANIFEST).write_bytes(b"[]"), "format must be attnd-snapshot"),
}


@pytest.mark.parametrize(("alter", "message"), ALTERED.values(), ids=ALTERED)
def test_what_was_altered_is_refused(tmp_path: Path, alter: Callable[[Path], None], message: str) -> None:
    (folder,) = written(tmp_path, filled(table()))
    alter(folder)
    assert re.search(message, refusal(tmp_path))


def test_one_refused_snapshot_lets_none_be_restored(tmp_path: Path) -> None:
    caches = table()
    folders = written(tmp_path, filled(caches), filled(caches))
    (folders[1] / TENSORS).write_bytes(b"")
    assert folders[1].name in refusal(tmp_path)
    shutil.rmtree(folders[1])
    assert [cache.id.hex() for cache in restored(tmp_path)] == [folders[0].name[:32]]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    caches = table()
    written(tmp_path, filled(caches), filled(caches))
    with opened(tmp_path) as store, pytest.raises(SnapshotRefused, match=r"cannot hold it: .* the server's limit is 1"):
        store.restore(table(max_caches=1), 99)
    small = CacheTable(ServerConfig(), CPU, kv_bytes=CONFIG.num_bytes)
    with opened(tmp_path) as store, pytest.raises(SnapshotRefused, match="cannot hold it: num_pages is 9"):
        store.restore(small, 99)
    assert {cache.ttl_s for cache in restored(tmp_path, max_ttl_s=5)} == {5}


def test_other_things_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    (tmp_path / ".writing-0123").mkdir()  # of a server that was killed
    (tmp_path / ".writing-0123" / TENSORS).write_bytes(b"half")
    assert restored(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["lost+found"]


def test_two_servers_do_not_share_a_folder(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(SnapshotRefused, match="which another server has"):
        SnapshotStore(str(tmp_path))
    with opened(tmp_path):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(SnapshotRefused, match="but must be a folder that can be written to"):
        SnapshotStore(str(tmp_path / "file"))


def test_a_full_disk_loses_one_cache_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The limit on a file's size is as good as a small disk: the write that goes beyond fails."""
    caches = table()
    big, small = filled(caches, pages=list(range(9))), filled(caches, pages=[3], name="small")
    kept = written(tmp_path, filled(caches))  # of before
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(tmp_path) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * CONFIG.num_bytes // 4, limits[1]))
        try:
            lost = store.write([big, small])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert lost == [big]
        assert {path.name[:32] for path in store.found()} == {kept[0].name[:32], small.id.hex()}
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "cache lost: its snapshot cannot be written: [Errno 27] File too large" in record.getMessage()
    assert (record.cache, record.num_pages) == (big.id.hex(), 9)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert len(restored(tmp_path)) == 2


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failure_at_the_end_leaves_nothing_half(tmp_path: Path, monkeypatch, call: str) -> None:
    cache = filled(table())

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with opened(tmp_path) as store:
        monkeypatch.setattr(os, call, fail)
        assert store.write([cache]) == [cache]
        monkeypatch.undo()
        assert list(tmp_path.iterdir()) == []
        assert store.write([cache]) == []


@pytest.mark.parametrize("fault", ["", "CUDA error: an illegal memory access was encountered"])
def test_a_call_that_runs_costs_its_own_cache_alone_and_a_fault_all(
    tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    monkeypatch.setattr(ending, "QUIET_S", 0.01)
    service = build.build_service(ServerConfig(device="cpu"))
    executor, go_on, runs = service.executor, threading.Event(), threading.Event()
    cache, other = filled(service.caches), filled(service.caches)

    def work() -> bytes:
        runs.set()
        return str(go_on.wait(20)).encode()

    executor.submit(on_cache(cache, work), lambda result, error: None)
    assert runs.wait(20)
    executor.end_running("it ends")
    executor.close(timeout_s=0.01)
    with opened(tmp_path) as store:
        if fault:
            executor.faults.fail(fault)
            assert ending.save_caches([cache, other], executor, store) == [cache, other]
            assert "cache lost: the device has failed" in caplog.text
            assert store.found() == []
        else:
            assert ending.save_caches([cache, other], executor, store) == [cache]  # a call runs on this one alone
            assert "cache lost: a call of it still runs" in caplog.text
            assert [path.name[:32] for path in store.found()] == [other.id.hex()]
        go_on.set()
        executor.close()
        if not fault:
            assert ending.save_caches([cache], executor, store) == []
            assert len(store.found()) == 2
    assert executor.run_now(lambda: b"late") is None


def test_a_manifest_is_read_as_it_was_written() -> None:
    for config in GEOMETRIES.values():
        told = Manifest("0123456789abcdef" * 2, (1 << 63, 5), "bob", "", 60, CacheShape.of(config), (3,), 9, "f" * 64)
        assert Manifest.from_bytes(told.to_bytes(), AttentionConfig) == told


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(GEOMETRIES)), st.randoms(use_true_random=False), JSON)
def test_a_manifest_that_says_anything_else_is_refused(name: str, random: Random, value: object) -> None:
    """With a checksum that is right: whatever is accepted is well formed."""
    told = Manifest(
        "0123456789abcdef" * 2, (1 << 63, 5), "bob", "", 60, CacheShape.of(GEOMETRIES[name]), (3,), 9, "f" * 64
    )
    said = json.loads(told.to_bytes())
    del said["checksum"]
    config = said["config"] if "config" in said else said["groups"][0]
    where = random.choice([said, config, config["kv_split"]])
    where[random.choice(sorted(where))] = value
    said["checksum"] = manifest._checksum(said)
    try:
        data = json.dumps(said, indent=1).encode() + b"\n"
        read = Manifest.from_bytes(data)
    except manifest.ManifestRefused:
        return
    assert read.to_bytes() == data
    assert type(read.num_bytes) is type(read.num_pages[0]) is type(read.shape.common.page_size) is int
    tensor_layout.TensorLayout(read.shape, read.num_pages)


def test_progress_is_logged(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(Progress, "PERIOD_S", 0)
    progress = Progress("writing", 200, cache="c")
    progress.advance(50)
    progress.advance(100)
    assert [(record.getMessage(), record.percent, record.cache) for record in caplog.records] == [
        ("writing", 25, "c"),
        ("writing", 75, "c"),
    ]
