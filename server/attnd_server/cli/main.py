"""The commands of `attnd`. The rooms below this one read no environment variables of ours.

Whatever takes long to import is imported inside a command, so that help is instant.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from attnd_server.cli import cache
from attnd_server.cli.credentials import with_credentials
from attnd_server.cli.demo.commands import chat, demo
from attnd_server.cli.derived_options import option_of
from attnd_server.cli.options import DEFAULT_ADDRESS, AsJson, Command, Group, several, timeout
from attnd_server.cli.parsers import call_type, gpu_kind, number, whole
from attnd_server.cli.serve import serve
from attnd_server.cli.streams import errors, output
from attnd_server.cli.texts import told
from attnd_server.config import ServerConfig

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.add_typer(cache.app, name="cache")
app.command(cls=Command)(serve)
app.command(cls=Command)(demo)
app.command(cls=Command)(chat)


def _version(asked: bool) -> None:
    if asked:
        print_version()
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="As the command version.")
    ] = False,
) -> None:
    """A server that owns paged KV and attention kernels, for model workers in other processes."""


@app.command(cls=Command)
@with_credentials
def info(
    address: Annotated[
        str, typer.Argument(envvar="ATTND_ADDRESS", metavar="HOST:PORT", help="The server to ask.")
    ] = DEFAULT_ADDRESS,
    timeout_s: Annotated[float, timeout("How long to wait for it.")] = 5.0,
    as_json: AsJson = False,
    credentials: Any = None,
) -> None:
    """Show what a server can do, and its caches with the pages in use."""
    from attnd_server.cli.info import run_info

    raise typer.Exit(run_info(address, timeout_s, output(), errors(), credentials, as_json=as_json))


@app.command(cls=Command)
@with_credentials
def doctor(
    address: Annotated[
        str, typer.Argument(envvar="ATTND_ADDRESS", metavar="HOST:PORT", help="The server to examine.")
    ] = DEFAULT_ADDRESS,
    socket_dir: Annotated[
        str,
        typer.Option(
            metavar="PATH", show_default="as the server does", help="Folder of the server's sockets as seen from here."
        ),
    ] = "",
    timeout_s: Annotated[float, timeout("How long to wait for each answer.")] = 5.0,
    as_json: AsJson = False,
    credentials: Any = None,
) -> None:
    """Try every plane from this process to a server: which work, how fast they are, and why others do not."""
    from attnd_server.cli.doctor import run_doctor

    code = run_doctor(address, socket_dir, timeout_s, output(), errors(), credentials, as_json=as_json)
    raise typer.Exit(code)


@app.command(cls=Command)
@with_credentials
def top(
    address: Annotated[
        str, typer.Argument(envvar="ATTND_ADDRESS", metavar="HOST:PORT", help="The server to watch.")
    ] = DEFAULT_ADDRESS,
    interval_s: Annotated[
        float, typer.Option("--interval", parser=number(0.1, 3600), metavar="SECONDS", help="Time between two answers.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Ask twice, show the difference, and end.")] = False,
    timeout_s: Annotated[float, timeout("How long to wait for each answer.")] = 5.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON object on a line each time, and nothing else.")
    ] = False,
    credentials: Any = None,
) -> None:
    """Watch what a server does: who calls, how fast, how long calls take, memory, the queue, refusals. Ctrl-C ends it.

    It shows one's own callers, and everybody's to those whom the server's --operators names.
    """
    from attnd_server.cli.top.command import run_top

    modes = {"once": once, "as_json": as_json}
    raise typer.Exit(run_top(address, interval_s, timeout_s, output(), errors(), credentials, **modes))


@app.command(cls=Command)
def kernels(
    kernel_cache: Annotated[str, option_of(ServerConfig, "kernel_cache")] = "",
    target: Annotated[
        list[str] | None, several("A kind of GPU, by its compute capability.", gpu_kind, "sm_NN", "sm_80, sm_89, sm_90")
    ] = None,
    head_dim: Annotated[list[int] | None, several("Elements of a head.", whole(8, 512), "N", "64, 128, 256")] = None,
    dtype: Annotated[
        list[str] | None, several("Type of a call's tensors.", call_type, "NAME", "bfloat16, float16")
    ] = None,
    no_fp8: Annotated[bool, typer.Option("--no-fp8", help="Not for pages of FP8.")] = False,
    places: Annotated[
        int, typer.Option(parser=whole(0, 256), metavar="N", help="Kernels at once; 0: half of the cores.")
    ] = 0,
) -> None:
    """Compile kernels into a folder before a server needs them. This machine needs a C compiler, and no GPU.

    They are for caches with 8 KV heads and pages of 16 tokens. A server compiles what others need.
    """
    from attnd_server.cli import kernels as compiling
    from attnd_server.device.kernels.launchers import NoCompiler

    chosen = (target or compiling.TARGETS, head_dim or compiling.HEAD_DIMS, dtype or compiling.DTYPES)
    try:
        code = compiling.run_kernels(kernel_cache, *chosen, not no_fp8, places, output(), errors())
    except PermissionError as error:
        raise typer.BadParameter(str(error), param_hint="--kernel-cache") from None
    except NoCompiler as error:
        told(errors(), "kernels", error)
        code = 1
    raise typer.Exit(code)


@app.command(cls=Command)
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
        add_token(path, principal, show=typer.echo)
    except FileRefused as error:
        raise typer.BadParameter(str(error)) from None


@app.command("version", cls=Command)
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
