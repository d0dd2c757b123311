"""`model.generate` whose server is killed or restarted on the way: the same tokens as without a server."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import attnd
from tests.servers import ServerProcess

transformers = pytest.importorskip("transformers", reason="needs transformers")

from attnd.integrations.transformers import RemoteCache  # noqa: E402
from attnd.integrations.transformers import recovery as recomputing  # noqa: E402  # needs transformers
from tests.e2e.test_transformers import GREEDY, locally, make_model, padded_batch, remotely  # noqa: E402


class After(transformers.LogitsProcessor):
    """Does something once, between two passes."""

    def __init__(self, num_passes: int, do: Callable[[], None]) -> None:
        self.num_passes, self.do = num_passes, do

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.num_passes -= 1
        if self.num_passes == 0:
            self.do()
        return scores


def recomputed(
    model: Any, inputs: Any, cache: RemoteCache, num_passes: int, do: Callable[[], Any], **options: Any
) -> torch.Tensor:
    """Generates, and does something after so many passes."""
    return remotely(model, inputs, cache, logits_processor=[After(num_passes, do)], **options)


def deleted(model: Any, inputs: Any, cache: RemoteCache, num_passes: int, **options: Any) -> torch.Tensor:
    """Generates, and loses the cache after so many passes."""
    lost = cache.cache.ref.id
    output = recomputed(model, inputs, cache, num_passes, cache.cache.delete, **options)
    assert cache.cache.ref.id != lost
    return output


def within_a_pass(model: Any, do: Callable[[], None], layer: int = 1) -> Any:
    """Does something once before a layer of the next pass attends. Call what is returned to be done with it."""

    def hook(*_: object) -> None:
        handle.remove()
        do()

    handle = model.model.layers[layer].self_attn.register_forward_pre_hook(hook)
    return handle


def test_the_same_tokens_whatever_happens_to_the_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "attnd")
    model = make_model("llama")
    inputs = padded_batch([11, 19, 3])
    expected = locally(model, inputs, **GREEDY)
    beams = {"max_new_tokens": 10, "num_beams": 3, "do_sample": False}
    expected_beams = locally(model, inputs, **beams)
    snapshots = ["--device", "cpu", "--snapshot-dir", str(tmp_path / "snapshots"), "--drain-s", "0.2"]
    servers = [ServerProcess(tmp_path / "log", *snapshots)]

    def restart(how: str, *options: str) -> None:
        getattr(servers[-1], how)()
        servers[-1].wait()
        servers.append(ServerProcess(tmp_path / "log", *snapshots, *options, port=servers[0].port))

    with attnd.connect(servers[0].address, connect_timeout_s=60) as client:
        options = {"max_tokens": 1024, "dtype": model.dtype, "page_size": 4}
        with RemoteCache(client, model.config, **options, on_cache_lost="recompute", model=model) as cache:
            ids = [cache.cache.ref.id]
            # Killed between two layers of the fifth pass.
            kill = partial(restart, "kill")
            actual = recomputed(model, inputs, cache, 4, lambda: within_a_pass(model, kill), **GREEDY)
            assert torch.equal(actual, expected)
            ids.append(cache.cache.ref.id)
            assert ids[0] != ids[1]
            assert "the cache is lost, and computed again" in caplog.text

            cache.reset()
            caplog.clear()
            actual = recomputed(model, inputs, cache, 5, lambda: restart("terminate", "--restore"), **GREEDY)
            assert torch.equal(actual, expected)
            assert cache.cache.ref.id == ids[1]
            assert "the server is there again, with the cache" in caplog.text
            assert "computed again" not in caplog.text

            cache.reset()
            caplog.clear()
            actual = recomputed(model, inputs, cache, 6, kill, **beams)
            assert torch.equal(actual, expected_beams)
            assert "the cache is lost, and computed again" in caplog.text
            assert cache.cache.info().num_pages_written >= cache.num_pages_used
    for server in servers:
        server.stop()
    assert "internal error" not in servers[0].log


@pytest.fixture
def lossy(client: attnd.Client) -> Iterator[Callable[..., RemoteCache]]:
    """Makes caches that the test may lose: that is, delete."""
    caches: list[RemoteCache] = []

    def make(model: Any, **options: Any) -> RemoteCache:
        options = {"max_tokens": 1024, "dtype": model.dtype, "page_size": 4, "on_cache_lost": "recompute"} | options
        caches.append(RemoteCache(client, model.config, **options, model=model))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("pass_tokens", [1, 30])
def test_windows_sinks_and_passes_of_any_size(lossy, monkeypatch, name: str, pass_tokens: int) -> None:
    monkeypatch.setattr(recomputing, "PASS_TOKENS", pass_tokens)
    model, inputs = make_model(name), padded_batch([11, 19, 3, 14])
    cache = lossy(model)
    actual = deleted(model, inputs, cache, 6, **GREEDY)
    assert torch.equal(actual, locally(model, inputs, **GREEDY))


@pytest.mark.parametrize("num_passes", [1, 9])
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 4, "do_sample": False}, {"do_sample": True}, {"prompt_lookup_num_tokens": 4, "do_sample": False}],
    ids=["beams", "sampling", "prompt-lookup"],
)
def test_ways_to_generate(lossy, num_passes: int, options: dict[str, Any]) -> None:
    model = make_model("llama")
    inputs = {"input_ids": torch.randint(2, 97, (1, 6)).repeat(1, 4)}
    options = {"max_new_tokens": 14} | options
    cache = lossy(model)
    actual = deleted(model, inputs, cache, num_passes, **options)
    assert torch.equal(actual, locally(model, inputs, **options))


def test_lost_again_and_again_at_every_layer(lossy) -> None:
    model, inputs = make_model("llama"), padded_batch([11, 19])
    cache = lossy(model)
    for layer in (0, 1, 2):
        cache.reset()
        do = lambda layer=layer: within_a_pass(model, lambda: cache.cache.delete(), layer)  # noqa: E731
        actual = recomputed(model, inputs, cache, 3, do, **GREEDY)
        assert torch.equal(actual, locally(model, inputs, **GREEDY))


def test_a_conversation_goes_on_after_a_loss(lossy) -> None:
    model = make_model("llama")
    cache = lossy(model)
    first = remotely(model, padded_batch([8]), cache, **GREEDY)
    cache.cache.delete()
    longer = {"input_ids": torch.cat([first, torch.randint(2, 97, (1, 5))], 1)}
    assert torch.equal(remotely(model, longer, cache, **GREEDY), locally(model, longer, **GREEDY))


def test_without_being_asked_it_raises(lossy) -> None:
    model = make_model("llama")
    with pytest.raises(attnd.InvalidRequest, match="on_cache_lost is 'retry', but must be one of raise, recompute"):
        lossy(model, on_cache_lost="retry")
    with pytest.raises(attnd.InvalidRequest, match='model must be given with on_cache_lost="recompute", and only then'):
        lossy(model, on_cache_lost="raise")
    with RemoteCache(lossy(model).cache._client, model.config, max_tokens=64, dtype=model.dtype) as cache:
        with pytest.raises(attnd.CacheLost):
            recomputed(model, padded_batch([8]), cache, 2, cache.cache.delete, **GREEDY)


def test_tokens_that_nobody_saw_cannot_be_computed_again(lossy) -> None:
    model = make_model("llama")
    cache = lossy(model)
    embeddings = {"inputs_embeds": model.get_input_embeddings()(padded_batch([8])["input_ids"]).detach()}
    with pytest.raises(attnd.CacheLost, match="it cannot be computed again: tokens came to the model as embeddings"):
        recomputed(model, embeddings, cache, 2, cache.cache.delete, **GREEDY)
    cache.reset()
    inputs = padded_batch([8])
    assert torch.equal(
        recomputed(model, inputs, lossy(model), 2, lambda: None, **GREEDY), locally(model, inputs, **GREEDY)
    )
