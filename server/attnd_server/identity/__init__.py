"""Who calls, and what proves it: tokens, certificates, and the files that both are in."""

from attnd_server.identity.certificates import ServerCertificates
from attnd_server.identity.opened import OpenByToken
from attnd_server.identity.principals import (
    ANYBODY,
    Principals,
    is_revoked,
    refuse_if_revoked,
    wanted_until_revoked,
)
from attnd_server.identity.tokens import TokenFile, TokenPrincipal
from attnd_server.identity.watched_files import FileRefused, WatchedFiles

__all__ = [
    "ANYBODY",
    "FileRefused",
    "OpenByToken",
    "Principals",
    "ServerCertificates",
    "TokenFile",
    "TokenPrincipal",
    "WatchedFiles",
    "is_revoked",
    "refuse_if_revoked",
    "wanted_until_revoked",
]
