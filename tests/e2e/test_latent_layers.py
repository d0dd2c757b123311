"""Layer groups through both clients and planes: latent layers beside others, each with pages of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import attnd
from attnd import LayerGroup, StepGroup
from tests.attention import dense_attention
from tests.servers import ServerProcess

HEADS, PAGE = 6, 4
# Layers 0 and 3 are latent, layer 1 has V of another size and type, layer 2 a window.
LATENT_DIM, LATENT_V, WINDOW = 48, 32, 5
GROUPS = [
    LayerGroup([0, 3], num_kv_heads=1, head_dim=LATENT_DIM, head_dim_v=LATENT_V, num_pages=20, latent=True),
    LayerGroup([1], num_kv_heads=2, head_dim=16, head_dim_v=24, num_pages=9, v_dtype="float8_e4m3fn", v_scales=0.25),
    LayerGroup([2], num_kv_heads=3, head_dim=8, page_size=2, num_pages=30, window=WINDOW),
]
SHAPES = {0: (1, 48, 48), 3: (1, 48, 48), 1: (2, 16, 24), 2: (3, 8, 8)}
PAGES = [[7, 19, 2, 11], [8, 0, 5, 3], [29, 3, 12, 4, 9, 17, 22, 1]]


@pytest.fixture(scope="module")
def shm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("shm")
    with ServerProcess(folder / "log", "--device", "cpu", "--socket-dir", str(folder / "sockets")) as process:
        yield process
        log = process.log
    assert "internal error" not in log, log


def rounded(v: torch.Tensor) -> torch.Tensor:
    """What FP8 pages of scale 0.25 make of V."""
    return (v / 0.25).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.25


def qkv(layer: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    num_kv_heads, head_dim, head_dim_v = SHAPES[layer]
    q, k = torch.randn(num_tokens, HEADS, head_dim), torch.randn(num_tokens, num_kv_heads, head_dim)
    return q, k, None if layer in (0, 3) else torch.randn(num_tokens, num_kv_heads, head_dim_v)


def windowed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Each query over the last WINDOW keys up to itself."""
    first = len(k) - len(q)
    rows = [
        dense_attention(q[row : row + 1], *(x[max(0, end - WINDOW) : end] for x in (k, v)))
        for row, end in enumerate(range(first + 1, len(k) + 1))
    ]
    return torch.cat(rows)


