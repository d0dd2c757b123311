"""From the address of a server to what gRPC connects to. What gRPC would take for something else is refused here.

An address is `HOST` or `HOST:PORT`; an IPv6 address may have brackets, and must with a port. Without one the port is
`DEFAULT_PORT`. gRPC's own `dns:HOST:PORT`, `ipv4:IP:PORT,...`, `ipv6:[IP]:PORT,...`, `unix:PATH` and
`unix-abstract:NAME` are taken too.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass

from attnd.errors import InvalidRequest
from attnd.protocol.printable import printable

DEFAULT_PORT = 7411
MAX_PORT = 65_535
DEFAULT_ADDRESS = f"localhost:{DEFAULT_PORT}"

_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z)({_LABEL}\.)*{_LABEL}\.?")
# What Linux takes in an address of a socket, its final zero aside.
_MOST_PATH_BYTES = 107
_RULE = "must be HOST, HOST:PORT, [IPV6]:PORT or unix:PATH"


@dataclass(frozen=True)
class Target:
    """Where a server is.

    Attributes:
        name: what gRPC connects to.
        shown: the address for people, with its port.
        host: the name that was given, for gRPC to resolve; "": addresses were given, or a socket's path.
        port: its port; 0 where host is "".
        is_local: whether the connection stays on this machine, as far as the address alone says.
    """

    name: str
    shown: str
    host: str = ""
    port: int = 0
    is_local: bool = False


def parse_target(address: str) -> Target:
    """What an address says.

    Raises:
        InvalidRequest: it is no address of a server.
    """
    if not isinstance(address, str):
        raise _refused(address, _RULE)
    scheme, separator, rest = address.partition(":")
    if separator and scheme in _SCHEMES:
        return _SCHEMES[scheme](address, rest)
    if "://" in address:
        raise _refused(address, f"{_RULE}, without {scheme}://")
    host, port = split_host_port(address, address)
    return _of_host(host, port or DEFAULT_PORT)


def split_host_port(text: str, address: str) -> tuple[str, int | None]:
    """Host, an IPv6 address without its brackets, and port of `HOST[:PORT]`; None: it has no port.

    Args:
        text: what is split.
        address: that it is of, for errors.

    Raises:
        InvalidRequest: it has another form, or may be meant in two ways.
    """
    if is_ip(text, 6):
        head, _, tail = text.rpartition(":")
        if is_ip(head, 6) and tail.isdecimal():
            raise _refused(address, f"must have brackets: [{head}]:{tail}, or [{text}] without a port")
        return text, None
    match = re.fullmatch(r"(\[[^\[\]]*\]|[^:\[\]]*)(:(.*))?", text, re.DOTALL)
    if match is None:
        raise _refused(address, _RULE)
    host, port = match[1].strip("[]"), match[3]
    if match[1].startswith("[") and not is_ip(host, 6):
        raise _refused(address, "must have an IPv6 address in brackets")
    check_host(host, address)
    if port is None:
        return host, None
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= MAX_PORT:
        raise _refused(address, f"must have a port of 1..{MAX_PORT}, or none, which is {DEFAULT_PORT}")
    return host, int(port)


def check_host(host: str, address: str) -> None:
    """Raises InvalidRequest if `host`, of `address`, is neither a name nor an IP address."""
    if is_ip(host, 4) or is_ip(host, 6):
        return
    # What ends with a number would be read as an IP address: 127.1, or a port alone.
    if not _NAME.fullmatch(host) or host.rstrip(".").rpartition(".")[2].isdigit():
        raise _refused(address, f"{_RULE}, with HOST a name or an IP address")


def join_host_port(host: str, port: int) -> str:
    """`HOST:PORT`, with brackets for an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_ip(host: str, version: int) -> bool:
    """Whether it is an IP address of that version, 4 or 6, without brackets; of 6 with or without a zone."""
    try:
        is_it = ipaddress.ip_address(host).version == version
        return is_it and re.fullmatch(r"[\w.:%-]+", host, re.ASCII) is not None
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether only this machine can be reached at `host`, or can reach it: localhost or a loopback address."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _of_host(host: str, port: int) -> Target:
    shown = join_host_port(host, port)
    if is_ip(host, 4) or is_ip(host, 6):
        return Target(shown, shown, is_local=_stays_here(host))
    return Target(shown, shown, host, port, _stays_here(host))


def _stays_here(host: str) -> bool:
    """Whether a connection to `host` does: one to the address that stands for all of this machine's does, too."""
    return is_loopback(host) or host in ("0.0.0.0", "::")


def _of_name(address: str, rest: str) -> Target:
    host, port = split_host_port(rest.removeprefix("///"), address)
    return _of_host(host, port or DEFAULT_PORT)


def _of_ips(version: int) -> Callable[[str, str], Target]:
    def target(address: str, rest: str) -> Target:
        parts = [split_host_port(part, address) for part in rest.removeprefix("///").split(",")]
        if not all(is_ip(host, version) for host, _ in parts):
            raise _refused(address, f"must have IPv{version} addresses after ipv{version}:")
        joined = ",".join(join_host_port(host, port or DEFAULT_PORT) for host, port in parts)
        name = f"ipv{version}:{joined}"
        return Target(name, name, is_local=all(_stays_here(host) for host, _ in parts))

    return target


def _of_socket(address: str, rest: str) -> Target:
    path = rest.removeprefix("//") if rest.startswith("///") else rest
    if not path or path.startswith("//") or not path.isprintable() or len(path.encode()) > _MOST_PATH_BYTES:
        rule = f"must have the path of a socket after unix:, at most {_MOST_PATH_BYTES} bytes"
        raise _refused(address, rule)
    return Target(address, address, is_local=True)


_SCHEMES: dict[str, Callable[[str, str], Target]] = {
    "dns": _of_name,
    "ipv4": _of_ips(4),
    "ipv6": _of_ips(6),
    "unix": _of_socket,
    "unix-abstract": _of_socket,
}


def _refused(address: object, rule: str) -> InvalidRequest:
    shown = printable(str(address)) or "''"
    return InvalidRequest(f"address is {shown}, but {rule}", field="address")
