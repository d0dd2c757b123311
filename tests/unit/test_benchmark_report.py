from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from attnd_server.attention.backends.sdpa import SdpaAttention
from benchmarks import attending_echo, echo, report
from benchmarks.before_and_after import median_interval
from benchmarks.doorbell_echo import DoorbellEcho
from benchmarks.workload import DecodeStep

ROWS = [
    {"tokens": 1, "way": "stream", "p50_us": 1234.5, "ratio": 1.25, "floor": ["echo stream", "backend"]},
    {"tokens": 1, "way": "backend", "p50_us": 98.76, "ratio": None, "floor": []},
    {"tokens": 16, "way": "stream", "p50_us": 9876.0, "ratio": 1.0, "floor": ["echo stream", "backend"]},
]


def test_a_table_has_the_chosen_columns() -> None:
    table = report.table("decode", "in us", ROWS, {"tokens": "tokens", "way": "way", "p50_us": "p50", "ratio": "ratio"})
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    lines = [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert ["tokens", "way", "p50", "ratio"] in lines
    assert ["1", "stream", "1234", "1.25"] in lines
    assert ["1", "backend", "98.8"] in lines
    assert ["16", "stream", "9876", "1.00"] in lines


def test_json_says_where_and_how_it_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    report.write_json(path, "service", {"context": 256}, ROWS)
    result = json.loads(path.read_text())
    assert result["benchmark"] == "service"
    assert result["parameters"] == {"context": 256}
    assert result["rows"] == ROWS
    assert result["command"].startswith("python ")
    assert result["hardware"]["cores"] >= 1
    # A package's metadata may leave out the build, such as +cu130.
    assert result["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert {"git_commit", "finished"} <= result.keys()


def test_a_plot_is_written(tmp_path: Path) -> None:
    bars = [report.Bar("stream", 9.0, {"echo": 3.0, "backend": 4.0}), report.Bar("inproc", 5.0, {"backend": 4.0})]
    report.plot(tmp_path / "result.png", "decode", "us", {"1 token": bars, "16 tokens": bars})
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("dtype", report.TOLERANCES, ids=str)
def test_rounding_passes(dtype: torch.dtype) -> None:
    expected = torch.randn(3, 4, 64, dtype=torch.float64)
    report.refuse_wrong("way", expected.to(dtype), expected)


@pytest.mark.parametrize("dtype", report.TOLERANCES, ids=str)
def test_one_token_of_a_thousand_left_out_is_refused(dtype: torch.dtype) -> None:
    values = torch.randn(1000, 4, 64, dtype=torch.float64)
    with pytest.raises(report.WrongResult, match="way has a relative error of"):
        report.refuse_wrong("way", values[:-1].mean(0)[None].to(dtype), values.mean(0)[None])


def test_nan_and_other_shapes_are_refused() -> None:
    expected = torch.ones(2, 1, 8, dtype=torch.float64)
    with pytest.raises(report.WrongResult, match="nan"):
        report.refuse_wrong("way", torch.full((2, 1, 8), torch.nan), expected)
    with pytest.raises(report.WrongResult, match=r"way has shape \[1, 1, 8\], but must have \[2, 1, 8\]"):
        report.refuse_wrong("way", torch.ones(1, 1, 8), expected)


class _Forgetful:
    """A cache that stores nothing."""

    def store_kv(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        pass

    def read_kv(self, layer: int, slots: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(like), torch.zeros_like(like)


def test_a_way_that_stores_nothing_is_refused() -> None:
    step = DecodeStep(2, 20, torch.float32, kv_bytes=1)  # one layer
    with pytest.raises(report.WrongResult, match="stored k of layer 0"):
        step.check("way", _Forgetful(), lambda layer: step.expected[layer].float())


def test_an_echo_returns_the_part_that_was_asked_for() -> None:
    assert len(echo.message(1000, 300)) == 1000
    assert len(echo.reply(echo.message(1000, 300))) == 300
    with pytest.raises(ValueError, match="num_reply_bytes is 1001"):
        echo.message(1000, 1001)


def test_the_doorbell_echo_returns_what_was_asked_for() -> None:
    with DoorbellEcho() as doorbell:
        for num_bytes in (3, 70_000):
            arrays = [memoryview(bytes(range(250))), memoryview(b"x" * 100_000)]
            assert doorbell.call(arrays, num_bytes) == b"".join(arrays)[:num_bytes]


def test_echoes_that_attend_return_the_same_and_are_not_the_bare_ones() -> None:
    step = DecodeStep(2, 20, torch.float32, kv_bytes=1)
    arrays = [memoryview(bytes(range(250)))]
    with attending_echo.doorbell(step, 1) as doorbell, attending_echo.stream_echo(step, 1) as stream:
        for _ in range(3):
            assert doorbell.call(arrays, 100) == bytes(range(100))
            assert stream.call(echo.message(300, 100)) == echo.message(300, 100)[:100]
        assert stream.call(echo.message(300, 8)) == echo.message(300, 8)[:8]


def test_echoes_that_attend_compute_a_layer_for_each_call_and_refuse_a_wrong_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = attending_echo.decoded(attending_echo.encoded(DecodeStep(2, 20, torch.float32, kv_bytes=1 << 20)))
    assert len(step.layers) > 1
    computed: list[int] = []
    run = SdpaAttention.run

    def counted(self: SdpaAttention, *arguments: Any) -> Any:
        computed.append(1)
        return run(self, *arguments)

    monkeypatch.setattr(SdpaAttention, "run", counted)
    attend = attending_echo.attending(step)
    num_checks = len(computed)
    assert num_checks == len(step.layers)
    for _ in range(5):
        attend()
    assert len(computed) == num_checks + 5
    monkeypatch.setattr(SdpaAttention, "run", lambda self, plan, q, *rest: (torch.zeros_like(q), None))
    with pytest.raises(report.WrongResult, match="backend behind an echo, layer 0"):
        attending_echo.attending(step)


def test_the_interval_of_a_median_follows_from_the_order_of_few_values() -> None:
    # The chance that the median of a distribution lies beyond the second of ten values on either side is 2.15 %.
    assert median_interval([9, 1, 3, 2, 5, 4, 7, 6, 8, 10]) == (2, 9)
    assert median_interval(range(6)) == (0, 5)
    with pytest.raises(ValueError, match="there are 5 values, but there must be at least 6"):
        median_interval(range(5))
