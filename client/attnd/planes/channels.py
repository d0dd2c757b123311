"""Opens gRPC channels, and tells why there is no connection, for both clients and the health probe."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import grpc

from attnd.credentials import Credentials
from attnd.planes.targets import Target, join_host_port

# Seconds for asking why there is no connection.
WHY_S = 0.5
# Seconds for that and for asking each address of a name apart, with its resolution.
ALL_WHY_S = 3 * WHY_S
# What an RPC without a connection is told of an address where nobody listens.
_REFUSED = "Failed to connect to remote host"
_HINTS = (
    (True, r"WRONG_VERSION_NUMBER", "; the server does not speak TLS"),
    (False, r"Socket closed|Connection reset", "; it may speak TLS, for which credentials must be given"),
)
# What gRPC reads the address of a proxy from.
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")


def open_channel(module: Any, target: Target, credentials: Credentials, options: Sequence[tuple[str, Any]] = ()) -> Any:
    """A channel of `grpc` or `grpc.aio`, whichever `module` is.

    What stays on this machine takes no proxy, whatever the environment says: a proxy would see it, and is elsewhere.

    Raises:
        InvalidRequest: a file of the credentials cannot be read.
    """
    options = [*options, *([("grpc.enable_http_proxy", 0)] if target.is_local else [])]
    if not credentials.tls:
        return module.insecure_channel(target.name, options=options)
    secure = [*options, *credentials.channel_options()]
    return module.secure_channel(target.name, credentials.channel_credentials(), options=secure)


def telling(details: str, target: Target, credentials: Credentials) -> str:
    """Why there is no connection: what gRPC said, or what another address of the same name says, if that tells more.

    A name such as localhost has several addresses, and gRPC tells of the one that it tried last: if nobody listens
    there, nobody hears that the certificate at the other is wrong. So each is asked once more, apart.

    Args:
        details: what gRPC said of all.
        target: what it was asked for.
        credentials: the client's.
    """
    if _REFUSED in details and target.host and (target.is_local or not _proxied()):
        details = next((said for said in _said(target, credentials) if _REFUSED not in said), details)
    for tls, pattern, hint in _HINTS:
        if credentials.tls is tls and re.search(pattern, details):
            return details + hint
    return details


def _said(target: Target, credentials: Credentials) -> list[str]:
    """What is said at each address of a name that cannot be used."""
    # The certificate has the name, not the address.
    named = [] if credentials.server_name or not credentials.tls else [("grpc.ssl_target_name_override", target.host)]
    with ExitStack() as stack:
        calls = []
        for address in _addresses(target):
            at = Target(address, address, is_local=target.is_local)
            channel = stack.enter_context(open_channel(grpc, at, credentials, named))
            calls.append(channel.unary_unary("/grpc.health.v1.Health/Check").future(b"", timeout=WHY_S))
        errors = [call.exception() for call in calls]
    return [error.details() or "" for error in errors if error and error.code() is grpc.StatusCode.UNAVAILABLE]


def _addresses(target: Target) -> list[str]:
    """Those of a name, or none if it has one at most."""
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    hosts = [str(address[0]) for *_, address in found]
    if target.is_local:  # gRPC takes both, whatever the system's resolver says
        hosts += ["127.0.0.1", "::1"]
    hosts = list(dict.fromkeys(hosts))
    names = [f"ipv{6 if ':' in host else 4}:{join_host_port(host, target.port)}" for host in hosts]
    return names if len(names) > 1 else []


def _proxied() -> bool:
    return any(os.environ.get(name) for name in _PROXIES)
