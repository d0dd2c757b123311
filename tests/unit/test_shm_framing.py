"""Messages of the shm plane on its socket, however the kernel cuts them."""

from __future__ import annotations

import socket
import struct
import threading
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnd.errors import DeadlineExceeded, InvalidRequest
from attnd.protocol import frames
from attnd.protocol.shm import framing, sockets


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def test_requests_are_as_the_contract_says() -> None:
    assert framing.request_bytes(b"abc", 3) == struct.pack("<IIQI", 3, 0, 0, 3) + b"abc"
    assert framing.repeated_call(7, 1 << 40, 2) == struct.pack("<IIQI", 0, 7, 1 << 40, 2)
    assert framing.reply_bytes(b"ab") == struct.pack("<IIQIIII", 2, 0, 0, 0, 0, 0, 0) + b"ab"
    assert framing.repeated_reply(7, 9, 3, 4, 5, 6) == struct.pack("<IIQIIII", 0, 7, 9, 3, 4, 5, 6)


messages = st.one_of(
    st.builds(framing.Request, st.just(0), st.just(0), st.integers(0, 3), st.binary(min_size=1, max_size=300)),
    st.builds(framing.Request, st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(0, 3), st.just(b"")),
)


@given(sent=st.lists(messages, max_size=8), piece=st.integers(1, 64))
def test_what_was_sent_arrives_however_it_is_cut(sent: list[framing.Request], piece: int) -> None:
    data = b"".join(
        framing.request_bytes(each.message, each.lane)
        if each.message
        else framing.repeated_call(each.layer, each.step_id, each.lane)
        for each in sent
    )
    one, other = socket.socketpair()
    with one, other:

        def write() -> None:
            for start in range(0, len(data), piece):
                one.sendall(data[start : start + piece])
            one.shutdown(socket.SHUT_WR)

        writer = threading.Thread(target=write)
        writer.start()
        requests = framing.Requests(other)
        assert list(iter(requests.receive, None)) == sent
        writer.join()


def test_long_messages_arrive(pair: tuple[socket.socket, socket.socket]) -> None:
    message = bytes(range(256)) * 5000
    writer = threading.Thread(target=pair[0].sendall, args=(framing.reply_bytes(message) * 2,))
    writer.start()
    replies = framing.Replies(pair[1])
    for _ in range(2):
        reply = replies.receive()
        assert reply is not None
        assert reply.message == message
    writer.join()


@pytest.mark.parametrize("num_bytes", [0, 3, 16, 20])
def test_an_end_within_a_message_is_an_end(pair: tuple[socket.socket, socket.socket], num_bytes: int) -> None:
    pair[0].sendall(framing.request_bytes(b"0123456789")[:num_bytes])
    pair[0].close()
    assert framing.Requests(pair[1]).receive() is None


def test_a_length_beyond_the_limit_is_refused_before_it_arrives(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].sendall(struct.pack("<IIQI", frames.MAX_MESSAGE_BYTES + 1, 0, 0, 0))
    with pytest.raises(InvalidRequest, match=f"must have at most {frames.MAX_MESSAGE_BYTES}"):
        framing.Requests(pair[1]).receive()


class Drip:
    """A connection from which a long message comes, a few bytes at a time, and then no more in time."""

    def __init__(self, announced: bytes, num_bytes: int, piece: int) -> None:
        self._left = announced + bytes(num_bytes)
        self._piece = piece

    def recv(self, num_bytes: int, flags: int = 0) -> bytes:
        piece, self._left = self._left[: self._piece], self._left[self._piece :]
        if not piece:
            raise TimeoutError
        return piece

    def recv_into(self, buffer: memoryview, num_bytes: int = 0, flags: int = 0) -> int:
        piece = self.recv(len(buffer))[: len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)


@pytest.mark.parametrize("is_reply", [False, True])
@pytest.mark.parametrize("piece", [1, 2, 20, 1000])
def test_a_long_message_that_comes_in_bits_takes_as_much_memory_as_has_come_of_it(piece: int, is_reply: bool) -> None:
    """Whatever its header announces."""
    num_bytes = 40_000 * min(piece, 8)
    announced = struct.pack("<IIQIIII" if is_reply else "<IIQI", 250 << 20, *[0] * (6 if is_reply else 3))
    drip = Drip(announced, num_bytes, piece)
    received = (framing.Replies if is_reply else framing.Requests)(drip)
    tracemalloc.start()
    try:
        with pytest.raises(TimeoutError):
            received.receive()
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 2 * num_bytes + (64 << 10)
    assert most < 3 * num_bytes + (128 << 10)


@pytest.mark.parametrize("num_bytes", [1, 19, 21, 60])
def test_a_message_that_is_not_whole_in_its_time_is_refused_for_ever(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, num_bytes: int
) -> None:
    one, other = pair
    other.setblocking(False)
    requests = framing.Requests(other)
    one.sendall(framing.request_bytes(bytes(60)))
    assert requests.receive() is not None
    monkeypatch.setattr(framing, "MESSAGE_S", 0.0)
    one.sendall(framing.request_bytes(bytes(60))[:num_bytes])
    for _ in range(2):
        with pytest.raises(DeadlineExceeded, match="not whole within 0 s of its first byte"):
            requests.receive()
        one.sendall(framing.request_bytes(bytes(60))[num_bytes:])
    assert requests.has_unread


def test_whoever_waits_for_the_rest_of_a_message_waits_no_longer_than_it_may_take(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = pair
    monkeypatch.setattr(framing, "MESSAGE_S", 0.05)
    one.sendall(framing.request_bytes(bytes(60))[:30])
    with pytest.raises(DeadlineExceeded):
        framing.Requests(other).receive()


def test_the_sockets_own_timeout_holds_within_a_message_too(pair: tuple[socket.socket, socket.socket]) -> None:
    one, other = pair
    sockets.set_timeouts(other, receive_s=0.02)
    requests = framing.Requests(other)
    message = framing.request_bytes(bytes(60))
    for start in range(0, 60, 20):
        one.sendall(message[start : start + 20])
        with pytest.raises(BlockingIOError):
            requests.receive()
    one.sendall(message[60:])
    assert requests.receive() == framing.Request(0, 0, 0, bytes(60))


def test_a_reader_has_a_limit_of_its_own(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].sendall(framing.request_bytes(bytes(100)) + framing.request_bytes(bytes(101)))
    requests = framing.Requests(pair[1], max_bytes=100)
    assert requests.receive() == framing.Request(0, 0, 0, bytes(100))
    with pytest.raises(InvalidRequest, match="a message has 101 bytes, but must have at most 100"):
        requests.receive()


@pytest.mark.parametrize("piece", [1, 7, 32, 33, 90])
def test_a_socket_that_does_not_block_gives_each_message_once_it_is_whole(
    pair: tuple[socket.socket, socket.socket], piece: int
) -> None:
    one, other = pair
    other.setblocking(False)
    replies = framing.Replies(other)
    sent = [framing.Reply(0, 0, 0, 0, 0, 0, bytes(range(50))), framing.Reply(1, 2, 3, 4, 5, 6, b"")]
    data = framing.reply_bytes(sent[0].message) + framing.repeated_reply(*sent[1][:6])
    received: list[framing.Reply | None] = []
    whole = [32 + 50, 32 + 50 + 32]
    for start in range(0, len(data), piece):
        one.sendall(data[start : start + piece])
        with pytest.raises(BlockingIOError):
            received.extend(iter(replies.receive, None))  # what came before stays
        assert len(received) == sum(end <= start + piece for end in whole)
    assert received == sent
