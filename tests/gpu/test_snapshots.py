"""Snapshots of caches on a GPU: what is written there comes back there, and on a processor, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import attnd
from attnd_server.attention.config import FP8, AttentionConfig, Layout
from attnd_server.attention.kernels.pages import stored_tokens
from attnd_server.cli import cache_files as transfer
from attnd_server.config import ServerConfig
from attnd_server.kv.caches import CacheTable
from attnd_server.kv.snapshots import SnapshotStore

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
CONFIGS = {
    "bfloat16": AttentionConfig(3, 8, 128, 300, dtype=torch.bfloat16),
    "fp8": AttentionConfig(3, 8, 128, 300, dtype=torch.bfloat16, kv_dtype=FP8, k_scales=(0.02,), v_scales=(3.0,)),
    "float16-distinct": AttentionConfig(3, 4, 64, 300, dtype=torch.float16, layout=Layout.DISTINCT),
}


def table(device: torch.device) -> CacheTable:
    return CacheTable(ServerConfig(), device, kv_bytes=1 << 30)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("device", [GPU, CPU], ids=str)
def test_everything_comes_back(tmp_path: Path, config: AttentionConfig, device: torch.device) -> None:
    before = table(GPU).create(config, principal="a", ttl_s=9, name="")
    slots = torch.randperm(100 * config.page_size)[:999] + 7
    for layer in range(config.num_layers):
        k, v = (torch.randn(999, config.num_kv_heads, config.head_dim, device=GPU).to(config.dtype) for _ in "kv")
        before.groups[0].store(layer, k, v, stored_tokens(slots, GPU))
    before.groups[0].mark_written(slots)
    torch.cuda.synchronize()
    store = SnapshotStore(str(tmp_path))
    assert store.write([before]) == []
    caches = table(device)
    store.restore(caches, 99)
    store.consume()
    store.close()
    (after,) = caches.all()
    assert torch.equal(after.groups[0].written_pages, before.groups[0].written_pages)
    for name in ("k_pages", "v_pages"):
        written, read = (getattr(cache.groups[0], name).cpu().view(torch.uint8) for cache in (before, after))
        assert torch.equal(written, read)
        assert written.any()


@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn"])
def test_an_export_has_the_same_bits(tmp_path: Path, server_address: str, kv_dtype: str | None) -> None:
    """The server's Triton kernels convert FP8, the export does so on the processor."""
    with attnd.connect(server_address) as client:
        scales = {} if kv_dtype is None else {"kv_dtype": kv_dtype, "k_scales": 0.013, "v_scales": 1.7}
        geometry = {"num_layers": 2, "num_kv_heads": 8, "head_dim": 128, "num_pages": 64} | scales
        with client.create_cache(**geometry) as cache:
            for layer in range(2):
                k, v = (torch.randn(500, 8, 128).mul(3).bfloat16() for _ in "kv")
                cache.store_kv(layer, torch.randperm(64 * 16)[:500], k, v)
            transfer.export_cache(client, cache.ref.id.hex(), tmp_path / "a", lambda done, total: None)
            with transfer.import_cache(client, tmp_path / "a", lambda done, total: None) as other:
                transfer.export_cache(client, other.ref.id.hex(), tmp_path / "b", lambda done, total: None)
                for layer in range(2):
                    there, here = (each.read_kv(layer, torch.arange(1024), torch.empty(0)) for each in (cache, other))
                    assert torch.equal(there[0], here[0])
                    assert torch.equal(there[1], here[1])
    assert (tmp_path / "a" / "kv.safetensors").read_bytes() == (tmp_path / "b" / "kv.safetensors").read_bytes()
