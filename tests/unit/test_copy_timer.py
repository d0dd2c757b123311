"""How the copies of a call are told from its kernels, with a device whose clock the test sets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from attnd_server.copy_timer import Copies, CopyTimer

DEVICE = torch.device("cuda", 0)


class Event:
    """Comes to each mark 100 microseconds after the one before, and answers after the call's synchronisation alone."""

    num_recorded = 0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        assert stream == "stream"
        Event.num_recorded += 1
        self.ms = 0.1 * Event.num_recorded

    def elapsed_time(self, other: Event) -> float:
        return other.ms - self.ms


@pytest.fixture(autouse=True)
def host_ms(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """What the host's clock shows each time when it is read."""
    times: list[float] = []
    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: "stream")
    monkeypatch.setattr("attnd_server.copy_timer.time.perf_counter", lambda: times.pop(0) / 1e3)
    yield times
    assert times == []


def test_staged_copies_are_the_hosts_and_the_devices_own(host_ms: list[float]) -> None:
    host_ms += [5.0, 5.25, 6, 7, 8]  # 250 us to fill the buffer
    timer = CopyTimer(DEVICE)
    for _ in range(4):
        timer.mark()
    assert timer.staged() == Copies(350, 100)


def test_blocking_copies_are_what_the_kernels_leave_of_the_hosts_time(host_ms: list[float]) -> None:
    host_ms += [5.0, 5.4, 5.5, 6.0]
    timer = CopyTimer(DEVICE)
    timer.mark()
    timer.mark()
    assert timer.blocking() == Copies(400, 500)


def test_clocks_that_differ_give_no_negative_time(host_ms: list[float]) -> None:
    host_ms += [5.0, 5.4, 5.41, 5.42]
    timer = CopyTimer(DEVICE)
    timer.mark()
    timer.mark()
    assert timer.blocking() == Copies(400, 0)


def test_a_call_without_results_asks_the_device_nothing(host_ms: list[float]) -> None:
    host_ms += [5.0, 5.4]
    timer = CopyTimer(DEVICE)
    timer.mark()
    assert timer.blocking_in() == Copies(400, 0)
