"""The metrics' port: what a client may send, how long, and how many may do so at one time."""

from __future__ import annotations

import gzip
import http.client
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from attnd_server.observe import http_server
from attnd_server.observe.endpoint import MetricsEndpoint
from attnd_server.observe.http_messages import MAX_REQUEST_BYTES, HttpRefused, answer_bytes, read_request
from attnd_server.observe.http_server import MAX_CONNECTIONS, HttpServer
from tests.servers import wait_for

GET = b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n"


class Numbers(Collector):
    """Counts how often it was asked; fails if it is told to."""

    def __init__(self):
        self.num_asked = 0
        self.fails = False

    def collect(self):
        self.num_asked += 1
        if self.fails:
            raise RuntimeError("no numbers today")
        yield GaugeMetricFamily("asked", "How often.", self.num_asked)


@pytest.fixture
def numbers():
    return Numbers()


@pytest.fixture
def endpoint(numbers) -> Iterator[MetricsEndpoint]:
    endpoint = MetricsEndpoint("127.0.0.1:0", numbers)
    yield endpoint
    endpoint.close()


def connected(endpoint, data=b""):
    host, _, port = endpoint.address.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(data)
    return connection


def ask(endpoint, method="GET", path="/metrics", **headers):
    host, _, port = endpoint.address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def until_end(connection):
    """All that comes, until the server has closed."""
    chunks = []
    try:
        while chunk := connection.recv(1 << 16):
            chunks.append(chunk)
    except ConnectionResetError:
        pass
    return b"".join(chunks)


@pytest.mark.parametrize("path", ["/metrics", "/", "/anything?else", "http://there/metrics"])
def test_every_path_has_the_metrics(endpoint, path):
    status, headers, body = ask(endpoint, path=path)
    assert (status, headers["Connection"]) == (200, "keep-alive")
    assert headers["Content-Type"].startswith("text/plain; version=")
    assert b"asked 1.0" in body
    assert ask(endpoint, path="/favicon.ico")[2] == b""


def test_an_answer_is_as_the_client_likes_it(endpoint):
    _, headers, body = ask(endpoint, **{"Accept-Encoding": "gzip"})
    assert headers["Content-Encoding"] == "gzip"
    assert b"asked 1.0" in gzip.decompress(body)
    _, headers, body = ask(endpoint, Accept="application/openmetrics-text; version=1.0.0")
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
    assert b"asked" not in ask(endpoint, path="/metrics?name[]=process_open_fds")[2]


def test_other_methods(endpoint, numbers):
    status, headers, body = ask(endpoint, "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 20
    asked = numbers.num_asked
    status, headers, body = ask(endpoint, "OPTIONS")
    assert (status, headers["Allow"], body) == (200, "GET, HEAD, OPTIONS", b"")
    for method in ("POST", "DELETE", "BREW"):
        status, headers, _ = ask(endpoint, method)
        assert (status, headers["Allow"], headers["Connection"]) == (405, "GET, HEAD, OPTIONS", "close")
    assert numbers.num_asked == asked


def test_requests_follow_each_other_on_one_connection_also_at_once(endpoint):
    host, _, port = endpoint.address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    for number in (1, 2, 3):
        connection.request("GET", "/metrics")
        assert f"asked {number}.0".encode() in connection.getresponse().read()
    connection.close()
    last = GET.replace(b"Host", b"Connection: close\r\nHost")
    with connected(endpoint, GET + GET + last) as at_once:
        told = until_end(at_once)
    assert [f"asked {number}.0".encode() in told for number in (4, 5, 6)] == [True] * 3
    assert told.count(b"HTTP/1.1 200 OK") == 3
    with connected(endpoint, b"GET / HTTP/1.0\r\n\r\n") as old:
        assert b"asked 7.0" in until_end(old)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"get / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nno header\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n folded: line\r\n\r\n", 400),
        (b"GET http://[/ HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", 413),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 65 + b"\r\n", 431),
        (b"GET /" + b"x" * MAX_REQUEST_BYTES, 431),
        (b"x" * (1 << 20), 431),
    ],
)
def test_what_is_no_request_is_told_so_and_ends_the_connection(endpoint, numbers, sent, status):
    with connected(endpoint) as connection:
        try:
            connection.sendall(sent)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has read enough
        told = until_end(connection)
    assert told.startswith(f"HTTP/1.1 {status} ".encode()) or len(sent) >= 1 << 20
    assert numbers.num_asked == 0
    assert ask(endpoint)[0] == 200


