"""A transformers model that is attached with one line: used as with any other attention."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import attnd
from tests.tiny_model import save_tiny_model

transformers = pytest.importorskip("transformers", reason="needs transformers")

from attnd.integrations.transformers import RemoteCache, attach, detach  # noqa: E402
from tests.e2e.test_transformers import GREEDY, MODELS, generate, locally, make_model, padded_batch  # noqa: E402


@pytest.fixture
def caches(client: attnd.Client) -> Iterator[Any]:
    """The names of caches that are leased, by which a test may see that none is left."""

    def there() -> list[str]:
        gc.collect()
        return [info.name for info in client.list_caches() if info.name == "attached"]

    yield there
    deadline = time.monotonic() + 20  # one that was dropped goes by itself
    while there():
        assert time.monotonic() < deadline, "a cache is left"
        time.sleep(0.05)


def attached(client: attnd.Client, model: Any, **options: Any) -> Any:
    return attach(model, client, **{"max_tokens": 1024, "name": "attached", "page_size": 4} | options)


@pytest.mark.parametrize("name", list(MODELS))
def test_generate(client, caches, name: str) -> None:
    model, inputs = make_model(name), padded_batch([11, 19, 3, 14])
    expected = locally(model, inputs, **GREEDY)
    with attached(client, model):
        assert torch.equal(generate(model, inputs, **GREEDY), expected)
        assert caches() == []
    assert model.config._attn_implementation == "eager"
    assert torch.equal(generate(model, inputs, **GREEDY), expected)


WAYS: dict[str, dict[str, Any]] = {
    "sampled": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "prompt-lookup": {"prompt_lookup_num_tokens": 3, "do_sample": False},
    "classifier-free-guidance": {"guidance_scale": 1.7, "do_sample": False},
    "without-cache": {"use_cache": False, "do_sample": False},
    "chunked-prefill": {"prefill_chunk_size": 4, "do_sample": False},
    "early-exit": {"assistant_early_exit": 2, "do_sample": False},
}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("on_cache_lost", ["raise", "recompute"])
def test_ways_to_generate(client, caches, way: str, on_cache_lost: str) -> None:
    model, inputs = make_model("llama"), padded_batch([13])
    options = {"max_new_tokens": 10} | WAYS[way]
    expected = locally(model, inputs, **options)
    with attached(client, model, on_cache_lost=on_cache_lost):
        assert torch.equal(generate(model, inputs, **options), expected)


@pytest.mark.parametrize("who", ["both", "model", "draft"])
def test_assisted_decoding_with_a_draft(client, caches, who: str) -> None:
    model, draft, inputs = make_model("llama"), make_model("llama"), padded_batch([9])
    with torch.no_grad():
        draft.lm_head.weight[::3] += 0.3
    options = {"max_new_tokens": 20, "do_sample": False, "assistant_model": draft}
    draft.set_attn_implementation("eager")
    expected = locally(model, inputs, **options)
    for each in (model, draft):
        if who in ("both", "model" if each is model else "draft"):
            attached(client, each)
    assert torch.equal(generate(model, inputs, **options), expected)
    for each in (model, draft):
        if each.config._attn_implementation == "attnd":
            detach(each)


def test_pipeline_over_a_list(client, caches, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path)
    prompts = ["the ferry was on the pier", "a boat", "in the winter the captain is in the library on the island"]
    pipe = transformers.pipeline("text-generation", model=str(folder), tokenizer=str(folder), device="cpu")
    pipe.tokenizer.pad_token = "<end>"
    options = {"max_new_tokens": 8, "do_sample": False, "batch_size": 2}
    expected = pipe(prompts, **options)
    with attached(client, pipe.model):
        assert pipe(prompts, **options) == expected


@torch.no_grad()
def test_calls_without_a_cache(client, caches) -> None:
    model, inputs = make_model("gemma2"), padded_batch([11, 19, 3])
    real = inputs["attention_mask"] == 1
    model.set_attn_implementation("eager")
    expected = model(**inputs).logits[real]
    with attached(client, model):
        for options in ({}, {"use_cache": False}, {"past_key_values": None}, {"return_dict": False}):
            output = model(**inputs, **options)
            actual = output[0] if isinstance(output, tuple) else output.logits
            torch.testing.assert_close(actual[real], expected, atol=1e-4, rtol=1e-4)
        positional = model.model(inputs["input_ids"], inputs["attention_mask"], None, None)
        torch.testing.assert_close(
            positional.last_hidden_state[real], output_of(model, inputs)[real], atol=1e-4, rtol=1e-4
        )
        assert model(**inputs, use_cache=False).past_key_values is None
        assert isinstance(model(**inputs).past_key_values, RemoteCache)
        del output, positional
        gc.collect()


def output_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    hidden: torch.Tensor = model(**inputs, output_hidden_states=True).hidden_states[-1]
    return hidden


@torch.no_grad()
def test_a_call_goes_on_with_the_cache_of_another(client, caches) -> None:
    model = make_model("llama")
    ids = padded_batch([20])["input_ids"]
    model.set_attn_implementation("eager")
    expected = model(ids).logits
    with attached(client, model):
        first = model(ids[:, :9])
        second = model(ids[:, 9:], past_key_values=first.past_key_values)
        actual = torch.cat([first.logits, second.logits], 1)
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
        empty = transformers.DynamicCache(config=model.config)
        torch.testing.assert_close(model(ids, past_key_values=empty).logits, expected, atol=1e-4, rtol=1e-4)
        full = transformers.DynamicCache(config=model.config)
        full.update(torch.zeros(1, 2, 3, 32), torch.zeros(1, 2, 3, 32), 0)
        with pytest.raises(attnd.InvalidRequest, match="past_key_values is a DynamicCache with tokens"):
            model(ids, past_key_values=full)
        del first, second
        gc.collect()


def test_a_result_that_has_the_cache_goes_on(client, caches) -> None:
    model = make_model("llama")
    inputs = padded_batch([8])
    longer = torch.randint(2, 97, (1, 5))
    with attached(client, model):
        result = generate(model, inputs, **GREEDY, return_dict_in_generate=True)
        more = torch.cat([result.sequences, longer], 1)
        actual = generate(model, {"input_ids": more}, **GREEDY, past_key_values=result.past_key_values)
        assert len(caches()) == 1
        del result
    assert torch.equal(actual, locally(model, {"input_ids": more}, **GREEDY))


@pytest.mark.parametrize("way", ["generate", "call"])
def test_an_interrupted_call_frees_its_cache(client, caches, way: str) -> None:
    model, inputs = make_model("llama"), padded_batch([8])
    with attached(client, model):

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        handle = model.model.layers[1].register_forward_pre_hook(stop)
        run = {"generate": lambda: generate(model, inputs, **GREEDY), "call": lambda: model(**inputs, use_cache=False)}
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            run[way]()
        handle.remove()
        actual = generate(model, inputs, **GREEDY)
    assert torch.equal(actual, locally(model, inputs, **GREEDY))


def test_many_threads_at_once(client, caches) -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = make_model("llama")
    prompts = [padded_batch([length]) for length in (5, 9, 12, 16)]
    expected = [locally(model, prompt, **GREEDY) for prompt in prompts]
    with attached(client, model), ThreadPoolExecutor(4) as pool:
        for actual, each in zip(
            pool.map(lambda prompt: model.generate(**prompt, **GREEDY), prompts), expected, strict=True
        ):
            assert torch.equal(actual, each)


def test_copies_are_not_attached_and_say_so(client, caches) -> None:
    model, inputs = make_model("llama"), padded_batch([8])
    expected = locally(model, inputs, **GREEDY)
    with attached(client, model):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            if twin.config._attn_implementation == "attnd":
                with pytest.raises(attnd.InvalidRequest, match=r"attach\(model, client"):
                    twin.generate(**inputs, **GREEDY)
            with attached(client, twin):
                assert torch.equal(generate(twin, inputs, **GREEDY), expected)
            twin.set_attn_implementation("eager")
            assert torch.equal(generate(twin, inputs, **GREEDY), expected)


def test_attach_and_detach(client, caches) -> None:
    model = make_model("llama")
    before = dict(vars(model))
    attachment = attached(client, model)
    with pytest.raises(attnd.InvalidRequest, match="attached already"):
        attached(client, model)
    attachment.detach()
    attachment.detach()
    assert {name for name in vars(model) if name not in before} == set()
    assert not model.model._forward_pre_hooks
    assert not model.model._forward_hooks
    with pytest.raises(attnd.InvalidRequest, match="not attached"):
        detach(model)


def test_errors_say_what_to_do(client, caches) -> None:
    model, inputs = make_model("llama"), padded_batch([8])
    with pytest.raises(attnd.InvalidRequest, match="there is no option max_pages, but only backend,"):
        attached(client, model, max_pages=3)
    with pytest.raises(attnd.InvalidRequest, match="max_tokens is 0, but must be at least 1"):
        attached(client, model, max_tokens=0)
    with pytest.raises(attnd.InvalidRequest, match=r"client is a builtins\.str, but must be what attnd.connect gives"):
        attach(model, "localhost:7411", max_tokens=64)  # type: ignore[arg-type]
    assert model.config._attn_implementation != "attnd"
    with attached(client, model), pytest.raises(attnd.Unsupported, match="cache_implementation is 'static'"):
        generate(model, inputs, **GREEDY, cache_implementation="static")
    with attached(client, model, max_tokens=8), pytest.raises(attnd.Exhausted, match="max_tokens gives 2 pages"):
        generate(model, inputs, **GREEDY)


@torch.no_grad()
def test_several_prompts_in_a_row_are_refused(client, caches) -> None:
    model = make_model("llama")
    ids = padded_batch([11])["input_ids"]
    model.set_attn_implementation("eager")
    positions = torch.arange(3, 14)[None]
    expected = model(ids, position_ids=positions).logits
    with attached(client, model):
        torch.testing.assert_close(model(ids, position_ids=positions).logits, expected, atol=1e-4, rtol=1e-4)
        packed = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]])
        with pytest.raises(attnd.Unsupported, match="position_ids begin again within a row, but each row must be one"):
            model(ids, position_ids=packed)


def test_an_asyncio_client_is_refused(server_address) -> None:
    async def run() -> None:
        async with await attnd.aio.connect(server_address) as client:
            with pytest.raises(attnd.InvalidRequest, match="as models call attention without await"):
                attach(make_model("llama"), client, max_tokens=64)  # type: ignore[arg-type]

    asyncio.run(run())
