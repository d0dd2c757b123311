from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attnd_server.attention.config import AttentionBackend
from attnd_server.attention.masks import visible
from benchmarks import blocks, chunked, decode, fp8, kernel_benchmark, prefill, ragged, roofline, store
from benchmarks.ceilings import Ceilings
from benchmarks.dense_peers import Flex, Sdpa
from benchmarks.exactness import expected, sample
from benchmarks.graph_timing import Layers, time_together
from benchmarks.kernel_benchmark import Benchmark, measure
from benchmarks.kernel_cases import FP8, Case
from benchmarks.kernel_runs import Notes, NotThere, measure_all
from benchmarks.kernel_tensors import Tensors, as_slots, draw
from benchmarks.peers import FlashAttention3, Ours, Prepared, Way
from benchmarks.report import WrongResult
from tests import interpreter

CPU = torch.device("cpu")
ROOF = Ceilings(read_gbs=4000.0, copy_gbs=3900.0, matmul_tflops=800.0)
ALL = [module.BENCHMARK for module in (decode, blocks, prefill, chunked, ragged, fp8)]
TINY = {
    "decode": Case("decode", "tiny", (33, 5, 64), (1, 1, 1)),
    "speculative": Case("decode", "tiny", (33, 5), (5, 5)),
    "block": Case("block", "tiny", (64, 32), (32, 32), block_size=32),
    "prefill": Case("causal", "tiny", (0, 0), (70, 70)),
    "block-causal": Case("block-causal", "tiny", (0, 0), (70, 70), block_size=32),
    "mixed": Case("mixed", "tiny", (40, 7), (50, 1), page_size=128),
    "fp8": Case("fp8", "tiny", (33, 64), (1, 1), kv_dtype=FP8),
}


def small_heads(case: Case) -> Case:
    return replace(case, num_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32)


class Fake:
    """A peer that computes what it is told."""

    def __init__(self, name: str, output: Callable[[Case, Tensors, int], torch.Tensor]) -> None:
        self.name, self._output = name, output

    def prepare(self, case: Case, tensors: Tensors) -> Prepared:
        return Prepared(lambda layer: self._output(case, tensors, layer))


def fake_attention(case: Case, tensors: Tensors, layer: int) -> torch.Tensor:
    output = torch.full_like(tensors.q, 1.0)
    reference = expected(case, tensors, layer)
    output[reference.rows] = reference.output.float()
    return output


def naive() -> Way:
    return Ours(AttentionBackend.NAIVE, CPU)


def measured(case: Case, *ways: Way) -> tuple[dict, Notes]:
    notes = Notes()
    return measure(small_heads(case), ways, ROOF, 0.001, notes, CPU), notes


@pytest.mark.parametrize("name", TINY)
def test_our_backends_pass_the_check_of_every_kind_of_cell(name: str) -> None:
    row, notes = measured(TINY[name], naive())
    assert not notes.lines()
    assert row["ours_us"] > 0
    assert row["plan_us"] > 0
    assert float(row["relative_errors"]["ours"]) < 3e-3


@pytest.mark.parametrize("name", ["decode", "fp8", "mixed"])
def test_one_wrong_page_in_a_layer_is_not_timed(name: str) -> None:
    def forgetful(case: Case, tensors: Tensors, layer: int) -> torch.Tensor:
        pages = [each._replace(k=each.k.clone(), v=each.v.clone()) for each in tensors.layers]
        as_slots(pages[1].v)[int(case.page_tables[0, 0]) * case.page_size] += 3
        return fake_attention(case, replace(tensors, layers=pages), layer)

    row, notes = measured(TINY[name], Fake("ours", forgetful), Fake("peer", fake_attention))
    assert row["ours_us"] is None
    assert row["peer_us"] > 0
    assert row["ratio"] is row["share"] is None
    assert "ours: wrong result: output of layer 1 has a relative error of" in notes.lines()[0]
    assert notes.ours_failed


