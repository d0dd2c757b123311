"""Certificates for tests, made by openssl: an authority, and what it signs."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="the command openssl makes the certificates")


@dataclass(frozen=True)
class Certificate:
    """Files with a certificate and its key, PEM."""

    cert: str
    key: str


class Authority:
    """A certificate authority whose files lie in `folder`."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self._own = self._make(name, f"/CN={name}", "basicConstraints=critical,CA:TRUE")
        self.ca = self._own.cert

    def issue(self, file_name: str, subject: str, names: str = "") -> Certificate:
        """A certificate of `subject`, "/CN=...", with alternative names such as "DNS:localhost,IP:127.0.0.1"."""
        extensions = ["basicConstraints=critical,CA:FALSE"] + ([f"subjectAltName={names}"] if names else [])
        return self._make(file_name, subject, *extensions, signed_by=self._own)

    def _make(
        self, file_name: str, subject: str, *extensions: str, signed_by: Certificate | None = None
    ) -> Certificate:
        made = Certificate(str(self._folder / f"{file_name}.pem"), str(self._folder / f"{file_name}.key"))
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        command += ["-days", "2", "-subj", subject, "-out", made.cert, "-keyout", made.key]
        command += [part for extension in extensions for part in ("-addext", extension)]
        if signed_by is not None:
            command += ["-CA", signed_by.cert, "-CAkey", signed_by.key]
        subprocess.run(command, check=True, capture_output=True)
        Path(made.key).chmod(0o600)
        return made
