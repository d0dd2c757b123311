"""The benchmarks of whole workers and of a layer's parts: their dry runs work, and what is wrong is not timed."""

from __future__ import annotations

import json
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import layer_cell, layer_parts, worker, worker_options, worker_ways
from benchmarks.worker_contexts import Batch, Contexts
from benchmarks.worker_model import TINY
from benchmarks.worker_ways import WAYS

BRIEF = ["--dry-run", "--rounds", "1", "--steps", "3", "--warm-up", "1"]
# What the folder of a peer has: FlashAttention-3's interface, in torch.
FA3 = """
    import torch

    def load(folder):
        return "operators"

    def plan(ops, *, num_reqs, max_query_len, max_context_len, num_heads, num_kv_heads, head_dim, dtype, seq_lens,
             cu_seqlens_q, page_size, causal):
        assert (ops, max_query_len, causal, len(cu_seqlens_q)) == ("operators", 1, True, num_reqs + 1)
        assert seq_lens.dtype == cu_seqlens_q.dtype == torch.int32
        return seq_lens.clone()

    def attend(ops, q, k_cache, v_cache, out, *, cu_seqlens_q, seq_lens, page_tables, max_query_len, max_context_len,
               scale, causal, metadata):
        assert page_tables.dtype == torch.int32
        for request, seq_len in enumerate(metadata.tolist()):
            pages = page_tables[request].long()
            k, v = (cache[pages].flatten(0, 1)[:seq_len].repeat_interleave(2, 1) for cache in (k_cache, v_cache))
            weights = torch.einsum("hd,shd->hs", q[request], k).mul(scale).softmax(-1)
            out[request] = torch.einsum("hs,shd->hd", weights, v)
        return out
"""


