"""`attnd top`: rates from two answers, and tables that fit a terminal of any width."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import pytest
from rich.console import Console
from rich.live import Live

from attnd.v1 import capabilities_pb2, error_pb2, plane_pb2, status_pb2
from attnd_server.cli.top import command
from attnd_server.cli.top.rates import KEPT_ANSWERS, Answers, quantiles
from attnd_server.cli.top.report import to_json
from attnd_server.cli.top.tables import number_text, screen, seconds_text, us_text

HOSTILE = "mallory\x1b[2J\u202e:smile:[red]"


def served(steps: int, calls: int, kernel: list[int] | None = None) -> status_pb2.ServedCounts:
    times = status_pb2.PhaseTimes(kernel=kernel or [])
    return status_pb2.ServedCounts(steps=steps, tokens=10 * steps, calls=calls, times=times)


def answer(epoch: int = 7, steps: int = 0, kernel: list[int] | None = None, names: tuple[str, ...] = ("alice",)):
    calls = served(steps, 32 * steps, kernel)
    return status_pb2.GetStatusResponse(
        version="1.2",
        epoch=epoch,
        uptime_s=100,
        queue_depth=3,
        shows_everybody=True,
        num_process_bytes=1 << 30,
        devices=[capabilities_pb2.Device(name="cuda:0", num_bytes_used=1 << 30, num_bytes_limit=1 << 34)],
        principals=[
            status_pb2.PrincipalStatus(principal=name, served=calls, num_kv_bytes=1 << 30, num_pages=4096)
            for name in names
        ],
        sessions=[
            status_pb2.SessionStatus(principal=name, id=number, plane=plane_pb2.PLANE_SHM, served=calls)
            for number, name in enumerate(names)
        ],
        refusals=[status_pb2.RefusalCount(reason=error_pb2.ERROR_REASON_EXHAUSTED, count=12)],
        num_sessions_left_out=5,
    )


def drawn(answers: Answers, width: int, trouble: str = "", **options: object) -> str:
    console = Console(file=io.StringIO(), width=width, height=50, emoji=False, **options)
    console.print(screen("localhost:7411", answers.now(), trouble, width, 50))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_rates_are_differences_of_two_answers() -> None:
    answers = Answers()
    assert answers.now() is None
    answers.add(50.0, answer(steps=200))
    alone = answers.now()
    assert alone is not None
    assert (alone.principals[0].steps, alone.sessions[0].calls) == (2, 64)  # since the server began, 100 s ago
    answers.add(52.0, answer(steps=300))
    now = answers.now()
    assert now is not None
    assert (now.principals[0].steps, now.principals[0].tokens, now.sessions[0].calls) == (50, 500, 1_600)


def test_a_restart_begins_anew() -> None:
    answers = Answers()
    answers.add(50.0, answer(steps=100_000))
    answers.add(51.0, answer(epoch=8, steps=100))
    now = answers.now()
    assert now is not None
    assert now.principals[0].steps == 1


def test_a_row_that_is_new_began_with_nothing() -> None:
    answers = Answers()
    answers.add(50.0, answer(steps=10))
    answers.add(51.0, answer(steps=10, names=("alice", "bob")))
    now = answers.now()
    assert now is not None
    assert [row.steps for row in now.principals] == [0, 10]


def test_times_are_of_the_last_calls() -> None:
    answers = Answers()
    for number in range(3 * KEPT_ANSWERS):
        answers.add(float(number), answer(kernel=[0, 0, 1_000, 0, 0, 0, 0, number]))
    now = answers.now()
    assert now is not None
    assert now.principals[0].times["kernel"] == (128, 128)
    answers.add(100.0, answer(kernel=[0, 0, 1_000, 0, 0, 0, 0, 29]))
    for number in range(KEPT_ANSWERS):
        answers.add(101.0 + number, answer(kernel=[0, 0, 1_000, 0, 0, 0, 0, 29]))
    now = answers.now()
    assert now is not None
    assert now.principals[0].times["kernel"] == (4, 128)  # of no call lately, those of all


def test_quantiles_are_upper_ends_of_buckets() -> None:
    assert quantiles([]) is None
    assert quantiles([0, 0]) is None
    assert quantiles([5]) == (0, 0)
    assert quantiles([0, 98, 0, 2]) == (2, 8)
    assert quantiles([0, 99, 0, 1]) == (2, 2)


@pytest.mark.parametrize("width", [200, 80, 60, 40, 24, 12])
@pytest.mark.parametrize("names", [("alice",), (HOSTILE, "b" * 128, "\u4e2d\u6587" * 40)], ids=["plain", "hostile"])
def test_no_line_is_wider_than_the_terminal(width: int, names: tuple[str, ...]) -> None:
    answers = Answers()
    kernel = [0] * 20 + [3, 0, 0, 9]
    answers.add(50.0, answer(steps=10**9, kernel=kernel, names=names))
    answers.add(51.0, answer(steps=2 * 10**9, kernel=kernel, names=names))
    text = drawn(answers, width, trouble="no answer for 12 s: " + HOSTILE * 10)
    from rich.cells import cell_len

    assert max(map(cell_len, text.splitlines())) <= width
    assert "tok/s" in text or width < 24
    for character in ("\x1b", "\u202e"):
        assert character not in text


def test_everything_has_room_at_80_columns() -> None:
    answers = Answers()
    answers.add(50.0, answer(steps=1_000, kernel=[0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 1]))
    text = drawn(answers, 80)
    for told in ("sess", "waiting", "pages", "refused", "idle", "queue p50/99", "16us", "copies"):
        assert told in text, told
    assert "cuda:0 KV 1.0 GiB of 16.0 GiB, process 1.0 GiB, 3 calls wait" in text
    assert "refused: 12 exhausted" in text
    assert "and 5 more sessions" in text


def test_what_others_named_is_shown_as_it_is() -> None:
    answers = Answers()
    answers.add(50.0, answer(names=(HOSTILE,)))
    assert r"mallory\x1b[2J\u202e:smile:[red]" in drawn(answers, 160)


def test_a_server_in_trouble_says_so() -> None:
    answers, told = Answers(), answer()
    told.draining, told.device_failure, told.shows_everybody = True, "an ECC error", False
    answers.add(50.0, told)
    text = drawn(answers, 80, trouble="no answer for 3 s: gone")
    for line in ("it is draining", "its device has failed: an ECC error", "no answer for 3 s: gone", "your own alone"):
        assert line in text


def test_rows_that_have_no_room_are_counted() -> None:
    answers = Answers()
    answers.add(50.0, answer(names=tuple(f"tenant-{number}" for number in range(64))))
    console = Console(file=io.StringIO(), width=80)
    console.print(screen("localhost:7411", answers.now(), "", 80, 24))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert len(text.splitlines()) <= 24
    assert "more principals" in text
    assert "more sessions" in text


def test_numbers_are_short() -> None:
    assert [number_text(value) for value in (0, 0.04, 7.31, 940, 999.6, 1_234, 12_345, 5e6, 3e12)] == [
        *("0", "0.0", "7.3", "940", "1.0k", "1.2k", "12k", "5.0M", "3.0T")
    ]
    assert [us_text(value) for value in (0, 64, 4096, 2**21, 2**24)] == ["0us", "64us", "4.1ms", "2.1s", "16.8s"]
    assert [seconds_text(value) for value in (0.04, 9.96, 59, 300, 18_000, 1e6)] == [
        "0.0s",
        "10s",
        "59s",
        "5m",
        "5h",
        "12d",
    ]
    assert max(len(number_text(10.0**power * 9.994)) for power in range(-3, 15)) <= 5


def test_json_has_what_the_tables_have() -> None:
    answers = Answers()
    answers.add(50.0, answer(steps=10, kernel=[0, 1], names=(HOSTILE,)))
    now = answers.now()
    assert now is not None
    told = json.loads(json.dumps(to_json("localhost:7411", now)))
    assert (told["epoch"], told["refusals"]) == ("7", {"exhausted": 12})
    (row,) = told["principals"]
    assert (row["principal"], row["calls"], row["times_us"]) == (HOSTILE, 320, {"kernel": {"p50": 2, "p99": 2}})
    assert told["sessions"][0]["plane"] == "shm"


def test_an_interrupt_while_the_screen_is_made_brings_the_one_of_before_back() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24)

    class Interrupted:
        def __rich_console__(self, *_: object) -> Iterator[str]:
            raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        command._screen_of_before(console),
        Live(Interrupted(), console=console, screen=True, auto_refresh=False),
    ):
        raise AssertionError("it has begun")
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().endswith("\x1b[?1049l\x1b[?25h")
