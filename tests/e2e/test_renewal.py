"""Leases of idle caches are renewed in the background."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

import attnd
from attnd.errors import AttndError, CacheLost, Disconnected
from attnd.renewal import Renewal
from tests.servers import wait_for


class Leased:
    """What stands for a cache: notes when it is renewed."""

    def __init__(self, ttl_s: float, *errors: AttndError) -> None:
        self.ttl_s = ttl_s
        self.ref = object()
        self.renewals = 0
        self._errors = list(errors)
        self._renewed = threading.Condition()

    def renew(self) -> None:
        with self._renewed:
            self.renewals += 1
            self._renewed.notify_all()
        if self._errors:
            raise self._errors.pop(0)

    def wait_for(self, renewals: int) -> None:
        with self._renewed:
            assert self._renewed.wait_for(lambda: self.renewals >= renewals, 30)


@pytest.fixture
def renewal() -> Iterator[Renewal]:
    running = Renewal()
    yield running
    running.close()


def test_an_idle_cache_is_renewed_again_and_again(renewal: Renewal) -> None:
    cache = Leased(0.06)
    renewal.add(cache)  # type: ignore[arg-type]
    cache.wait_for(3)


def test_caches_that_come_do_not_put_off_the_others(renewal: Renewal) -> None:
    first = Leased(0.3)
    renewal.add(first)  # type: ignore[arg-type]
    deadline = time.monotonic() + 30
    while not first.renewals:  # each comes before the first is due
        renewal.add(Leased(3600.0))  # type: ignore[arg-type]
        time.sleep(0.01)
        assert time.monotonic() < deadline


def test_who_is_away_is_tried_again_and_what_is_gone_is_not(renewal: Renewal) -> None:
    away, gone = Leased(0.06, Disconnected("away"), Disconnected("away")), Leased(0.06, CacheLost("gone"))
    for cache in (away, gone):
        renewal.add(cache)  # type: ignore[arg-type]
    away.wait_for(4)
    assert gone.renewals == 1


def test_removed_and_closed_it_renews_nothing(renewal: Renewal) -> None:
    removed, kept = Leased(0.03), Leased(0.03)
    for cache in (removed, kept):
        renewal.add(cache)  # type: ignore[arg-type]
    removed.wait_for(1)
    renewal.remove(removed)  # type: ignore[arg-type]
    count = removed.renewals
    kept.wait_for(kept.renewals + 3)
    assert removed.renewals <= count + 1  # one may have been under way
    renewal.close()
    count = kept.renewals
    time.sleep(0.1)
    assert kept.renewals == count


def test_closing_waits_for_a_renewal_that_is_under_way_whatever_has_ended_before(renewal: Renewal) -> None:
    class Slow(Leased):
        """Its renewal takes until it may go on."""

        go_on, is_done = threading.Event(), False

        def renew(self) -> None:
            super().renew()
            assert self.go_on.wait(30)
            self.is_done = True

    first, slow = Leased(3600.0), Slow(0.03)
    renewal.add(first)  # type: ignore[arg-type]
    wait_for(lambda: renewal._runner is not None, "no thread begins")
    renewal.remove(first)  # type: ignore[arg-type]
    wait_for(lambda: renewal._runner is None, "a thread without a lease does not end")
    renewal.add(slow)  # type: ignore[arg-type]
    slow.wait_for(1)
    threading.Timer(0.2, slow.go_on.set).start()
    renewal.close()
    assert slow.is_done


GEOMETRY = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "num_pages": 1, "dtype": "float32", "ttl_s": 1.5}


def lease_left_s(client: attnd.Client, name: str) -> list[float]:
    return [info.expires_in_s for info in client.list_caches() if info.name == name]


def outlives(client: attnd.Client, name: str) -> Callable[[], bool]:
    """Whether the cache is still there, once its time to live is long over."""
    deadline = time.monotonic() + 4

    def is_there() -> bool:
        while (left := lease_left_s(client, name)) and time.monotonic() < deadline:
            assert 0 <= left[0] <= 1.5
            time.sleep(0.05)
        return bool(left)

    return is_there


def test_a_process_that_does_nothing_keeps_its_cache_unless_it_wants_to_lose_it(client: attnd.Client) -> None:
    client.create_cache(**GEOMETRY, name="renewed")
    client.create_cache(**GEOMETRY, name="left alone", renew=False)
    assert not outlives(client, "left alone")()
    assert outlives(client, "renewed")()
