"""`attnd serve --verify`: calls of a real server are looked at again, whatever plane they came on."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

import attnd
from tests.e2e.test_metrics import DECODE, GEOMETRY, PREFILL, K, Measured, Q, V
from tests.faulty_server import WRONG

NAIVE = attnd.AttentionOptions(backend="naive")
WITHHELD = attnd.AttentionOptions(backend="naive", scale=WRONG)


class Wrong(Measured):
    module = "tests.faulty_server"


def counted(server: Measured, samples: int) -> dict[str, float]:
    """Mismatches and the like, once so many samples were verified."""
    deadline = time.monotonic() + 20
    while (scrape := server.scrape()).value("attnd_verify_error_ratio_count") < samples:
        assert time.monotonic() < deadline, scrape.text
        time.sleep(0.02)
    assert scrape.value("attnd_verify_error_ratio_count") == samples
    names = ("mismatches_total", "not_finite_total", "dropped_total")
    return {name: scrape.value(f"attnd_verify_{name}") for name in names}


def test_right_and_wrong_calls_of_every_plane_are_told_apart(tmp_path: Path) -> None:
    options = ("--device", "cpu", "--metrics", "0", "--kv-bytes", "1MiB", "--socket-dir", str(tmp_path))
    with Wrong(tmp_path / "log", *options, "--verify", "1") as server, attnd.connect(server.address) as client:
        with client.create_cache(**GEOMETRY) as cache:
            for plane in ("inline", "shm"):
                with cache.session(plane=plane) as session:
                    session.step(PREFILL).attend(0, Q, K, V)
                    session.step(DECODE).attend(0, Q[:1], K[:1], V[:1], NAIVE)
            client.prefill(cache, PREFILL, 1, Q, K, V)
            assert counted(server, 5) == {"mismatches_total": 0, "not_finite_total": 0, "dropped_total": 0}
            with cache.session() as session:
                answered = session.step(DECODE).attend(0, Q[:1], K[:1], V[:1], WITHHELD)
                assert torch.isfinite(answered).all()
            assert counted(server, 6)["mismatches_total"] == 1
        assert server.log.count("wrong output") == 1


def test_a_wrong_output_is_withheld(tmp_path: Path) -> None:
    options = ("--device", "cpu", "--metrics", "0", "--kv-bytes", "1MiB", "--verify", "1", "--verify-action", "refuse")
    with Wrong(tmp_path / "log", *options) as server, attnd.connect(server.address) as client:
        with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
            with pytest.raises(attnd.ServerFault, match="output of layer 1 by backend naive was withheld"):
                session.step(DECODE).attend(1, Q[:1], K[:1], V[:1], WITHHELD)
            session.step(DECODE).attend(1, Q[:1], K[:1], V[:1], NAIVE)
            assert counted(server, 2)["mismatches_total"] == 1


@pytest.mark.parametrize("fraction", ["-0.1", "1.5", "often"])
def test_a_fraction_is_one(fraction: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"verify|must be a number 0\.\.1"):
        Measured(tmp_path / "log", "--verify", fraction)
