"""What a client shows a server, and asks of it: TLS, a certificate of its own, a token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from attnd.errors import InvalidRequest

Metadata = tuple[tuple[str, str], ...] | None
"""gRPC's metadata of an RPC; None: none."""


@dataclass(frozen=True)
class Credentials:
    """How a connection is encrypted, and who the client is.

    ```
    attnd.connect("attention.example:7411", credentials=attnd.Credentials(ca="ca.pem", token=token))
    ```

    Attributes:
        token: the bearer token, or what gives it: called for each RPC that begins, so that a token may be renewed, from
            any thread, and expected not to wait. "": none.
        ca: file of the authorities that may have signed the server's certificate, PEM; "": those that gRPC knows.
        cert: file of the client's own certificate, PEM, for a server that asks for one; "": none.
        key: file of its key, PEM.
        server_name: the name that the server's certificate must have; "": that of the address.
        tls: False leaves TLS to somebody else, a proxy beside each end, say; or takes a token over loopback without it.
    """

    token: str | Callable[[], str] = field(default="", repr=False)
    ca: str = ""
    cert: str = ""
    key: str = ""
    server_name: str = ""
    tls: bool = True

    def __post_init__(self) -> None:
        if bool(self.cert) != bool(self.key):
            absent, given = ("key", "cert") if self.cert else ("cert", "key")
            raise InvalidRequest(f"{absent} is absent, but must be given, as {given} is", field=absent)
        for name in ("ca", "cert", "server_name"):
            if getattr(self, name) and not self.tls:
                raise InvalidRequest(f"{name} is {getattr(self, name)}, but must be absent without tls", field=name)
        if isinstance(self.token, str):
            self.metadata()

    def metadata(self) -> Metadata:
        """GRPC's metadata of an RPC that begins now.

        Raises:
            InvalidRequest: what gives the token gave something else.
        """
        token = self.token if isinstance(self.token, str) else self.token()
        if not token and token is self.token:
            return None
        # gRPC would refuse other characters too, in a message that repeats them.
        if not token or not all("!" <= character <= "~" for character in token):
            raise InvalidRequest("token must be characters of ASCII without spaces, and at least one", field="token")
        return (("authorization", f"Bearer {token}"),)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """GRPC's credentials of a channel.

        Raises:
            InvalidRequest: a file cannot be read, or does not hold what it must.
        """
        ca, cert, key = (self._read(name) for name in ("ca", "cert", "key"))
        self._check()
        return grpc.ssl_channel_credentials(ca, key, cert)

    def _check(self) -> None:
        """GRPC says nothing of what is wrong with the files, and connects to nobody later."""
        import ssl  # a client without TLS need not wait for it

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.ca:
            try:
                context.load_verify_locations(self.ca)
            except (OSError, ValueError) as error:  # errors of SSL are OSErrors
                raise InvalidRequest(f"ca is {self.ca}, but must be certificates, PEM: {error}", field="ca") from None
        if self.cert:
            try:
                context.load_cert_chain(self.cert, self.key, password=lambda: "")
            except (OSError, ValueError) as error:
                rule = "must be a certificate and its key, PEM without a passphrase"
                raise InvalidRequest(
                    f"cert is {self.cert} and key is {self.key}, but {rule}: {error}", field="cert"
                ) from None

    def channel_options(self) -> list[tuple[str, str]]:
        """GRPC's options of a channel."""
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []

    def _read(self, name: str) -> bytes | None:
        path = getattr(self, name)
        if not path:
            return None
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise InvalidRequest(f"{name} is {path}, which cannot be read: {error.strerror}", field=name) from None


def metadata_after(refused: Metadata, metadata: Callable[[], Metadata]) -> Metadata:
    """What `metadata` gives after the server has refused what it gave before; None: nothing else."""
    try:
        renewed = metadata()
    except Exception:  # what gives the token has no more; that it was refused tells more
        return None
    return None if renewed == refused else renewed


# A connection without any: neither encrypted nor anybody's.
NO_CREDENTIALS = Credentials(tls=False)
