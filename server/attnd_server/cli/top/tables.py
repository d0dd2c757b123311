"""`attnd top` on a terminal of any width: what has no room is left out, the least important first."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from attnd.v1 import error_pb2, plane_pb2
from attnd_server.cli.texts import bytes_text, enum_name, shown
from attnd_server.cli.top.rates import Now, Row

# Columns that names of principals have at the least.
MIN_NAME_WIDTH = 8
_GAP = 2


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        name: its heading.
        width: characters of its cells.
        value: a row's cell.
        rank: columns of a greater one are left out first.
    """

    name: str
    width: int
    value: Callable[[Row], str]
    rank: int = 0


PRINCIPALS = (
    Column("sess", 4, lambda row: str(row.told.num_sessions), 2),
    Column("tok/s", 6, lambda row: number_text(row.tokens)),
    Column("calls/s", 7, lambda row: number_text(row.calls)),
    Column("waiting", 7, lambda row: number_text(row.told.queue_depth), 1),
    Column("KV", 9, lambda row: bytes_text(row.told.num_kv_bytes), 1),
    Column("pages", 13, lambda row: _pages(row), 3),
    Column("refused", 7, lambda row: number_text(sum(each.count for each in row.told.refusals)), 2),
)
SESSIONS = (
    Column("plane", 6, lambda row: enum_name(plane_pb2.Plane, row.told.plane)),
    Column("idle", 5, lambda row: seconds_text(row.told.idle_s), 3),
    Column("tok/s", 6, lambda row: number_text(row.tokens)),
    Column("calls/s", 7, lambda row: number_text(row.calls), 1),
    Column("queue p50/99", 13, lambda row: _times(row, "queue"), 1),
    Column("kernel p50/99", 13, lambda row: _times(row, "kernel"), 2),
    Column("copies", 6, lambda row: _copies(row), 4),
)


def screen(address: str, now: Now | None, trouble: str, width: int, height: int) -> RenderableType:
    """All that is shown.

    Args:
        address: of the server.
        now: what it has answered; None: nothing yet.
        trouble: why it does not answer; "": it does.
        width: columns of the terminal.
        height: its lines.
    """
    parts: list[RenderableType] = _head(address, now, width)
    if trouble:
        parts.append(_line(trouble, width, "red"))
    if now is not None:
        told = now.told
        room = max(2, (height - len(parts) - 8) // 2)
        parts += [Text(), _table("principal", PRINCIPALS, now.principals[:room], width)]
        parts += _left_out(len(now.principals) - room, told.num_principals_left_out, "principals", width)
        if now.sessions:
            parts += [Text(), _table("session", SESSIONS, now.sessions[:room], width)]
            parts += _left_out(len(now.sessions) - room, told.num_sessions_left_out, "sessions", width)
        if not told.shows_everybody:
            parts.append(_line("these are your own alone: others' are for operators", width, "dim"))
    return Group(*parts)


def _head(address: str, now: Now | None, width: int) -> list[RenderableType]:
    clock = time.strftime("%H:%M:%S")
    if now is None:
        return [_line(f"{address}  {clock}", width, "bold")]
    told = now.told
    first = f"{address}  attnd {told.version}, up {seconds_text(told.uptime_s)}  {clock}"
    lines = [_line(first, width, "bold")]
    if told.draining:
        lines.append(_line("it is draining: it takes no new steps", width, "yellow"))
    if told.device_failure:
        lines.append(_line(f"its device has failed: {told.device_failure}", width, "red"))
    facts = [
        f"{device.name} KV {bytes_text(device.num_bytes_used)} of {bytes_text(device.num_bytes_limit)}"
        for device in told.devices
    ]
    if told.num_process_bytes:
        facts.append(f"process {bytes_text(told.num_process_bytes)}")
    facts.append(f"{told.queue_depth:,} calls wait")
    lines.append(_line(", ".join(facts), width))
    if told.refusals:
        reasons = (f"{each.count:,} {_reason(each.reason)}" for each in told.refusals)
        lines.append(_line(f"refused: {', '.join(reasons)}", width))
    return list(lines)


def _reason(reason: int) -> str:
    """`ERROR_REASON_CACHE_NOT_FOUND` is "cache not found"."""
    return enum_name(error_pb2.ErrorReason, reason).replace("_", " ")


def _table(name: str, columns: Sequence[Column], rows: Sequence[Row], width: int) -> Table:
    fitting = _fitting(columns, width)
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold", expand=False)
    rest = width - sum(column.width + _GAP for column in fitting) - _GAP
    table.add_column(name, no_wrap=True, overflow="ellipsis", max_width=max(1, rest))
    for column in fitting:
        table.add_column(column.name, justify="right", no_wrap=True, overflow="ellipsis", min_width=column.width)
    for row in rows:
        table.add_row(shown(row.told.principal), *(column.value(row) for column in fitting))
    return table


def _fitting(columns: Sequence[Column], width: int) -> list[Column]:
    """The columns for which there is room beside names, in their order."""
    fitting = list(columns)
    while len(fitting) > 1 and MIN_NAME_WIDTH + sum(column.width + _GAP for column in fitting) > width:
        fitting.remove(max(fitting, key=lambda column: column.rank))
    return fitting


def _left_out(hidden: int, left_out: int, what: str, width: int) -> list[RenderableType]:
    number = max(0, hidden) + left_out
    return [_line(f"and {number:,} more {what}", width, "dim")] if number else []


def _line(text: str, width: int, style: str = "") -> Text:
    line = shown(text)
    line.stylize(style)
    line.truncate(max(1, width), overflow="ellipsis")
    line.no_wrap = True
    return line


def _pages(row: Row) -> str:
    return f"{number_text(row.told.num_pages_written)} of {number_text(row.told.num_pages)}"


def _times(row: Row, phase: str) -> str:
    found = row.times.get(phase)
    return "-" if found is None else f"{us_text(found.p50)} {us_text(found.p99)}"


def _copies(row: Row) -> str:
    """What half of the calls copied, in and out, at the most."""
    us = sum(row.times[phase].p50 for phase in ("copy_in", "copy_out") if phase in row.times)
    return us_text(us) if us else "-"


def number_text(value: float) -> str:
    """A number in at most five characters: 0, 7.3, 940, 1.2k, 12M."""
    if value < 10 and value != int(value):
        return f"{value:.1f}"
    for unit in ("", "k", "M", "G", "T"):
        if value < 999.5:
            is_short = unit and value < 9.95
            return f"{value:.1f}{unit}" if is_short else f"{value:.0f}{unit}"
        value /= 1000
    return f"{value:.0f}P"


def us_text(us: float) -> str:
    """Microseconds in at most six characters: 64us, 4.1ms, 2.1s."""
    if us < 1000:
        return f"{us:.0f}us"
    return f"{us / 1e3:.3g}ms" if us < 999_500 else f"{us / 1e6:.3g}s"


def seconds_text(seconds: float) -> str:
    """Seconds in at most five characters: 9.9s, 59s, 3m, 5h, 12d."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    for unit, size in (("s", 60), ("m", 60), ("h", 24)):
        if seconds < size:
            return f"{seconds:.0f}{unit}"
        seconds /= size
    return f"{seconds:.0f}d"
