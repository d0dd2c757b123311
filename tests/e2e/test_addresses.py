"""Addresses of real servers: IPv6, proxies in the environment, and why there is no connection."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

import attnd
from attnd.planes import channels
from attnd.planes.targets import parse_target
from attnd_server import health_probe
from tests.certificates import Authority, needs_openssl
from tests.servers import ServerProcess

PROXIES = ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as tried:
            tried.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")


def ask(address: str, credentials: attnd.Credentials | None = None) -> None:
    attnd.connect(address, credentials=credentials, connect_timeout_s=1).close()


def ask_aio(address: str, credentials: attnd.Credentials | None = None) -> None:
    async def main() -> None:
        async with await attnd.aio.connect(address, credentials=credentials, connect_timeout_s=1):
            pass

    asyncio.run(main())


def probe(address: str, credentials: attnd.Credentials | None = None) -> None:
    if why := health_probe.failure(address, shown=credentials):
        raise attnd.Disconnected(why)


WAYS: dict[str, Callable[..., None]] = {"sync": ask, "aio": ask_aio, "probe": probe}


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in os.environ.items() if name not in (*PROXIES, "no_proxy", "NO_PROXY")}
    plain |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "COLUMNS": "160"}
    arguments = (sys.executable, "-m", *arguments)
    return subprocess.run(arguments, capture_output=True, text=True, env=plain | environment, timeout=120)


class FakeProxy:
    """Listens, counts who comes, and closes."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                self.requests.append(connection.recv(4096))

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeProxy]:
    """One that the environment names for everything."""
    proxy = FakeProxy()
    for name in PROXIES:
        monkeypatch.setenv(name, proxy.url)
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield proxy
    proxy.close()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_no_proxy_sees_what_stays_on_this_machine(server_address: str, proxy: FakeProxy, way: str, host: str) -> None:
    WAYS[way](f"{host}:{server_address.rpartition(':')[2]}")
    assert proxy.requests == []


@pytest.mark.parametrize("way", WAYS)
def test_a_proxy_is_asked_for_other_machines(proxy: FakeProxy, way: str) -> None:
    with pytest.raises(attnd.Disconnected):
        WAYS[way]("attention.invalid:1")
    assert proxy.requests[0].startswith(b"CONNECT attention.invalid:1 ")


def test_commands_take_no_proxy_to_this_machine(server_address: str) -> None:
    proxy = FakeProxy()
    address = f"localhost:{server_address.rpartition(':')[2]}"
    for arguments in (("attnd_server", "info"), ("attnd_server", "doctor"), ("attnd_server.health_probe",)):
        result = command(*arguments, address, **dict.fromkeys(PROXIES, proxy.url))
        assert result.returncode == 0, result.stderr
    assert proxy.requests == []
    proxy.close()


@needs_ipv6
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_ipv6(tmp_path: Path, host: str) -> None:
    with ServerProcess(tmp_path / "log", "--device", "cpu", "--host", host, "--metrics", "[::1]:0") as server:
        assert server.address == f"[::1]:{server.port}"
        assert f"serves [::1]:{server.port} on cpu, metrics on http://[::1]:" in server.banner
        for address in (server.address, f"localhost:{server.port}", f"[::1%lo]:{server.port}"):
            for way in WAYS.values():
                way(address)
        assert command("attnd_server", "info", server.address).returncode == 0


def other_of(host: str) -> str:
    return "[::1]" if host == "127.0.0.1" else "127.0.0.1"


@needs_openssl
@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("[::1]", marks=needs_ipv6)])
def test_the_reason_behind_a_name_is_told_whichever_address_was_tried_last(tmp_path: Path, host: str) -> None:
    authority = Authority(tmp_path)
    (tmp_path / "another").mkdir()
    another = Authority(tmp_path / "another")
    made = authority.issue("server", "/CN=attnd", "DNS:elsewhere.example")
    cases = [
        (made, attnd.Credentials(ca=authority.ca), r"Verification|Peer name"),
        (made, attnd.Credentials(ca=another.ca), "CERTIFICATE_VERIFY_FAILED"),
        (made, None, "it may speak TLS, for which credentials must be given"),
        (None, attnd.Credentials(ca=authority.ca), "the server does not speak TLS"),
    ]
    for certificate, credentials, why in cases:
        server = grpc.server(None)
        if certificate is None:
            port = server.add_insecure_port(f"{host}:0")
        else:
            pair = (Path(certificate.key).read_bytes(), Path(certificate.cert).read_bytes())
            port = server.add_secure_port(f"{host}:0", grpc.ssl_server_credentials([pair]))
        server.start()
        try:
            for way in WAYS.values():
                with pytest.raises(attnd.Disconnected, match=why):
                    way(f"localhost:{port}", credentials)
            # What gRPC says where the address at which nobody listens was the last one.
            said = f"last error: UNKNOWN: {other_of(host)}:{port}: Failed to connect to remote host: Connection refused"
            shown = credentials or attnd.Credentials(tls=False)
            assert why.split("|")[0] in channels.telling(said, parse_target(f"localhost:{port}"), shown)
        finally:
            server.stop(None)


@needs_openssl
def test_commands_tell_the_reason(tmp_path: Path) -> None:
    made = Authority(tmp_path).issue("server", "/CN=attnd", "DNS:localhost")
    with ServerProcess(tmp_path / "log", "--device", "cpu", "--tls-cert", made.cert, "--tls-key", made.key) as server:
        for arguments in (("attnd_server", "info"), ("attnd_server", "doctor"), ("attnd_server.health_probe",)):
            told = command(*arguments, f"localhost:{server.port}")
            assert told.returncode == 1
            assert "it may speak TLS, for which credentials must be given" in told.stderr
            assert told.stderr.count("\n") == 1


def test_nobody_listens_or_nobody_has_the_name() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        for way in WAYS.values():
            with pytest.raises(attnd.Disconnected, match="Connection refused"):
                way(f"localhost:{port}")
    for way in WAYS.values():
        with pytest.raises(attnd.Disconnected, match=r"no answer from attention|attention\.invalid:1 does not answer"):
            way("attention.invalid:1")


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = command("attnd_server", "serve", "--device", "cpu", "--port", port, "--log-format", "json")
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if '"level": "error"' in line]
    assert f"port is {port}, but must be a free one" in line
    assert all(line.startswith("{") for line in result.stderr.splitlines()), result.stderr
