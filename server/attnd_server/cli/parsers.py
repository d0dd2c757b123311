"""Parsers of values on the command line. Each raises `typer.BadParameter` with the value and the rule."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import typer

from attnd_server.config import MAX_PORT

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
# What the libraries below take, where a setting has no limit of its own: 32 bits of a count, 30 years, an EiB.
MAX_COUNT, MAX_SECONDS, MAX_BYTES = (1 << 31) - 1, 1e9, 1 << 60
_MAX_USER = (1 << 32) - 2
# A longer number is beyond every limit; Python would refuse to read one of thousands of digits.
_MAX_DIGITS = 20


def device_name(value: str) -> str:
    """Parses a device without asking torch."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", value):
        raise typer.BadParameter(f"it is {value!r}, but must be auto, cpu, cuda or cuda:N")
    return value


def num_bytes(value: str | int) -> int:
    """Parses an amount of memory: bytes, or with a unit as in 512MiB and 8GiB."""
    match = re.fullmatch(rf"([0-9]+) ?({'|'.join(_UNITS)})?", str(value))
    if match is None:
        raise typer.BadParameter(f"it is {value!r}, but must be bytes, or a number with a unit as in 512MiB, 8GiB")
    size = int(match[1][:_MAX_DIGITS]) << 10 * _UNITS.index(match[2] or "B")
    if size > MAX_BYTES or len(match[1]) > _MAX_DIGITS:
        raise typer.BadParameter(f"it is {value}, but must be at most {MAX_BYTES >> 40}TiB")
    return size


def listen_host(value: str) -> str:
    """Parses an address to listen on, or a name of it; an IPv6 address may have brackets, which are left out."""
    # gRPC comes with them, which help need not wait for.
    from attnd.errors import InvalidRequest
    from attnd.planes.targets import check_host, is_ip

    host = value[1:-1] if value.startswith("[") and is_ip(value[1:-1], 6) else value
    try:
        check_host(host, value)
    except InvalidRequest:
        rule = "must be a name or an IP address, without a port"
        raise typer.BadParameter(f"it is {_shown(value)}, but {rule}") from None
    return host


def listen_address(value: str) -> str:
    """Parses where to listen: HOST:PORT, or a PORT of this machine's own; "" stays that."""
    match = re.fullmatch(r"(?:(\[[^\[\]]+\]|[^:\[\]]+):)?([0-9]{1,5})", value)
    if value and (match is None or int(match[2]) > MAX_PORT):
        raise typer.BadParameter(f"it is {_shown(value)}, but must be HOST:PORT or PORT, and PORT 0..{MAX_PORT}")
    if not match:
        return ""
    host = listen_host(match[1] or "127.0.0.1")
    return f"[{host}]:{match[2]}" if ":" in host else f"{host}:{match[2]}"


def users(value: str | frozenset[int]) -> frozenset[int]:
    """Parses numbers of users: 1000,1001."""
    if isinstance(value, frozenset):
        return value
    if not re.fullmatch(r"([0-9]+(,[0-9]+)*)?", value):
        raise typer.BadParameter(f"it is {value!r}, but must be numbers of users as in 1000,1001")
    if any(len(number) > _MAX_DIGITS or int(number) > _MAX_USER for number in value.split(",") if number):
        raise typer.BadParameter(f"it is {value}, but must be numbers of users up to {_MAX_USER}")
    return frozenset(int(number) for number in value.split(",") if number)


def names(value: str | frozenset[str]) -> frozenset[str]:
    """Parses names of principals: alice,team/bob."""
    if isinstance(value, frozenset):
        return value
    return frozenset(name for each in value.split(",") if (name := each.strip()))


def gpu_kind(value: str) -> str:
    """Parses a kind of GPU by its compute capability: sm_90."""
    if not re.fullmatch(r"sm_[0-9]{2,3}", value):
        raise typer.BadParameter(f"it is {value!r}, but must be like sm_90")
    return value


def call_type(value: str) -> str:
    """Parses the type of a call's tensors."""
    if value not in (types := ("bfloat16", "float16", "float32")):
        raise typer.BadParameter(f"it is {value!r}, but must be one of {', '.join(types)}")
    return value


def whole(low: int, high: int | None = None) -> Callable[[str | int], int]:
    """A parser of whole numbers in `low..high`."""

    def parse(value: str | int) -> int:
        text = str(value)
        if not re.fullmatch(r"-?[0-9]+", text) or not _in_range(float(text), low, high):
            raise typer.BadParameter(f"it is {_shown(value)}, but must be a whole number {_range_text(low, high)}")
        if float(text) > MAX_COUNT:
            raise typer.BadParameter(f"it is {text}, but must be at most {MAX_COUNT}")
        return int(text)

    return parse


def number(low: float, high: float | None = None) -> Callable[[str | float], float]:
    """A parser of finite numbers in `low..high`."""

    def parse(value: str | float) -> float:
        try:
            parsed = float(value)
        except ValueError:
            parsed = math.nan
        if not _in_range(parsed, low, high):
            raise typer.BadParameter(f"it is {_shown(value)}, but must be a number {_range_text(low, high)}")
        if parsed > MAX_SECONDS:
            raise typer.BadParameter(f"it is {value}, but must be at most {MAX_SECONDS:.0f}")
        return parsed

    return parse


def _shown(value: object) -> str:
    """A value in a message, where it cannot do anything to a terminal."""
    from attnd.protocol.printable import printable

    return printable(str(value)) or "''"


def _in_range(value: float, low: float, high: float | None) -> bool:
    return math.isfinite(value) and low <= value and (high is None or value <= high)


def _range_text(low: float, high: float | None) -> str:
    return f"from {low:g}" if high is None else f"{low:g}..{high:.0f}"
