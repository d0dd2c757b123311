"""The server's certificate and key, and the authority whose certificates clients must have."""

from __future__ import annotations

import ssl
from typing import Any

import grpc

from attnd_server.identity.watched_files import FileRefused, WatchedFile, WatchedFiles


class ServerCertificates(WatchedFiles):
    """What TLS needs. Changed files count from the next handshake on; connections stay as they are."""

    def __init__(self, cert: str, key: str, client_ca: str = "") -> None:
        """Reads the files.

        Args:
            cert: path of the certificate and those between it and its authority, PEM.
            key: path of the key, PEM without a passphrase; nobody else may read it.
            client_ca: path of the authorities one of which must have signed a client's certificate, PEM; "": clients
                need none.

        Raises:
            FileRefused: a file cannot be used, or certificate and key do not belong together.
        """
        self._is_mutual = bool(client_ca)
        self._changed: Any = None  # gRPC's configuration that no handshake has seen yet
        files = [WatchedFile("tls_cert", cert, is_private=False), WatchedFile("tls_key", key, is_private=True)]
        if client_ca:
            files.append(WatchedFile("tls_client_ca", client_ca, is_private=False))
        super().__init__(*files)

    def credentials(self) -> grpc.ServerCredentials:
        """What gRPC serves a port with."""
        first, self._changed = self._changed, None
        return grpc.dynamic_ssl_server_credentials(first, self._take_changed, self._is_mutual)

    def _take_changed(self) -> Any:
        """By gRPC, before each handshake: the configuration that is new, or None."""
        changed, self._changed = self._changed, None
        return changed

    def _load(self, contents: list[bytes]) -> None:
        cert, key, *client_ca = contents
        self._check()
        if self._read() != contents:
            raise FileRefused("certificate and key changed while they were read")
        self._changed = grpc.ssl_server_certificate_configuration([(key, cert)], client_ca[0] if client_ca else None)

    def _check(self) -> None:
        """GRPC says nothing of what is wrong with them, and refuses handshakes later."""
        cert, key, *client_ca = self._files
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(cert.path, key.path, password=lambda: "")
        except (ssl.SSLError, OSError, ValueError) as error:
            rule = "must be a certificate and its key, PEM without a passphrase"
            raise FileRefused(f"tls_cert is {cert.path} and tls_key is {key.path}, but {rule}: {error}") from None
        for file in client_ca:
            try:
                context.load_verify_locations(file.path)
            except (ssl.SSLError, OSError) as error:
                raise FileRefused(f"tls_client_ca is {file.path}, but must be certificates, PEM: {error}") from None
