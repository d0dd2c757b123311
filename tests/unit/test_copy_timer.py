"""How the copies of a call are told from its kernels, with a device whose clock the test sets."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from attnd_server.device.copy_timer import Copies, CopyTimer, timed_behind

DEVICE = torch.device("cuda", 0)


class Event:
    """Comes to each mark 100 microseconds after the one before, and answers after the call's synchronisation alone."""

    num_recorded = 0
    waits: ClassVar[list[float]] = []

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        assert stream == "stream"
        Event.num_recorded += 1
        self.ms = 0.1 * Event.num_recorded

    def synchronize(self) -> None:
        Event.waits.append(self.ms)

    def elapsed_time(self, other: Event) -> float:
        return other.ms - self.ms


@pytest.fixture(autouse=True)
def host_ms(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """What the host's clock shows each time when it is read."""
    times: list[float] = []
    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: "stream")
    clock = SimpleNamespace(perf_counter=lambda: times.pop(0) / 1e3)
    monkeypatch.setattr("attnd_server.device.copy_timer.time", clock)
    yield times
    assert times == []


def test_staged_copies_are_the_hosts_and_the_devices_own(host_ms: list[float]) -> None:
    host_ms += [5.0, 5.25, 6, 7, 8]  # 250 us to fill the buffer
    timer = CopyTimer(DEVICE)
    for _ in range(4):
        timer.mark()
    assert timer.staged() == Copies(350, 100)


def marked(num_marks: int) -> CopyTimer:
    timer = CopyTimer(DEVICE)
    for _ in range(num_marks):
        timer.mark()
    return timer


def test_copies_that_the_host_waits_for_take_its_time(host_ms: list[float]) -> None:
    host_ms += [5.0, 5.0, 5.4, 5.5, 6.0]
    assert marked(3).waited() == Copies(400, 500)


def test_copies_that_the_host_only_starts_take_the_devices_time(host_ms: list[float]) -> None:
    host_ms += [5.0, 5.0, 5.01, 5.02, 5.5]  # 10 us to start what takes the device 100
    assert marked(3).waited() == Copies(100, 300)


def test_clocks_that_differ_give_no_negative_time(host_ms: list[float]) -> None:
    host_ms += [5.0, 5.0, 5.4, 5.41, 5.42]
    assert marked(3).waited() == Copies(400, 0)


@pytest.mark.parametrize(("host_us", "in_us"), [(400, 400), (10, 100)])
def test_a_call_without_results_waits_for_its_copies_alone(host_ms: list[float], host_us: int, in_us: int) -> None:
    host_ms += [5.0, 5.0, 5.0 + host_us / 1e3]
    timer = marked(2)
    Event.waits.clear()
    copied_at_ms = 0.1 * Event.num_recorded
    assert timer.copied() == Copies(in_us, 0)
    assert Event.waits == [copied_at_ms]


def test_copies_of_a_captured_launch_come_behind_launches_that_keep_the_device_busy() -> None:
    done: list[str] = []
    fetch, send = (lambda: done.append("fetch")), (lambda: done.append("send"))
    assert timed_behind(lambda: done.append("launch"), fetch, send, DEVICE) == Copies(100, 100)
    assert done == ["launch"] * (len(done) - 2) + ["fetch", "send"]
    assert len(done) > 4
