"""Released versions beside today's: their clients with today's server, and today's clients with their servers."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import attnd
import attnd.aio
from tests.released import calls, versions
from tests.released.calls import settled
from tests.released.later import CONTEXT_SLOTS, CONTEXTS, LATER, ORDINARY, STEP, Later
from tests.released.plain import PlainCache
from tests.servers import ServerProcess

OPTIONS = ["--device", "cpu", "--socket-dir"]
# What is refused, by what was asked: the class, and its text with "..." for what differs each time.
REFUSALS = {
    "layer": "InvalidRequest: layer is 9, but the cache has layers 0..1",
    "page": "InvalidRequest: page_tables[0, 0] is 40, but the cache has pages 0..39, and -1 is no page",
    "slot that is read": "InvalidRequest: slot_mapping[0] is 12, but must not be a slot that request 0 ...",
    "slot twice": "InvalidRequest: slot_mapping[1] is 1, but must differ from slot_mapping[0]",
    "backend": "Unsupported: backend is flash_attn, but must be one that can serve this step: ...",
    "type": "InvalidRequest: q has dtype float16, but must be float32",
    "context that no page covers": "InvalidRequest: context_lens[0] is 5, but page_tables covers 4: ...",
    "head_dim": "InvalidRequest: head_dim is 7, but must be 8..512",
    "memory": "Exhausted: num_pages is 2147483647, which takes ...",
    "another life": "EpochMismatch: cache.epoch is ...",
    "deleted": "CacheLost: cache.id is ..., but no such cache exists: deleted, expired or never created",
    "deleted twice": "CacheLost: cache.id is ..., but no such cache exists: deleted, expired or never created",
    "deleted, attended": "CacheLost: cache.id is ..., but no such cache exists: deleted, expired or never created",
}
NUM_ERRORS = 472  # outputs, lse and tensors read
DELTA_BYTES = 200  # a step takes no more whose page tables are told by a delta; they alone would take 960


@pytest.fixture(scope="module", params=versions.WHEELS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def packages(version: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return versions.unpack(version, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def old_server(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("old")
    with versions.ReleasedServer(packages, folder / "log", *OPTIONS, str(folder / "s")) as server:
        yield server
        log = server.log
    assert "internal error" not in log, log


@pytest.fixture(scope="module")
def new_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("new")
    with ServerProcess(folder / "log", *OPTIONS, str(folder / "s")) as server:
        yield server
        log = server.log
    assert "internal error" not in log, log


def check(found: dict[str, Any]) -> None:
    """What both found: every result is right, every refusal is as it was."""
    assert len(found["errors"]) == NUM_ERRORS
    assert {place: error for place, error in found["errors"].items() if not error <= 1} == {}
    for client in ("Client", "AsyncClient"):
        for what, expected in REFUSALS.items():
            pattern = re.escape(expected).replace(re.escape("..."), ".*")
            assert re.fullmatch(pattern, found["refusals"].pop(f"{client}, {what}"))
        assert found["told"].pop(f"{client}, list") == 1
    assert found["refusals"] == {}
    for place, told in found["told"].items():
        where, _, what = place.rpartition(", ")
        cache = where.partition(", ")[2].partition(", ")[2]
        if what == "plane":
            assert where.split(", ")[1] == told
        elif what == "bytes of a step":
            assert told < DELTA_BYTES
        else:
            ttl_s = calls.CACHES[cache][0].get("ttl_s", 60.0)
            expected = {"stored": 4, "info": [cache, 40, 40, ttl_s], "written pages": 40, "graphs": 0}
            assert told == expected[what], place


def test_released_client_with_todays_server(packages: Path, version: str, new_server: ServerProcess) -> None:
    found = versions.make_calls(packages, new_server.address)
    assert found["version"] == version
    assert found["told"].pop("server") == attnd.__version__
    check(found)


def test_todays_client_with_released_server(version: str, old_server: ServerProcess) -> None:
    found = asdict(calls.make_calls(old_server.address))
    assert found["told"].pop("server") == version
    check(found)


@pytest.fixture(params=[("sync", "inline"), ("sync", "shm"), ("sync", "unary"), ("aio", "inline"), ("aio", "unary")])
def way(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Client and plane of today's."""
    first, second = request.param
    return first, second


