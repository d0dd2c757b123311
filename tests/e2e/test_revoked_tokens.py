"""A token that is taken out of the file ends what it opened: between two chunks, while something waits, when idle."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import torch

import attnd
from attnd.planes.grpc import SERVICE
from attnd.planes.tickets import show_ticket
from attnd.protocol import frames, requests
from attnd.v1 import plane_pb2
from attnd_server.identity.tokens import add_token
from tests.raw_shm import AGAIN, RawClient
from tests.servers import ServerProcess, mapped, wait_for

GEOMETRY = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 16, "num_pages": 8, "page_size": 4, "dtype": "float32"}
ONE = torch.ones(1, 2, 16)
DECODE = attnd.StepMetadata([1], [0], [[0]], [0], kind="decode")
MAX_SESSIONS = 4


@dataclass
class Tokens:
    """A server with tokens of two principals, one of which is taken out."""

    server: ServerProcess
    path: Path
    tokens: dict[str, str]

    def credentials(self, principal: str) -> attnd.Credentials:
        return attnd.Credentials(self.tokens[principal], tls=False)

    def connect(self, principal: str, plane: str = "inline") -> attnd.Client:
        return attnd.connect(self.server.address, credentials=self.credentials(principal), plane=plane)

    def is_known(self, principal: str) -> bool:
        try:
            self.connect(principal).close()
        except attnd.Unauthenticated:
            return False
        return True

    def remove(self, principal: str) -> None:
        lines = self.path.read_text().splitlines(keepends=True)
        self.path.write_text("".join(line for line in lines if not line.startswith(f"{principal} ")))
        wait_for(lambda: not self.is_known(principal), "a token that was taken out is still known")


@pytest.fixture
def tokens(tmp_path: Path) -> Iterator[Tokens]:
    path = tmp_path / "tokens"
    made = {name: add_token(str(path), name) for name in ("alice", "bob")}
    options = ["--device", "cpu", "--tokens", str(path), "--socket-dir", str(tmp_path / "sockets"), "--drain-s", "1"]
    options += ["--max-sessions", str(MAX_SESSIONS)]
    with ServerProcess(tmp_path / "log", *options) as server:
        yield Tokens(server, path, made)
        assert "internal error" not in server.log, server.log


def is_refused(error: grpc.RpcError) -> bool:
    return error.code() is grpc.StatusCode.UNAUTHENTICATED and "no longer known here" in error.details()


def test_read_kv_ends_at_a_chunk(tokens: Tokens) -> None:
    """128 MiB are asked for, of which a reader that stops has a few chunks."""
    geometry = {**GEOMETRY, "num_kv_heads": 8, "head_dim": 256, "num_pages": 2_048}
    with tokens.connect("alice") as hers:
        cache = hers.create_cache(**geometry)
        slots = range(8_192)
        with grpc.insecure_channel(tokens.server.address, [("grpc.max_receive_message_length", -1)]) as channel:
            request, metadata = requests.read_kv(cache.ref, 0, slots), tokens.credentials("alice").metadata()
            chunks = channel.unary_stream(f"{SERVICE}ReadKv")(request, metadata=metadata)
            read = requests.joined([frames.READ_KV_RESPONSE.decode(next(chunks))], ONE)[0].shape[0]
            assert read == 256
            tokens.remove("alice")
            with pytest.raises(grpc.RpcError) as raised:  # noqa: PT012  # wherever the server had got to
                for chunk in chunks:
                    read += requests.joined([frames.READ_KV_RESPONSE.decode(chunk)], ONE)[0].shape[0]
            assert is_refused(raised.value)
            assert read < len(slots) / 2


@pytest.mark.parametrize("method", ["Attend", "StoreKv"])
def test_an_idle_stream_ends_and_gives_its_place_back(tokens: Tokens, method: str) -> None:
    with grpc.insecure_channel(tokens.server.address) as channel, tokens.connect("bob") as his:
        release = threading.Event()

        def nothing() -> Iterator[bytes]:
            yield from ()
            release.wait(60)

        metadata = tokens.credentials("alice").metadata()
        calls = [channel.stream_stream(SERVICE + method)(nothing(), metadata=metadata) for _ in range(2)]
        with his.create_cache(**GEOMETRY) as cache, cache.session() as session:
            session.step(DECODE).attend(0, ONE, ONE, ONE)
            tokens.remove("alice")
            for call in calls:
                with pytest.raises(grpc.RpcError) as raised:
                    next(call)
                assert is_refused(raised.value)
            release.set()
            session.step(DECODE).attend(0, ONE, ONE, ONE)


def test_a_stream_whose_client_reads_nothing_ends(tokens: Tokens) -> None:
    """Its place is given back, though the answers that wait for it are never read."""
    num_tokens = 8_192
    tensors = [torch.ones(num_tokens, 2, 16) for _ in range(3)]
    metadata = attnd.StepMetadata([1] * num_tokens, [0] * num_tokens, [[-1]] * num_tokens, kind="decode")
    release = threading.Event()
    with tokens.connect("alice") as hers:
        cache = hers.create_cache(**GEOMETRY)
        call = requests.attend_call(1, 0, *tensors, requests.DEFAULT_OPTIONS)

        def flood() -> Iterator[bytes]:
            yield frames.step_request(metadata.to_message(1, cache.ref))
            for _ in range(40):
                yield call
            release.wait(60)

        with grpc.insecure_channel(tokens.server.address, [("grpc.max_receive_message_length", -1)]) as channel:
            shown = tokens.credentials("alice").metadata()
            streams = [channel.stream_stream(f"{SERVICE}Attend")(flood(), metadata=shown) for _ in range(2)]
            for stream in streams:
                next(stream)
            tokens.tokens["again"] = add_token(str(tokens.path), "alice")
            wait_for(lambda: tokens.is_known("again"), "a new token is not known")
            lines = tokens.path.read_text().splitlines(keepends=True)
            tokens.path.write_text("".join(lines[1:]))  # the first is the one that opened them
            wait_for(lambda: not tokens.is_known("alice"), "a token that was taken out is still known")
            with tokens.connect("again") as again, again.create_cache(**GEOMETRY) as other:
                wait_for(lambda: is_served(other), "places of streams that read nothing were not given back")
            release.set()


def is_served(cache: attnd.Cache) -> bool:
    """Whether there is a place for a session of each half of what a principal may have."""
    try:
        with cache.session() as one, cache.session() as other:
            for session in (one, other):
                session.step(DECODE).attend(0, ONE, ONE, ONE)
    except attnd.Exhausted:
        return False
    return True


def test_calls_that_are_like_the_last_one_are_refused_and_an_idle_plane_ends(tokens: Tokens) -> None:
    with tokens.connect("alice") as hers:
        cache = hers.create_cache(**GEOMETRY)
        with closing(RawClient(hers, cache)) as works, closing(RawClient(hers, cache)) as idle:
            regions = mapped(tokens.server.pid)
            tokens.remove("alice")
            works.socket.sendall(AGAIN)
            assert works.answer() == "error"
            assert idle.replies.receive() is None  # its end
            wait_for(lambda: mapped(tokens.server.pid) < regions, "regions are left")


def test_a_ticket_of_a_removed_token_opens_nothing(tokens: Tokens) -> None:
    with tokens.connect("alice") as hers:
        plane = plane_pb2.OpenPlaneResponse.FromString(hers.transport.unary("OpenPlane", b"", 10))
        tokens.remove("alice")
        with pytest.raises(attnd.Unauthenticated, match="no longer known here"):
            show_ticket(plane.shm.ticket, plane.shm.socket_path, "", 1, 10)
