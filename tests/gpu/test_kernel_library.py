"""Kernels are compiled once, beside the service: what a machine has seen is found again after a restart."""

from __future__ import annotations

import multiprocessing
import statistics
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import attnd
from attnd.v1 import status_pb2
from tests.attention import dense_attention
from tests.servers import ServerProcess, wait_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

PAGE, HEADS, KV_HEADS = 16, 8, 2
# Geometries whose kernels differ, of layers that Hopper's own kernels serve and of others.
HEAD_DIMS = (64, 80)


def geometry(head_dim: int) -> dict[str, Any]:
    return {
        "num_layers": 1, "num_kv_heads": KV_HEADS, "head_dim": head_dim, "num_pages": 64, "page_size": PAGE,
        "dtype": "bfloat16", "backend": "triton_grouped",  # auto may choose cuDNN, which compiles nothing here
    }  # fmt: skip


def kernels(client: attnd.Client) -> status_pb2.KernelStatus:
    return client.status().kernels


def calls(cache: attnd.Cache, head_dim: int) -> None:
    """A prefill and a decode step over its context."""
    pages = list(range(8))
    with cache.session() as session:
        for kind, context_len, num_new in (("prefill", 0, 37), ("decode", 37, 1)):
            slots = list(range(context_len, context_len + num_new))
            step = session.step(attnd.StepMetadata([num_new], [context_len], [pages], slots, kind=kind))
            q = torch.randn(num_new, HEADS, head_dim, dtype=torch.bfloat16)
            k, v = (torch.randn(num_new, KV_HEADS, head_dim, dtype=torch.bfloat16) for _ in "kv")
            assert step.attend(0, q, k, v).isfinite().all()


def served(log: Path, folder: Path) -> status_pb2.KernelStatus:
    """What a server says of its kernels in its life, after calls of each geometry and all that it compiles ahead."""
    with ServerProcess(log, "--device", "cuda", "--kernel-cache", str(folder)) as server:
        with attnd.connect(server.address, timeout_s=120) as client:
            num_loaded = 0

            def is_idle() -> bool:
                told = kernels(client)
                return told.num_loaded > num_loaded and not (told.num_compiling or told.num_waiting)

            for head_dim in HEAD_DIMS:
                with client.create_cache(**geometry(head_dim)) as cache:
                    # A call that came earlier might have another kernel compiled, to stand in for its own.
                    wait_for(is_idle, "kernels that a cache can need", timeout_s=240)
                    calls(cache, head_dim)
                num_loaded = kernels(client).num_loaded
            num_loaded = 0
            wait_for(is_idle, "kernels that calls need", timeout_s=240)
            return kernels(client)


def test_what_this_machine_has_seen_is_never_compiled_again(tmp_path: Path) -> None:
    first = served(tmp_path / "first.log", tmp_path / "kernels")
    assert first.num_compiled > 0
    assert first.num_failed == 0, first.failed
    assert first.num_loaded == first.num_compiled + first.num_found
    second = served(tmp_path / "second.log", tmp_path / "kernels")
    assert (second.num_compiled, second.num_failed) == (0, 0)
    assert second.num_found == second.num_loaded >= first.num_compiled


needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


@needs_hopper
def test_a_first_prefill_has_the_bits_of_those_that_come_later(tmp_path: Path) -> None:
    """Though another kernel stands in for it. Prints how long both took."""
    group, num_new = 7, 300  # a group that nothing is compiled for ahead
    with ServerProcess(tmp_path / "log", "--device", "cuda", "--kernel-cache", str(tmp_path / "kernels")) as server:
        with (
            attnd.connect(server.address, timeout_s=120) as client,
            client.create_cache(**geometry(128)) as cache,
            cache.session() as session,
        ):
            q = torch.randn(num_new, group * KV_HEADS, 128, dtype=torch.bfloat16)
            k, v = (torch.randn(num_new, KV_HEADS, 128, dtype=torch.bfloat16) for _ in "kv")
            outputs, seconds = [], []

            def call() -> None:
                began = time.perf_counter()
                metadata = attnd.StepMetadata([num_new], [0], [list(range(19))], list(range(num_new)), kind="prefill")
                outputs.append(session.step(metadata).attend(0, q, k, v))
                seconds.append(time.perf_counter() - began)

            call()
            num_loaded = kernels(client).num_loaded
            wait_for(lambda: not kernels(client).num_compiling, "the kernel itself", timeout_s=240)
            assert kernels(client).num_loaded > num_loaded
            call()
            print(f"the first prefill took {seconds[0]:.2f} s, the same one later {seconds[1] * 1e3:.1f} ms")
            expected = dense_attention(q, k, v)
            torch.testing.assert_close(outputs[0], expected, rtol=2e-2, atol=2e-2)
            assert torch.equal(*outputs)


