"""What an address means, and which are refused before gRPC reads something else out of them."""

from __future__ import annotations

import asyncio
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

import attnd
from attnd.planes import channels
from attnd.planes.targets import DEFAULT_PORT, MAX_PORT, is_loopback, join_host_port, parse_target
from attnd.protocol.printable import printable
from attnd_server import config


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("localhost", "localhost:7411"),
        ("attention.example", "attention.example:7411"),
        ("attention.example.", "attention.example.:7411"),
        ("a_b-c:1", "a_b-c:1"),
        ("h:65535", "h:65535"),
        ("127.0.0.1", "127.0.0.1:7411"),
        ("127.0.0.1:80", "127.0.0.1:80"),
        ("::1", "[::1]:7411"),
        ("[::1]", "[::1]:7411"),
        ("[::1]:80", "[::1]:80"),
        ("2001:db8::7:a", "[2001:db8::7:a]:7411"),
        ("[2001:db8::7:8]", "[2001:db8::7:8]:7411"),
        ("1:2:3:4:5:6:7:8", "[1:2:3:4:5:6:7:8]:7411"),
        ("fe80::1%eth0", "[fe80::1%eth0]:7411"),
        ("[fe80::1%eth0]:80", "[fe80::1%eth0]:80"),
        ("dns:h", "h:7411"),
        ("dns:///h:80", "h:80"),
        ("ipv4:1.2.3.4,1.2.3.5:80", "ipv4:1.2.3.4:7411,1.2.3.5:80"),
        ("ipv6:[::1]:80,[::2]", "ipv6:[::1]:80,[::2]:7411"),
        ("unix:socket", "unix:socket"),
        ("unix:///run/attnd/a b", "unix:///run/attnd/a b"),
        ("unix-abstract:attnd", "unix-abstract:attnd"),
    ],
)
def test_addresses(address: str, name: str) -> None:
    assert parse_target(address).name == name


WRONG = [
    *(
        "h:0",
        "h:65536",
        "h:99999",
        "h:-1",
        "h:+1",
        "h:x",
        "h:0x1f",
        "h: 80",
        "h:80 ",
        "h:\uff11",
        "h:",
        "h:1\n",
        "h:1:2",
    ),
    *(
        "",
        ":",
        ":80",
        " ",
        "a b",
        "a b:1",
        "h\n",
        "\th",
        "h\x1b[31m:1",
        "h\u202e:1",
        "-h",
        "h-",
        "a..b",
        ".",
        "exämple",
    ),
    *("http://h", "https://h:1", "grpc://h:1", "http:h", "xds:///h", "vsock:1:2", "://h", "u@h", "u:p@h:1"),
    *("h/", "h:1/path", "h?x", "h#x", "7411", "127.1", "1.2.3.4.5", "256.1.1.1", "a" * 64, ".".join(["a" * 60] * 5)),
    *("::1:7411", "2001:db8::1:80", "[::1", "::1]", "[[::1]]:1", "[::1]x", "[::1]:", "[::1]:0", "[h]:1", "[1.2.3.4]:1"),
    *("[]", "[]:1", ":::", "fe80::1%\n", "fe80::1%a b", "dns:", "dns://8.8.8.8/h", "dns:///h:0", "ipv4:h", "ipv4:::1"),
    *("ipv4:", "ipv6:1.2.3.4", "ipv4:1.2.3.4,", "unix:", "unix://host/path", "unix:a\nb", "unix:" + "a" * 108),
]


@pytest.mark.parametrize("address", [*WRONG, None, 7411, b"h:1"], ids=ascii)
def test_what_is_no_address(address: object) -> None:
    with pytest.raises(attnd.InvalidRequest) as raised:
        parse_target(address)  # type: ignore[arg-type]
    assert raised.value.field == "address"
    shown = printable(str(address)) or "''"
    assert str(raised.value).startswith(f"address is {shown}, but must ")
    assert str(raised.value).isprintable()


def test_both_clients_refuse_at_once() -> None:
    for connect in (attnd.connect, lambda address: asyncio.run(attnd.aio.connect(address))):
        for address in ("h:65536", "http://h", ""):
            with pytest.raises(attnd.InvalidRequest, match=r"^address is "):
                connect(address)
    with pytest.raises(attnd.InvalidRequest, match="the sync client alone takes"):
        asyncio.run(attnd.aio.connect("inproc://"))


@pytest.mark.parametrize(
    "address",
    [
        *("localhost", "LocalHost:1", "localhost.", "127.0.0.1:1", "127.8.9.1", "::1", "[::1]:1", "dns:localhost"),
        *("::ffff:127.0.0.1", "0.0.0.0:1", "[::]:1", "unix:/a", "unix-abstract:a", "ipv4:127.0.0.1,127.0.0.2"),
    ],
)
def test_what_stays_on_this_machine(address: str) -> None:
    assert parse_target(address).is_local


@pytest.mark.parametrize(
    "address", ["h", "localhost.example", "127.0.0.1.example", "192.168.0.1", "2001:db8::a", "ipv4:127.0.0.1,10.0.0.1"]
)
def test_what_may_leave_it(address: str) -> None:
    assert not parse_target(address).is_local


@given(st.text() | st.text(alphabet="[]:%./,-0179afhx \n").map(str) | st.binary().map(os.fsdecode))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    for address in (text, f"h:{text}", f"[{text}]:1", f"unix:{text}", f"dns:///{text}", f"ipv4:{text}"):
        try:
            target = parse_target(address)
        except attnd.InvalidRequest:
            continue
        assert target.name.isprintable()
        assert target.name.isascii() or target.name.startswith("unix")
        if target.host:
            assert target.name == f"{target.host}:{target.port}"
            assert 1 <= target.port <= MAX_PORT


def test_what_is_shown_is_an_address_again() -> None:
    for address in ("h", "h:1", "::1", "[::1]:1", "fe80::1%eth0", "ipv6:::1", "unix:/a"):
        shown = parse_target(address).shown
        assert parse_target(shown).shown == shown
    assert join_host_port("::1", 1) == "[::1]:1"
    assert is_loopback("[::1]")


def test_client_and_server_have_the_same_port() -> None:
    assert (config.ServerConfig.port, config.MAX_PORT) == (DEFAULT_PORT, MAX_PORT)


def test_a_name_with_one_address_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "open_channel", None)
    monkeypatch.setattr(channels.socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("192.0.2.1", 1))])
    details = "last error: UNKNOWN: ipv4:192.0.2.1:1: Failed to connect to remote host: Connection refused"
    assert channels.telling(details, parse_target("h:1"), attnd.Credentials(tls=False)) == details
    # Through a proxy nobody's addresses are asked: the proxy knows them.
    monkeypatch.setenv("https_proxy", "http://192.0.2.9:1")
    monkeypatch.setattr(channels.socket, "getaddrinfo", None)
    assert channels.telling(details, parse_target("h:1"), attnd.Credentials(tls=False)) == details
