"""Who calls: TLS, tokens and certificates on real sockets, and what one principal learns of another: nothing."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import torch
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import attnd
from attnd.planes.grpc import SERVICE
from attnd.protocol import frames, requests
from attnd.v1 import cache_pb2, plane_pb2
from attnd_server import health_probe
from attnd_server.identity.tokens import add_token
from tests.certificates import Authority, needs_openssl
from tests.e2e.test_commands import attnd_command
from tests.scrape import Scrape
from tests.servers import ServerProcess, wait_for

GEOMETRY = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 16, "num_pages": 8, "page_size": 4, "dtype": "float32"}
Q, K, V = torch.ones(2, 4, 16), torch.ones(2, 2, 16), torch.ones(2, 2, 16)
PREFILL = attnd.StepMetadata(query_lens=[2], context_lens=[0], page_tables=[[0]], slot_mapping=[0, 1])
DECODE = attnd.StepMetadata([1], [2], [[0]], [2], kind="decode")

pytestmark = needs_openssl


@dataclass
class Secured:
    """A server with TLS, tokens, metrics and shared memory."""

    server: ServerProcess
    folder: Path
    authority: Authority
    tokens: dict[str, str]

    @property
    def tokens_path(self) -> Path:
        return self.folder / "tokens"

    def credentials(self, principal: str, **more: object) -> attnd.Credentials:
        return attnd.Credentials(self.tokens.get(principal, principal), ca=self.authority.ca, **more)

    def connect(self, principal: str) -> attnd.Client:
        return attnd.connect(self.server.address, credentials=self.credentials(principal), connect_timeout_s=20)

    def scrape(self, num_calls: int = 0) -> Scrape:
        """The metrics, once so many RPCs were counted: their callers know of their end a little earlier."""
        deadline = time.monotonic() + 10
        while True:
            scrape = Scrape.of(re.search(r"metrics on (\S+)$", self.server.banner)[1])
            if scrape.value("grpc_server_call_duration_seconds_count") >= num_calls or time.monotonic() > deadline:
                return scrape
            time.sleep(0.01)

    def channel(self) -> grpc.Channel:
        return grpc.secure_channel(self.server.address, self.credentials("").channel_credentials())


@contextmanager
def running(folder: Path) -> Iterator[Secured]:
    authority = Authority(folder)
    made = authority.issue("server", "/CN=attnd", "DNS:localhost,IP:127.0.0.1")
    tokens = {name: add_token(str(folder / "tokens"), name) for name in ("alice", "bob")}
    options = ["--device", "cpu", "--tls-cert", made.cert, "--tls-key", made.key, "--tokens", str(folder / "tokens")]
    options += ["--socket-dir", str(folder / "sockets"), "--metrics", "0", "--drain-s", "1"]
    with ServerProcess(folder / "log", *options) as server:
        yield Secured(server, folder, authority, tokens)
        log = server.log
    assert "internal error" not in log, log
    assert not any(token in log for token in tokens.values())


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[Secured]:
    """A server whose files and counts a test may change."""
    with running(tmp_path) as server:
        yield server


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """One for all tests that leave it as it is."""
    with running(tmp_path_factory.mktemp("shared")) as server:
        yield server


def attended(session: attnd.Session) -> torch.Tensor:
    return session.step(PREFILL).attend(0, Q, K, V)


@pytest.mark.parametrize("plane", ["inline", "shm"])
def test_a_token_over_tls_does_everything(shared: Secured, plane: str) -> None:
    with shared.connect("alice") as client, client.create_cache(**GEOMETRY) as cache:
        with cache.session(plane=plane) as session:
            assert attended(session).shape == Q.shape
            assert session.plane == plane
        assert client.prefill(cache, PREFILL, 0, Q, K, V).shape == Q.shape
        assert cache.store_kv(0, [4, 5], K, V) == 2
        assert torch.equal(cache.read_kv(0, [4, 5], like=K)[0], K)


def test_the_asyncio_client_has_credentials_too(shared: Secured) -> None:
    async def main() -> None:
        credentials = shared.credentials("alice")
        async with await attnd.aio.connect(shared.server.address, credentials=credentials) as client:
            async with await client.create_cache(**GEOMETRY) as cache, cache.session() as session:
                step = await session.step(PREFILL)
                assert (await step.attend(0, Q, K, V)).shape == Q.shape
                assert await cache.store_kv(0, [4, 5], K, V) == 2
                assert torch.equal((await cache.read_kv(0, [4, 5], like=K))[0], K)

    asyncio.run(main())


def refused(address: str, credentials: attnd.Credentials | None) -> list[attnd.AttndError]:
    """What both clients are told."""

    async def main() -> None:
        await attnd.aio.connect(address, credentials=credentials, connect_timeout_s=1)

    told = []
    with pytest.raises(attnd.AttndError) as raised:
        attnd.connect(address, credentials=credentials, connect_timeout_s=1)
    told.append(raised.value)
    with pytest.raises(attnd.AttndError) as raised:
        asyncio.run(main())
    return [*told, raised.value]


def test_no_or_a_wrong_token_is_unauthenticated_and_counted_without_a_name(secured: Secured) -> None:
    wrong = "no-token-of-this-server"
    for principal, why in (("", "authorization is absent"), (wrong, "with a token that this server knows")):
        for told in refused(secured.server.address, secured.credentials(principal)):
            assert type(told) is attnd.Unauthenticated
            assert isinstance(told, attnd.PermissionDenied)
            assert why in str(told)
            assert wrong not in str(told)
    scrape = secured.scrape(num_calls=4)
    assert scrape.by("attnd_refusals_total", "reason") == {"Unauthenticated": 4}
    ended = scrape.by("grpc_server_call_duration_seconds_count", "grpc_status")
    assert ended == {"UNAUTHENTICATED": 4}
    with secured.connect("alice") as client, client.create_cache(**GEOMETRY, name="hers") as cache:
        with cache.session() as session:
            attended(session)
    text = secured.scrape().text + secured.server.log
    for secret in ("alice", "hers", wrong, *secured.tokens.values()):
        assert secret not in text


def test_nothing_is_read_of_a_message_of_nobody(secured: Secured) -> None:
    with secured.channel() as channel, pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary(f"{SERVICE}CreateCache")(bytes(64 << 20), timeout=20)
    assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
    received = secured.scrape(num_calls=1).samples["grpc_server_call_rcvd_total_compressed_message_size_bytes_sum"]
    assert [(labels["grpc_status"], value) for labels, value in received] == [("UNAUTHENTICATED", 0)]


def test_an_end_that_does_not_trust_the_other_connects_to_nobody(shared: Secured, tmp_path: Path) -> None:
    (tmp_path / "another").mkdir()
    another = Authority(tmp_path / "another")
    token = shared.tokens["alice"]
    ca = shared.authority.ca
    for credentials, why in (
        (attnd.Credentials(token, ca=another.ca), "CERTIFICATE_VERIFY_FAILED"),
        (attnd.Credentials(token, ca=ca, server_name="another.example"), "Hostname Verification"),
        (attnd.Credentials(token, tls=False), ""),
        (None, ""),
    ):
        for told in refused(shared.server.address, credentials):
            assert type(told) is attnd.Disconnected
            assert why in str(told)
            assert token not in str(told)


def test_health_and_the_contract_need_no_token(shared: Secured) -> None:
    assert health_probe.failure(shared.server.address, shown=shared.credentials("")) is None
    arguments = ("attnd_server.health_probe", shared.server.address, "--tls-ca", shared.authority.ca)
    assert attnd_command(*arguments).returncode == 0
    with shared.channel() as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=20)
    assert "attnd.v1.AttentionService" in {service.name for service in answer.list_services_response.service}


def test_commands_show_a_token(shared: Secured) -> None:
    file = shared.folder / "alice.token"
    file.write_text(shared.tokens["alice"] + "\n")
    credentials = ("--tls-ca", shared.authority.ca, "--token-file", str(file))
    with shared.connect("alice") as client, client.create_cache(**GEOMETRY, name="shown here"):
        result = attnd_command("attnd_server", "info", shared.server.address, *credentials)
        assert (result.returncode, result.stderr) == (0, "")
        assert "shown here" in result.stdout
        assert (
            "authorization is absent"
            in attnd_command("attnd_server", "info", shared.server.address, *credentials[:2]).stderr
        )
    result = attnd_command("attnd_server", "doctor", shared.server.address, *credentials)
    assert result.returncode == 0, result.stderr
    assert "takes shm" in result.stdout


def requests_of(ref: cache_pb2.CacheRef) -> dict[str, tuple[str, list[bytes]]]:
    """By method its kind, and sound requests that name a cache."""
    options = requests.DEFAULT_OPTIONS
    one = (Q[:1], K[:1], V[:1])
    step = frames.step_request(PREFILL.to_message(1, ref))
    return {
        "RenewCache": ("unary_unary", [cache_pb2.RenewCacheRequest(cache=ref).SerializeToString()]),
        "AdoptCache": ("unary_unary", [cache_pb2.AdoptCacheRequest(cache=ref).SerializeToString()]),
        "CopyPages": ("unary_unary", [requests.copy_pages(ref, [0], [1])]),
        "WarmUp": (
            "unary_unary",
            [requests.warm_up(ref, num_heads=4, query_len=1, max_reqs=1, max_context_len=0, options=options)],
        ),
        "Prefill": ("unary_unary", [requests.unary_call("prefill", PREFILL, ref, 0, Q, K, V, options)]),
        "Decode": ("unary_unary", [requests.unary_call("decode", DECODE, ref, 0, *one, options)]),
        "Attend": ("stream_stream", [step, requests.attend_call(1, 0, Q, K, V, options)]),
        "StoreKv": ("stream_stream", list(requests.store_kv(ref, 0, [0, 1], K, V))),
        "ReadKv": ("unary_stream", [requests.read_kv(ref, 0, [0, 1])]),
        "DeleteCache": ("unary_unary", [cache_pb2.DeleteCacheRequest(cache=ref).SerializeToString()]),
    }


def answers(channel: grpc.Channel, token: str, ref: cache_pb2.CacheRef) -> dict[str, object]:
    """Everything that comes back for each request: messages, code, details and trailers, as bytes."""
    metadata = (("authorization", f"Bearer {token}"),)
    told: dict[str, object] = {}
    for method, (kind, messages) in requests_of(ref).items():
        call = getattr(channel, kind)(SERVICE + method)
        try:
            sent = iter(messages) if kind.startswith("stream") else messages[0]
            answer = call(sent, metadata=metadata, timeout=20)
            told[method] = answer if isinstance(answer, bytes) else list(answer)
        except grpc.RpcError as error:
            told[method] = error.code(), error.details(), tuple(error.trailing_metadata())
    return told


def test_anothers_cache_is_answered_byte_for_byte_as_an_unknown_one(shared: Secured) -> None:
    with shared.connect("alice") as client, shared.channel() as channel:
        cache = client.create_cache(**GEOMETRY)
        cache.store_kv(0, [0, 1], K, V)
        while_it_exists = answers(channel, shared.tokens["bob"], cache.ref)
        hers = answers(channel, shared.tokens["alice"], cache.ref)
        assert all(not isinstance(told, tuple) for told in hers.values())  # the requests are sound, then
        assert torch.equal(k_of(hers["ReadKv"]), K)
        with pytest.raises(attnd.CacheLost):
            cache.renew()  # she deleted it
        afterwards = answers(channel, shared.tokens["bob"], cache.ref)
    assert while_it_exists == afterwards
    for method, told in while_it_exists.items():
        assert f"cache.id is {cache.ref.id.hex()}, but no such cache exists" in str(told), method


def k_of(chunks: list[bytes]) -> torch.Tensor:
    """K of what ReadKv answered."""
    return requests.joined([frames.READ_KV_RESPONSE.decode(data) for data in chunks], K)[0]


@pytest.mark.parametrize("plane", ["inline", "shm"])
def test_a_session_does_not_reach_anothers_cache(shared: Secured, plane: str) -> None:
    with shared.connect("alice") as hers, shared.connect("bob") as his, hers.create_cache(**GEOMETRY) as cache:
        cache.store_kv(0, [0, 1], K, V)
        with his.create_cache(**GEOMETRY) as own, own.session(plane=plane) as session:
            attended(session)
            own.ref.CopyFrom(cache.ref)
            with pytest.raises(attnd.CacheLost, match="no such cache exists"):
                session.step(PREFILL).attend(0, 2 * Q, 2 * K, 2 * V)
            with pytest.raises(attnd.CacheLost):
                own.delete()
        assert torch.equal(cache.read_kv(0, [0, 1], like=K)[0], K)


def test_each_lists_only_its_own_caches(secured: Secured) -> None:
    with secured.connect("alice") as hers, secured.connect("bob") as his:
        with hers.create_cache(**GEOMETRY, name="hers"), his.create_cache(**GEOMETRY, name="his"):
            assert [[info.name for info in client.list_caches()] for client in (hers, his)] == [["hers"], ["his"]]
            secured.tokens["alice, too"] = add_token(str(secured.tokens_path), "alice")
            wait_for(lambda: is_known(secured, "alice, too"), "a new token is not known")
            with secured.connect("alice, too") as again:
                assert [info.name for info in again.list_caches()] == ["hers"]


def is_known(secured: Secured, principal: str) -> bool:
    try:
        secured.connect(principal).close()
    except attnd.Unauthenticated:
        return False
    return True


def test_anothers_plane_is_an_unknown_one(shared: Secured) -> None:
    with shared.connect("alice") as hers, shared.connect("bob") as his:
        wanted = plane_pb2.OpenPlaneRequest(plane=plane_pb2.PLANE_SHM).SerializeToString()
        opened = plane_pb2.OpenPlaneResponse.FromString(hers.transport.unary("OpenPlane", wanted, 20))
        close = plane_pb2.ClosePlaneRequest(id=opened.id).SerializeToString()
        told = []
        for _ in range(2):  # as it is there, and once it has gone
            with pytest.raises(attnd.InvalidRequest) as raised:
                his.transport.unary("ClosePlane", close, 20)
            told.append(str(raised.value))
            if len(told) == 1:
                hers.transport.unary("ClosePlane", close, 20)
        assert told == [f"id is {opened.id}, but no such plane is open"] * 2


@pytest.mark.parametrize("plane", ["inline", "shm"])
def test_a_removed_token_ends_what_it_had_opened_and_nothing_else(secured: Secured, plane: str) -> None:
    with secured.connect("alice") as hers, secured.connect("bob") as his:
        cache, own = hers.create_cache(**GEOMETRY), his.create_cache(**GEOMETRY)
        with cache.session(plane=plane) as session, own.session(plane=plane) as other:
            step = session.step(PREFILL)
            step.attend(0, Q, K, V)
            attended(other)
            lines = secured.tokens_path.read_text().splitlines(keepends=True)
            secured.tokens_path.write_text("".join(line for line in lines if not line.startswith("alice ")))
            wait_for(lambda: not is_known(secured, "alice"), "a token that was taken out is still known")
            with pytest.raises(attnd.Unauthenticated, match="no longer known here"):
                step.attend(0, Q, K, V)  # of a step that was open
            with pytest.raises(attnd.Unauthenticated):
                attended(session)
            with pytest.raises(attnd.Unauthenticated):
                cache.renew()
            attended(other)
        own.delete()


def test_a_broken_new_file_changes_nothing_but_the_log(secured: Secured) -> None:
    secured.tokens_path.write_text(f"alice {secured.tokens['alice']}\n")
    wait_for(lambda: "a changed file is not used" in secured.server.log, "a wrong file is not told of")
    assert is_known(secured, "alice")
    assert is_known(secured, "bob")


def test_a_token_that_is_called_for_may_change_on_one_connection(shared: Secured) -> None:
    tokens = iter([shared.tokens["alice"], shared.tokens["bob"], "neither"])
    credentials = attnd.Credentials(lambda: next(tokens), ca=shared.authority.ca)
    with attnd.connect(shared.server.address, credentials=credentials) as client:
        client.capabilities()
        with pytest.raises(attnd.Unauthenticated):
            client.capabilities()


def test_tokens_without_tls_are_for_loopback(tmp_path: Path) -> None:
    token = add_token(str(tmp_path / "tokens"), "alice")
    with ServerProcess(tmp_path / "log", "--device", "cpu", "--tokens", str(tmp_path / "tokens")) as server:
        with attnd.connect(server.address, credentials=attnd.Credentials(token, tls=False)) as client:
            assert client.list_caches() == []
        (tmp_path / "token").write_text(token)
        arguments = ("attnd_server", "info", server.address, "--token-file", str(tmp_path / "token"))
        assert attnd_command(*arguments).returncode == 0


@pytest.fixture
def mutual(tmp_path: Path) -> Iterator[Secured]:
    """A server that knows clients by their certificates."""
    authority = Authority(tmp_path)
    made = authority.issue("server", "/CN=attnd", "DNS:localhost,IP:127.0.0.1")
    options = ["--device", "cpu", "--tls-cert", made.cert, "--tls-key", made.key, "--tls-client-ca", authority.ca]
    with ServerProcess(tmp_path / "log", *options) as server:
        yield Secured(server, tmp_path, authority, {})


def shown(secured: Secured, authority: Authority, name: str, subject: str, names: str = "") -> attnd.Credentials:
    made = authority.issue(name, subject, names)
    return attnd.Credentials(ca=secured.authority.ca, cert=made.cert, key=made.key)


def test_certificates_name_principals(mutual: Secured) -> None:
    alice = shown(mutual, mutual.authority, "alice", "/CN=alice")
    bob = shown(mutual, mutual.authority, "bob", "/", "URI:spiffe://attention.example/bob")
    address = mutual.server.address
    with attnd.connect(address, credentials=alice) as hers, attnd.connect(address, credentials=bob) as his:
        with hers.create_cache(**GEOMETRY) as cache, cache.session() as session:
            attended(session)
            assert (len(hers.list_caches()), len(his.list_caches())) == (1, 0)
    nameless = shown(mutual, mutual.authority, "nameless", "/O=nobody")
    for told in refused(address, nameless):
        assert type(told) is attnd.Unauthenticated
        assert "must have one subject alternative name" in str(told)
    arguments = ("--tls-ca", mutual.authority.ca, "--tls-client-cert", alice.cert, "--tls-client-key", alice.key)
    assert attnd_command("attnd_server", "info", address, *arguments).returncode == 0
    assert attnd_command("attnd_server.health_probe", address, *arguments).returncode == 0


def test_no_or_an_alien_certificate_is_not_connected(mutual: Secured, tmp_path: Path) -> None:
    (tmp_path / "another").mkdir()
    alien = shown(mutual, Authority(tmp_path / "another"), "alice", "/CN=alice")
    for credentials in (attnd.Credentials(ca=mutual.authority.ca), alien):
        assert {type(told) for told in refused(mutual.server.address, credentials)} == {attnd.Disconnected}
    assert health_probe.failure(mutual.server.address, shown=attnd.Credentials(ca=mutual.authority.ca)) is not None


def test_a_new_certificate_is_served_to_new_connections_and_old_ones_go_on(secured: Secured, tmp_path: Path) -> None:
    (tmp_path / "next").mkdir()
    successor = Authority(tmp_path / "next", "successor")
    made = successor.issue("server", "/CN=attnd", "IP:127.0.0.1")
    with secured.connect("alice") as client, client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        attended(session)
        for kind in ("key", "pem"):
            os.replace(getattr(made, {"key": "key", "pem": "cert"}[kind]), secured.folder / f"server.{kind}")
        wait_for(lambda: secured.server.log.count("read again") == 1, "the file is not read again")
        attended(session)
        credentials = attnd.Credentials(secured.tokens["alice"], ca=successor.ca)
        with attnd.connect(secured.server.address, credentials=credentials) as another:
            assert len(another.list_caches()) == 1


def test_files_that_cannot_be_used_end_the_start(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("alice sha256:0\n")
    (tmp_path / "tokens").chmod(0o644)
    for mode, why in ((0o644, "whose mode is 0644, but must give others nothing"), (0o600, "line 1 must be")):
        (tmp_path / "tokens").chmod(mode)
        result = attnd_command(
            "attnd_server", "serve", "--port", "0", "--device", "cpu", "--tokens", str(tmp_path / "tokens")
        )
        assert result.returncode == 1
        assert "cannot serve: tokens is" in result.stderr
        assert why in result.stderr


def test_inproc_refuses_credentials() -> None:
    with pytest.raises(attnd.InvalidRequest, match="credentials are given for inproc://, but must be absent"):
        attnd.connect("inproc://", credentials=attnd.Credentials("token"))
