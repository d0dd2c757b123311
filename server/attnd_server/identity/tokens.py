"""The file of tokens: who has which, without the tokens themselves.

A line is `PRINCIPAL sha256:DIGEST`; empty lines and lines that begin with # are nothing. The file holds digests, so
that a copy of it, in a backup or a log, lets nobody in. A plain SHA-256 is enough because tokens are random: `attnd
token` makes them of 256 bits, and nobody can try so many. A principal may have several tokens, so that a new one can be
handed out before the old one goes.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Callable, Mapping

from attnd_server.identity.watched_files import FileRefused, WatchedFile, WatchedFiles

PRINCIPAL_RULE = "letters, digits and . _ @ : / -, at most 128, the first a letter or digit"
_PRINCIPAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:/-]{0,127}")
_LINE = re.compile(rf"({_PRINCIPAL.pattern})[ \t]+sha256:([0-9a-f]{{64}})")
# Of a token that is made here.
TOKEN_BYTES = 32


class TokenPrincipal(str):
    """The principal whom a token names. Compared by name alone; it also knows whether the token is still good."""

    _tokens: TokenFile
    _key: bytes
    _seen: Mapping[bytes, str]
    _is_revoked: bool

    def __new__(cls, name: str, tokens: TokenFile, key: bytes) -> TokenPrincipal:
        """`name`, as the line of `tokens` under `key` says."""
        self = super().__new__(cls, name)
        self._tokens, self._key, self._seen, self._is_revoked = tokens, key, tokens.known, False
        return self

    @property
    def is_revoked(self) -> bool:
        """Whether the file has changed since and no longer gives the token to this principal. By any thread."""
        known = self._tokens.known
        if known is not self._seen:  # looked up once for each change of the file
            self._is_revoked = known.get(self._key) != str(self)
            self._seen = known
        return self._is_revoked


class TokenFile(WatchedFiles):
    """Who has which token.

    Attributes:
        known: principals by the keyed digests of their tokens; another object after each change.
    """

    known: Mapping[bytes, str]

    def __init__(self, path: str) -> None:
        """Reads the file at `path`.

        Raises:
            FileRefused: it cannot be read, others may read it, or a line breaks the rule.
        """
        # The table's keys depend on a secret of this process: how long a search takes says nothing about any token.
        self._secret = secrets.token_bytes(32)
        super().__init__(WatchedFile("tokens", path, is_private=True))

    def principal(self, token: str) -> TokenPrincipal | None:
        """Whom `token` names; None: nobody."""
        known, key = self.known, self._key(digest(token))
        name = known.get(key)
        return None if name is None else TokenPrincipal(name, self, key)

    def _key(self, token_digest: bytes) -> bytes:
        return hashlib.blake2b(token_digest, key=self._secret, digest_size=32).digest()

    def _load(self, contents: list[bytes]) -> None:
        path, known = self._files[0].path, {}
        for number, line in enumerate(contents[0].decode(errors="replace").splitlines(), 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            match = _LINE.fullmatch(line)
            if match is None:  # what the line says may be a token, so the message does not
                rule = f"must be 'PRINCIPAL sha256:DIGEST', with a principal of {PRINCIPAL_RULE}, and 64 digits 0-9a-f"
                raise FileRefused(f"tokens is {path}, whose line {number} {rule}")
            key = self._key(bytes.fromhex(match[2]))
            if key in known:
                raise FileRefused(f"tokens is {path}, whose line {number} must have a token that no line above has")
            known[key] = match[1]
        if not known:  # also what a file looks like while it is being written
            raise FileRefused(f"tokens is {path}, which must have at least one token; see attnd token --help")
        self.known = known


def digest(token: str) -> bytes:
    """What the file keeps of a token."""
    return hashlib.sha256(token.encode(errors="surrogatepass")).digest()  # whatever a client sends


def add_token(path: str, principal: str, show: Callable[[str], None] | None = None) -> str:
    """Makes a token for `principal`, adds its line to the file at `path`, and returns it.

    Args:
        path: of the file; it is made for this user alone if there is none.
        principal: whose token it is.
        show: is given the token before its line is added: of one that cannot be shown there is none.

    Raises:
        FileRefused: the file cannot be written, or the principal breaks the rule.
    """
    if not _PRINCIPAL.fullmatch(principal):
        raise FileRefused(f"principal is {principal!r}, but must be {PRINCIPAL_RULE}")
    token = secrets.token_urlsafe(TOKEN_BYTES)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise FileRefused(f"tokens is {path}, which cannot be written: {error.strerror}") from None
    with open(descriptor, "r+b", buffering=0) as file:
        if show is not None:
            show(token)
        try:
            file.seek(0, os.SEEK_END)
            ended = True
            if file.tell():
                file.seek(-1, os.SEEK_END)
                ended = file.read(1) == b"\n"
            line = f"{principal} sha256:{digest(token).hex()}\n"
            file.write((line if ended else f"\n{line}").encode())  # whole, or a server that reads meanwhile refuses it
        except OSError as error:
            raise FileRefused(f"tokens is {path}, which cannot be written: {error.strerror}") from None
    return token
