"""Sessions of a real server that decode at the same time: their launches are shared, and nobody's bits change."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import attnd
from attnd_server.execution.joined import graphs
from tests.gpu.test_batch import HOPPER
from tests.servers import ServerProcess, wait_for
from tests.shared_calls import Caller, check_same_bits, waiting

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

GEOMETRY: dict[str, Any] = {
    "num_layers": 3,
    "num_kv_heads": 8,
    "head_dim": 128,
    "page_size": 16,
    "dtype": torch.bfloat16,
    "backend": "triton_grouped",
}
NUM_HEADS, ROUNDS = 32, 40
# Context lengths of each caller: of one token, around the ends of pages, and some pages more than others.
CONTEXTS = ([0, 15, 16, 17], [1], [2047, 1, 600, 31], [48] * 7, [300])


class Worker:
    """Decodes on a plane, and again in process, alone."""

    def __init__(self, address: str, inproc: attnd.Client, plane: str, context_lens: list[int], seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.context_lens, pages = context_lens, [length // 16 + 4 for length in context_lens]
        self.client = attnd.connect(address, timeout_s=60)
        order = torch.randperm(sum(pages), generator=self.random).int()
        width, self.num_pages = max(pages), sum(pages)
        self.tables = torch.full((len(pages), width), -1, dtype=torch.int32)
        for row, part in zip(self.tables, order.split(pages), strict=True):
            row[: len(part)] = part
        self.caches = [each.create_cache(num_pages=sum(pages), **GEOMETRY) for each in (self.client, inproc)]
        for layer in range(GEOMETRY["num_layers"]):
            k, v = (torch.randn(16 * sum(pages), 8, 128, generator=self.random).bfloat16() for _ in range(2))
            for cache in self.caches:
                cache.store_kv(layer, torch.arange(len(k)), k, v)
        self.ours, self.theirs = self.caches[0].session(plane=plane), self.caches[1].session()
        self.outputs: list[tuple[attnd.StepMetadata, list[Any], list[torch.Tensor]]] = []

    def run(self) -> None:
        """Steps that overlap with everybody else's."""
        for step in range(ROUNDS):
            lens = [length + step for length in self.context_lens]
            slots = [
                int(table[length // 16]) * 16 + length % 16 for table, length in zip(self.tables, lens, strict=True)
            ]
            metadata = attnd.StepMetadata([1] * len(lens), lens, self.tables, slots, kind="decode")
            calls = [
                [torch.randn(len(lens), heads, 128, generator=self.random).bfloat16() for heads in (NUM_HEADS, 8, 8)]
                for _ in range(GEOMETRY["num_layers"])
            ]
            opened = self.ours.step(metadata)
            self.outputs.append(
                (metadata, calls, [opened.attend(layer, *call).clone() for layer, call in enumerate(calls)])
            )

    def check(self) -> None:
        """The same steps alone have the same bits, and leave the same in the pages."""
        for metadata, calls, outputs in self.outputs:
            opened = self.theirs.step(metadata)
            for layer, (call, output) in enumerate(zip(calls, outputs, strict=True)):
                assert torch.equal(opened.attend(layer, *call), output), f"layer {layer} of {metadata.context_lens}"
        for layer in range(GEOMETRY["num_layers"]):
            slots = torch.arange(16 * self.num_pages)
            kept = [cache.read_kv(layer, slots, like=torch.ones(1)) for cache in self.caches]
            assert all(torch.equal(*each) for each in zip(*kept, strict=True))

    def close(self) -> None:
        for cache in self.caches:
            cache.delete()
        self.client.close()


@pytest.mark.parametrize("planes", [("shm",), ("inline",), ("shm", "inline")], ids="+".join)
def test_workers_at_the_same_time_get_the_bits_that_they_get_alone(
    server: ServerProcess, planes: tuple[str, ...]
) -> None:
    with attnd.connect("inproc://") as inproc:
        workers = [
            Worker(server.address, inproc, planes[index % len(planes)], lens, index)
            for index, lens in enumerate(CONTEXTS)
        ]
        with torch.inference_mode():
            workers[0].run()  # compiles
            for worker in workers:
                worker.check()
                worker.outputs.clear()
        threads = [threading.Thread(target=worker.run) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for worker in workers:
            assert len(worker.outputs) == ROUNDS
            worker.check()
            worker.close()
    assert "cannot run together" not in server.log


def test_launches_are_graphs_of_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of callers that never were together before need no new one."""
    monkeypatch.setattr(graphs, "ASKED_BEFORE", 0)
    with waiting("cuda") as server:
        callers = [
            Caller(server, [5 + seed, 0, 37], seed, "triton_grouped", num_pages=40, geometry=HOPPER)
            for seed in range(5)
        ]
        check_same_bits(server, callers[:3], attnd.AttentionOptions())
        joined = server.service.executor.runner._shared.joined
        (graph,) = joined._graphs.values()
        for some in (callers[1:], callers[::2], callers[3:], callers):
            check_same_bits(server, some, attnd.AttentionOptions())
        assert list(joined._graphs.values()) == [graph]
        for caller in callers:
            caller.session.close()
            caller.cache.delete()
        wait_for(lambda: graph.is_over, "the caches' space is still there")
        joined.forget()
        assert not joined._graphs
