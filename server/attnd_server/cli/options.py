"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from attnd_server.cli.derived_options import option_of
from attnd_server.cli.parsers import number
from attnd_server.config import ServerConfig

# That of attnd.planes.targets, with which gRPC comes, which help need not wait for.
DEFAULT_ADDRESS = f"localhost:{ServerConfig.port}"


class Command(TyperCommand):
    """A command in whose help flags do not look as if they took a value."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Those of the command, and --help."""
        return without_values(super().get_params(ctx))


class Group(TyperGroup):
    """Likewise for commands of commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Those of the group, and --help."""
        return without_values(super().get_params(ctx))


def without_values(parameters: list[Any]) -> list[Any]:
    """The parameters; what a flag takes, which newer versions of typer call <bool>, is nothing."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False) and parameter.metavar is None:
            parameter.metavar = ""
    return parameters


def option(envvar: str, text: str, *, flag: str = "", panel: str | None = None, **kinds: Any) -> Any:
    """An option with the help `text` that the environment may set too.

    Args:
        envvar: the variable's name.
        text: the help.
        flag: the option's own name; "" derives it from the parameter's.
        panel: the heading that the option stands under in the help.
        kinds: what else `typer.Option` takes: a parser, a metavar.
    """
    names = (flag,) if flag else ()
    return typer.Option(*names, envvar=envvar, show_envvar=False, help=text, rich_help_panel=panel, **kinds)


def timeout(text: str) -> Any:
    """The option --timeout-s with the help `text`."""
    return typer.Option(parser=number(0.1), metavar="SECONDS", help=text)


def several(text: str, parser: Callable[[str], Any], metavar: str, default: str) -> Any:
    """An option with the help `text` that may be given several times, each time with one value."""
    return typer.Option(help=f"{text} Give it once for each.", parser=parser, metavar=metavar, show_default=default)


AsJson = Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")]
Device = Annotated[str, option_of(ServerConfig, "device")]
