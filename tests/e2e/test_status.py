"""GetStatus of real servers: over every plane, from both clients, and to whom it tells of whom."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest
import torch

import attnd
from attnd.v1 import attention_pb2_grpc, error_pb2, plane_pb2, status_pb2
from attnd_server.identity.tokens import add_token
from tests.servers import ServerProcess, wait_for

GEOMETRY = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "num_pages": 8, "page_size": 4, "dtype": "float32"}
Q, K, V = torch.ones(2, 4, 16), torch.ones(2, 2, 16), torch.ones(2, 2, 16)
PREFILL = attnd.StepMetadata(query_lens=[2], context_lens=[0], page_tables=[[0]], slot_mapping=[0, 1])


class Tokens:
    """A server with principals alice, bob, and olga who operates it."""

    def __init__(self, folder: Path) -> None:
        self.tokens = {name: add_token(str(folder / "tokens"), name) for name in ("alice", "bob", "olga")}
        options = ["--tokens", str(folder / "tokens"), "--operators", "olga, nobody-yet"]
        self.server = ServerProcess(folder / "log", "--device", "cpu", "--socket-dir", str(folder / "s"), *options)

    def credentials(self, name: str) -> attnd.Credentials:
        return attnd.Credentials(self.tokens[name], tls=False)

    def connect(self, name: str) -> attnd.Client:
        return attnd.connect(self.server.address, credentials=self.credentials(name))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokens]:
    made = Tokens(tmp_path_factory.mktemp("status"))
    yield made
    made.server.stop()


def rows(client: attnd.Client) -> dict[str, status_pb2.PrincipalStatus]:
    return {row.principal: row for row in client.status().principals}


@pytest.mark.parametrize(("plane", "number"), [("inline", plane_pb2.PLANE_INLINE), ("shm", plane_pb2.PLANE_SHM)])
def test_a_session_has_a_row_as_long_as_it_is_open(tokens: Tokens, plane: str, number: int) -> None:
    with tokens.connect("alice") as alice, alice.create_cache(**GEOMETRY, name="hers") as cache:
        before = rows(alice)["alice"].served
        with cache.session(plane=plane) as session:
            step = session.step(PREFILL)
            for layer in range(2):
                step.attend(layer, Q, K, V)
            told = alice.status()
            (row,) = told.sessions
            assert (row.principal, row.plane) == ("alice", number)
            assert (row.served.steps, row.served.tokens, row.served.calls) == (1, 2, 2)
            assert sum(row.served.times.kernel) == sum(row.served.times.queue) == 1
            assert 0 <= row.idle_s <= row.open_s <= told.uptime_s
            assert told.principals[0].num_sessions == 1
        wait_for(lambda: not alice.status().sessions, "the session's row stays")
        after = rows(alice)["alice"]
        assert after.served.calls == before.calls + 2
        assert (after.num_caches, after.num_pages, after.num_pages_written) == (1, 8, 1)


def test_the_asyncio_client_asks_too(tokens: Tokens) -> None:
    async def main() -> status_pb2.GetStatusResponse:
        async with await attnd.aio.connect(tokens.server.address, credentials=tokens.credentials("bob")) as client:
            async with await client.create_cache(**GEOMETRY) as cache, cache.session() as session:
                await (await session.step(PREFILL)).attend(0, Q, K, V)
                return await client.status()

    told = asyncio.run(main())
    assert [row.principal for row in told.principals] == ["bob"]
    assert [(row.principal, row.served.calls) for row in told.sessions] == [("bob", 1)]


def test_only_an_operator_sees_others(tokens: Tokens) -> None:
    with tokens.connect("alice") as alice, tokens.connect("bob") as bob, tokens.connect("olga") as olga:
        with bob.create_cache(**GEOMETRY, name="his") as cache, cache.session() as session:
            session.step(PREFILL).attend(0, Q, K, V)
            hers, all_of_them = alice.status(), olga.status()
            assert not hers.shows_everybody
            assert {row.principal for row in hers.principals} == {"alice"}
            assert "bob" not in {row.principal for row in hers.sessions}
            assert hers.num_process_bytes == hers.num_sessions_left_out == hers.num_principals_left_out == 0
            assert all_of_them.shows_everybody
            assert all_of_them.num_process_bytes > 1 << 20
            assert "bob" in {row.principal for row in all_of_them.principals}
            assert "bob" in {row.principal for row in all_of_them.sessions}
            for told in (hers, all_of_them):
                assert cache.ref.id not in told.SerializeToString()
                assert b"his" not in told.SerializeToString()


def test_who_shows_no_token_is_told_nothing(tokens: Tokens) -> None:
    with grpc.insecure_channel(tokens.server.address) as channel:
        stub = attention_pb2_grpc.AttentionServiceStub(channel)
        with pytest.raises(grpc.RpcError) as raised:
            stub.GetStatus(status_pb2.GetStatusRequest(), timeout=30)
    assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_where_nobody_is_asked_everybody_is_one(any_client: attnd.Client) -> None:
    with any_client.create_cache(**GEOMETRY) as cache, cache.session(plane="inline") as session:
        session.step(PREFILL).attend(0, Q, K, V)
        told = any_client.status()
        assert told.shows_everybody
        (row,) = told.principals
        assert row.num_caches >= 1
        assert {each.principal for each in told.sessions} == {row.principal}
        assert told.epoch == any_client.epoch or told.epoch == any_client.capabilities().epoch
        any_client.prefill(cache, PREFILL, 0, Q, K, V)
        assert rows(any_client)[row.principal].served.steps == row.served.steps + 1


@pytest.mark.parametrize("plane", ["inline", "shm", "unary"])
def test_refusals_are_counted_for_whom_was_told(tokens: Tokens, plane: str) -> None:
    reason = error_pb2.ERROR_REASON_INVALID_REQUEST
    with tokens.connect("alice") as alice, tokens.connect("bob") as bob, alice.create_cache(**GEOMETRY) as cache:

        def counts(client: attnd.Client) -> int:
            (row,) = client.status().principals
            return sum(each.count for each in row.refusals if each.reason == reason)

        hers, his = counts(alice), counts(bob)
        with cache.session(plane="inline" if plane == "unary" else plane) as session:
            asked = partial(alice.prefill, cache, PREFILL) if plane == "unary" else session.step(PREFILL).attend
            with pytest.raises(attnd.InvalidRequest):
                asked(99, Q, K, V)
        assert (counts(alice), counts(bob)) == (hers + 1, his)
