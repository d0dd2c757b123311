"""The service with its caches on a GPU, and workers on the processor and on the GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import attnd
from tests.attention import dense_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

PAGE, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 16, 8, 2, 64, 3


@pytest.fixture
def cache(client: attnd.Client) -> Iterator[attnd.Cache]:
    geometry = {"num_layers": LAYERS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "num_pages": 64}
    with client.create_cache(**geometry, page_size=PAGE, dtype=torch.bfloat16) as created:
        yield created


def test_the_server_holds_its_caches_on_the_gpu(client: attnd.Client) -> None:
    (device,) = client.capabilities().devices
    assert device.name == "cuda:0"
    assert device.uuid
    assert device.num_bytes_limit > 1 << 30


@pytest.mark.parametrize("worker", ["cpu", "cuda"])
@pytest.mark.parametrize("backend", ["auto", "naive", "sdpa", "triton", "triton_grouped"])
def test_prefill_and_decode_from_either_side(cache: attnd.Cache, worker: str, backend: str) -> None:
    options = attnd.AttentionOptions(backend=backend)
    pages = torch.randperm(64)[:8].tolist()
    histories: list[tuple[torch.Tensor, torch.Tensor]] = []
    with cache.session() as session:
        for context_len, num_new in ((0, 37), (37, 1), (38, 1), (39, 20)):
            slots = [pages[p // PAGE] * PAGE + p % PAGE for p in range(context_len, context_len + num_new)]
            kind = "decode" if num_new == 1 else "prefill"
            step = session.step(attnd.StepMetadata([num_new], [context_len], [pages], slots, kind=kind))
            for layer in range(LAYERS):
                q = torch.randn(num_new, HEADS, HEAD_DIM, device=worker, dtype=torch.bfloat16)
                k, v = (torch.randn(num_new, KV_HEADS, HEAD_DIM, device=worker, dtype=torch.bfloat16) for _ in "kv")
                if context_len == 0:
                    histories.append((k, v))
                else:
                    histories[layer] = tuple(torch.cat(pair) for pair in zip(histories[layer], (k, v), strict=True))
                output = step.attend(layer, q, k, v, options)
                assert output.device == q.device
                assert output.dtype == torch.bfloat16
                torch.testing.assert_close(output, dense_attention(q, *histories[layer]), rtol=2e-2, atol=2e-2)
        assert session.timings().backend == ("triton_grouped" if backend == "auto" else backend)


def test_what_is_stored_from_the_gpu_reads_back_to_it(cache: attnd.Cache) -> None:
    k = torch.randn(40, KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    slots = torch.randperm(64 * PAGE)[:40]
    cache.store_kv(1, slots, k, -k)
    read_k, read_v = cache.read_kv(1, slots.cuda(), like=k)
    assert read_k.is_cuda
    assert torch.equal(read_k, k)
    assert torch.equal(read_v, -k)


def test_a_cache_that_does_not_fit_is_refused_and_the_server_goes_on(client: attnd.Client, cache: attnd.Cache) -> None:
    with pytest.raises(attnd.Exhausted, match="are free"):
        client.create_cache(num_layers=80, num_kv_heads=8, head_dim=128, num_pages=1 << 20)
    k = torch.ones(1, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    assert cache.store_kv(0, [5], k, k) == 1


@pytest.mark.parametrize("is_warm", [False, True])
def test_copies_are_told_from_the_kernels(client: attnd.Client, is_warm: bool) -> None:
    geometry = {"num_layers": 2, "num_kv_heads": 8, "head_dim": 128, "num_pages": 64, "dtype": torch.bfloat16}
    with client.create_cache(**geometry) as cache, cache.session() as session:
        if is_warm:
            cache.warm_up(num_heads=32, max_reqs=64)
        q, k, v = (torch.randn(64, heads, 128, dtype=torch.bfloat16) for heads in (32, 8, 8))
        metadata = attnd.StepMetadata(
            [1] * 64, [0] * 64, [[r] for r in range(64)], [16 * r for r in range(64)], kind="decode"
        )
        for _ in range(3):
            step = session.step(metadata)
            for layer in range(2):
                assert torch.equal(step.attend(layer, q, k, v), v.repeat_interleave(4, 1))
        timings = session.timings()
        assert min(timings.copy_in_us, timings.kernel_us, timings.copy_out_us) > 0  # half a MiB each way, six times
        stored = session.step(attnd.StepMetadata([64], [0], [[0, 1, 2, 3]], list(range(64)), store_only=True))
        session.reset_timings()
        assert stored.attend(0, None, k, v) is None
        assert session.timings().copy_out_us == 0