async def say(address: str, way: tuple[str, str], later: Later) -> tuple[Any, float]:
    """What a step of a later version gives: the error that it raises, or None and how far its output is wrong.

    What is in the cache is the same as before if it raised, and an ordinary step is served as ever.
    """
    client_kind, plane = way
    connecting = attnd.connect(address) if client_kind == "sync" else attnd.aio.connect(address)
    client: Any = await settled(connecting)
    cache = await settled(client.create_cache(**calls.GEOMETRY, dtype="float32", backend="naive"))
    session = None if plane == "unary" else cache.session(plane=plane)

    async def attend(said: dict[str, Any], qkv: Any) -> Any:
        metadata = attnd.StepMetadata(**said)
        if session is None:
            method = client.decode if metadata.kind == "decode" else client.prefill
            return await settled(method(cache, metadata, 0, *qkv))
        return await settled((await settled(session.step(metadata))).attend(0, *qkv))

    async def stored() -> torch.Tensor:
        everywhere = list(range(calls.NUM_PAGES * calls.PAGE_SIZE))
        return torch.stack(await settled(cache.read_kv(0, everywhere, torch.empty(0))))

    context = PlainCache()
    _, k, v = calls.inputs(CONTEXTS, calls.HEAD_DIM, torch.float32, 1)
    await attend(CONTEXTS | {"slot_mapping": CONTEXT_SLOTS, "store_only": True}, (None, k, v))
    context.store(0, CONTEXT_SLOTS, k, v)
    if later.says.get("context_lens") == [3, 5]:  # one more, behind the window's page
        await settled(cache.store_kv(0, [36], k[:1], v[:1]))
        context.store(0, [36], k[:1], v[:1])
    before, qkv = await stored(), later.inputs(2)
    try:
        output = await attend(dict(later.says), qkv)
        refusal, wrong = None, later.error(output, context, 0, qkv)
    except attnd.AttndError as error:
        refusal = error
        assert torch.equal(await stored(), before)
        ordinary = Later("", "", STEP, ORDINARY)
        qkv = ordinary.inputs(3)
        wrong = ordinary.error(await attend(STEP, qkv), context, 0, qkv)
    await settled(client.close())
    return refusal, wrong


GROUPED = Later(
    "groups",
    "layer groups",
    {
        "query_lens": STEP["query_lens"],
        "context_lens": STEP["context_lens"],
        "groups": [attnd.StepGroup(STEP["page_tables"], STEP["slot_mapping"], window=3)],
    },
)
REFUSED = {**LATER, "groups": GROUPED}


@pytest.mark.parametrize("name", REFUSED)
def test_released_server_is_asked_nothing_that_it_does_not_know(
    version: str, old_server: ServerProcess, way: tuple[str, str], name: str
) -> None:
    later = REFUSED[name]
    refusal, wrong = asyncio.run(say(old_server.address, way, later))
    server = f"the server is of version {version}, which has no {later.words}: upgrade it"
    assert type(refusal) is attnd.Unsupported
    assert str(refusal) == f"{later.field} is given, but {server}"
    assert wrong <= 1


@pytest.mark.parametrize("name", LATER)
def test_todays_server_answers_what_is_new(new_server: ServerProcess, way: tuple[str, str], name: str) -> None:
    refusal, wrong = asyncio.run(say(new_server.address, way, LATER[name]))
    assert refusal is None
    assert wrong <= 1


def test_snapshots_go_on_and_back_behind_one_address(packages: Path, version: str, tmp_path: Path) -> None:
    options = ["--device", "cpu", "--snapshot-dir", str(tmp_path / "snapshots"), "--restore"]
    later = LATER["store_first"]
    _, k, v = calls.inputs(CONTEXTS, calls.HEAD_DIM, torch.float32, 1)
    context = PlainCache()
    context.store(0, CONTEXT_SLOTS, k, v)
    server: ServerProcess = versions.ReleasedServer(packages, tmp_path / "log", *options)
    try:
        with attnd.connect(server.address, plane="inline") as client:
            caches = [
                client.create_cache(**(calls.GEOMETRY | {"backend": "naive"} | more))
                for more, _, _ in calls.CACHES.values()
            ]
            for cache, (_, dtype, plain) in zip(caches, calls.CACHES.values(), strict=True):
                wide_v = v.repeat(1, 1, 2)[..., : plain.head_dim_v]
                cache.store_kv(0, CONTEXT_SLOTS, k.to(dtype), wide_v.to(dtype))
            before = [cache.read_kv(0, CONTEXT_SLOTS, torch.empty(0)) for cache in caches]
            for is_released in (False, True):
                server.stop()
                if is_released:
                    server = versions.ReleasedServer(packages, tmp_path / "log", *options, port=server.port)
                else:
                    server = ServerProcess(tmp_path / "log", *options, port=server.port)
                for cache, stored in zip(caches, before, strict=True):
                    cache.adopt()
                    for read, expected in zip(cache.read_kv(0, CONTEXT_SLOTS, torch.empty(0)), stored, strict=True):
                        assert torch.equal(read, expected)
                metadata, qkv = attnd.StepMetadata(**later.says), later.inputs(2)
                if is_released:
                    with pytest.raises(attnd.Unsupported, match=f"of version {re.escape(version)}, which has no"):
                        client.prefill(caches[0], metadata, 0, *qkv)
                else:
                    assert later.error(client.prefill(caches[0], metadata, 0, *qkv), context, 0, qkv) <= 1
    finally:
        server.stop()