@given(data=st.binary(max_size=200) | st.text("GETHP /:.1\r\n", max_size=60).map(str.encode))
def test_any_bytes_are_a_request_or_none_or_not_whole(data):
    try:
        found = read_request(data)
    except HttpRefused:
        return
    assert found is None or 0 < found[1] <= len(data)


def test_idle_connections_take_no_threads_few_descriptors_and_nobodys_place(endpoint):
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with ExitStack() as stack:
        for index in range(300):
            stack.enter_context(connected(endpoint, GET[: index % 30]))
            if index % 50 == 0:
                assert ask(endpoint)[0] == 200
        assert ask(endpoint)[0] == 200
        assert threading.active_count() <= threads
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 300 + MAX_CONNECTIONS


def test_a_newcomer_takes_the_place_of_whom_has_been_there_longest(endpoint):
    with ExitStack() as stack:
        connections = [stack.enter_context(connected(endpoint, GET)) for _ in range(MAX_CONNECTIONS)]
        for connection in connections:
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")
        assert ask(endpoint)[0] == 200
        assert until_end(connections[0]) == b""
        connections[-1].sendall(GET)
        assert connections[-1].recv(1 << 16).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("setting", ["REQUEST_S", "IDLE_S"])
def test_who_is_silent_too_long_is_ended(numbers, monkeypatch, setting):
    monkeypatch.setattr(http_server, setting, 0.1)
    endpoint = MetricsEndpoint("127.0.0.1:0", numbers)
    try:
        with connected(endpoint, GET if setting == "IDLE_S" else GET[:10]) as connection:
            assert until_end(connection).startswith(b"HTTP/1.1 200 OK" if setting == "IDLE_S" else b"")
    finally:
        endpoint.close()


def test_a_request_byte_by_byte_has_one_deadline(numbers, monkeypatch):
    monkeypatch.setattr(http_server, "REQUEST_S", 0.5)
    endpoint = MetricsEndpoint("127.0.0.1:0", numbers)
    try:
        with connected(endpoint) as connection:
            connection.settimeout(0.05)
            with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012  # as long as it lasts
                for _ in range(400):
                    connection.sendall(b"x")
                    try:
                        assert connection.recv(1) == b""
                    except TimeoutError:
                        pass
        assert numbers.num_asked == 0
    finally:
        endpoint.close()


def serving(answer):
    listener = socket.create_server(("127.0.0.1", 0))
    return HttpServer(listener, answer), listener.getsockname()


def test_who_does_not_read_the_answer_holds_up_nobody_and_is_ended(monkeypatch):
    monkeypatch.setattr(http_server, "ANSWER_S", 0.3)
    server, address = serving(lambda request: answer_bytes("200 OK", [], bytes(64 << 20), keeps_open=True))
    try:
        with socket.create_connection(address, timeout=20) as slow, socket.create_connection(address, 20) as reader:
            slow.sendall(GET)
            wait_for(lambda: any(each.to_send for each in list(server._connections)), "nothing is answered")
            reader.sendall(b"OPTIONS / HTTP/1.1\r\nConnection: close\r\n\r\n")
            reader.recv(1 << 16)
            wait_for(lambda: len(server._connections) <= 1, "who does not read is not ended")
            assert len(until_end(slow)) < 64 << 20
    finally:
        server.close()


def test_numbers_that_cannot_be_had_are_told_and_the_next_are(endpoint, numbers, caplog):
    numbers.fails = True
    assert ask(endpoint)[0] == 500
    assert "the metrics cannot be told" in caplog.text
    numbers.fails = False
    assert ask(endpoint)[0] == 200


def test_it_computes_for_a_small_part_of_the_time():
    """An answer that takes 50 ms is followed by none for 450 ms."""

    def answer(request):
        begun.append(time.monotonic())
        time.sleep(0.05)
        return answer_bytes("200 OK", [], b"", keeps_open=True)

    begun: list[float] = []
    server, address = serving(answer)
    try:
        with socket.create_connection(address, timeout=20) as one, socket.create_connection(address, 20) as other:
            for connection in (one, other):
                connection.sendall(GET)
            for connection in (one, other):
                assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")
    finally:
        server.close()
    assert begun[1] - begun[0] >= 0.5


def test_close_ends_what_is_open(numbers):
    endpoint = MetricsEndpoint("127.0.0.1:0", numbers)
    with connected(endpoint) as silent, connected(endpoint, GET) as idle:
        assert idle.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")
        endpoint.close()
        assert (until_end(silent), until_end(idle)) == (b"", b"")
