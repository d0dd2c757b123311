"""Who calls, and what proves it: tokens, certificates, and the files that both are in."""

from attnd_server.identity.certificates import ServerCertificates
from attnd_server.identity.principals import ANYBODY, Principals, refuse_if_revoked
from attnd_server.identity.tokens import TokenFile, TokenPrincipal
from attnd_server.identity.watched_files import FileRefused, WatchedFiles

__all__ = [
    "ANYBODY",
    "FileRefused",
    "Principals",
    "ServerCertificates",
    "TokenFile",
    "TokenPrincipal",
    "WatchedFiles",
    "refuse_if_revoked",
]
