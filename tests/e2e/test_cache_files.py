"""`attnd cache export` and `import`: a cache on a real server to files and back, bit for bit."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import attnd
from attnd_server.attention.config import FP8, AttentionConfig
from attnd_server.cli import cache_files as transfer
from attnd_server.cli import main as cli
from attnd_server.kv.snapshots import MANIFEST, TENSORS, read_manifest
from tests import layer_groups

GEOMETRY: dict[str, Any] = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "num_pages": 64, "page_size": 4}
# Pages 3, 4 and 62, some of them in part.
SLOTS = [12, 13, 19, 248, 249, 250, 251]
GEOMETRIES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16-distinct": {"dtype": "bfloat16", "layout": "distinct", "head_dim_v": 8},
    "float16": {"dtype": "float16", "kv_split": attnd.KVSplit(chunk_size=64, batch_invariant=True), "backend": "naive"},
    "fp8": {"dtype": "bfloat16", "kv_dtype": "float8_e4m3fn", "k_scales": [0.0123, 7.0], "v_scales": 1e-3},
    "fp8-distinct": {"dtype": "float16", "kv_dtype": "float8_e4m3fn", "k_scales": 0.07, "layout": "distinct"},
    "fp8-k-distinct": {
        "dtype": "bfloat16",
        "kv_dtype": "float8_e4m3fn",
        "v_dtype": "bfloat16",
        "k_scales": 0.07,
        "layout": "distinct",
    },
    "fp8-v": {"dtype": "float16", "v_dtype": "float8_e4m3fn", "v_scales": [0.01, 2.0]},
}


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(cli.app, ["cache", *map(str, arguments)])
    result.text = " ".join(re.sub("[─│╭╮╰╯]", " ", result.output).split())
    return result


@pytest.fixture
def filled(client: attnd.Client) -> Iterator[Callable[..., attnd.Cache]]:
    caches: list[attnd.Cache] = []

    def make(**geometry: Any) -> attnd.Cache:
        cache = client.create_cache(**GEOMETRY | {"name": "filled", "ttl_s": 50} | geometry)
        caches.append(cache)
        dtype = getattr(torch, geometry["dtype"])
        for layer in range(2):
            k, v = torch.randn(7, 2, 16), torch.randn(7, 2, geometry.get("head_dim_v", 16))
            k[0, 0, :3] = torch.tensor([float("nan"), -0.0, 1e5])
            cache.store_kv(layer, SLOTS, k.to(dtype), v.to(dtype))
        return cache

    yield make
    for cache in caches:
        cache.__exit__(None, None, None)


def contents(cache: attnd.Cache) -> list[bytes]:
    """The bits of all slots, as calls see them."""
    read = [cache.read_kv(layer, torch.arange(256), like=torch.empty(0)) for layer in range(2)]
    return [tensor.view(torch.uint8).numpy().tobytes() for pair in read for tensor in pair]


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_there_and_back(client, filled, server_address, tmp_path: Path, monkeypatch, geometry: dict[str, Any]) -> None:
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 4096)
    cache = filled(**geometry)
    folder = tmp_path / "folder"
    exported = run("export", cache.ref.id.hex(), folder, "--address", server_address)
    assert exported.exit_code == 0, exported.output
    assert exported.text.startswith("3 of 64 pages, ")
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())] == [0o700, 0o600, 0o600]

    imported = run("import", folder, "--address", server_address)
    assert imported.exit_code == 0, imported.output
    with client.open_cache(imported.stdout.split()[0]) as other:
        assert "leased for 50 s" in imported.stderr
        assert other.ref.id != cache.ref.id
        before, after = cache.info(), other.info()
        assert after.config == before.config
        assert (after.name, after.ttl_s) == ("filled", 50)
        assert contents(other) == contents(cache)
        assert other.written_pages() == cache.written_pages() == [3, 4, 62]
        # What is exported again is the same file: FP8 and all, nothing was rounded on the way.
        transfer.export_cache(client, other.ref.id.hex(), tmp_path / "again", lambda done, total: None)
        assert (tmp_path / "again" / TENSORS).read_bytes() == (folder / TENSORS).read_bytes()


def test_it_has_the_bits_that_a_server_writes(client, filled, tmp_path: Path) -> None:
    cache = filled(**GEOMETRIES["fp8"])
    transfer.export_cache(client, cache.ref.id.hex(), tmp_path / "folder", lambda done, total: None)
    manifest, layout = read_manifest(tmp_path / "folder")
    with (tmp_path / "folder" / TENSORS).open("rb") as file:
        file.seek(layout.parts[0].offset)
        page = torch.frombuffer(bytearray(file.read(layout.parts[0].page_bytes)), dtype=torch.uint8).view(FP8)
    k = page.view(4, 2, 16).float() * torch.tensor(manifest.shape.common.k_scales)[:, None]
    assert manifest.principal is None
    assert torch.equal(k[1].bfloat16(), cache.read_kv(0, [13], like=torch.empty(0))[0][0])
    assert not k[2].any()


def test_an_altered_folder_is_refused_before_anything_is_leased(client, filled, server_address, tmp_path: Path) -> None:
    cache = filled(dtype="float32")
    folder = tmp_path / "folder"
    assert run("export", cache.ref.id.hex(), folder, "--address", server_address).exit_code == 0
    data = bytearray((folder / TENSORS).read_bytes())
    data[-1] ^= 1
    (folder / TENSORS).write_bytes(data)
    before = len(client.list_caches())
    result = run("import", folder, "--address", server_address)
    assert result.exit_code == 1
    assert "attnd cache import:" in result.text
    assert "its sha256 is" in result.text
    (folder / MANIFEST).unlink()
    assert "but not so here: manifest.json" in run("import", folder, "--address", server_address).text
    assert len(client.list_caches()) == before


def test_an_import_that_fails_leaves_no_cache(client, filled, tmp_path: Path) -> None:
    cache = filled(dtype="float32")
    transfer.export_cache(client, cache.ref.id.hex(), tmp_path / "folder", lambda done, total: None)
    before = len(client.list_caches())

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transfer.import_cache(client, tmp_path / "folder", fail)
    assert len(client.list_caches()) == before


def test_mistakes_are_one_line(filled, server_address, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    cache = filled(dtype="float32")
    at = ("--address", server_address)
    for arguments, message in (
        (("export", "abc", tmp_path / "new", *at), "cache.id is 'abc', but must be 16 bytes or 32 hexadecimal digits"),
        (("export", "0" * 32, tmp_path / "new", *at), "no such cache exists"),
        (("export", cache.ref.id.hex(), tmp_path / "full", *at), "Directory not empty"),
        (("import", tmp_path / "none", *at), "it cannot be read: No such file or directory"),
        (
            ("export", "0" * 32, tmp_path / "new", "--address", "localhost:1", "--timeout-s", "0.2"),
            "no answer from localhost:1",
        ),
    ):
        result = run(*arguments)
        assert result.exit_code == 1
        assert result.text.startswith(f"attnd cache {arguments[0]}: ")
        assert message in result.text
        assert not (tmp_path / "new").exists()


def test_fp8_that_calls_cannot_carry_is_refused(client, filled, tmp_path: Path) -> None:
    cache = filled(dtype="float16", kv_dtype="float8_e4m3fn", v_scales=[1.0, 1000.0])
    with pytest.raises(attnd.InvalidRequest, match=r"v_scales\[1\] is 1000, but must let every FP8 value"):
        transfer.export_cache(client, cache.ref.id.hex(), tmp_path / "new", lambda done, total: None)
    fine = AttentionConfig(1, 1, 8, 1, dtype=torch.bfloat16, kv_dtype=FP8, k_scales=(1e-30,), v_scales=(1e30,))
    transfer.refuse_if_inexact(fine)


@pytest.mark.parametrize("command", ["export", "import"])
def test_help(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    for option in ("--address", "--timeout-s", "--tls-ca", "--token-file", "--tls-client-cert"):
        assert option in result.text


def test_what_is_wrong_without_a_server_is_told_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attnd, "connect", lambda *_, **__: pytest.fail("asked a server"))
    exported = run("export", "zz", tmp_path / "folder")
    assert exported.exit_code == 1
    assert "cache.id is 'zz', but must be 16 bytes or 32 hexadecimal digits" in exported.text
    imported = run("import", tmp_path / "absent")
    assert imported.exit_code == 1
    assert f"{tmp_path / 'absent'} is refused: it cannot be read: No such file or directory" in imported.text


def test_layer_groups_there_and_back(client, server_address, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 1000)
    worker = layer_groups.Worker(5)
    with layer_groups.create(client, name="groups", ttl_s=50) as cache:
        with cache.session() as session:
            worker.runs(session, [5, 8])
        folder = tmp_path / "folder"
        exported = run("export", cache.ref.id.hex(), folder, "--address", server_address)
        assert exported.exit_code == 0, exported.output
        num_pages = cache.info().num_pages_written
        assert exported.text.startswith(f"{num_pages} of 44 pages, ")
        written = [cache.written_pages(group=group) for group in range(3)]
        config = cache.info().config
    imported = run("import", folder, "--address", server_address)
    assert imported.exit_code == 0, imported.output
    with client.open_cache(imported.stdout.split()[0]) as other, other.session() as session:
        assert other.info().config == config
        assert [other.written_pages(group=group) for group in range(3)] == written
        for query_lens in ([1, 1], [2, 3]):
            worker.runs(session, query_lens)  # upon what the first cache had
