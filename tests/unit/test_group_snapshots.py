"""Snapshots of caches with layer groups: each group comes back bit for bit, and an odd manifest is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from attnd.v1 import cache_pb2
from attnd_server.attention.config import AttentionConfig
from attnd_server.kv.cache import Cache
from attnd_server.kv.cache_shape import CacheShape
from attnd_server.kv.caches import CacheTable
from attnd_server.kv.snapshots import MANIFEST, TENSORS, manifest, tensor_layout
from attnd_server.kv.snapshots.manifest import Manifest, ManifestRefused
from attnd_server.service import validation
from tests.layer_groups import config
from tests.unit.test_snapshots import JSON, refusal, restored, table, written

# Of each group; the second has ids that the others lack.
PAGES = [[0, 3, 11], [24, 2, 7, 9], [6]]
SHAPE: CacheShape[AttentionConfig] = validation.cache_shape(config())


def filled(caches: CacheTable, shape: CacheShape[AttentionConfig] = SHAPE) -> Cache:
    """A cache with random bits, NaNs among them, in some pages of each group."""
    cache = caches.create(shape, principal="alice", ttl_s=90.5, name="groups")
    for group, pages in zip(cache.groups, PAGES, strict=False):
        parts = (group.k_pages,) if group.config.latent else (group.k_pages, group.v_pages)
        for part in (layer for each in parts for layer in each):
            bits = part.view(len(part), -1).view(torch.uint8)
            bits[pages] = torch.randint(256, (len(pages), bits.shape[1]), dtype=torch.uint8)
        group.mark_pages_written(torch.tensor(pages))
    return cache


def bits(cache: Cache) -> list[bytes]:
    return [
        pages.contiguous().view(torch.uint8).numpy().tobytes()
        for group in cache.groups
        for pages in (group.k_pages, group.v_pages)
    ]


@pytest.mark.parametrize("chunk_bytes", [1, 1000, 16 << 20])
def test_every_group_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(tensor_layout, "CHUNK_BYTES", chunk_bytes)
    before = filled(table())
    written(tmp_path, before)
    caches = table()
    (after,) = restored(tmp_path, caches)
    assert after.shape == SHAPE
    assert bits(after) == bits(before)
    assert [group.written_pages.tolist() for group in after.groups] == [sorted(pages) for pages in PAGES]
    assert after.num_pages_written == before.num_pages_written == 8
    known = cache_pb2.CacheRef(id=before.id, epoch=before.epoch)
    assert caches.adopt(known, "alice") is after
    after.groups[0].mark_pages_written(torch.tensor([24 - 20]))
    assert caches.adopt(known, "alice") is after


def test_the_file_is_safetensors_with_the_numbers_of_the_cache(tmp_path: Path) -> None:
    (folder,) = written(tmp_path, filled(table()))
    tensors = load_file(folder / TENSORS)
    assert [tensors.pop(f"groups.{index}.pages").tolist() for index in range(3)] == [sorted(each) for each in PAGES]
    names = [f"layers.{layer}.{part}" for layer in range(6) for part in ("kv" if layer != 3 else "k")]
    assert sorted(tensors) == sorted(names)
    assert tensors["layers.4.v"].shape == (4, 2, 1, 8)
    assert tensors["layers.4.v"].dtype is torch.float8_e4m3fn
    assert tensors["layers.3.k"].shape == (1, 8, 1, 40)


def test_a_version_that_earlier_readers_refuse_is_written_only_where_they_must(tmp_path: Path) -> None:
    flat = AttentionConfig(num_layers=2, num_kv_heads=2, head_dim=16, num_pages=12, page_size=4, dtype=torch.float32)
    (folder,) = written(tmp_path / "flat", filled(table(), CacheShape.of(flat)))
    said = json.loads((folder / MANIFEST).read_bytes())
    assert said["version"] == 1
    assert list(said) == [
        *("format", "version", "id", "epochs", "principal", "name", "ttl_s", "config", "num_pages", "num_bytes"),
        *("sha256", "checksum"),
    ]
    assert said["num_pages"] == 3
    alone = CacheShape((flat,), ((0, 1),))  # asked for with one group, and told so
    (folder,) = written(tmp_path / "alone", filled(table(), alone))
    said = json.loads((folder / MANIFEST).read_bytes())
    assert (said["version"], said["num_pages"]) == (2, [3])
    (after,) = restored(tmp_path / "alone")
    assert after.shape == alone
    assert len(after.info().config.groups) == 1


def rewrite(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A manifest that says something else, with a checksum that is right."""

    def altered(folder: Path) -> None:
        said = json.loads((folder / MANIFEST).read_bytes())
        change(said)
        del said["checksum"]
        said["checksum"] = manifest._checksum(said)
        (folder / MANIFEST).write_bytes(manifest._dump(said))

    return altered


