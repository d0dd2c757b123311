"""Who calls: the principal to whom caches and planes belong."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from attnd.errors import Unauthenticated
from attnd_server.identity.tokens import TokenFile, TokenPrincipal

# Who everybody is on a server that asks nobody.
ANYBODY = "anybody"
# The key of gRPC's metadata that carries a token, and what stands before it there.
_KEY, _SCHEME = "authorization", "bearer"


class Principals:
    """Says who calls. Once for each RPC, also for a stream with a million messages.

    A token names the principal where the server has tokens. Where it has only an authority for clients' certificates,
    the certificate does: its common name or, without one, its only subject alternative name. Where it has both, a
    client needs both, and the token names it.
    """

    def __init__(self, tokens: TokenFile | None = None, by_certificate: bool = False) -> None:
        """Asks for what there is; nothing: everybody is `ANYBODY`."""
        self._tokens = tokens
        self._by_certificate = by_certificate

    def refusal(self, metadata: Iterable[tuple[str, str | bytes]]) -> Unauthenticated | None:
        """Why an RPC with this metadata is refused before its first message is read; None: it is not."""
        try:
            if self._tokens is not None:
                _token_principal(self._tokens, metadata)
        except Unauthenticated as error:
            return error
        return None

    def of(self, context: Any) -> str:
        """The principal of an RPC with gRPC's `context`.

        Raises:
            Unauthenticated: it proves nobody.
        """
        if self._tokens is not None:
            return _token_principal(self._tokens, context.invocation_metadata() or ())
        if self._by_certificate:
            return _certificate_principal(context.auth_context())
        return ANYBODY


def is_revoked(principal: str) -> bool:
    """Whether the token with which a principal came has gone from the file."""
    return isinstance(principal, TokenPrincipal) and principal.is_revoked


def refuse_if_revoked(principal: str) -> None:
    """Ends what a principal may do on a stream or plane once its token has gone from the file.

    Raises:
        Unauthenticated: it has.
    """
    if is_revoked(principal):
        raise Unauthenticated("the token with which this was opened is no longer known here; connect with another")


def wanted_until_revoked(principal: str) -> Callable[[], bool] | None:
    """`is_wanted` of work that waits for the executor: it raises Unauthenticated as `refuse_if_revoked` does.

    None: nothing can happen to the principal meanwhile.
    """
    if not isinstance(principal, TokenPrincipal):
        return None

    def is_wanted() -> bool:
        refuse_if_revoked(principal)
        return True

    return is_wanted


def _token_principal(tokens: TokenFile, metadata: Iterable[tuple[str, str | bytes]]) -> TokenPrincipal:
    values = [value for key, value in metadata if key == _KEY]
    if not values:
        raise Unauthenticated(f"{_KEY} is absent, but must be 'Bearer TOKEN': this server asks for a token")
    scheme, _, token = str(values[0]).partition(" ")
    principal = tokens.principal(token) if len(values) == 1 and scheme.lower() == _SCHEME else None
    if principal is None:
        raise Unauthenticated(f"{_KEY} must be 'Bearer TOKEN', once, with a token that this server knows")
    return principal


def _certificate_principal(auth_context: dict[str, list[bytes]]) -> str:
    common_names = auth_context.get("x509_common_name", [])
    names = [name for name in common_names if name] or auth_context.get("x509_subject_alternative_name", [])
    if len(names) != 1:
        rule = f"one subject alternative name, as it has no common name; it has {len(names)}"
        raise Unauthenticated(f"the client's certificate must have {rule}")
    return names[0].decode(errors="backslashreplace")
