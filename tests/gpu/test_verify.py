"""`--verify 1` on a GPU: every backend's outputs are within what is tolerated, and a wrong one is found."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import attnd
from tests.e2e.test_metrics import Measured

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

HEADS, KV_HEADS, DIM, LAYERS, PAGE, PAGES = 8, 2, 128, 3, 16, 256
GEOMETRY = {"num_layers": LAYERS, "num_kv_heads": KV_HEADS, "head_dim": DIM, "num_pages": PAGES, "page_size": PAGE}


@pytest.fixture(scope="module", params=["log", "refuse"])
def verifying(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measured]:
    options = ("--device", "cuda", "--metrics", "0", "--verify", "1.0", "--verify-action", request.param)
    with Measured(tmp_path_factory.mktemp("verify") / "log", *options) as server:
        yield server
        assert "wrong output" not in server.log, server.log
        assert "cannot be verified" not in server.log, server.log


def seen(server: Measured) -> float:
    scrape = server.scrape()
    return scrape.value("attnd_verify_error_ratio_count") + scrape.value("attnd_verify_dropped_total")


def check(server: Measured, before: float, num_calls: int) -> None:
    """Every call was looked at or dropped, none was found wrong; the errors are printed."""
    deadline = time.monotonic() + 120
    while seen(server) - before < num_calls:
        assert time.monotonic() < deadline, server.scrape().text
        time.sleep(0.05)
    assert seen(server) - before == num_calls
    scrape = server.scrape()
    assert not scrape.by("attnd_verify_mismatches_total", "backend")
    assert not scrape.by("attnd_verify_not_finite_total", "backend")
    assert scrape.value("attnd_verify_dropped_total", reason="failed") == 0
    assert scrape.value("attnd_verify_dropped_total", reason="too_big") == 0
    counts = scrape.by("attnd_verify_error_ratio_count", "backend")
    sums = scrape.by("attnd_verify_error_ratio_sum", "backend")
    print(
        {name: f"{sums[name] / count:.3f} of what is tolerated, {count:.0f} samples" for name, count in counts.items()}
    )


class Worker:
    """Four requests in one cache, each with a quarter of its pages: a prompt, then tokens."""

    def __init__(self, client: attnd.Client, seed: int = 0, **geometry: Any) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self._dtype = geometry.get("dtype", torch.bfloat16)
        self.cache = client.create_cache(**{**GEOMETRY, "dtype": self._dtype, **geometry})
        self._tables = torch.randperm(PAGES, generator=self._random).view(4, -1).tolist()
        self._lens = [0] * 4

    def run(self, query_lens: list[int], kind: str = "prefill", **options: Any) -> int:
        """A step of all layers. Returns the number of calls."""
        slots = [
            table[position // PAGE] * PAGE + position % PAGE
            for table, have, new in zip(self._tables, self._lens, query_lens, strict=True)
            for position in range(have, have + new)
        ]
        metadata = attnd.StepMetadata(query_lens, self._lens, self._tables, slots, kind=kind)
        with self.cache.session() as session:
            step = session.step(metadata)
            for layer in range(LAYERS):
                q, k, v = (self._tokens(len(slots), heads) for heads in (HEADS, KV_HEADS, KV_HEADS))
                step.attend(layer, q, k, v, attnd.AttentionOptions(**options))
        self._lens = [have + new for have, new in zip(self._lens, query_lens, strict=True)]
        return LAYERS

    def _tokens(self, num_tokens: int, heads: int) -> torch.Tensor:
        return (torch.randn(num_tokens, heads, DIM, generator=self._random) * 2).to(self._dtype)


@pytest.mark.parametrize("backend", ["auto", "naive", "sdpa", "triton", "triton_grouped"])
@pytest.mark.parametrize(
    "geometry",
    [
        {"dtype": torch.float32},
        {"dtype": torch.float16},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "kv_dtype": "float8_e4m3fn", "k_scales": 0.05, "v_scales": [0.04, 0.06]},
    ],
    ids=["float32", "float16", "bfloat16", "fp8"],
)
def test_sound_backends_are_found_sound(verifying: Measured, geometry: dict[str, Any], backend: str) -> None:
    before = seen(verifying)
    with attnd.connect(verifying.address, timeout_s=300) as client:
        worker = Worker(client, **geometry)
        num_calls = worker.run([300, 17, 0, 130], backend=backend)
        num_calls += worker.run([5, 40, 1, 0], backend=backend)  # a chunk, a prompt's rest
        num_calls += worker.run([1, 1, 1, 1], "decode", backend=backend)
        num_calls += worker.run([8, 8, 8, 8], "decode", backend=backend)
        if backend in ("auto", "triton", "triton_grouped"):
            num_calls += worker.run([1, 1, 1, 1], "decode", backend=backend, window=100, softcap=20.0, return_lse=True)
        worker.cache.delete()
        check(verifying, before, num_calls)


@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn"])
def test_graphs_and_shared_launches_are_found_sound(verifying: Measured, kv_dtype: str | None) -> None:
    before, calls = seen(verifying), []

    def work(seed: int) -> None:
        with attnd.connect(verifying.address, timeout_s=300) as client:
            worker = Worker(client, seed, kv_dtype=kv_dtype)
            if seed % 2:
                worker.cache.warm_up(num_heads=HEADS, max_reqs=4)
            calls.append(worker.run([200, 3, 77, 1]))
            calls.extend(worker.run([1, 1, 1, 1], "decode") for _ in range(10))
            worker.cache.delete()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 6 * 11
    check(verifying, before, sum(calls))
