"""Asks a server again and again, and shows what it answers."""

from __future__ import annotations

import json
import queue
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NamedTuple

from rich.console import Console
from rich.live import Live

import attnd
from attnd.errors import AttndError, Unsupported
from attnd.v1 import status_pb2
from attnd_server.cli.texts import told as tell
from attnd_server.cli.top.rates import Answers
from attnd_server.cli.top.report import to_json
from attnd_server.cli.top.tables import screen


class Asked(NamedTuple):
    """What came of asking.

    Attributes:
        at: when, `time.monotonic`.
        told: the answer; None: there is none.
        error: why.
    """

    at: float
    told: status_pb2.GetStatusResponse | None = None
    error: AttndError | None = None


class Asker(threading.Thread):
    """Asks on a thread of its own: whoever is interrupted is not within gRPC."""

    def __init__(
        self, address: str, interval_s: float, timeout_s: float, credentials: attnd.Credentials | None
    ) -> None:
        """Asks the server at `address` each `interval_s`, and waits `timeout_s` for each answer."""
        super().__init__(name="asker", daemon=True)
        self._address = address
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._credentials = credentials
        self._ended = threading.Event()
        self._results: queue.SimpleQueue[Asked | BaseException] = queue.SimpleQueue()

    def next(self) -> Asked:
        """The next answer. Raises what nobody has expected."""
        result = self._results.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def end(self) -> None:
        """Asks no more. Waits a moment for an answer that is under way."""
        self._ended.set()
        self.join(1)

    def run(self) -> None:
        """The thread."""
        client: attnd.Client | None = None
        try:
            while not self._ended.is_set():
                try:
                    client = client or attnd.connect(
                        self._address,
                        timeout_s=self._timeout_s,
                        connect_timeout_s=self._timeout_s,
                        credentials=self._credentials,
                    )
                    self._results.put(Asked(time.monotonic(), client.status()))
                except AttndError as error:
                    self._results.put(Asked(time.monotonic(), error=error))
                self._ended.wait(self._interval_s)
        except BaseException as error:
            self._results.put(error)
        finally:
            if client is not None:
                client.close()


def run_top(
    address: str,
    interval_s: float,
    timeout_s: float,
    console: Console,
    errors: Console,
    credentials: attnd.Credentials | None = None,
    *,
    once: bool = False,
    as_json: bool = False,
) -> int:
    """Shows what the server at `address` does, until Ctrl-C.

    Args:
        address: of the server.
        interval_s: seconds between two answers.
        timeout_s: how long to wait for each, in seconds.
        console: where it is shown.
        errors: where the one line goes if nobody answers.
        credentials: what to show the server.
        once: show two answers' difference, and end.
        as_json: a JSON object on a line each time, and nothing else.

    Returns:
        The exit code: 0, or 1 if nobody has answered at the start, or to `once` a second time.
    """
    asker, answers = Asker(address, interval_s, timeout_s, credentials), Answers()
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        asker.start()
        first = asker.next()
        if first.told is None:
            is_old = isinstance(first.error, Unsupported)
            tell(errors, "top", "the server is of an older version and has no GetStatus" if is_old else first.error)
            return 1
        answers.add(first.at, first.told)
        view = _View(address, answers, console, as_json)
        if once:
            second = asker.next()
            if second.told is None:
                tell(errors, "top", second.error)
                return 1
            answers.add(second.at, second.told)
            view.write()
        elif as_json or not console.is_terminal or console.is_dumb_terminal:
            _go_on(asker, answers, view.write)
        else:
            # On a screen of its own, as other programs of this kind have it: what was there before comes back.
            with (
                _screen_of_before(console),
                Live(view.drawn(), console=console, screen=True, auto_refresh=False) as live,
            ):
                _go_on(asker, answers, lambda trouble: live.update(view.drawn(trouble), refresh=True))
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
        with suppress(KeyboardInterrupt):
            asker.end()
    return 0


class _View:
    """Shows answers."""

    def __init__(self, address: str, answers: Answers, console: Console, as_json: bool) -> None:
        self._address = address
        self._answers = answers
        self._console = console
        self._as_json = as_json

    def drawn(self, trouble: str = "") -> Any:
        size = self._console.size
        return screen(self._address, self._answers.now(), trouble, size.width, size.height)

    def write(self, trouble: str = "") -> None:
        """One after the other, as a script or a terminal without a cursor has it."""
        now = self._answers.now()
        if not self._as_json:
            self._console.print(screen(self._address, now, trouble, self._console.width, 1 << 16))
        elif now is not None:
            self._console.file.write(json.dumps(to_json(self._address, now, trouble)) + "\n")
            self._console.file.flush()


def _go_on(asker: Asker, answers: Answers, show: Any) -> None:
    """Shows each answer, or why there is none."""
    show("")
    away_since = 0.0
    while True:
        asked = asker.next()
        if asked.told is not None:
            answers.add(asked.at, asked.told)
            away_since = 0.0
            show("")
        else:
            away_since = away_since or asked.at
            reason = " ".join(str(asked.error).split())
            show(f"no answer for {asked.at - away_since:.0f} s: {reason}")


@contextmanager
def _screen_of_before(console: Console) -> Iterator[None]:
    """Shows it again also where an interrupt comes while Live begins, of which nothing is undone then."""
    try:
        yield
    finally:
        if console.is_alt_screen:
            console.set_alt_screen(False)
            console.show_cursor(True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends it as Ctrl-C does, so that the terminal is left whole."""
    raise KeyboardInterrupt
