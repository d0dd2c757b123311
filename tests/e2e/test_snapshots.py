"""A server that is restarted with --snapshot-dir and --restore, seen from its clients."""

from __future__ import annotations

import asyncio
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import attnd
from tests.e2e.test_commands import attnd_command
from tests.servers import ServerProcess

NUM_LAYERS = 3
GEOMETRY: dict[str, Any] = {
    "num_layers": NUM_LAYERS,
    "num_kv_heads": 2,
    "head_dim": 16,
    "num_pages": 64,
    "page_size": 4,
    "dtype": "float32",
}
PROMPT, NUM_STEPS = 6, 7


def qkv(step: int, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + layer)
    num = PROMPT if step == 0 else 1
    return tuple(torch.randn(num, heads, 16, generator=generator) for heads in (4, 2, 2))  # type: ignore[return-value]


def metadata(step: int) -> attnd.StepMetadata:
    pages = [9, 2, 40, 5]
    first, num = (0, PROMPT) if step == 0 else (PROMPT + step - 1, 1)
    slots = [pages[token // 4] * 4 + token % 4 for token in range(first, first + num)]
    return attnd.StepMetadata([num], [first], [pages], slots, kind="decode" if step else "prefill")


def attended(session: attnd.Session, step: int, layers: range = range(NUM_LAYERS)) -> list[torch.Tensor]:
    opened = session.step(metadata(step))
    return [opened.attend(layer, *qkv(step, layer)) for layer in layers]


def uninterrupted(client: attnd.Client, **options: Any) -> list[list[torch.Tensor]]:
    with client.create_cache(**GEOMETRY | options) as cache, cache.session() as session:
        return [attended(session, step) for step in range(NUM_STEPS)]


def assert_equal(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(map(torch.equal, actual, expected))


def restarted(server: ServerProcess, *options: str) -> ServerProcess:
    return ServerProcess(server.log_path, "--device", "cpu", *options, port=server.port)


def test_a_restart_between_two_steps_and_within_one(tmp_path: Path) -> None:
    snapshots = ["--snapshot-dir", str(tmp_path / "snapshots"), "--drain-s", "0.2"]
    server = ServerProcess(tmp_path / "log", "--device", "cpu", *snapshots)
    fp8 = {"kv_dtype": "float8_e4m3fn", "k_scales": 0.03, "layout": "distinct"}
    with attnd.connect(server.address, connect_timeout_s=60) as client:
        expected, expected_fp8 = uninterrupted(client), uninterrupted(client, **fp8)
        cache, other = client.create_cache(**GEOMETRY, name="kept"), client.create_cache(**GEOMETRY, **fp8)
        session, other_session = cache.session(), other.session()
        for step in range(3):
            assert_equal(attended(session, step), expected[step])
            assert_equal(attended(other_session, step), expected_fp8[step])
        attended(session, 3, range(1))  # and no further: its other layers are never answered
        server.terminate()
        assert server.wait() == 0
        assert server.log.count("snapshot written") == 2
        kept = tmp_path / "kept"
        shutil.copytree(tmp_path / "snapshots", kept)

        second = restarted(server, *snapshots, "--restore")
        assert list((tmp_path / "snapshots").iterdir()) == []
        with pytest.raises(attnd.EpochMismatch, match=r"restored this cache: adopt it to go on \(cache.adopt\(\)"):
            cache.renew()
        assert [info.awaits_adoption for info in client.list_caches()] == [True, True]
        old_ref = cache.ref
        assert cache.adopt().name == "kept"
        assert cache.ref.id == old_ref.id
        assert client.epoch == cache.ref.epoch != old_ref.epoch
        session.close()
        for step in range(3, 5):  # the step that was cut off is sent again
            assert_equal(attended(session, step), expected[step])

        async def adopted() -> None:
            async with await attnd.aio.connect(second.address) as aio_client:
                there = await aio_client.open_cache(other.ref.id.hex(), epoch=other.ref.epoch)
                async with there.session() as aio_session:
                    opened = await aio_session.step(metadata(3))
                    for layer in range(NUM_LAYERS):
                        output = await opened.attend(layer, *qkv(3, layer))
                        assert torch.equal(output, expected_fp8[3][layer])
                assert await there.written_pages() == [2, 9, 40]
                assert (await there.adopt()).cache == there.ref

        asyncio.run(adopted())
        assert client.open_cache(other.ref.id, epoch=other.ref.epoch).written_pages() == [2, 9, 40]

        second.kill()  # nothing was written; and now somebody puts the stale snapshots back
        shutil.copytree(kept, tmp_path / "snapshots", dirs_exist_ok=True)
        third = restarted(server, *snapshots, "--restore")
        with pytest.raises(attnd.Disconnected):
            attended(session, 5)
        with pytest.raises(attnd.EpochMismatch, match="the KV is gone"):
            attended(session, 5)
        with pytest.raises(attnd.CacheLost, match="may be without what was stored since"):
            cache.adopt()
        assert other.adopt().num_pages_written == 2  # what this object knows, which saw nothing of the second server

        # A disk that is full, as far as this process goes; the log is a small file.
        resource.prlimit(third.pid, resource.RLIMIT_FSIZE, (30_000, 30_000))
        large = client.create_cache(**GEOMETRY, name="large")
        slots = torch.arange(256, dtype=torch.int32)
        large.store_kv(0, slots, torch.ones(256, 2, 16), torch.ones(256, 2, 16))
        third.terminate()
        assert third.wait() == 3
        assert "cache lost: its snapshot cannot be written: [Errno 27]" in third.log
        assert large.ref.id.hex() not in [path.name[:32] for path in (tmp_path / "snapshots").iterdir()]
    for each in (server, second, third):
        each.stop()
    assert "internal error" not in server.log

    torn = next((tmp_path / "snapshots").iterdir()) / "kv.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    result = attnd_command("attnd_server", "serve", "--port", "0", "--device", "cpu", *snapshots, "--restore")
    assert result.returncode == 1
    assert f"cannot serve: {torn} is refused: it has" in result.stderr
    assert "move it away to go on without it" in result.stderr
    assert torn.exists()


def test_an_inproc_server_adopts_too() -> None:
    with attnd.connect("inproc://") as client, client.create_cache(**GEOMETRY) as cache:
        assert cache.adopt().cache == cache.ref  # it was never restarted
        cache.ref.epoch += 1
        with pytest.raises(attnd.EpochMismatch):
            cache.adopt()
        with pytest.raises(attnd.InvalidRequest, match=r"cache\.id is 'abc', but must be 16 bytes"):
            client.open_cache("abc")
        with pytest.raises(attnd.CacheLost, match="no such cache exists"):
            client.open_cache(bytes(16), epoch=7)
        cache.ref.epoch -= 1
