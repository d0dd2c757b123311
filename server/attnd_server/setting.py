"""How a setting is declared: as a field of a frozen dataclass that carries all that is said about it anywhere.

The command line, the environment variables and the table of settings are derived from these fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from enum import Enum, auto
from typing import Any, TypeVar

T = TypeVar("T")

_KEY = "setting"
_SIZES = (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


class Kind(Enum):
    """What the value of a setting is. The command line has a parser for each kind."""

    TEXT = auto()
    FLAG = auto()
    CHOICE = auto()
    COUNT = auto()
    FRACTION = auto()
    SECONDS = auto()
    BYTES = auto()
    DEVICE = auto()
    HOST = auto()
    ADDRESS = auto()
    USERS = auto()
    NAMES = auto()
    FILE = auto()
    FOLDER = auto()


NUMBERS = frozenset({Kind.COUNT, Kind.FRACTION, Kind.SECONDS, Kind.BYTES})
_UNITS = {Kind.BYTES: "bytes", Kind.SECONDS: "seconds"}


@dataclass(frozen=True)
class Setting:
    """What is said about a setting besides its name, its type and its default.

    Attributes:
        kind: what its value is.
        group: the heading that it stands under in the help.
        help: what it does, for operators.
        unit: what a number counts; "" for what is no number.
        low: the least value of a number.
        high: the greatest value of a number; None: what the command line takes of its kind.
        choices: the values of a choice.
        default_text: what the default means, where its value does not say it.
        metavar: the value's name in the help; "" is that of the kind.
    """

    kind: Kind
    group: str
    help: str
    unit: str = ""
    low: int = 0
    high: int | None = None
    choices: tuple[str, ...] = ()
    default_text: str = ""
    metavar: str = ""


def setting(default: T, kind: Kind, group: str, help: str, **more: Any) -> T:
    """The field of a dataclass that is a setting; `more` are other attributes of `Setting`."""
    declared = Setting(kind, group, help, **{"unit": _UNITS.get(kind, ""), **more})
    made: T = field(default=default, metadata={_KEY: declared})
    return made


def settings(kind: type[Any]) -> Iterator[tuple[Field[Any], Setting]]:
    """The settings of a dataclass, in the order of its fields."""
    for each in fields(kind):
        yield each, each.metadata[_KEY]


def option_name(name: str) -> str:
    """The option of the command line that sets the setting `name`."""
    return f"--{name.replace('_', '-')}"


def environment_variable(name: str) -> str:
    """The environment variable that sets the setting `name`."""
    return f"ATTND_{name.upper()}"


def size_text(num_bytes: int) -> str:
    """An amount of memory in the largest unit that needs no fraction: 512MiB, 1000."""
    for unit, size in _SIZES:
        if num_bytes and num_bytes % size == 0:
            return f"{num_bytes // size}{unit}"
    return str(num_bytes)
