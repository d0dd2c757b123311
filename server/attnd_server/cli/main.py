"""The commands of `attnd`. With the other `cli_*` modules the only place that knows environment variables.

Whatever takes long to import is imported inside a command, so that help is instant.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from rich.console import Console

from attnd_server.cli import cache as cli_cache
from attnd_server.cli import options
from attnd_server.cli import serve as cli_serve
from attnd_server.cli.credentials import with_credentials
from attnd_server.cli.options import number, whole

app = typer.Typer(
    help="A server that owns paged KV and attention kernels, for model workers in other processes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.add_typer(cli_cache.app, name="cache")
app.command()(cli_serve.serve)


@app.command()
@with_credentials
def demo(
    device: options.Device = "auto",
    max_new_tokens: Annotated[int, typer.Option(parser=whole(1), metavar="N", help="Tokens of each answer.")] = 48,
    dtype: Annotated[options.Dtype, typer.Option(help="Type of the model and its KV.")] = options.Dtype.FLOAT32,
    model_path: options.ModelPath = None,
    address: options.Address = None,
    credentials: Any = None,
) -> None:
    """Let a real model answer with attention from a server, then with its own, and compare."""
    from attnd_server.cli.demo.demo import run_demo

    code = run_demo(
        console=Console(),
        device=device,
        max_new_tokens=max_new_tokens,
        dtype=dtype.value,
        model_path=model_path,
        address=address,
        credentials=credentials,
    )
    raise typer.Exit(code)


@app.command()
@with_credentials
def chat(
    device: options.Device = "auto",
    max_new_tokens: Annotated[int, typer.Option(parser=whole(1), metavar="N", help="Most tokens of an answer.")] = 512,
    temperature: Annotated[
        float, typer.Option(parser=number(0), metavar="X", help="0 always takes the likeliest token.")
    ] = 0.7,
    model_path: options.ModelPath = None,
    address: options.Address = None,
    credentials: Any = None,
) -> None:
    """Talk with the demo's model, its attention served by a server."""
    from attnd_server.cli.demo.chat import run_chat

    code = run_chat(
        console=Console(),
        device=device,
        max_new_tokens=max_new_tokens,
        address=address,
        model_path=model_path,
        temperature=temperature,
        credentials=credentials,
    )
    raise typer.Exit(code)


@app.command()
@with_credentials
def info(
    address: Annotated[
        str, typer.Argument(envvar="ATTND_ADDRESS", metavar="HOST:PORT", help="The server to ask.")
    ] = options.DEFAULT_ADDRESS,
    timeout_s: Annotated[
        float, typer.Option(parser=number(0.1), metavar="SECONDS", help="How long to wait for it.")
    ] = 5.0,
    credentials: Any = None,
) -> None:
    """Show what a server can do, and its caches with the pages in use."""
    from attnd_server.cli.info import run_info

    raise typer.Exit(run_info(address, timeout_s, Console(), Console(stderr=True), credentials))


@app.command()
@with_credentials
def doctor(
    address: Annotated[
        str, typer.Argument(envvar="ATTND_ADDRESS", metavar="HOST:PORT", help="The server to examine.")
    ] = options.DEFAULT_ADDRESS,
    socket_dir: Annotated[
        str,
        typer.Option(
            metavar="PATH", show_default="as the server does", help="Folder of the server's sockets as seen from here."
        ),
    ] = "",
    timeout_s: Annotated[
        float, typer.Option(parser=number(0.1), metavar="SECONDS", help="How long to wait for each answer.")
    ] = 5.0,
    credentials: Any = None,
) -> None:
    """Try every plane from this process to a server: which work, how fast they are, and why others do not."""
    from attnd_server.cli.doctor import run_doctor

    raise typer.Exit(run_doctor(address, socket_dir, timeout_s, Console(), Console(stderr=True), credentials))


@app.command()
def token(
    principal: Annotated[str, typer.Argument(metavar="PRINCIPAL", help="Whose token it is.")],
    path: Annotated[str, typer.Argument(metavar="FILE", help="The file that serve --tokens reads.")],
) -> None:
    """Make a token, add its digest to a file, and print it: nothing has it afterwards.

    A new file is this user's alone. A server takes the token within a second. To revoke it, remove its line.
    """
    from attnd_server.identity.tokens import add_token
    from attnd_server.identity.watched_files import FileRefused

    try:
        typer.echo(add_token(path, principal))
    except FileRefused as error:
        raise typer.BadParameter(str(error)) from None


@app.command("version")
def print_version() -> None:
    """Show the versions of attnd and of what it stands on."""
    from attnd._version import __version__

    parts = [f"attnd {__version__}", f"Python {platform.python_version()}"]
    for package in ("grpcio", "protobuf", "torch", "triton"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(f"no {package}")
    typer.echo(", ".join(parts))
