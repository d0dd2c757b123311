"""Caches whose layers are all groups of their own: what the server tells of them is more than it was asked with."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import torch

import attnd
from tests.servers import ServerProcess

# Each with one page of one token. Asked for with fewer fields than a message may have, and told with more.
GROUPS = [
    attnd.LayerGroup(
        layers=[layer],
        num_kv_heads=1,
        head_dim=8,
        num_pages=1,
        page_size=1,
        kv_dtype="float8_e4m3fn",
        v_dtype="float32",
    )
    for layer in range(250)
]


@pytest.fixture(scope="module")
def shm_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[attnd.Client]:
    folder = tmp_path_factory.mktemp("groups")
    with ServerProcess(folder / "log", "--device", "cpu", "--socket-dir", str(folder / "sockets")) as process:
        with attnd.connect(process.address) as client:
            yield client
        log = process.log
    assert "internal error" not in log, log


def test_a_client_reads_what_it_is_told_of_many_groups(server_address: str) -> None:
    with (
        attnd.connect(server_address) as client,
        client.create_cache(groups=GROUPS, dtype="float32") as cache,
        client.open_cache(cache.ref.id.hex()) as same,
    ):
        assert len(same.config.groups) == len(GROUPS)
        assert cache.written_pages(group=249) == []
        assert cache.info().num_pages_written == 0


def test_an_async_client_does_likewise(server_address: str) -> None:
    async def go() -> int:
        async with (
            await attnd.aio.connect(server_address) as client,
            await client.create_cache(groups=GROUPS, dtype="float32") as cache,
            await client.open_cache(cache.ref.id.hex()) as same,
        ):
            assert await cache.written_pages(group=249) == []
            return len(same.config.groups)

    assert asyncio.run(go()) == len(GROUPS)


@pytest.mark.parametrize("plane", ["inline", "shm"])
def test_each_of_many_groups_has_its_own_tables(shm_client: attnd.Client, plane: str) -> None:
    """It is checked where nobody else waits. Half of the groups have the tables of the first."""
    q, k, v = torch.randn(3, 1, 1, 8, generator=torch.Generator().manual_seed(1))
    groups = [
        attnd.LayerGroup(layers=[layer], num_kv_heads=1, head_dim=8, num_pages=2 + layer % 2, page_size=1)
        for layer in range(200)
    ]
    with shm_client.create_cache(groups=groups, dtype="float32") as cache, cache.session(plane=plane) as session:
        for layer in (0, 1, 199):
            cache.store_kv(layer, [0, 1], torch.cat([k, k + layer]), torch.cat([v, v + layer]))
        for step_id in range(12):
            told = [
                attnd.StepGroup([[1]], [0]) if layer % 2 == 0 else attnd.StepGroup([[1, step_id % 3]], [2])
                for layer in range(200)
            ]
            step = session.step(attnd.StepMetadata([1], [1], groups=told))
            for layer in (0, 1, 199):
                scores = torch.einsum("qhd,khd->hqk", q, torch.cat([k + layer, k])) * 8**-0.5
                expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), torch.cat([v + layer, v]))
                torch.testing.assert_close(step.attend(layer, q, k, v), expected)
        told[198] = attnd.StepGroup([[1]], [2])
        with pytest.raises(
            attnd.InvalidRequest, match=r"groups\[198\].slot_mapping\[0\] is 2, but the cache has slots 0..1"
        ):
            session.step(attnd.StepMetadata([1], [1], groups=told)).attend(0, q, k, v)


def test_more_than_a_message_may_have_are_refused_before_there_are_any(server_address: str) -> None:
    with attnd.connect(server_address) as client:
        before = len(client.list_caches())
        groups = [
            attnd.LayerGroup(layers=[layer], num_kv_heads=1, head_dim=8, num_pages=1, page_size=1, window=1)
            for layer in range(900)
        ]
        with pytest.raises(attnd.InvalidRequest, match="starts a field beyond the 4096 that a message may have"):
            client.create_cache(groups=groups, dtype="float32")
        assert len(client.list_caches()) == before
