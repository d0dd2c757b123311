"""A process that compiles is ended when it takes too long, and the time for which it stands does not count."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import psutil
import pytest

from attnd_server.device.kernels.compile_child import Child

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="where kernels are compiled"),
    # The child does nothing that another thread's lock could keep it from.
    pytest.mark.filterwarnings("ignore:.*is multi-threaded:DeprecationWarning"),
]
Start = Callable[..., Child]


def sleeping(seconds: float, code: int = 0) -> Callable[[int, str], NoReturn]:
    """Prints, leaves a file, and ends after a while."""

    def run(log: int, folder: str) -> NoReturn:
        os.setpgid(0, 0)
        os.write(log, b"words")
        open(os.path.join(folder, "left"), "w").close()
        time.sleep(seconds)
        os._exit(code)

    return run


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts processes, which are ended with the test, and leave nothing."""
    started: list[Child] = []

    def start_one(run: Callable[[int, str], NoReturn], timeout_s: float = 60.0) -> Child:
        started.append(Child(len(started), False, str(tmp_path), timeout_s, run))
        return started[-1]

    yield start_one
    for each in started:
        if is_there(each):
            each.kill()
            each.ended()
    assert not list(tmp_path.iterdir())


def is_there(child: Child) -> bool:
    return psutil.pid_exists(child._process)


def state(child: Child) -> str:
    return psutil.Process(child._process).status()


def ended(child: Child) -> str:
    """When it has, by itself or because it is late."""
    end = time.monotonic() + 20
    while not select.select([child.descriptor], [], [], 0.05)[0]:
        assert time.monotonic() < end
        child.end_if_late()
    return child.ended()


@pytest.mark.parametrize(("code", "said"), [(0, ""), (3, "words")])
def test_it_says_how_it_ended(start: Start, code: int, said: str) -> None:
    assert ended(start(sleeping(0, code))) == said


def test_it_ends_when_it_takes_too_long(start: Start) -> None:
    child = start(sleeping(600), timeout_s=0.2)
    assert 0 < (child.left_s() or -1) <= 0.2
    assert ended(child) == "its process took longer than 0.2 s; words"
    assert child.left_s() is None


def test_the_time_for_which_it_stands_does_not_count(start: Start) -> None:
    child = start(sleeping(600), timeout_s=1.0)
    for _ in range(2):
        child.stand()
        child.stand()
        assert child.left_s() is None
        time.sleep(1.1)
        child.end_if_late()
        assert state(child) == psutil.STATUS_STOPPED
        child.go_on()
        left_s = child.left_s()
        child.go_on()
        assert 0 < (left_s or -1) <= 1.0
        assert state(child) != psutil.STATUS_STOPPED
    assert ended(child).startswith("its process took longer than 1 s")


def test_what_stands_can_be_ended(start: Start) -> None:
    child = start(sleeping(600))
    child.stand()
    child.kill()
    assert ended(child).startswith("its process was ended by signal 9")


def test_what_has_ended_does_not_stand(start: Start) -> None:
    child = start(sleeping(0))
    assert select.select([child.descriptor], [], [], 20)[0]
    child.stand()
    assert child.ended() == ""
