"""Caches with layer groups on a real server, on every plane that has one: right, apart from each other, kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import attnd
from attnd.protocol import frames, requests
from attnd.v1 import cache_pb2, step_pb2
from attnd_server.config import ServerConfig
from tests import layer_groups
from tests.layer_groups import FULL, GROUPS, LATENT, WINDOWED, Group, Worker, check, create
from tests.server_thread import server_thread
from tests.servers import ServerProcess

PLANES = pytest.mark.parametrize("plane", ["inline", "shm"])


@pytest.fixture(scope="module")
def shm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("groups")
    with ServerProcess(folder / "log", "--device", "cpu", "--socket-dir", str(folder / "sockets")) as process:
        yield process
        log = process.log
    assert "internal error" not in log, log


@pytest.fixture
def client(shm_server: ServerProcess) -> Iterator[attnd.Client]:
    with attnd.connect(shm_server.address) as connected:
        yield connected


@pytest.fixture
def cache(client: attnd.Client) -> Iterator[attnd.Cache]:
    with create(client) as made:
        yield made


@pytest.fixture
def session(cache: attnd.Cache) -> Iterator[attnd.Session]:
    with cache.session(plane="inline") as opened:
        yield opened


@PLANES
@pytest.mark.parametrize("seed", range(4))
def test_every_layer_attends_over_its_own_pages(cache: attnd.Cache, plane: str, seed: int) -> None:
    worker = Worker(seed)
    with cache.session(plane=plane) as session:
        for query_lens in ([5, 8], [1, 1], [1, 1], [3, 1], [1, 1], [2, 2], [1, 7], [1, 1]):
            worker.runs(session, query_lens, gives_back=bool(seed % 2))
        assert session.plane == plane
    assert cache.info().num_pages_written == sum(
        len({slot // group.page_size for request in range(2) for slot in worker.slots(group.layers[0], request)})
        for group in GROUPS
    )


@PLANES
def test_calls_of_a_step_come_in_any_order_and_again(cache: attnd.Cache, plane: str) -> None:
    """On a shm plane a call that is meant again may be of another group, whose tensors are others."""
    worker = Worker(7)
    with cache.session(plane=plane) as session:
        worker.runs(session, [4, 3])
        step = session.step(worker.metadata([1, 1]))
        calls = {layer: worker.tensors(layer, 2) for layer in range(layer_groups.NUM_LAYERS)}
        expected = {layer: worker.expected(layer, [1, 1], *each) for layer, each in calls.items()}
        for layer in (5, 0, 0, 3, 3, 2, 1, 4, 1, 5):
            check(step.attend(layer, *calls[layer]), expected[layer])


@PLANES
def test_groups_of_one_geometry_are_apart(client: attnd.Client, plane: str) -> None:
    """What a shm plane says again of a layer of the other group has the same tensors, and other page tables."""
    alike = (Group((0, 2), 2, 16, 16, 4, 12), Group((1, 3), 2, 16, 16, 4, 12))
    worker = Worker(3, groups=alike)
    assert worker.tables[0] != worker.tables[1]
    with create(client, alike) as cache, cache.session(plane=plane) as session:
        for query_lens in ([5, 4], [1, 1], [1, 1]):
            worker.runs(session, query_lens)


def test_unary_requests_are_of_the_group_of_their_layer(client: attnd.Client, cache: attnd.Cache) -> None:
    worker = Worker(5)
    for query_lens, send in (([5, 2], client.prefill), ([1, 1], client.decode)):
        metadata = worker.metadata(query_lens)
        for layer in range(layer_groups.NUM_LAYERS):
            tensors = worker.tensors(layer, sum(query_lens))
            check(send(cache, metadata, layer, *tensors), worker.expected(layer, query_lens, *tensors))
        worker.ends(query_lens)


def test_tables_that_groups_have_in_common_are_sent_once(client: attnd.Client) -> None:
    alike = (FULL, Group((1, 3, 4), 1, 8, 8, page_size=4, num_pages=12, window=6))
    worker = Worker(2, groups=alike)
    worker.tables[1] = worker.tables[0]
    with create(client, alike) as cache, cache.session(plane="inline") as session:
        for query_lens in ([5, 4], [1, 1], [1, 1]):
            metadata = worker.metadata(query_lens)
            message = metadata.to_message(1, cache.ref)
            assert message.groups[1].tables_of == 0
            assert not message.groups[1].HasField("page_tables")
            worker.runs(session, query_lens)


def test_deltas_are_of_the_same_group_of_the_base(monkeypatch: pytest.MonkeyPatch, session: attnd.Session) -> None:
    sent: list[step_pb2.Step] = []
    to_message = attnd.StepMetadata.to_message

    def noted(*arguments: Any) -> step_pb2.Step:
        sent.append(to_message(*arguments))
        return sent[-1]

    monkeypatch.setattr(attnd.StepMetadata, "to_message", noted)
    worker = Worker(11)
    for query_lens in ([5, 8], [1, 1], [1, 1], [1, 1], [2, 2]):
        worker.runs(session, query_lens, width=99)
    told = [[group.HasField("page_table_delta") for group in step.groups] for step in sent]
    assert told == [[False] * 3, *[[True] * 3] * 4]


def test_slots_and_pages_are_those_of_the_group(cache: attnd.Cache, session: attnd.Session) -> None:
    worker = Worker(13)
    worker.runs(session, [5, 8])
    for layer in range(layer_groups.NUM_LAYERS):
        for request in range(2):
            k, v = worker.kept(layer, request)
            read_k, read_v = cache.read_kv(layer, worker.slots(layer, request), like=k)
            torch.testing.assert_close(read_k, k)
            torch.testing.assert_close(read_v, v)
    # The last slot of LATENT is none of FULL.
    last = LATENT.page_size * LATENT.num_pages - 1
    cache.read_kv(3, [last], like=torch.empty(0))
    with pytest.raises(attnd.InvalidRequest, match=rf"slot_mapping\[0\] is {last}, but the cache has slots 0\.\.47"):
        cache.read_kv(0, [last], like=torch.empty(0))
    with pytest.raises(attnd.InvalidRequest, match=r"^layer is 6, but the cache has layers 0\.\.5"):
        cache.read_kv(6, [0], like=torch.empty(0))


def test_a_page_of_another_group_is_no_page_of_this_one(cache: attnd.Cache, session: attnd.Session) -> None:
    worker = Worker(1)
    metadata = worker.metadata([1, 1])
    assert FULL.num_pages <= WINDOWED.num_pages - 1
    metadata.groups[0].page_tables[1][0] = WINDOWED.num_pages - 1  # type: ignore[index]
    with pytest.raises(attnd.InvalidRequest) as refused:
        session.step(metadata).attend(0, *worker.tensors(0, 2))
    rule = "but the cache has pages 0..11, and -1 is no page"
    assert str(refused.value) == f"groups[0].page_tables[1, 0] is 24, {rule}"
    assert refused.value.field == "groups[0].page_tables"
    with pytest.raises(attnd.InvalidRequest, match="groups has 2 elements, but must have 3: one for each layer group"):
        session.step(worker.metadata([1, 1], groups=worker.metadata([1, 1]).groups[:2])).attend(  # type: ignore[index]
            0, *worker.tensors(0, 2)
        )
    with pytest.raises(attnd.InvalidRequest, match="groups has 0 elements, but must have 3"):
        session.step(attnd.StepMetadata([1], [0], [[0]], [0], kind="decode")).attend(0, *worker.tensors(0, 1))
    worker.runs(session, [1, 1])


def test_a_call_is_checked_against_the_group_of_its_layer(session: attnd.Session) -> None:
    worker = Worker(1)
    step = session.step(worker.metadata([1, 1]))
    q, k, v = worker.tensors(0, 2)
    with pytest.raises(attnd.InvalidRequest, match=r"q has shape \[2, 4, 16\], but must be \[2, num_heads, 24\]"):
        step.attend(1, q, k, v)
    with pytest.raises(attnd.InvalidRequest, match=r"layer is 6, but the cache has layers 0\.\.5"):
        step.attend(6, q, k, v)
    q, k, _ = worker.tensors(3, 2)
    with pytest.raises(attnd.InvalidRequest, match=r"^v is given, but must be absent"):
        step.attend(3, q, k, k)
    q, k, v = worker.tensors(1, 2)
    with pytest.raises(attnd.InvalidRequest, match="window is 4, but must be 0 or 5"):
        step.attend(1, q, k, v, attnd.AttentionOptions(window=4))


def test_pages_are_copied_within_a_group(cache: attnd.Cache, session: attnd.Session) -> None:
    worker = Worker(4)
    worker.runs(session, [8, 8])
    for index, group in enumerate(GROUPS):
        source, target = worker.tables[index][0][0], worker.tables[index][1][-1]
        cache.copy_pages([source], [target], group=index)
        for layer in group.layers:
            size = group.page_size
            like = torch.empty(0)
            slots = [[page * size + offset for offset in range(size)] for page in (source, target)]
            before, after = (cache.read_kv(layer, each, like=like)[0] for each in slots)
            assert torch.equal(before, after)
        layer = group.layers[0]
        used = {slot // group.page_size for request in range(2) for slot in worker.slots(layer, request)}
        assert cache.written_pages(group=index) == sorted({*used, target})
    with pytest.raises(attnd.InvalidRequest, match=r"^group is 3, but the cache has layer groups 0\.\.2"):
        cache.copy_pages([0], [1], group=3)
    with pytest.raises(attnd.InvalidRequest, match=r"^group is 3, but the cache has layer groups 0\.\.2"):
        cache.written_pages(group=3)
    with pytest.raises(attnd.InvalidRequest, match=r"^group is 3, but the cache has layer groups 0\.\.2"):
        cache.warm_up(num_heads=4, max_reqs=1, group=3)


def test_the_cache_is_told_as_it_was_asked_for(client: attnd.Client, cache: attnd.Cache) -> None:
    told = cache.info().config
    assert told.num_layers == 6
    assert (told.num_kv_heads, told.head_dim, told.page_size, told.num_pages, told.kv_dtype) == (0, 0, 0, 0, 0)
    asked = layer_groups.config()
    for given, answered in zip(asked.groups, told.groups, strict=True):
        filled = cache_pb2.LayerGroup()
        filled.CopyFrom(given)
        filled.kv_dtype = given.kv_dtype or asked.dtype
        assert answered == filled
    # A flat cache is told without them.
    with client.create_cache(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=1) as flat:
        assert not flat.info().config.groups
        assert not flat.info().config.v_dtype


def test_a_snapshot_has_every_group(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--snapshot-dir", str(tmp_path / "snapshots"), "--drain-s", "0.2"]
    worker = Worker(6)
    with (
        ServerProcess(tmp_path / "log", *options) as first,
        attnd.connect(first.address, connect_timeout_s=60) as client,
    ):
        cache = create(client, name="groups")
        with cache.session() as session:
            worker.runs(session, [5, 8])
            worker.runs(session, [1, 1])
        first.terminate()
        assert first.wait() == 0
        with ServerProcess(tmp_path / "log", *options, "--restore", port=first.port):
            with pytest.raises(attnd.EpochMismatch, match="adopt it to go on"):
                cache.renew()
            adopted = cache.adopt()
            assert adopted.name == "groups"
            assert adopted.config == cache.info().config
            with cache.session() as session:
                for query_lens in ([1, 1], [2, 3]):
                    worker.runs(session, query_lens)
            cache.delete()


def test_a_cache_that_is_deleted_has_no_group_left() -> None:
    with (
        server_thread(ServerConfig(port=0, device="cpu", kv_bytes=1 << 20)) as (server, _),
        attnd.connect(server.address, plane="inline") as client,
    ):
        table = server.service.caches
        with create(client) as cache, cache.session() as session:
            assert table.num_bytes == cache.info().num_bytes
            step = session.step(Worker(1).metadata([1, 1]))
            (held,) = table.all()
            cache.delete()
            assert table.num_bytes == 0
            assert all(group.pages is None for group in held.groups)
            for layer in (0, 1, 3):
                with pytest.raises(attnd.CacheLost):
                    step.attend(layer, *Worker(1).tensors(layer, 2))
        assert not table._spaces._spaces


def test_all_groups_count_for_the_memory() -> None:
    each = [group.num_pages * group.page_size * len(group.layers) * group.num_kv_heads for group in GROUPS]
    of_head = [2 * 16 * 4, 24 + 8, 40 * 4]
    needed = sum(count * size for count, size in zip(each, of_head, strict=True))
    for kv_bytes in (needed - 1, needed):
        config = ServerConfig(port=0, device="cpu", kv_bytes=kv_bytes)
        with server_thread(config) as (server, _), attnd.connect(server.address, plane="inline") as client:
            if kv_bytes == needed:
                with create(client) as cache:
                    assert cache.info().num_bytes == needed
                continue
            text = rf"^num_pages is 12 \+ 25 \+ 7, which takes {needed} bytes, but of the server's {kv_bytes} bytes"
            with pytest.raises(attnd.Exhausted, match=text):
                create(client)


def test_the_last_layer_of_the_cache_ends_a_step() -> None:
    """Not the last of a group: a server that drains waits for the rest."""
    with server_thread(ServerConfig(port=0, device="cpu", kv_bytes=1 << 20)) as (server, _):
        with attnd.connect(server.address, plane="inline") as client, create(client) as cache:
            (held,) = server.service.caches.all()
            session = server.service.open_session(held.principal)
            worker = Worker(1)
            session.request(frames.step_request(worker.metadata([1, 1]).to_message(1, cache.ref)))
            for layer in (4, 3, 2, 5):
                assert session.is_under_way()
                message = requests.attend_call(1, layer, *worker.tensors(layer, 2), attnd.AttentionOptions())
                session.request(message)
            assert not session.is_under_way()


def test_calls_that_wait_while_the_cache_is_deleted_are_told(client: attnd.Client) -> None:
    worker = Worker(9)
    with create(client) as cache, cache.session(plane="inline") as session:
        step = session.step(worker.metadata([1, 1]))
        waiting = [step.submit(layer, *worker.tensors(layer, 2)) for layer in (0, 1, 3)]
        client.open_cache(cache.ref.id).delete()  # another's; one's own ends its sessions first
        outcomes: list[tuple[int, ...] | None] = []
        for each in waiting:
            try:
                outcomes.append(tuple(each.wait().shape))
            except attnd.CacheLost:
                outcomes.append(None)
        expected = [(2, 4, worker.group_of(layer).head_dim_v) for layer in (0, 1, 3)]
        assert all(got in (None, shape) for got, shape in zip(outcomes, expected, strict=True))
        with pytest.raises(attnd.CacheLost):
            step.attend(4, *worker.tensors(4, 2))
