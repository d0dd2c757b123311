"""What one principal may take of a server."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from attnd.errors import Exhausted
from attnd_server.config import PrincipalLimits, ServerConfig
from attnd_server.identity.quota import Quota

WHOLE = PrincipalLimits(kv_bytes=1001, caches=256, sessions=256, queue_depth=1024, step_bytes=256 << 20)
HALF = PrincipalLimits(kv_bytes=501, caches=128, sessions=128, queue_depth=512, step_bytes=128 << 20)


def shares(limit: int, share: int) -> Quota:
    return Quota("sessions", "are open", limit, share, "close one")


def test_where_everybody_is_one_principal_it_may_take_everything() -> None:
    assert ServerConfig().principal_limits(1001) == WHOLE


@pytest.mark.parametrize("asking", [{"tokens": "file"}, {"tls_client_ca": "file"}])
def test_where_the_server_asks_who_calls_one_may_take_half(asking: dict[str, str]) -> None:
    assert ServerConfig(**asking).principal_limits(1001) == HALF  # type: ignore[arg-type]
    assert ServerConfig(**asking, max_caches=1).principal_limits(1).caches == 1  # type: ignore[arg-type]


def test_what_is_said_counts_but_for_what_the_server_has_not() -> None:
    config = ServerConfig(tokens="file", principal_kv_bytes=7, principal_caches=300, principal_sessions=200)
    assert config.principal_limits(1001) == replace(HALF, kv_bytes=7, caches=256, sessions=200)
    assert ServerConfig(principal_queue_depth=3).principal_limits(1001) == replace(WHOLE, queue_depth=3)


def test_one_principal_leaves_something_to_another() -> None:
    held = shares(limit=5, share=3)
    for _ in range(3):
        held.take("alice")
    told = "3 sessions of this principal are open, but a principal's limit is 3; 0 are free: close one"
    with pytest.raises(Exhausted) as refused:
        held.take("alice")
    assert str(refused.value) == told
    held.take("bob")
    held.take("bob")
    with pytest.raises(Exhausted, match=r"^5 sessions are open, but the server's limit is 5; 0 are free: close one$"):
        held.take("bob")
    held.give_back("alice")
    held.take("bob")
    assert held.count == 5


def test_what_was_given_back_is_forgotten() -> None:
    held = shares(limit=2, share=1)
    for number in range(100):
        with held.held(f"principal {number}"):
            assert held.count == 1
    assert held.count == 0
    assert not held._held


def test_an_error_gives_back() -> None:
    held = shares(limit=1, share=1)
    with pytest.raises(ZeroDivisionError), held.held("alice"):
        raise ZeroDivisionError
    held.take("alice")


def test_threads_take_no_more_than_there_is() -> None:
    held, taken = shares(limit=50, share=30), []

    def take(principal: str) -> None:
        for _ in range(200):
            try:
                held.take(principal)
            except Exhausted:
                continue
            taken.append(principal)

    threads = [threading.Thread(target=take, args=(name,)) for name in ("alice", "alice", "bob", "bob")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held.count == len(taken) == 50
    assert max(taken.count("alice"), taken.count("bob")) <= 30