def test_every_way_and_load_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert worker.main([*BRIEF, "--table", "all", "--json", str(tmp_path / "w.json"), "--plot", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "a dry run; cuda and ahead go over shm" in printed
    assert "sessions x requests" in printed
    rows = json.loads((tmp_path / "w.json").read_text())["rows"]
    of_workers = [row for row in rows if row["table"] == "worker"]
    assert [(row["cell"], row["way"]) for row in of_workers] == [(c, w) for c in ("1 x 40", "3 x 20") for w in WAYS]
    assert all(row["step_ms"] > 0 and row["steps"] == 3 for row in of_workers)
    assert [row["ratio"] for row in of_workers if row["way"] == "local"] == [1.0, 1.0]
    assert all((row["attention_us"] is None) == (row["way"] == "none") for row in of_workers)
    loads = [row for row in rows if row["table"] == "sessions"]
    assert [(row["cell"], row["steps"]) for row in loads] == [("1 x 3", 3), ("2 x 1", 6)]
    assert loads[0]["ratio"] == 1.0
    assert (tmp_path / "worker.png").exists()


def test_flash_attention_3_is_called_as_its_folder_has_it(tmp_path: Path) -> None:
    (tmp_path / "fa3.py").write_text(textwrap.dedent(FA3))
    arguments = [*BRIEF, "--ways", "local", "shm", "--peers", str(tmp_path), "--json", str(tmp_path / "w.json")]
    assert worker.main(arguments) == 0
    rows = json.loads((tmp_path / "w.json").read_text())["rows"]
    assert [row["way"] for row in rows] == ["local", "shm"] * 2


def test_who_is_wrong_is_not_timed_and_the_others_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def other_page(self: Batch, context_len: int) -> object:
        tables = self.page_tables.clone()
        tables[0, 0] = tables[0, 1]
        return replace(decode(self, context_len), page_tables=tables)

    decode = Batch.decode
    monkeypatch.setattr(Batch, "decode", other_page)
    arguments = [*BRIEF, "--cells", "2x40", "--ways", "none", "local", "cuda", "--json", str(tmp_path / "w.json")]
    assert worker.main(arguments) == 1
    assert "2 x 40 cuda was not timed: wrong result: cuda, step 0, layer 0, request 0" in capsys.readouterr().out
    written = json.loads((tmp_path / "w.json").read_text())
    assert [row["way"] for row in written["rows"]] == ["none", "local"]
    assert len(written["parameters"]["not_timed"]) == 1


def test_a_token_that_is_not_stored_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker_ways.LocalPages, "store", lambda self, layer, k, v, slots: None)
    assert worker.main([*BRIEF, "--cells", "2x40", "--ways", "local", "shm"]) == 1
    # The plain attention of the dry run reads the new token from its page, too.
    assert "2 x 40 local was not timed: wrong result: local, step 0" in capsys.readouterr().out


def test_contexts_are_the_same_whoever_draws_them() -> None:
    batch = Batch(3, 20, 5)
    contexts, others = (Contexts(batch, TINY, torch.device("cpu"), seed) for seed in (0, 1))
    k, v = contexts.draw_all(1, range(1, 3))
    assert torch.equal(k, torch.cat([contexts.draw(1, 1)[0], contexts.draw(1, 2)[0]]))
    assert not torch.equal(k, v)
    assert not torch.equal(k, others.draw_all(1, range(1, 3))[0])
    assert sorted(batch.page_tables.flatten().tolist()) == list(range(6))


def test_every_part_of_a_layer_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dry-run", "--rounds", "1", "--runs", "2", "--json", str(tmp_path), "--plot", str(tmp_path)]
    assert layer_parts.main(arguments) == 0
    assert "hand-over, nothing back" in capsys.readouterr().out
    rows = json.loads((tmp_path / "layer_parts.json").read_text())["rows"]
    names = [part.name for part in layer_cell.PARTS]
    assert [(row["cell"], row["way"]) for row in rows] == [(c, name) for c in ("1 x 40", "3 x 20") for name in names]
    assert all(row["layer_us"] > 0 and (row["floor_us"] is not None) == ("attention" in row["way"]) for row in rows)
    assert (tmp_path / "layer_parts.png").exists()


def test_parts_that_hand_over_something_else_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing(self: object, tensors: object, outputs: list[torch.Tensor], returns: bool) -> object:
        return lambda: None

    monkeypatch.setattr(layer_cell.OneProcessor, "worker", nothing)
    assert layer_parts.main(["--dry-run", "--cells", "2x20", "--runs", "1"]) == 1
    assert "ours: wrong result: layer 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cells", "16"], "argument --cells: is '16', but must be requests x context, such as 16x2k"),
        (["--sessions", "0x4"], "argument --sessions: is '0x4', but must be sessions x requests, such as 16x4"),
        (["--steps", "1"], "argument --steps: is 1, but must be at least 2"),
        (["--rounds", "0"], "argument --rounds: is '0', but must be a whole number from 1"),
        (["--peers", "/nowhere"], "argument --peers: is /nowhere, but must be a folder"),
    ],
)
def test_arguments_that_make_no_sense(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        worker_options.parse(["--dry-run", *arguments])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("parse", [worker_options.parse, layer_parts.parse])
def test_without_two_gpus_there_is_only_a_dry_run(
    parse: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit):
        parse([])  # type: ignore[operator]
    assert "torch finds 1 GPUs, but there must be two, or --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize("has_gpu", [False, True])
def test_on_one_gpu_both_sides_must_run_at_once(
    has_gpu: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    gpu = SimpleNamespace(has_mps=False)
    monkeypatch.setattr(worker_options, "device", lambda index: gpu)
    with pytest.raises(SystemExit):
        worker_options.parse(["--one-gpu", "--table", "sessions"])
    assert "argument --one-gpu: needs a GPU and CUDA's MPS: nvidia-cuda-mps-control -d" in capsys.readouterr().err
    gpu.has_mps = True
    if has_gpu:
        assert worker_options.parse(["--one-gpu", "--table", "sessions"]).one_gpu
