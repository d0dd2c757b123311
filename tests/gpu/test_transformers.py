"""transformers models on a GPU, over the cuda plane: the tokens of eager attention, and passes that are stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import attnd
from tests.servers import ServerProcess

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

from attnd.integrations.transformers import RemoteCache, attach  # noqa: E402
from tests.e2e.test_transformers import GREEDY, VOCAB, make_model, padded_batch  # noqa: E402

NAMES = ["llama", "gemma2", "gpt_oss"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("transformers")
    options = ("--device", "cuda:0", "--socket-dir", str(folder / "sockets"), "--kv-bytes", "2GiB")
    with ServerProcess(folder / "log", *options, "--cuda-region-bytes", "1MiB") as server:
        yield server.address
        log = server.log
    assert "internal error" not in log, log


@pytest.fixture
def client(address: str) -> Iterator[attnd.Client]:
    with attnd.connect(address) as connected:
        yield connected


@pytest.fixture
def gpu_model() -> Callable[[str], Any]:
    """Makes float32 models on the worker's GPU: the second one, where there are two."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    torch.cuda.set_device(device)
    return lambda name: make_model(name).to(device)


def on(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def eager(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    model.set_attn_implementation("eager")
    torch.manual_seed(2)
    tokens: torch.Tensor = model.generate(**inputs, **options)
    model.set_attn_implementation("attnd")
    return tokens


def remote(client: attnd.Client, model: Any, **options: Any) -> RemoteCache:
    return RemoteCache(client, model.config, **{"max_tokens": 4096, "dtype": model.dtype, "page_size": 16} | options)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_over_the_cuda_plane(client, gpu_model, name: str) -> None:
    model = gpu_model(name)
    inputs = on(model, padded_batch([11, 19, 3, 14]))
    expected = eager(model, inputs, **GREEDY)
    with remote(client, model) as cache:
        assert torch.equal(model.generate(**inputs, past_key_values=cache, **GREEDY), expected)
        assert cache.session.plane == "cuda", cache.session.refusals


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False},
        {"prompt_lookup_num_tokens": 3, "do_sample": False},
        {"guidance_scale": 1.5, "do_sample": False},
        {"prefill_chunk_size": 4, "do_sample": False},
        {"use_cache": False, "do_sample": False},
    ],
    ids=str,
)
def test_attached(client, gpu_model, options: dict[str, Any]) -> None:
    model = gpu_model("llama")
    inputs = on(model, padded_batch([13]))
    options = {"max_new_tokens": 10} | options
    expected = eager(model, inputs, **options)
    model.set_attn_implementation("eager")
    with attach(model, client, max_tokens=2048):
        torch.manual_seed(2)
        assert torch.equal(model.generate(**inputs, **options), expected)


@torch.no_grad()
def test_a_prompt_larger_than_the_region_is_split(client, gpu_model) -> None:
    model = gpu_model("llama")
    model.config.max_position_embeddings = 4096
    ids = torch.randint(2, VOCAB, (2, 1500), device=model.device)
    model.set_attn_implementation("eager")
    expected = model(ids).logits
    model.set_attn_implementation("attnd")
    with remote(client, model) as cache:
        actual = torch.cat([model(ids[:, :1400], past_key_values=cache).logits], 1)
        assert cache.session.plane != "cuda"
        assert "larger than the plane's region" in cache.session.refusals["cuda"]
        rest = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(1400, 1404)]
        assert cache.session.plane == "cuda", cache.session.refusals
    scale = expected.abs().max()
    actual = torch.cat([actual, *rest], 1)
    torch.testing.assert_close(actual / scale, expected[:, :1404] / scale, atol=2e-3, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_pass_stopped_on_the_cuda_plane_may_be_run_again(client, gpu_model, layer: int) -> None:
    model = gpu_model("llama")
    ids = torch.randint(2, VOCAB, (2, 24), device=model.device)
    model.set_attn_implementation("eager")
    expected = model(ids).logits
    model.set_attn_implementation("attnd")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with remote(client, model) as cache:
        model(ids[:, :8], past_key_values=cache)
        model(ids[:, 8:12], past_key_values=cache)
        handle = model.model.layers[layer].self_attn.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 12:], past_key_values=cache)
        handle.remove()
        assert cache.get_seq_length() == 12
        actual = model(ids[:, 12:23], past_key_values=cache).logits
        last = model(ids[:, 23:], past_key_values=cache).logits
        assert cache.session.plane == "cuda", cache.session.refusals
    scale = expected.abs().max()
    torch.testing.assert_close(torch.cat([actual, last], 1) / scale, expected[:, 12:] / scale, atol=2e-3, rtol=0)


@torch.no_grad()
def test_padding_on_the_right(client, gpu_model) -> None:
    model = gpu_model("llama")
    mask = torch.tensor([[1] * 9, [1, 1, 1, 1, 0, 0, 0, 0, 0]], device=model.device)
    ids = torch.randint(2, VOCAB, (2, 9), device=model.device)
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    expected = eager(model, inputs, **GREEDY)
    with remote(client, model) as cache:
        assert torch.equal(model.generate(**inputs, past_key_values=cache, **GREEDY), expected)


@torch.no_grad()
def test_forks_go_on_apart(client, gpu_model) -> None:
    model = gpu_model("gemma2")
    ids = torch.randint(2, VOCAB, (2, 19), device=model.device)
    model.set_attn_implementation("attnd")
    with remote(client, model) as cache:
        model(ids, past_key_values=cache)
        with cache.fork() as fork:
            for each in (cache, fork, fork, cache):
                new = torch.randint(2, VOCAB, (2, 3), device=model.device)
                each.so_far = torch.cat([getattr(each, "so_far", ids), new], 1)
                actual = model(new, past_key_values=each).logits
                assert each.session.plane == "cuda", each.session.refusals
                model.set_attn_implementation("eager")
                wanted = model(each.so_far).logits[:, -3:]
                model.set_attn_implementation("attnd")
                scale = wanted.abs().max()
                torch.testing.assert_close(actual / scale, wanted / scale, atol=2e-3, rtol=0)
