"""What is sent to a client of a shm plane by several threads: whole messages, whatever the socket takes at once."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from attnd.protocol.shm import framing
from attnd.v1 import attention_pb2
from attnd_server.planes.answer_socket import AnswerSocket

MIB = 1 << 20


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        other.settimeout(20)
        yield one, other


def received(connection: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        data += connection.recv(MIB)
    return data


def test_what_the_socket_took_in_part_is_sent_before_anything_else(pair: tuple[socket.socket, socket.socket]) -> None:
    answers = AnswerSocket(pair[0])
    big, small = bytes(range(256)) * (MIB // 64), b"small"
    assert not answers.send_now(big)
    answers.going_away()  # there is no room for it, and in the middle of an answer it would be none
    assert not answers.send_now(small)
    sender = threading.Thread(target=answers.send, args=(b"last",))
    sender.start()
    assert received(pair[1], len(big) + 9) == big + small + b"last"
    sender.join()
    assert answers.send_now(small)
    assert received(pair[1], 5) == small


def test_who_reads_is_told_that_the_server_goes_away(pair: tuple[socket.socket, socket.socket]) -> None:
    AnswerSocket(pair[0]).going_away()
    reply = framing.Replies(pair[1]).receive()
    assert reply is not None
    assert attention_pb2.AttendResponse.FromString(reply.message).going_away.reason == "the server is draining"


def test_who_reads_nothing_is_not_told_and_keeps_whole_messages(pair: tuple[socket.socket, socket.socket]) -> None:
    answers, num_sent = AnswerSocket(pair[0]), 0
    while answers.send_now(b"answer"):
        num_sent += 1
    answers.going_away()
    sender = threading.Thread(target=answers.send, args=(b"",))
    sender.start()
    assert received(pair[1], 6 * (num_sent + 1)) == b"answer" * (num_sent + 1)
    sender.join()


def test_whom_nobody_hears_is_an_error_for_answers_alone(pair: tuple[socket.socket, socket.socket]) -> None:
    answers = AnswerSocket(pair[0])
    pair[1].close()
    answers.going_away()
    for send in (answers.send, answers.send_now):
        with pytest.raises(OSError, match=r"[Bb]roken pipe"):
            send(b"answer")
