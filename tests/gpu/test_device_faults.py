"""A GPU that really fails under a server: the context is broken, or a kernel never ends."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

import attnd
from attnd_server.device.faults import EXIT_CODE
from tests.servers import ServerProcess

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

if torch.cuda.is_available():
    from tests.gpu.faulty_server import ASSERTION, ENDLESS, ILLEGAL
else:
    ASSERTION = ENDLESS = ILLEGAL = 0.0

GEOMETRY = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 64, "num_pages": 8, "dtype": torch.bfloat16}
METADATA = attnd.StepMetadata([1], [0], [[0]], [0], kind="decode")
NAIVE = attnd.AttentionOptions(backend="naive")


class FaultyServer(ServerProcess):
    module = "tests.gpu.faulty_server"


def call(session: attnd.Session, options: attnd.AttentionOptions) -> None:
    q, k = torch.ones(1, 4, 64, dtype=torch.bfloat16), torch.ones(1, 2, 64, dtype=torch.bfloat16)
    assert torch.equal(session.step(METADATA).attend(0, q, k, k, options), q)


@pytest.mark.parametrize("scale", [ILLEGAL, ASSERTION], ids=["illegal_address", "assertion"])
def test_a_broken_context_ends_the_server_and_another_serves(scale: float, tmp_path: Path) -> None:
    with FaultyServer(tmp_path / "log", "--device", "cuda") as server:
        with attnd.connect(server.address, timeout_s=30) as client:
            cache, others = client.create_cache(**GEOMETRY), client.create_cache(**GEOMETRY)
            wrong: list[BaseException] = []
            ended = threading.Event()

            def work() -> None:
                """Another worker, until it is refused: never answered wrongly."""
                try:
                    with others.session() as session:
                        while not ended.is_set():
                            call(session, NAIVE)
                except attnd.Disconnected:
                    pass
                except BaseException as error:
                    wrong.append(error)

            worker = threading.Thread(target=work)
            worker.start()
            with cache.session() as session:
                call(session, NAIVE)
                began = time.monotonic()
                with pytest.raises(attnd.Disconnected, match="cuda:0 failed, and the server ends: CUDA error"):
                    call(session, attnd.AttentionOptions(backend="naive", scale=scale))
            assert server.wait() == EXIT_CODE
            print(f"the server ended {time.monotonic() - began:.1f} s after the call")
            worker.join(60)
            ended.set()
            assert not wrong
            assert "the device failed" in server.log
            with ServerProcess(tmp_path / "next", "--device", "cuda", port=server.port):
                client.capabilities()
                with pytest.raises(attnd.EpochMismatch):
                    cache.renew()
                with client.create_cache(**GEOMETRY) as again, again.session() as session:
                    call(session, NAIVE)


def test_a_kernel_without_end_ends_the_server(tmp_path: Path) -> None:
    with FaultyServer(tmp_path / "log", "--device", "cuda", "--device-timeout-s", "3") as server:
        with attnd.connect(server.address, timeout_s=60) as client:
            with client.create_cache(**GEOMETRY).session() as session, pytest.raises(attnd.Disconnected):
                call(session, attnd.AttentionOptions(backend="naive", scale=ENDLESS))
        assert server.wait(60) == EXIT_CODE
        assert "has not ended within 3 s" in server.log


def test_a_full_gpu_refuses_a_cache_and_goes_on(tmp_path: Path) -> None:
    too_much = torch.cuda.mem_get_info()[1] * 2
    with ServerProcess(tmp_path / "log", "--device", "cuda", "--kv-bytes", str(too_much)) as server:
        with attnd.connect(server.address, timeout_s=60) as client:
            page_bytes = 16 * 2 * 64 * 2 * 2 * 2  # tokens, KV heads, elements, K and V, bytes, layers
            num_pages = torch.cuda.mem_get_info()[1] // page_bytes
            for _ in range(3):
                with pytest.raises(attnd.Exhausted, match=r"of the server's \d+ bytes .* are free, but cuda:0 cannot"):
                    client.create_cache(**{**GEOMETRY, "num_pages": num_pages})
            assert not client.list_caches()
            with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
                call(session, NAIVE)
            assert "the device failed" not in server.log