CREATED: dict[str, tuple[dict[str, Any], str]] = {
    "v_dtype": ({"dtype": "float32", "v_dtype": "float8_e4m3fn"}, "pages whose V has another type than K"),
    "groups": (
        {"dtype": "float32", "groups": [attnd.LayerGroup([0]), attnd.LayerGroup([1], num_pages=12, window=2)]},
        "layer groups",
    ),
}


@pytest.mark.parametrize("name", CREATED)
@pytest.mark.parametrize("connect", [attnd.connect, attnd.aio.connect], ids=["sync", "aio"])
def test_released_server_makes_no_cache_of_a_part_of_a_request(
    version: str, old_server: ServerProcess, connect: Callable[[str], Any], name: str
) -> None:
    asked, words = CREATED[name]

    async def test() -> None:
        client = await settled(connect(old_server.address))
        before = len(await settled(client.list_caches()))
        with pytest.raises(attnd.Unsupported) as refusal:
            await settled(client.create_cache(**calls.GEOMETRY, **asked))
        server = f"the server is of version {version}, which has no {words}: upgrade it"
        assert str(refusal.value) == f"{name} is given, but {server}"
        assert len(await settled(client.list_caches())) == before
        await settled(client.close())

    asyncio.run(test())


def test_todays_server_keeps_v_in_another_type(new_server: ServerProcess) -> None:
    asked, _ = CREATED["v_dtype"]
    with attnd.connect(new_server.address) as client, client.create_cache(**calls.GEOMETRY, **asked) as cache:
        k, v = torch.full((1, 2, 16), 0.3), torch.full((1, 2, 16), 0.3)
        cache.store_kv(0, [5], k, v)
        read_k, read_v = cache.read_kv(0, [5], torch.empty(0))
        assert torch.equal(read_k, k)
        assert torch.equal(read_v, v.to(torch.float8_e4m3fn).float())


def test_todays_server_has_layer_groups(new_server: ServerProcess) -> None:
    asked, _ = CREATED["groups"]
    _, k, v = calls.inputs(CONTEXTS, calls.HEAD_DIM, torch.float32, 1)
    context = PlainCache()
    # Layer 0 is as in STEP. Layer 1 has other pages of request 1, and a window of 2.
    other_slots = [*CONTEXT_SLOTS[:3], 16, 17, 18, 19]
    tables = attnd.StepGroup([[5, -1], [4, 11]], [23, 44, 45])
    rows = {
        0: (3, ORDINARY[0][1][-2:]),
        1: (4, [(3, "slot", 19), (4, "new", 1)]),
        2: (5, [(4, "new", 1), (5, "new", 2)]),
    }
    expected = [Later("", "", STEP, ORDINARY), Later("", "", STEP, rows)]
    lens = {name: STEP[name] for name in ("query_lens", "context_lens")}
    with attnd.connect(new_server.address) as client, client.create_cache(**calls.GEOMETRY, **asked) as cache:
        for layer, slots in enumerate((CONTEXT_SLOTS, other_slots)):
            cache.store_kv(layer, slots, k, v)
            context.store(layer, slots, k, v)
        step = attnd.StepMetadata(**lens, groups=[attnd.StepGroup(STEP["page_tables"], STEP["slot_mapping"]), tables])
        with cache.session() as session:
            opened = session.step(step)
            for layer, each in enumerate(expected):
                qkv = each.inputs(layer)
                assert each.error(opened.attend(layer, *qkv), context, layer, qkv) <= 1
