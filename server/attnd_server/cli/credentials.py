"""What a command shows the server that it connects to: options that several commands share, and the health probe too.

Must not import torch, nor typer or rich: a container runs the probe every few seconds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

if TYPE_CHECKING:
    from attnd.credentials import Credentials


class CredentialOption(NamedTuple):
    """One of them: its variable in the environment, its metavar and its help."""

    envvar: str
    metavar: str
    text: str


CREDENTIAL_OPTIONS = {
    "tls_ca": CredentialOption(
        "ATTND_TLS_CA",
        "FILE|system",
        "Connect with TLS: the authorities that may have signed the server's certificate, PEM; system: those that gRPC "
        "knows.",
    ),
    "tls_server_name": CredentialOption(
        "ATTND_TLS_SERVER_NAME", "NAME", "The name in the server's certificate, where it is not the address's."
    ),
    "tls_client_cert": CredentialOption(
        "ATTND_TLS_CLIENT_CERT", "FILE", "A certificate of one's own, PEM, for a server that asks for one."
    ),
    "tls_client_key": CredentialOption("ATTND_TLS_CLIENT_KEY", "FILE", "Its key, PEM."),
    "token_file": CredentialOption(
        "ATTND_TOKEN_FILE", "FILE", "A file with the token, for a server that asks for one; read for each request."
    ),
}


def credentials(options: Mapping[str, str | None]) -> Credentials | None:
    """What the options say, by their names in CREDENTIAL_OPTIONS; None: nothing.

    Raises:
        InvalidRequest: they do not go together, or a file cannot be used.
    """
    from attnd.credentials import Credentials
    from attnd.errors import InvalidRequest

    given = {name: value for name in CREDENTIAL_OPTIONS if (value := options.get(name))}
    if not given:
        return None
    ca, path = given.get("tls_ca"), given.get("token_file")
    if ca is None and given.keys() != {"token_file"}:
        rule = "must be given, as another option of TLS is; 'system' takes the authorities that gRPC knows"
        raise InvalidRequest(f"tls_ca is absent, but {rule}", field="tls_ca")
    return Credentials(
        token=_token_of(path) if path else "",
        tls=ca is not None,
        ca="" if ca in (None, "system") else str(ca),
        cert=given.get("tls_client_cert", ""),
        key=given.get("tls_client_key", ""),
        server_name=given.get("tls_server_name", ""),
    )


def _token_of(path: str) -> Callable[[], str]:
    """What reads the token anew, so that another one may be put into the file."""
    from attnd.errors import InvalidRequest

    def token() -> str:
        try:
            return Path(path).read_text(errors="replace").strip()
        except OSError as error:
            rule = f"which cannot be read: {error.strerror}"
            raise InvalidRequest(f"token_file is {path}, {rule}", field="token_file") from None

    return token


def with_credentials(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command of typer these options; it gets what they say as its parameter `credentials`.

    A token may go unencrypted to this machine only.
    """
    import typer

    from attnd_server.cli.derived_options import set_parameters
    from attnd_server.cli.options import DEFAULT_ADDRESS, option

    added = {
        name: Annotated[
            str, option(each.envvar, each.text, panel="TLS and tokens", metavar=each.metavar, show_default="none")
        ]
        for name, each in CREDENTIAL_OPTIONS.items()
    }

    @wraps(command)
    def wrapper(**arguments: Any) -> None:
        # gRPC comes with them, which help need not wait for.
        from attnd.errors import InvalidRequest
        from attnd.planes.targets import parse_target

        options = {name: arguments.pop(name) for name in CREDENTIAL_OPTIONS}
        try:
            shown = credentials(options)
            address = arguments.get("address") or DEFAULT_ADDRESS
            is_readable = shown is not None and not shown.tls and not parse_target(address).is_local
        except InvalidRequest as error:
            raise typer.BadParameter(str(error)) from None
        if is_readable:
            rule = "must be given with token_file unless the address is a loopback one: others could read the token"
            raise typer.BadParameter(f"tls_ca is absent, but {rule}", param_hint="--tls-ca")
        command(**arguments, credentials=shown)

    own = inspect.signature(command, eval_str=True).parameters.values()
    by_name = inspect.Parameter.KEYWORD_ONLY
    kept = [parameter.replace(kind=by_name) for parameter in own if parameter.name != "credentials"]
    more = [inspect.Parameter(name, by_name, default="", annotation=kind) for name, kind in added.items()]
    set_parameters(wrapper, [*kept, *more])
    return wrapper
