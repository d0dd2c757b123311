"""The arithmetic of `benchmarks.planes`, and that it refuses to time what is wrong."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import attnd
from benchmarks import callers, light_caller, many_echoes, plane_options, plane_results, planes, way_timing
from benchmarks.callers import ONE_LARGE, Group
from benchmarks.light_caller import LightStep, Sizes
from benchmarks.queued_ways import queued_way
from benchmarks.report import WrongResult
from benchmarks.servers import started
from benchmarks.way import Way
from benchmarks.way_timing import Samples, refuse_other_bits, rows
from benchmarks.workload import LLAMA_8B, MODELS, NUM_CALLS, DecodeStep

CACHE = object()  # a way that computes has one


def way(name: str, *floor: str) -> Way:
    return Way(name, lambda: lambda layer: layer, floor, None if name.startswith("echo") else CACHE)


WAYS = [way("backend"), way("inproc", "backend"), way("echo shm"), way("shm", "echo shm", "backend")]
CALL_US = {"backend": 100.0, "inproc": 150.0, "echo shm": 20.0, "shm": 180.0}


def row_by_way(ways: list[Way], call_us: dict[str, float]) -> dict[str, dict[str, object]]:
    samples = {name: Samples([us] * 99 + [us * 10], [us * NUM_CALLS + 64] * 3) for name, us in call_us.items()}
    return {row["way"]: row for row in rows(ways, samples)}


def test_a_plane_is_compared_with_its_floor_and_with_both_in_process() -> None:
    shm = row_by_way(WAYS, CALL_US)["shm"]
    assert (shm["p50_us"], shm["floor_us"], shm["ratio"]) == (180, 120, 1.5)
    assert shm["p99_us"] == pytest.approx(1800, rel=0.02)
    assert shm["step_us"] == 180 * 32 + 64
    assert shm["step_to_inproc"] == pytest.approx((180 * 32 + 64) / (150 * 32 + 64))
    assert shm["step_to_backend"] == pytest.approx((180 * 32 + 64) / (100 * 32 + 64))
    assert shm["over_us"] == pytest.approx(80)


def test_a_plane_is_compared_with_the_echo_that_attends_where_that_was_timed() -> None:
    limited = [*WAYS[:-1], replace(WAYS[-1], limit="echo shm + backend")]
    assert row_by_way(limited, CALL_US)["shm"]["limit_ratio"] is None
    timed = row_by_way([*limited, way("echo shm + backend")], {**CALL_US, "echo shm + backend": 150.0})
    assert timed["shm"]["limit_ratio"] == 1.2
    assert timed["backend"]["limit_ratio"] is None


def test_an_echo_is_compared_with_nothing() -> None:
    echo = row_by_way(WAYS, CALL_US)["echo shm"]
    assert [echo[key] for key in ("floor_us", "ratio", "step_to_inproc", "step_to_backend", "over_us")] == [None] * 5


def test_a_step_is_compared_with_the_backends_that_waits_once() -> None:
    shm = row_by_way([way("backend queued"), *WAYS], {**CALL_US, "backend queued": 60.0})["shm"]
    assert shm["over_us"] == pytest.approx(120)
    assert shm["ratio"] == 1.5  # a call is still compared with calls


def test_calls_of_a_step_go_over_all_layers_equally_often() -> None:
    layers: list[int] = []
    samples = Samples()
    samples.add_step(Way("way", lambda: layers.append), num_layers=4)
    assert layers == [0, 1, 2, 3] * 8
    assert len(samples.call_us) == NUM_CALLS
    assert samples.step_us[0] >= sum(samples.call_us)


def test_a_call_that_does_not_wait_is_a_share_of_its_step() -> None:
    waits: list[str] = []
    samples = Samples()
    samples.add_step(Way("way", lambda: lambda layer: layer, finish=lambda: waits.append("once")), num_layers=1)
    assert waits == ["once"]
    assert samples.call_us == [samples.step_us[0] / NUM_CALLS]


class QueuedSession:
    """A session on a plane whose steps cover each layer once, in order."""

    cache = CACHE

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.num_steps = self.num_finished = 0

    def step(self, metadata: object) -> QueuedSession:
        assert self.num_steps == 0 or self.next_layer == self.num_layers, "the step before is not complete"
        self.num_steps += 1
        self.next_layer = 0
        return self

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        assert layer == self.next_layer
        self.next_layer += 1
        return q

    def finish(self) -> None:
        assert self.next_layer == self.num_layers
        self.num_finished += 1


def test_a_queued_step_covers_each_layer_once_and_the_last_is_waited_for() -> None:
    step = DecodeStep(1, 16, torch.float32, kv_bytes=5 << 20)
    assert len(step.layers) == 16
    session = QueuedSession(16)
    queued = queued_way("cuda", step, session, torch.device("cpu"))
    samples = Samples()
    for _ in range(3):
        samples.add_step(queued, num_layers=16)
    assert (session.num_steps, session.num_finished) == (6, 3)
    assert len(samples.call_us) == 3
    assert torch.equal(queued.open()(0), step.layers[0][0])


def test_ways_take_turns_until_the_time_is_up() -> None:
    done: list[float] = []
    samples = way_timing.time_ways(WAYS, 1, 1e-9, done.append)
    assert {name: len(each.step_us) for name, each in samples.items()} == dict.fromkeys(CALL_US, 3)
    assert done[-1] == 1.0


def test_other_bits_than_inprocs_are_refused() -> None:
    output = torch.ones(2, 3)
    other = output.clone()
    other[0, 1] = 1 + 2**-20
    refuse_other_bits({"inproc": {0: output}, "shm": {0: output.clone()}}, {"inproc", "shm"})
    with pytest.raises(WrongResult, match=r"shm, layer 7: 1 of 6 numbers have other bits than inproc's"):
        refuse_other_bits({"inproc": {7: output}, "shm": {7: other}}, {"inproc", "shm"})


@pytest.mark.parametrize(("num_reqs", "kv_bytes", "num_layers"), [(1, 512 << 20, 32), (1, 7 << 20, 4), (64, 1, 1)])
def test_a_cache_has_as_many_layers_as_fit_and_divide_a_step(num_reqs: int, kv_bytes: int, num_layers: int) -> None:
    step = DecodeStep(num_reqs, 128, torch.float32, kv_bytes=kv_bytes)  # 9 pages of 128 KiB for each request
    assert step.geometry["num_layers"] == num_layers


@pytest.mark.parametrize("heads", MODELS, ids=lambda heads: heads.name)
def test_shapes_are_the_models(heads: object) -> None:
    step = DecodeStep(2, 16, torch.float32, heads, kv_bytes=1)  # type: ignore[arg-type]
    assert [tuple(tensor.shape) for tensor in step.layers[0]] == [
        (2, step.heads.num_heads, 128),
        (2, step.heads.num_kv_heads, 128),
        (2, step.heads.num_kv_heads, 128),
    ]
    assert step.expected[0].shape == (2, step.heads.num_heads, 128)


def test_callers_are_compared_with_one_large_batch() -> None:
    rates = {Group(1, 4): [10.0, 30.0, 20.0], Group(16, 4): [90.0, 80.0, 70.0], ONE_LARGE: [100.0, 90.0, 110.0]}
    result = callers.rows("shm", rates)
    assert [(row["callers"], row["tokens_per_s"], row["ratio"]) for row in result] == [
        ("1 x batch 4", 20.0, 0.2),
        ("16 x batch 4", 80.0, 0.8),
        ("1 x batch 64", 100.0, 1.0),
    ]
    assert (result[1]["least_tokens_per_s"], result[1]["most_tokens_per_s"]) == (70.0, 90.0)


def test_only_picks_cells_and_callers() -> None:
    arguments = ["--device", "cpu", "--tokens", "1", "16", "--context", "256", "1024"]
    options = plane_options.parse([*arguments, "--only", "16 x 1k"])
    assert [str(cell) for cell in options.cells] == ["8B 16 x 1k", "70B 16 x 1k", "30B-A3B 16 x 1k"]
    assert options.caller_planes == []
    options = plane_options.parse([*arguments, "--only", "callers shm"])
    assert (options.cells, options.caller_planes) == ([], ["shm"])
    options = plane_options.parse([*arguments, "--quick"])
    assert {cell.heads for cell in options.cells} == {LLAMA_8B}
    assert options.caller_planes == ["inline", "shm", "cuda"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "900B"], "is '900B', but must be a part of one of"),
        (["--device", "cuda:99"], "is cuda:99, but torch finds"),
        (["--device", "tpu"], "is 'tpu', but must be cpu, cuda or cuda:N"),
        (["--tokens", "0"], "is '0', but must be a whole number from 1"),
        (["--seconds", "0"], "is 0, but must be positive"),
        (["--device", "cpu", "--server-device", "cuda:99"], "is cuda:99, but"),
    ],
)
def test_arguments_that_make_no_sense(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plane_options.parse(arguments)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (WrongResult("shm is off"), 1, "8B 1 x 1k was not timed: wrong result: shm is off"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_was_measured_is_written_whatever_ends_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    measured = [{"cell": "8B 1 x 256", **row} for row in row_by_way(WAYS, CALL_US).values()]

    def measure(options: object, results: plane_results.Results, err: Console) -> None:
        results.rows += measured
        results.reasons["cuda"] = "there is no GPU"
        with results.noting("8B 1 x 1k"):
            raise error

    monkeypatch.setattr(planes, "measure", measure)
    out, err = (Console(file=io.StringIO(), width=140) for _ in range(2))
    assert planes.run(plane_options.parse(["--device", "cpu", "--out", str(tmp_path)]), out, err) == code
    printed = out.file.getvalue()  # type: ignore[attr-defined]
    assert "cuda cannot be had: there is no GPU" in printed
    assert words in printed
    written = json.loads((tmp_path / "planes-cpu.json").read_text())
    assert [row["way"] for row in written["rows"]] == list(CALL_US)
    assert written["parameters"]["planes_that_cannot_be_had"] == {"cuda": "there is no GPU"}
    assert (tmp_path / "planes-cpu.png").exists()


def test_a_child_that_says_nothing_is_named_with_its_last_words() -> None:
    with started("benchmarks.caller", "nowhere") as child:
        with pytest.raises(RuntimeError, match=r"did not say \^ready:\n(.*\n)*.*the following arguments are required"):
            child.read(rb"^ready", 60)


def test_a_light_caller_compares_with_float64() -> None:
    step = LightStep(Sizes(3, 21, 4, 2, 16, np.dtype(np.float32), 2))
    with (
        attnd.connect("inproc://") as client,
        client.create_cache(**step.geometry) as cache,
        cache.session() as session,
    ):
        step.fill(cache)
        step.check(session)
        cache.store_kv(
            1, [int(step.tables[2, 0]) * 16], np.ones((1, 2, 16), np.float32), np.ones((1, 2, 16), np.float32)
        )
        with pytest.raises(ValueError, match="request 2, layer 1: the relative error is"):
            step.check(session)


def test_callers_need_torch_on_the_cuda_plane_alone() -> None:
    gpu, cpu = torch.device("cuda:0"), torch.device("cpu")
    assert callers.command("a:1", "cuda", gpu, 4, 2048, 1)[0] == "benchmarks.caller"
    for plane, device in (("shm", gpu), ("inline", gpu), ("shm", cpu)):
        module, *arguments = callers.command("a:1", plane, device, 4, 2048, 1)
        assert module == "benchmarks.light_caller"
        assert ("--warm-up" in arguments) == (device is gpu)
        sizes = light_caller.sizes_of(light_caller.parse(arguments))
        assert (sizes.num_reqs, sizes.context_len, sizes.num_heads) == (4, 2048, 32)
        assert sizes.num_layers == (4 if device is gpu else 1)


def test_bare_callers_of_one_process_are_attended_for() -> None:
    with many_echoes.callers(DecodeStep(2, 20, torch.float32, kv_bytes=1), 3, 1) as callers_of_it:
        for child in callers_of_it:
            child.write("0.01")
        answers = [json.loads(child.read(rb"^{", 60).string) for child in callers_of_it]
    assert all(answer["steps"] >= 1 and answer["seconds"] > 0 for answer in answers)


def test_callers_are_compared_with_as_many_echoes() -> None:
    rates = {Group(4, 4): [60.0], ONE_LARGE: [120.0], Group(4, 4, is_echo=True): [80.0]}
    assert [(row["callers"], row["ratio"], row["to_echo"]) for row in callers.rows("shm", rates)] == [
        ("4 x batch 4", 0.5, 0.75),
        ("1 x batch 64", 1.0, None),
        ("4 x batch 4, echo", pytest.approx(2 / 3), None),
    ]