def step_groups(context_len: int, num_new: int) -> list[StepGroup]:
    groups = []
    for pages, page_size in zip(PAGES, (4, 4, 2), strict=True):
        slots = [
            pages[position // page_size] * page_size + position % page_size
            for position in range(context_len, context_len + num_new)
        ]
        groups.append(StepGroup([pages], slots))
    return groups


@pytest.mark.parametrize("backend", ["auto", "naive", "sdpa"])
@pytest.mark.parametrize("plane", ["inline", "shm"])
def test_every_group_attends_in_its_own_way(shm_server: ServerProcess, plane: str, backend: str) -> None:
    history: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    geometry = {"groups": GROUPS, "dtype": "float32", "page_size": PAGE}
    with attnd.connect(shm_server.address) as client, client.create_cache(**geometry, backend=backend) as cache:
        info = cache.info()
        assert info.num_bytes == 20 * 4 * 2 * 48 * 4 + 9 * 4 * 2 * (16 * 4 + 24) + 30 * 2 * 3 * 16 * 4
        with cache.session(plane=plane) as session:
            for context_len, num_new in ((0, 7), (7, 1), (8, 1), (9, 4)):
                metadata = attnd.StepMetadata([num_new], [context_len], groups=step_groups(context_len, num_new))
                step = session.step(metadata)
                for layer in range(4):
                    q, k, v = qkv(layer, num_new)
                    output = step.attend(layer, q, k, v)
                    v = k[..., :LATENT_V] if v is None else v
                    old_k, old_v = history.get(layer, (k[:0], v[:0]))
                    keys, values = torch.cat([old_k, k]), torch.cat([old_v, v])
                    expected = (windowed if layer == 2 else dense_attention)(q, keys, values)
                    torch.testing.assert_close(output, expected, msg=f"layer {layer} of {context_len} + {num_new}")
                    history[layer] = keys, torch.cat([old_v, rounded(v) if layer == 1 else v])
        assert [sorted(cache.written_pages(group=group)) for group in range(3)] == [
            sorted(PAGES[0]),
            sorted(PAGES[1]),
            sorted(PAGES[2][:7]),
        ]
        for layer, (keys, values) in history.items():
            group, page_size = {0: 0, 3: 0, 1: 1, 2: 2}[layer], 2 if layer == 2 else 4
            slots = [PAGES[group][p // page_size] * page_size + p % page_size for p in range(13)]
            for like in (torch.empty(0), np.empty(0)):
                read = cache.read_kv(layer, slots, like=like)
                for actual, wanted in zip(read, (keys, values), strict=True):
                    assert torch.equal(torch.tensor(np.asarray(actual)), wanted)


def test_a_latent_layer_is_stored_copied_and_read(any_client: attnd.Client) -> None:
    k = torch.randn(5, 1, LATENT_DIM)
    with any_client.create_cache(groups=GROUPS, dtype="float32", page_size=PAGE) as cache:
        assert cache.store_kv(3, [8, 9, 10, 11, 40], k) == 5
        assert cache.written_pages() == [2, 10]
        assert cache.written_pages(group=2) == []
        cache.copy_pages([2], [6], group=0)
        for slots, rows in (([24, 27], [0, 3]), ([40], [4])):
            read_k, read_v = cache.read_kv(3, slots, like=k)
            assert torch.equal(read_k, k[rows])
            assert torch.equal(read_v, k[rows][..., :LATENT_V])
        assert not cache.read_kv(0, [24], like=k)[0].any()
        for layer, group, pages in ((2, 2, 30), (1, 1, 9)):
            with pytest.raises(attnd.InvalidRequest, match=f"the cache has pages 0..{pages - 1}"):
                cache.copy_pages([pages], [0], group=group)
            with pytest.raises(attnd.InvalidRequest, match="v is absent"):
                cache.store_kv(layer, [0], qkv(layer, 1)[1])
        with pytest.raises(attnd.InvalidRequest, match="v is given, but must be absent"):
            cache.store_kv(0, [0], k[:1], k[:1, :, :LATENT_V])
        with pytest.raises(attnd.InvalidRequest, match="group is 3, but"):
            cache.written_pages(group=3)
        warmed = cache.warm_up(num_heads=HEADS, max_reqs=2, group=0)
        assert warmed.num_graphs == 0


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_kv_heads": 2}, "groups[0].num_kv_heads is 2, but must be 1 of a latent cache"),
        ({"head_dim_v": 56}, "groups[0].head_dim_v is 56, but must be at most head_dim, 48, of a latent cache"),
        ({"head_dim": 1032}, "groups[0].head_dim is 1032, but must be 8..1024"),
        ({"v_dtype": "float8_e4m3fn"}, "groups[0].v_dtype is torch.float8_e4m3fn, but must be torch.float32"),
        ({"layers": [0, 2]}, "groups[2].layers[0] is 2, but must be in one group, and is in groups[0]"),
        ({"layers": [0]}, "groups have no layer 3"),
    ],
)
def test_refusals(any_client: attnd.Client, changes: dict[str, Any], text: str) -> None:
    fields = {
        name: getattr(GROUPS[0], name) for name in ("layers", "num_kv_heads", "head_dim", "head_dim_v", "num_pages")
    }
    group = LayerGroup(**fields | changes, latent=True)
    with pytest.raises(attnd.InvalidRequest) as caught:
        any_client.create_cache(num_layers=4, groups=[group, *GROUPS[1:]], dtype="float32", page_size=PAGE)
    assert text in str(caught.value)


def test_asyncio_has_it_too(server_address: str) -> None:
    k = torch.randn(2, 1, LATENT_DIM)

    async def run() -> tuple[Any, ...]:
        async with (
            await attnd.aio.connect(server_address) as client,
            await client.create_cache(groups=GROUPS, dtype="float32", page_size=PAGE) as cache,
        ):
            await cache.store_kv(0, [5, 4], k)
            await cache.copy_pages([1], [3], group=0)
            told = await cache.written_pages(group=0), await cache.written_pages(group=1)
            warmed = await cache.warm_up(num_heads=HEADS, max_reqs=1, group=2)
            return *await cache.read_kv(0, [13, 12], like=k), told, warmed.num_graphs

    read_k, read_v, told, num_graphs = asyncio.run(run())
    assert torch.equal(read_k, k)
    assert torch.equal(read_v, k[..., :LATENT_V])
    assert (told, num_graphs) == (([1, 3], []), 0)