def test_rows_that_were_never_written_are_seen_without_a_reference_too() -> None:
    case, written = small_heads(TINY["prefill"]), torch.ones(140, 4, 16)

    def lazy(case: Case, tensors: Tensors, layer: int) -> torch.Tensor:
        output = fake_attention(case, tensors, layer)
        output[20] = torch.nan
        return output

    assert 20 not in expected(case, draw(case, CPU), 0).rows
    row, notes = measured(TINY["prefill"], Fake("peer", lazy))
    assert row["peer_us"] is None
    assert "numbers that are not finite" in notes.lines()[0]
    with pytest.raises(WrongResult, match="relative error"):
        expected(case, draw(case, CPU), 0).check("ones", written)


def test_a_peer_that_fails_leaves_its_cell_empty_and_its_reason_once() -> None:
    def fail(case: Case, tensors: Tensors, layer: int) -> torch.Tensor:
        raise RuntimeError("no kernel image\nand a long trace")

    notes = Notes()
    for name in ("decode", "speculative"):
        row = measure(small_heads(TINY[name]), [naive(), Fake("peer", fail)], ROOF, 0.001, notes, CPU)
        assert row["ours_us"] > 0
        assert row["peer_us"] is row["best_peer_us"] is row["ratio"] is None
    assert notes.lines() == ["peer: RuntimeError: no kernel image (decode tiny and 1 more)"]
    assert not notes.ours_failed


def test_the_ratio_is_to_the_fastest_peer_that_is_right() -> None:
    ways = [Fake(name, fake_attention) for name in ("ours", "slow", "fast", "absent")]
    case = TINY["decode"]
    row = kernel_benchmark.row(case, ways, {"ours": 20.0, "slow": 40.0, "fast": 16.0}, {}, ROOF, 5.0)
    assert row["best_peer_us"] == 16.0
    assert row["ratio"] == 1.25
    assert row["gb_per_s"] == pytest.approx(case.num_bytes / 20e-6 / 1e9)
    assert row["tflops"] == pytest.approx(case.operations / 20e-6 / 1e12)
    assert row["share"] == pytest.approx(row["gb_per_s"] / 4000.0)


@pytest.mark.parametrize("name", TINY)
def test_operations_are_those_of_visible_pairs(name: str) -> None:
    case = TINY[name]
    metadata = case.metadata()
    pairs = sum(int(visible(metadata, request, 0, page_size=case.page_size).sum()) for request in range(case.num_reqs))
    assert case.operations == 4 * 32 * 128 * pairs


def test_bytes_are_those_of_context_and_tensors() -> None:
    # Three requests with 102 tokens of context; K and V have 8 heads, q and output 32.
    assert TINY["decode"].num_bytes == 102 * 2 * 8 * 128 * 2 + 3 * (2 * 8 + 2 * 32) * 128 * 2
    assert TINY["fp8"].num_bytes == 97 * 2 * 8 * 128 + 2 * (2 * 8 + 2 * 32) * 128 * 2


