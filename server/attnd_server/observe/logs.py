"""Structured logs through the standard library: one event a line, its fields from `extra`.

    log.info("lease ended", extra={"cache": "demo", "num_bytes": 4096})

reads `14:03:07.512 info  lease ended  cache=demo num_bytes=4096` on a terminal and
`{"ts": "2025-11-01T14:03:07.512Z", "level": "info", "event": "lease ended", "cache": "demo", ...}` anywhere else.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from attnd.protocol.printable import printable

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("auto", "text", "json")

# What every record has; the rest of its attributes came with `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PLAIN = re.compile(r'[^\s="]+')


def setup(level: str = "info", log_format: str = "auto", stream: TextIO | None = None) -> None:
    """Sends the process's log records to `stream`, in one format, whichever library they come from.

    A second call replaces the first.

    Args:
        level: the least level that is written, one of `LEVELS`.
        log_format: "text", "json", or "auto": text on a terminal, JSON otherwise.
        stream: where to write; None means standard error.

    Raises:
        ValueError: no such level or format.
    """
    for name, value, known in (("level", level, LEVELS), ("log_format", log_format, FORMATS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(known)}")
    stream = stream or sys.stderr
    if log_format == "auto":
        log_format = "text" if stream.isatty() else "json"

    handler = _Handler(stream)
    handler.setFormatter(_Formatter(text_line if log_format == "text" else json_line))
    root = logging.getLogger()
    root.handlers = [kept for kept in root.handlers if not isinstance(kept, _Handler)] + [handler]
    root.setLevel(level.upper())


def json_line(record: logging.LogRecord) -> str:
    """`record` as one JSON object: ts (UTC), level, event, then its fields; a traceback is the field `exception`."""
    seconds, milliseconds = time.gmtime(record.created), int(record.msecs)
    line: dict[str, Any] = {
        "ts": f"{time.strftime('%Y-%m-%dT%H:%M:%S', seconds)}.{milliseconds:03}Z",
        "level": record.levelname.lower(),
        "event": record.getMessage(),
        "logger": record.name,
    }
    for name, value in {**fields(record), **_exception(record)}.items():
        line.setdefault(name, value)
    return json.dumps(line, default=str)


def text_line(record: logging.LogRecord) -> str:
    """`record` for people: local time, level, event, name=value pairs; a traceback follows on lines of its own.

    What a client has named cannot begin a line, nor change how one looks: see `printable`.
    """
    clock = f"{time.strftime('%H:%M:%S', time.localtime(record.created))}.{int(record.msecs):03}"
    pairs = " ".join(f"{name}={_text_value(value)}" for name, value in fields(record).items())
    line = f"{clock} {record.levelname.lower():<5} {printable(record.getMessage())}" + (f"  {pairs}" if pairs else "")
    return "\n".join([line, *_traceback_lines(record)])


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller gave as `extra`, in order."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def _exception(record: logging.LogRecord) -> dict[str, str]:
    return {"exception": logging.Formatter().formatException(record.exc_info)} if record.exc_info else {}


def _traceback_lines(record: logging.LogRecord) -> list[str]:
    """A traceback, of which only lines that Python wrote begin at the margin."""
    if not record.exc_info:
        return []
    lines = []
    for part in traceback.format_exception(*record.exc_info):
        first, *others = part.rstrip("\n").split("\n")
        lines += [first, *(each if each.startswith(" ") else f"    {each}" for each in others)]
    return [printable(each) for each in lines]


def _text_value(value: object) -> str:
    text = str(value)
    is_plain = _PLAIN.fullmatch(text) and text.isprintable()
    return text if is_plain else printable(json.dumps(text, ensure_ascii=False))


class _Handler(logging.StreamHandler[TextIO]):
    """A type of our own, so that `setup` finds the handler that it installed before."""


class _Formatter(logging.Formatter):
    def __init__(self, line: Callable[[logging.LogRecord], str]) -> None:
        super().__init__()
        self._line = line

    def format(self, record: logging.LogRecord) -> str:
        return self._line(record)