def of_group(index: int, **fields: Any) -> Callable[[Path], None]:
    return rewrite(lambda said: said["groups"][index].update(fields))


ALTERED = {
    "version": (rewrite(lambda said: said.update(version=1)), r"a field is missing or of another type: KeyError"),
    "twice": (of_group(1, layers=[1, 2]), r"groups\[1\]\.layers\[1\] is 2, but must be in one group"),
    "missing": (of_group(1, layers=[1, 6]), r"groups\[1\]\.layers\[1\] is 6, but must be 0\.\.5"),
    "falls": (of_group(1, layers=[4, 1]), r"groups\[1\]\.layers\[1\] is 1, but must be greater than 4"),
    "more": (of_group(1, layers=[1, 4, 5]), r"groups\[1\] has 3 layers, but must have 2, its num_layers"),
    "text": (of_group(1, layers=["1", 4]), "a field is missing or of another type"),
    "none": (of_group(1, layers=None), "a field is missing or of another type"),
    "geometry": (of_group(1, head_dim=23), r"groups\[1\]\.head_dim is 23, but must be a multiple of 8"),
    "dtype": (
        of_group(2, dtype="float16", kv_dtype="float16"),
        r"groups\[2\]\.dtype differs, but must be that",
    ),
    "backend": (of_group(2, backend="naive"), r"groups\[2\]\.backend differs"),
    "flat": (rewrite(lambda said: said.update(is_flat=True)), "is_flat is true of 3 groups, but must be of 1"),
    "fewer": (rewrite(lambda said: said["groups"].pop()), r"groups have no layer 3|must be 0\.\.4"),
    "no groups": (rewrite(lambda said: said.update(groups=[])), "groups have 0 layers together, but must have 1"),
    "counts": (rewrite(lambda said: said["num_pages"].pop()), "num_pages is .* but must be one for each layer group"),
    "count": (
        rewrite(lambda said: said.update(num_pages=[3, 26, 1])),
        "num_pages is 26, but must be one of",
    ),
    "other count": (rewrite(lambda said: said.update(num_pages=[3, 3, 1])), "bytes, but must have the manifest's"),
    "page sizes": (of_group(0, page_size=2, num_pages=24), "bytes, but must have the manifest's"),
    "extra": (of_group(0, more=1), "a field is missing or of another type"),
    "order": (rewrite(lambda said: said["groups"][0].update(layers=[2, 0, 5])), "is 0, but must be greater than 2"),
    "truth": (rewrite(lambda said: said.update(is_flat=0)), "it is not written as attnd writes one"),
}


@pytest.mark.parametrize(("alter", "message"), ALTERED.values(), ids=ALTERED)
def test_what_was_altered_is_refused(tmp_path: Path, alter: Callable[[Path], None], message: str) -> None:
    (folder,) = written(tmp_path, filled(table()))
    alter(folder)
    assert re.search(message, refusal(tmp_path))


def test_pages_of_another_group_are_refused(tmp_path: Path) -> None:
    """Page 24 is one of the second group, and the file says that it is one of the first."""
    (folder,) = written(tmp_path, filled(table()))
    data = bytearray((folder / TENSORS).read_bytes())
    first = 8 + int.from_bytes(data[:8], "little")
    data[first + 8 : first + 12] = (24).to_bytes(4, "little")
    (folder / TENSORS).write_bytes(data)
    assert re.search(r"pages must rise within 0\.\.11", refusal(tmp_path))


TOLD = Manifest("0123456789abcdef" * 2, (1 << 63, 5), "bob", "", 60, SHAPE, (3, 4, 1), 9, "f" * 64)


def test_a_manifest_is_read_as_it_was_written() -> None:
    assert Manifest.from_bytes(TOLD.to_bytes(), AttentionConfig) == TOLD


@settings(max_examples=200, deadline=None)
@given(st.randoms(use_true_random=False), JSON)
def test_a_manifest_that_says_anything_else_is_refused(random: Random, value: object) -> None:
    """With a checksum that is right: whatever is accepted is well formed."""
    said = json.loads(TOLD.to_bytes())
    del said["checksum"]
    group = random.choice(said["groups"])
    where = random.choice([said, group, group["kv_split"]])
    where[random.choice(sorted(where))] = value
    said["checksum"] = manifest._checksum(said)
    try:
        data = json.dumps(said, indent=1).encode() + b"\n"
        read = Manifest.from_bytes(data)
    except ManifestRefused:
        return
    assert read.to_bytes() == data
    assert all(type(number) is int for layers in read.shape.layers for number in (*layers, *read.num_pages))
    tensor_layout.TensorLayout(read.shape, read.num_pages)
