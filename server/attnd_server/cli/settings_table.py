"""The settings of `attnd serve` as a table in Markdown: `python -m attnd_server.cli.settings_table`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field
from itertools import groupby
from typing import Any

from attnd_server.cli.serve import ServeConfig
from attnd_server.config import ServerConfig
from attnd_server.setting import Kind, Setting, environment_variable, option_name, settings, size_text


def settings_table() -> str:
    """A document with a table of each group of settings."""
    declared = [each for kind in (ServerConfig, ServeConfig) for each in settings(kind)]
    groups = list(dict.fromkeys(each.group for _, each in declared))
    declared.sort(key=lambda each: groups.index(each[1].group))
    return "\n".join(_lines(declared)) + "\n"


def _lines(declared: list[tuple[Field[Any], Setting]]) -> Iterator[str]:
    yield "# Settings of a server"
    yield ""
    yield "Each is an option of `attnd serve` and an environment variable. The option counts where both are given."
    yield "This page is printed by `python -m attnd_server.cli.settings_table`."
    for group, members in groupby(declared, key=lambda each: each[1].group):
        yield from ("", f"## {group}", "", "| option | environment | unit | default | |", "|---|---|---|---|---|")
        for field, each in members:
            cells = (
                f"`{option_name(field.name)}`",
                f"`{environment_variable(field.name)}`",
                each.unit,
                _default_text(field.default, each),
                each.help,
            )
            yield f"| {' | '.join(cells)} |"


def _default_text(default: Any, declared: Setting) -> str:
    if declared.default_text:
        return declared.default_text
    if declared.kind is Kind.FLAG:
        return "off"
    if declared.kind is Kind.BYTES:
        return size_text(default)
    return f"{default:g}" if isinstance(default, float) else str(default)


if __name__ == "__main__":
    print(settings_table(), end="")
