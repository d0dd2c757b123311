"""The commands of `attnd cache`: a cache to files and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnd_server.cli import streams
from attnd_server.cli.credentials import with_credentials
from attnd_server.cli.options import DEFAULT_ADDRESS, AsJson, Command, Group, option, timeout
from attnd_server.cli.parsers import number

if TYPE_CHECKING:
    import attnd

app = typer.Typer(
    cls=Group,
    help="Caches as files, in the format of serve --snapshot-dir: safetensors with a manifest.",
    no_args_is_help=True,
)

Server = Annotated[
    str, option("ATTND_ADDRESS", "The server.", flag="--address", metavar="HOST:PORT", show_default=DEFAULT_ADDRESS)
]
Timeout = Annotated[float, timeout("How long to wait for each answer.")]


@app.command("export", cls=Command)
@with_credentials
def export_cache(
    cache_id: Annotated[
        str,
        typer.Argument(metavar="ID", help="The cache's id in hexadecimal digits: cache.ref.id.hex() in its worker."),
    ],
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The folder to make, or one that is empty.")],
    address: Server = DEFAULT_ADDRESS,
    timeout_s: Timeout = 60.0,
    as_json: AsJson = False,
    credentials: Any = None,
) -> None:
    """Write one of your caches to a folder: the pages that were written to, bit for bit.

    What is stored meanwhile may be in it or not: let its worker pause.
    """
    from attnd.protocol.requests import cache_id as checked_id
    from attnd_server.cli import cache_files as transfer
    from attnd_server.cli.texts import bytes_text, shown

    def check() -> None:
        checked_id(cache_id)

    def run(client: attnd.Client, advance: transfer.Advance) -> None:
        manifest = transfer.export_cache(client, cache_id, Path(folder), advance)
        if as_json:
            sizes = {"num_pages": sum(manifest.num_pages), "num_bytes": manifest.num_bytes}
            typer.echo(json.dumps({"id": manifest.id, "folder": folder, **sizes}))
            return
        pages = f"{sum(manifest.num_pages):,} of {manifest.shape.num_pages:,} pages"
        typer.echo(shown(f"{pages}, {bytes_text(manifest.num_bytes)}, to {folder}").plain)

    _with_client("export", address, timeout_s, credentials, check, run)


@app.command("import", cls=Command)
@with_credentials
def import_cache(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The folder that was exported.")],
    address: Server = DEFAULT_ADDRESS,
    timeout_s: Timeout = 60.0,
    ttl_s: Annotated[
        float,
        typer.Option(
            parser=number(0), metavar="SECONDS", help="Its lease; 0: as the exported one's.", show_default="as it was"
        ),
    ] = 0,
    name: Annotated[str, typer.Option(help="Its label for people.", show_default="as it was")] = "",
    as_json: AsJson = False,
    credentials: Any = None,
) -> None:
    """Lease a cache with what is in a folder, and print its id.

    It ends with its lease, unless a worker goes on with it: client.open_cache(ID).
    """
    from attnd_server.cli import cache_files as transfer
    from attnd_server.kv.snapshots.folder import read_manifest

    def check() -> None:
        read_manifest(Path(folder))

    def run(client: attnd.Client, advance: transfer.Advance) -> None:
        cache = transfer.import_cache(client, Path(folder), advance, ttl_s=ttl_s or None, name=name or None)
        cache.renew()
        if as_json:
            typer.echo(json.dumps({"id": cache.ref.id.hex(), "epoch": str(cache.ref.epoch), "ttl_s": cache.ttl_s}))
            return
        typer.echo(cache.ref.id.hex())
        typer.echo(f"leased for {cache.ttl_s:g} s from now: client.open_cache(ID) goes on with it", err=True)

    _with_client("import", address, timeout_s, credentials, check, run)


def _with_client(
    command: str,
    address: str,
    timeout_s: float,
    credentials: Any,
    check: Callable[[], None],
    run: Callable[[attnd.Client, Callable[[int, int], None]], None],
) -> None:
    """Runs a command with a connection and a bar, after what can be checked without. Exits with 1 and one line."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    import attnd
    from attnd_server.cli.texts import told
    from attnd_server.kv.snapshots.folder import SnapshotRefused

    errors = streams.errors()
    columns = (TextColumn(command), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    try:
        check()
        with (
            attnd.connect(
                address, timeout_s=timeout_s, connect_timeout_s=timeout_s, plane="inline", credentials=credentials
            ) as client,
            Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress,
        ):
            task = progress.add_task(command, total=None)
            run(client, lambda done, total: progress.update(task, advance=done, total=total))
    except (attnd.AttndError, SnapshotRefused, OSError) as error:
        told(errors, f"cache {command}", error)
        raise typer.Exit(1) from None
