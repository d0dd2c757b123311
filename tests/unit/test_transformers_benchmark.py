"""The arithmetic of `benchmarks.transformers_generate`, and that it refuses to time what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import transformers_generate as benchmark
from benchmarks.report import WrongResult


class Way(benchmark.Way):
    """One whose logits are eager's, but for an error."""

    def __init__(self, name: str, error: float) -> None:
        super().__init__(name, None, "")
        self._error = error

    def logits(self, ids: torch.Tensor, prompt_len: int) -> torch.Tensor:
        return torch.ones(2, 3, 4, dtype=torch.float64) + torch.tensor([0.0, self._error])[:, None, None]


def errors(monkeypatch: pytest.MonkeyPatch, ways: list[benchmark.Way]) -> dict[str, float]:
    monkeypatch.setattr(benchmark, "Way", lambda *_: Way("local eager", 0.0))
    return benchmark.errors_of(ways, None, torch.zeros(2, 3), 1)


def test_an_error_is_that_of_the_worst_row(monkeypatch: pytest.MonkeyPatch) -> None:
    found = errors(monkeypatch, [Way("local sdpa", 0.1), Way("attnd cuda", 0.15)])
    assert found == pytest.approx({"local sdpa": 0.1, "attnd cuda": 0.15})


@pytest.mark.parametrize("error", [0.21, float("nan")])
def test_what_is_farther_from_eager_than_sdpa_is_wrong(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    with pytest.raises(WrongResult, match=r"attnd cuda has logits .* off eager's, but must be at most 0\.2 off"):
        errors(monkeypatch, [Way("local sdpa", 0.1), Way("attnd cuda", error)])


def test_rows_are_medians_of_the_rounds_beside_those_of_sdpa() -> None:
    ways: list[Any] = [Way("local sdpa", 0.0), Way("attnd shm", 0.0)]
    ways[0].samples[8] = [(0.1, 0.02), (0.3, 0.03), (0.2, 0.025)]
    ways[1].samples[8] = [(0.5, 0.05), (0.5, 0.05), (9.0, 1.0)]
    sdpa, shm = benchmark.rows_of(ways, 8, {"local sdpa": 0.0, "attnd shm": 0.0})
    assert (sdpa["prefill_s"], sdpa["tokens_per_s"]) == (0.2, 320.0)
    assert (shm["prefill_ratio"], shm["decode_ratio"]) == (2.5, 0.5)


def test_a_tiny_model_on_a_processor(tmp_path: Path) -> None:
    small = ["--device", "cpu", "--batch", "2", "--prompt", "5", "--tokens", "3", "--rounds", "1"]
    assert benchmark.main([*small, "--planes", "shm", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "transformers-cpu.json").read_text())["rows"]
    assert [row["way"] for row in rows] == ["local sdpa", "attnd shm"]
    assert all(row["tokens_per_s"] > 0 and row["error"] < 1e-5 for row in rows)
