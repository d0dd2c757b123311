"""Who could use a server that listens with certain options."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Access:
    """What a server asks of those who reach its port.

    Attributes:
        is_encrypted: whether it speaks TLS.
        asks_for_certificates: whether clients must have a certificate.
        asks_for_tokens: whether they must have a token.
    """

    is_encrypted: bool
    asks_for_certificates: bool
    asks_for_tokens: bool

    @property
    def asks(self) -> bool:
        """Whether not everybody may call."""
        return self.asks_for_certificates or self.asks_for_tokens

    @property
    def missing(self) -> list[str]:
        """What it does not have of the two things."""
        have = {"encryption": self.is_encrypted, "authentication": self.asks}
        return [name for name, is_there in have.items() if not is_there]

    @property
    def danger(self) -> str:
        """What may happen to it where other machines reach it; "": it is safe there."""
        if self.is_encrypted and self.asks:
            return ""
        if self.is_encrypted:
            return "TLS alone hides what is sent, but whoever reaches the port can still use the server"
        if self.asks_for_tokens:
            return "tokens, and what they protect, would cross the network for everybody to read"
        return "whoever reaches the port can use the server, and read and write what others send to it"

    @property
    def remedy(self) -> str:
        """The options that are missing."""
        if self.is_encrypted:
            return "--tokens or --tls-client-ca"
        return "--tls-cert" if self.asks_for_tokens else "--tls-cert with --tokens or --tls-client-ca"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    from attnd.planes import targets  # gRPC comes with it, which help need not wait for

    return targets.is_loopback(host)