def first_calls_in_process(folder: Path, head_dim: int) -> int:
    """Makes the same calls in this process from before it has any kernel until it has all that they ask for.

    All have the bits of the first. Returns how often each was made while the kernel itself was compiled.
    """
    from attnd_server.config import ServerConfig
    from attnd_server.inproc import connect

    torch.manual_seed(0)
    # A group that nothing is compiled for ahead. A prompt, more of it, and a chunk on a context of several parts.
    group, layers, lens = 7, 3, [(0, 16), (16, 16), (32, 300), (332, 37)]
    transport = connect(ServerConfig(device="cuda", kernel_cache=str(folder)))
    with (
        attnd.Client(transport, timeout_s=120) as client,
        client.create_cache(**{**geometry(head_dim), "num_layers": layers}) as cache,
        cache.session() as session,
    ):
        heads = group * KV_HEADS
        calls = {
            (lengths, layer): [
                torch.randn(lengths[1], num_heads, head_dim, dtype=torch.bfloat16)
                for num_heads in (heads, KV_HEADS, KV_HEADS)
            ]
            for lengths in lens
            for layer in range(layers)
        }

        def outputs() -> dict[tuple[tuple[int, int], int], torch.Tensor]:
            found = {}
            for context_len, num_new in lens:
                slots = list(range(context_len, context_len + num_new))
                step = session.step(attnd.StepMetadata([num_new], [context_len], [list(range(24))], slots))
                for layer in range(layers):
                    key = (context_len, num_new), layer
                    found[key] = step.attend(layer, *calls[key])
            assert session.timings().backend == "triton_grouped"
            return found

        def is_compiling() -> bool:
            names = [each.name for each in kernels(client).compiling]
            return any(f"GROUP={group}," in name and "CONSUMERS=2" in name for name in names)

        first, num_rounds, num_after = outputs(), 0, 0
        while num_after < 3:
            num_after += not is_compiling()
            num_rounds += not num_after
            for key, output in outputs().items():
                assert torch.equal(output, first[key]), f"{key}, {num_rounds} rounds, then {num_after}"
        assert kernels(client).num_compiled > 0
        return num_rounds


@needs_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_first_calls_in_process_have_the_bits_of_those_that_come_later(head_dim: int, tmp_path: Path) -> None:
    """Though layers of one step may get different kernels. In a process of its own, which has no kernels yet."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        num_rounds = pool.submit(first_calls_in_process, tmp_path / "kernels", head_dim).result(timeout=240)
    print(f"{num_rounds} rounds of calls while the kernel itself was compiled")


def test_others_go_on_while_a_call_waits_for_its_kernel(tmp_path: Path) -> None:
    """Prints how long a call of a fresh geometry took, and what another's calls took meanwhile."""
    with ServerProcess(tmp_path / "log", "--device", "cuda", "--kernel-cache", str(tmp_path / "kernels")) as server:
        with (
            attnd.connect(server.address, timeout_s=120) as other,
            attnd.connect(server.address, timeout_s=120) as fresh,
            other.create_cache(**geometry(64)) as cache,
            cache.session() as session,
        ):
            q = torch.randn(1, HEADS, 64, dtype=torch.bfloat16)
            k, v = (torch.randn(1, KV_HEADS, 64, dtype=torch.bfloat16) for _ in "kv")

            def call() -> float:
                began = time.perf_counter()
                step = session.step(attnd.StepMetadata([1], [37], [list(range(8))], [37], kind="decode"))
                step.attend(0, q, k, v)
                return time.perf_counter() - began

            for _ in range(50):
                call()
            wait_for(lambda: not kernels(other).num_compiling, "the first geometry's kernels", timeout_s=240)
            alone = [call() for _ in range(500)]
            took: list[float] = []

            def first_call() -> None:
                with fresh.create_cache(**geometry(80)) as its:
                    began = time.perf_counter()
                    calls(its, 80)
                    took.append(time.perf_counter() - began)

            thread = threading.Thread(target=first_call)
            thread.start()
            beside = []
            while thread.is_alive():
                beside.append(call())
            thread.join()
            longest = max(beside)
            middle = statistics.median(alone), statistics.median(beside)
            print(f"fresh prefill and decode {took[0]:.2f} s; another's calls {middle[0] * 1e3:.2f} ms alone, "
                  f"{middle[1] * 1e3:.2f} ms beside it, longest {longest * 1e3:.1f} ms of {len(beside)}")  # fmt: skip
            assert longest < took[0] / 2  # nobody waits for another's kernel
