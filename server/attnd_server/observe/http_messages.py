"""Requests and answers of HTTP/1.1 as far as a page of numbers needs them: no bodies, no chunks. Strict and bounded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

# Bytes of a request, from its first line to the empty one, and its headers. Prometheus sends some 300 bytes.
MAX_REQUEST_BYTES, MAX_HEADERS = 16 << 10, 64
METHODS = ("GET", "HEAD", "OPTIONS")

_END = re.compile(rb"\r?\n\r?\n")
_FIRST_LINE = re.compile(r"([A-Z]{1,16}) ([!-~]+) HTTP/1\.([01])")
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([ \t!-~\x80-\xff]*)")


class HttpRefused(Exception):
    """What came is no request that is answered.

    Attributes:
        status: of the answer, "400 Bad Request".
    """

    def __init__(self, status: str) -> None:
        """Says so with `status`."""
        super().__init__(status)
        self.status = status


class HttpRequest(NamedTuple):
    """A request.

    Attributes:
        method: one of `METHODS`.
        path: decoded.
        query: as it came.
        headers: by their names in lower case; the last one of a name.
        keeps_open: whether the next request may come on the same connection.
    """

    method: str
    path: str
    query: str
    headers: dict[str, str]
    keeps_open: bool


def read_request(received: bytes | bytearray) -> tuple[HttpRequest, int] | None:
    """The request with which some bytes begin, and how many it has; None: it is not whole.

    Raises:
        HttpRefused: it is none, or is too long.
    """
    end = _END.search(received, 0, MAX_REQUEST_BYTES)
    if end is None:
        if len(received) >= MAX_REQUEST_BYTES:
            raise HttpRefused("431 Request Header Fields Too Large")
        return None
    first, *lines = re.split("\r?\n", received[: end.start()].decode("latin-1"))
    line = _FIRST_LINE.fullmatch(first)
    if line is None:
        raise HttpRefused("400 Bad Request")
    if len(lines) > MAX_HEADERS:
        raise HttpRefused("431 Request Header Fields Too Large")
    headers = {}
    for each in lines:
        header = _HEADER.fullmatch(each)
        if header is None:
            raise HttpRefused("400 Bad Request")
        headers[header[1].lower()] = header[2].strip()
    method, target, minor = line.groups()
    if method not in METHODS:
        raise HttpRefused("405 Method Not Allowed")
    if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
        raise HttpRefused("413 Content Too Large")
    try:
        parts = urlsplit(target)
    except ValueError:
        raise HttpRefused("400 Bad Request") from None
    keeps_open = minor == "1" and "close" not in headers.get("connection", "").lower()
    return HttpRequest(method, unquote(parts.path), parts.query, headers, keeps_open), end.end()


def answer_bytes(
    status: str, headers: Sequence[tuple[str, str]], body: bytes, *, is_head: bool = False, keeps_open: bool = False
) -> bytes:
    """An answer.

    Args:
        status: "200 OK".
        headers: beside those that say how long it is and what comes after it.
        body: what it carries.
        is_head: whether the body is told of and not sent.
        keeps_open: whether another may follow.
    """
    connection = "keep-alive" if keeps_open else "close"
    told = [*headers, ("Content-Length", str(len(body))), ("Connection", connection)]
    head = "".join(f"{name}: {value}\r\n" for name, value in told)
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode("latin-1") + (b"" if is_head else body)