@pytest.mark.parametrize("name", TINY)
def test_new_tokens_lie_behind_the_context_in_pages_of_their_own_request(name: str) -> None:
    case = small_heads(TINY[name])
    tensors = draw(case, CPU)
    assert len(case.new_slots.unique()) == case.num_tokens
    for layer in tensors.layers:
        for pages, tokens in ((layer.k, tensors.k), (layer.v, tensors.v)):
            stored = as_slots(pages)[case.new_slots].view(pages.dtype)
            assert torch.equal(stored.float(), tokens.to(pages.dtype).float())
    used = [table[table >= 0].tolist() for table in case.page_tables]
    assert [len(pages) for pages in used] == [-(-seq_len // case.page_size) for seq_len in case.seq_lens]
    assert sorted(page for pages in used for page in pages) == list(range(sum(map(len, used))))


def test_a_block_sees_all_if_it_is_aligned() -> None:
    case = TINY["block"]
    assert case.sees_all
    assert not replace(case, context_lens=(64, 33)).sees_all
    assert not replace(case, query_lens=(32, 33)).sees_all
    assert not TINY["prefill"].sees_all
    for name, case in TINY.items():
        metadata = case.metadata()
        seen = [visible(metadata, request, 0, page_size=case.page_size).all() for request in range(case.num_reqs)]
        assert case.sees_all == all(seen), name


@pytest.mark.parametrize("benchmark", ALL, ids=lambda benchmark: benchmark.name)
def test_cells_have_names_of_their_own_and_quick_ones_exist(benchmark: Benchmark) -> None:
    names = [str(case) for case in benchmark.cells]
    assert len(set(names)) == len(names)
    assert set(benchmark.quick) <= {case.name for case in benchmark.cells}
    for case in benchmark.cells:
        assert sample(case)


def test_lengths_of_uneven_batches() -> None:
    lens = ragged.log_uniform(256)
    assert lens[:64] == ragged.log_uniform(64)
    assert all(256 <= length <= 65536 for length in lens)
    assert 90 < sum(length < 4096 for length in lens) < 166  # half of them lie below the middle of the logarithms


def test_dense_peers_compute_the_same() -> None:
    peer = Sdpa("flash", torch.nn.attention.SDPBackend.FLASH_ATTENTION)
    row, notes = measured(TINY["prefill"], naive(), peer)
    assert not notes.lines()
    assert row["ratio"] == row["ours_us"] / row["flash_us"]
    for name in ("decode", "block-causal"):
        with pytest.raises(NotThere, match="dense causal"):
            peer.prepare(TINY[name], draw(small_heads(TINY[name]), CPU))
    with pytest.raises(NotThere, match="dense"):
        Flex().prepare(TINY["decode"], draw(small_heads(TINY["decode"]), CPU))


FA3 = """
import torch

calls = []


def load(folder):
    return "operators"


def plan(ops, *, num_reqs, max_query_len, max_context_len, num_heads, num_kv_heads, head_dim, dtype, seq_lens,
         cu_seqlens_q, page_size, causal):
    calls.append((num_reqs, max_query_len, max_context_len, seq_lens.tolist(), page_size, causal))
    return "metadata"


def attend(ops, q, k_cache, v_cache, out, *, cu_seqlens_q, seq_lens, page_tables, max_query_len, max_context_len, scale,
           causal, metadata):
    assert (ops, metadata) == ("operators", "metadata")
    for request, (start, end) in enumerate(zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist())):
        if page_tables is None:
            k, v = k_cache[request], v_cache[request]
        else:
            k, v = (x[page_tables[request].long()].flatten(0, 1)[: seq_lens[request]] for x in (k_cache, v_cache))
        k, v = (x.to(out.dtype).repeat_interleave(q.shape[1] // k_cache.shape[-2], 1) for x in (k, v))
        scores = torch.einsum("nhd,shd->hns", q[start:end].to(out.dtype), k) * scale
        n, s = scores.shape[1:]
        if causal:
            scores = scores.masked_fill(torch.ones(n, s).triu(s - n + 1).bool(), -torch.inf)
        out[start:end] = torch.einsum("hns,shd->nhd", scores.softmax(2), v)
    return out
"""


@pytest.fixture
def fa3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FlashAttention3:
    """The peer over a module that computes the same in torch."""
    (tmp_path / "fa3.py").write_text(FA3)
    monkeypatch.delitem(__import__("sys").modules, "fa3", raising=False)
    peer = FlashAttention3(tmp_path, torch.device("cuda"))
    peer._load()
    peer._device = CPU
    return peer


@pytest.mark.parametrize("name", TINY)
def test_flash_attention_3_is_given_the_same_step(name: str, fa3: FlashAttention3) -> None:
    row, notes = measured(TINY[name], fa3)
    if name == "block-causal":
        assert notes.lines() == ["FA3: has no block-causal mask (block-causal tiny)"]
        return
    assert not notes.lines()
    assert row["FA3_us"] > 0


def test_a_peer_that_is_not_found_says_so() -> None:
    with pytest.raises(NotThere, match="no --peers FOLDER"):
        FlashAttention3(None, CPU).prepare(TINY["decode"], draw(small_heads(TINY["decode"]), CPU))


def test_time_of_a_layer_is_the_time_of_all_by_their_number() -> None:
    calls: list[int] = []

    def call(layer: int) -> torch.Tensor:
        calls.append(layer)
        return torch.tensor(layer)

    layers = Layers(call, 3, CPU)
    assert calls == [0, 0, 1, 2]
    assert {layer: int(output) for layer, output in layers.outputs.items()} == {0: 0, 2: 2}
    times = time_together({"way": layers, "other": Layers(call, 1, CPU)}, 0.001, CPU)
    assert times.keys() == {"way", "other"}
    assert all(time > 0 for time in times.values())


def test_the_ceiling_is_the_lower_of_two() -> None:
    assert ROOF.floor_us(operations=0, num_bytes=4e9) == pytest.approx(1000)
    assert ROOF.floor_us(operations=8e12, num_bytes=4e9) == pytest.approx(10000)
    assert ROOF.tflops(1) == 4
    assert ROOF.tflops(1000) == 800


def test_a_run_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.ceilings.measure", lambda device, dtype: ROOF)
    arguments = ["--device", "cpu", "--only", "1 x 1k", "--heads", "4/2", "--seconds", "0.001"]
    assert kernel_benchmark.main(decode.BENCHMARK, [*arguments, "--json", str(tmp_path), "--plot", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "4/2 heads x 128, naive, CPU" in table
    assert "not found" in table
    assert "FA3: not found: no --peers FOLDER is given (decode 1 x 1k)" in table
    result = json.loads((tmp_path / "decode.json").read_text())
    assert [row["cell"] for row in result["rows"]] == ["1 x 1k"]
    assert result["rows"][0]["FA3_us"] is None
    assert result["parameters"]["ceilings"]["read_gbs"] == 4000.0
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_needs_no_times(tmp_path: Path) -> None:
    row = {"cell": "1 x 1k", "operations": 8, "bytes": 1, "ours_us": None, "best_peer_us": None}
    roofline.plot(tmp_path / "roofline.png", "title", [row], ROOF)
    assert (tmp_path / "roofline.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--heads", "33/8"], "argument --heads: is '33/8', but must be query heads/KV heads"),
        (["--only", "7 x 1"], "argument --only: is '7 x 1', but must be a part of one of: decode 1 x 1k"),
        (["--peers", "/nowhere"], "argument --peers: is /nowhere, but must be a folder"),
        (["--seconds", "-1"], "argument --seconds: is -1, but must be positive"),
    ],
)
def test_errors_name_the_argument(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernel_benchmark.main(decode.BENCHMARK, arguments)
    assert error in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_there() -> None:
    def stop(cell: int) -> dict[str, int]:
        if cell == 2:
            raise KeyboardInterrupt
        return {"cell": cell}

    from rich.console import Console

    assert measure_all([1, 2, 3], str, stop, CPU, Console(quiet=True)) == ([{"cell": 1}], True)


@pytest.mark.skipif(interpreter.reason_against() is not None, reason=str(interpreter.reason_against()))
@pytest.mark.parametrize(
    ("operation", "peer", "what"), [("store", "index_copy", "pages"), ("gather", "index_select", "tokens")]
)
def test_stores_and_gathers_are_checked(monkeypatch: pytest.MonkeyPatch, operation: str, peer: str, what: str) -> None:
    monkeypatch.setattr(store, "NUM_SLOTS", 64)
    monkeypatch.setattr(store, "NUM_LAYERS", 2)
    right = store.WAYS[operation][peer]

    def displaced(pages: store.KV, new: store.KV, slots: torch.Tensor) -> store.KV:
        return right(pages, new, slots.roll(1))

    monkeypatch.setitem(store.WAYS[operation], peer, displaced)
    notes = Notes()
    with interpreter.interpreter() as device:
        row = store.measure(store.Cell(operation, 5), ROOF, 0.001, notes, torch.device(device))
    assert row["ours_us"] > 0
    assert row["torch_us"] is row["ratio"] is None
    reason = f"wrong result: {peer}: k {what} of layer 0 hold something else"
    assert notes.lines() == [f"{peer}: {reason} ({operation} 5 tokens)"]


def test_a_wrong_gather_of_ours_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "NUM_SLOTS", 64)
    monkeypatch.setattr(store, "NUM_LAYERS", 2)
    monkeypatch.setitem(store.WAYS["gather"], "ours", lambda pages, new, slots: new)
    notes = Notes()
    row = store.measure(store.Cell("gather", 5), ROOF, 0.001, notes, CPU)
    assert row["ours_us"] is row["ratio"] is None
    assert row["torch_us"] > 0
    assert notes.ours_failed
