"""`attnd serve --verify`: calls of a real server are looked at again, whatever plane they came on."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

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


def test_what_a_client_does_to_its_numbers_is_no_wrong_output(tmp_path: Path) -> None:
    """Products beyond float32 of both signs, and tensors in shared memory that change while the server reads them."""
    options = ("--device", "cpu", "--metrics", "0", "--socket-dir", str(tmp_path), "--verify", "1")
    with Measured(tmp_path / "log", *options) as server, attnd.connect(server.address) as client:
        geometry = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 16, "num_pages": 8, "page_size": 4}
        tensors = torch.randn(256, 4, 16), torch.randn(256, 2, 16), torch.randn(256, 2, 16)
        with client.create_cache(**geometry, dtype="float32") as cache:
            with cache.session(plane="inline") as session:
                k = torch.full((3, 2, 16), 1e20)
                k[..., 1::2] *= -1
                step = session.step(attnd.StepMetadata([3], [0], [[0]], [0, 1, 2]))
                step.attend(0, torch.full((3, 4, 16), 1e20), k, torch.ones(3, 2, 16), NAIVE)
            assert counted(server, 1)["mismatches_total"] == 0
            assert server.scrape().value("attnd_verify_beyond_float32_total") == 12
            with cache.session(plane="shm") as session:
                step = session.step(attnd.StepMetadata([256], [0], [[0]], [-1] * 256))
                step.attend(0, *tensors)
                stream: Any = session._stream
                memory, over = torch.frombuffer(stream._region._bytes, dtype=torch.float32), threading.Event()

                def change() -> None:
                    while not over.is_set():
                        memory[: 1 << 16].normal_()

                changing = threading.Thread(target=change)
                changing.start()
                for _ in range(100):
                    step.attend(0, *tensors)
                over.set()
                changing.join()
            deadline = time.monotonic() + 60
            while (scrape := server.scrape()).value("attnd_verify_error_ratio_count") + scrape.value(
                "attnd_verify_dropped_total"
            ) < 102:
                assert time.monotonic() < deadline, scrape.text
            assert scrape.value("attnd_verify_error_ratio_count") > 10
            assert scrape.value("attnd_verify_mismatches_total") == 0
        assert "wrong output" not in server.log


@pytest.mark.parametrize("fraction", ["-0.1", "1.5", "often"])
def test_a_fraction_is_one(fraction: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"verify|must be a number 0\.\.1"):
        Measured(tmp_path / "log", "--verify", fraction)
