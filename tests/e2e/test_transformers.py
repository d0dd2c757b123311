"""`model.generate` of transformers with attention on a server: the same tokens as with attention of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import attnd
from tests.servers import ServerProcess

transformers = pytest.importorskip("transformers", reason="needs transformers")

from attnd.integrations.transformers import RemoteCache  # noqa: E402  # needs transformers

VOCAB = 97
PAD = 0

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # large enough that a token depends on what attention saw
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
WINDOW = 6
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**COMMON)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**COMMON, sliding_window=WINDOW)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **COMMON,
            sliding_window=WINDOW,
            attn_logit_softcapping=3.0,
            query_pre_attn_scalar=24,
            tie_word_embeddings=False,  # else it repeats the last token, whatever attention says
        )
    ),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**COMMON, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1)
    ),
    # Windows only in its masks, not in what it tells the attention function.
    "phimoe": lambda: transformers.PhimoeForCausalLM(
        transformers.PhimoeConfig(**COMMON, sliding_window=WINDOW, num_local_experts=2)
    ),
}
GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model("llama")


def make_model(name: str) -> Any:
    torch.manual_seed(1)
    model = MODELS[name]().eval()
    if name == "gpt_oss":
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    return model


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return padded_batch([11, 19, 3, 14])


def padded_batch(lengths: list[int]) -> dict[str, torch.Tensor]:
    """Prompts of these lengths, padded on the left."""
    longest = max(lengths)
    mask = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])
    tokens = torch.randint(2, VOCAB, mask.shape).masked_fill(mask == 0, PAD)
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.fixture
def remote(client: attnd.Client) -> Iterator[Callable[..., RemoteCache]]:
    """Makes caches that are closed afterwards."""
    caches: list[RemoteCache] = []

    def make(model: Any, max_tokens: int = 1024, **options: Any) -> RemoteCache:
        caches.append(RemoteCache(client, model.config, max_tokens=max_tokens, dtype=model.dtype, **options))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()


def generate(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    torch.manual_seed(2)
    return model.generate(**inputs, **options)


def locally(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    model.set_attn_implementation("eager")
    return generate(model, inputs, **options)


def remotely(model: Any, inputs: dict[str, torch.Tensor], cache: RemoteCache, **options: Any) -> torch.Tensor:
    model.set_attn_implementation("attnd")
    return generate(model, inputs, past_key_values=cache, **options)


def test_greedy_tokens_of_a_padded_batch(model, batch, remote):
    cache = remote(model)
    assert torch.equal(remotely(model, batch, cache, **GREEDY), locally(model, batch, **GREEDY))
    assert cache.timings().num_steps == 12
    assert cache.timings().num_calls == 12 * 3


@torch.no_grad()
def test_logits_of_a_prompt_in_pieces(model, batch, remote):
    tokens, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model.set_attn_implementation("eager")
    expected = model(tokens, attention_mask=mask, position_ids=positions).logits
    model.set_attn_implementation("attnd")
    cache = remote(model)
    pieces = []
    for first, end in ((0, 4), (4, 12), (12, 19)):  # in the first piece some rows have nothing but padding
        piece = {"attention_mask": mask[:, :end], "position_ids": positions[:, first:end]}
        pieces.append(model(tokens[:, first:end], past_key_values=cache, **piece).logits)
    actual = torch.cat(pieces, 1)
    scale = expected[mask == 1].abs().max()
    torch.testing.assert_close(actual[mask == 1] / scale, expected[mask == 1] / scale, atol=1e-5, rtol=0)


def test_a_piece_of_nothing_but_padding(llama, remote):
    llama.set_attn_implementation("attnd")
    cache = remote(llama)
    with torch.no_grad():
        llama(torch.zeros(2, 3, dtype=torch.int64), attention_mask=torch.zeros(2, 3), past_key_values=cache)
    assert (cache.get_seq_length(), cache.num_pages_used, cache.timings().num_calls) == (3, 0, 0)


def test_sampling_with_a_seed(llama, batch, remote):
    options = {"max_new_tokens": 12, "do_sample": True, "top_k": 20}
    assert torch.equal(remotely(llama, batch, remote(llama), **options), locally(llama, batch, **options))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_beam_search(name, remote):
    model, inputs = make_model(name), padded_batch([5, 13])
    options = {"max_new_tokens": 24, "do_sample": False, "num_beams": 4, "num_return_sequences": 2, "eos_token_id": 7}
    cache = remote(model, page_size=4)
    assert torch.equal(remotely(model, inputs, cache, **options), locally(model, inputs, **options))
    assert cache.num_pages_used < 4 * (5 + 24 + 13 + 24) / 4  # beams share pages


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_prompt_lookup_decoding(name, remote):
    model = make_model(name)
    inputs = {"input_ids": torch.randint(2, VOCAB, (1, 6)).repeat(1, 4)}
    options = {"max_new_tokens": 24, "do_sample": False}
    cache = remote(model, page_size=4)
    actual = remotely(model, inputs, cache, **options, prompt_lookup_num_tokens=4)
    assert torch.equal(actual, locally(model, inputs, **options))
    assert cache.get_seq_length() == actual.shape[1] - 1


def test_assisted_decoding(llama, remote):
    inputs = padded_batch([9])
    options = {"max_new_tokens": 20, "do_sample": False}
    assistant = make_model("llama")  # the same weights: all its guesses are right
    with torch.no_grad():
        assistant.lm_head.weight[::3] += 0.3  # now some are wrong
    actual = remotely(llama, inputs, remote(llama), **options, assistant_model=assistant)
    assert torch.equal(actual, locally(llama, inputs, **options))


def test_contrast_of_rows_selected_and_repeated(llama, batch, remote):
    """After select and repeat each row goes on as it would have alone."""
    tokens, mask = batch["input_ids"], batch["attention_mask"]
    cache = remote(llama, page_size=4)
    llama.set_attn_implementation("attnd")
    rows = [3, 3, 1, 1]
    with torch.no_grad():
        llama(tokens, attention_mask=mask, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([3, 1]))
        cache.batch_repeat_interleave(2)
        new = torch.randint(2, VOCAB, (4, 2))
        longer = torch.cat([mask[rows], torch.ones_like(new)], 1)
        actual = llama(new, attention_mask=longer, past_key_values=cache).logits
        llama.set_attn_implementation("eager")
        expected = llama(torch.cat([tokens[rows], new], 1), attention_mask=longer).logits[:, -2:]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("crop", [-9, 10])
def test_crop_by_and_to_a_length(llama, batch, remote, crop):
    tokens, mask = batch["input_ids"], batch["attention_mask"]
    cache = remote(llama, page_size=4)
    llama.set_attn_implementation("attnd")
    with torch.no_grad():
        llama(tokens, attention_mask=mask, past_key_values=cache)
        cache.crop(crop)
        assert cache.get_seq_length() == 10
        actual = llama(tokens[:, 10:], attention_mask=mask, past_key_values=cache).logits
        llama.set_attn_implementation("eager")
        expected = llama(tokens, attention_mask=mask).logits[:, 10:]
    torch.testing.assert_close(actual[mask[:, 10:] == 1], expected[mask[:, 10:] == 1], atol=1e-4, rtol=1e-4)


def test_a_conversation_goes_on_in_the_same_cache(llama, remote):
    cache = remote(llama)
    first = remotely(llama, padded_batch([8]), cache, **GREEDY)
    longer = {"input_ids": torch.cat([first, torch.randint(2, VOCAB, (1, 5))], 1)}
    assert torch.equal(remotely(llama, longer, cache, **GREEDY), locally(llama, longer, **GREEDY))
    assert cache.timings().num_steps == 24


def test_reset_frees_the_pages_for_another_batch(llama, batch, remote):
    cache = remote(llama, max_tokens=4 * 32)
    remotely(llama, batch, cache, **GREEDY)
    with pytest.raises(attnd.InvalidRequest, match="batch size is 2, but the cache holds 4 rows"), torch.no_grad():
        llama(torch.ones(2, 1, dtype=torch.int64), past_key_values=cache)
    cache.reset()
    assert (cache.num_pages_used, cache.get_seq_length()) == (0, 0)
    inputs = padded_batch([23, 30])
    assert torch.equal(remotely(llama, inputs, cache, **GREEDY), locally(llama, inputs, **GREEDY))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(batch, remote, dtype):
    model = make_model("llama").to(dtype)
    inputs = {"input_ids": batch["input_ids"][:1, -8:], "attention_mask": torch.ones(1, 8)}
    cache = remote(model)
    model.set_attn_implementation("attnd")
    with torch.no_grad():
        actual = model(**inputs, past_key_values=cache).logits
        model.set_attn_implementation("eager")
        expected = model(**inputs).logits
    assert actual.dtype == dtype
    scale = expected.abs().max()
    torch.testing.assert_close(actual / scale, expected / scale, atol=4 * torch.finfo(dtype).eps, rtol=0)


def test_fp8_pages(llama, batch, remote):
    cache, plain = remote(llama, kv_dtype="float8_e4m3fn"), remote(llama)
    assert 4 * cache.cache.info().num_bytes == plain.cache.info().num_bytes
    # The first new token sees nothing that was rounded.
    first = batch["input_ids"].shape[1] + 1
    assert torch.equal(remotely(llama, batch, cache, **GREEDY)[:, :first], locally(llama, batch, **GREEDY)[:, :first])
    assert cache.timings().num_steps == 12


def test_scales_of_fp8_pages(llama, batch, remote):
    cache = remote(llama, kv_dtype="float8_e4m3fn", k_scales=0.5, v_scales=[0.25, 2.0])
    config = cache.cache.info().config
    assert (config.k_scales.shape, config.v_scales.shape) == ([1], [2])
    tokens = remotely(llama, batch, cache, **GREEDY)
    other = remotely(llama, batch, remote(llama, kv_dtype="float8_e4m3fn", k_scales=64.0, v_scales=64.0), **GREEDY)
    assert not torch.equal(tokens, other)  # with so coarse a scale K and V are rounded to little


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_prompt_larger_than_a_step_or_a_message(tmp_path, name):
    model, inputs = make_model(name), padded_batch([40, 90, 7])
    expected = locally(model, inputs, **GREEDY)
    model.set_attn_implementation("attnd")
    for limits in (["--max-step-tokens", "32"], ["--max-step-reqs", "2"], ["--region-bytes", "64KiB"]):
        with ServerProcess(tmp_path / "log", "--device", "cpu", *limits) as server:
            with attnd.connect(server.address) as client:
                kinds = {"max_tokens": 1024, "dtype": model.dtype, "page_size": 4}
                with RemoteCache(client, model.config, **kinds) as cache:
                    assert torch.equal(generate(model, inputs, past_key_values=cache, **GREEDY), expected)


def test_error_when_the_pages_do_not_suffice(llama, remote):
    cache = remote(llama, max_tokens=4 * 16)
    with pytest.raises(attnd.Exhausted, match="4 pages of 16 tokens, 0 of them free, but must leave 4 free for 4 rows"):
        remotely(llama, padded_batch([16, 16, 16, 16]), cache, **GREEDY)
    cache.reset()
    with pytest.raises(attnd.Exhausted, match="4 of them free, but must leave 8 free for 4 rows of up to 30 tokens"):
        remotely(llama, padded_batch([30, 30, 30, 30]), cache, **GREEDY)


def test_error_without_a_remote_cache(llama, batch):
    llama.set_attn_implementation("attnd")
    with pytest.raises(attnd.InvalidRequest, match="pass past_key_values=RemoteCache"):
        generate(llama, batch, **GREEDY)


def test_error_with_another_attention(llama, batch, remote):
    llama.set_attn_implementation("sdpa")
    with pytest.raises(attnd.Unsupported, match=r"call model.set_attn_implementation\(\"attnd\"\)"):
        generate(llama, batch, past_key_values=remote(llama), **GREEDY)


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
def test_error_for_attention_weights(remote, batch, kind):
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=2, pad_token_id=PAD)
        model = transformers.GPT2LMHeadModel(config).eval()
    elif kind == "opt":  # takes it as an argument of its own, and tells no layer
        common = {key: value for key, value in COMMON.items() if key not in ("num_key_value_heads", "head_dim")}
        config = transformers.OPTConfig(**common, ffn_dim=64, word_embed_proj_dim=64)
        model = transformers.OPTForCausalLM(config).eval()
    else:
        model = make_model(kind)
    model.set_attn_implementation("attnd")
    cache = remote(model)
    with torch.no_grad():
        with pytest.raises(
            attnd.Unsupported, match="output_attentions is true, but a server gives no attention weights"
        ):
            model(**batch, past_key_values=cache, output_attentions=True)
        assert cache.get_seq_length() == 0
        model(**batch, past_key_values=cache)


def test_error_with_gradients(llama, batch, remote):
    llama.set_attn_implementation("attnd")
    with pytest.raises(attnd.Unsupported, match="no gradients"):
        llama(**batch, past_key_values=remote(llama))


def test_error_for_a_mask_that_forgets_tokens(llama, batch, remote):
    llama.set_attn_implementation("attnd")
    cache = remote(llama)
    tokens, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        llama(tokens, attention_mask=mask, past_key_values=cache)
        forgetful = torch.cat([mask, torch.ones(4, 1, dtype=torch.int64)], 1)
        forgetful[1, 2] = 0
        with pytest.raises(attnd.InvalidRequest, match=r"attention_mask\[1\] has 18 real tokens .* must have 19"):
            llama(tokens[:, :1], attention_mask=forgetful, past_key_values=cache)


def test_error_for_a_mask_of_the_callers_own(llama, batch, remote):
    llama.set_attn_implementation("attnd")
    custom = torch.ones(4, 1, 19, 19, dtype=torch.bool).tril()
    with pytest.raises(attnd.InvalidRequest, match=r"attention_mask has shape \[4, 1, 19, 19\]"), torch.no_grad():
        llama(batch["input_ids"], attention_mask=custom, past_key_values=remote(llama))


def test_error_for_models_with_other_layers(client):
    config = transformers.Llama4TextConfig(num_hidden_layers=4)
    with pytest.raises(attnd.Unsupported, match=r"layer_types\[0\] is chunked_attention"):
        RemoteCache(client, config, max_tokens=64, dtype=torch.float32)
    with pytest.raises(attnd.Unsupported, match="caches latents"):
        RemoteCache(client, transformers.DeepseekV3Config(), max_tokens=64, dtype=torch.float32)
    with pytest.raises(attnd.Unsupported, match="encoder-decoder"):
        RemoteCache(client, transformers.T5Config(), max_tokens=64, dtype=torch.float32)


def test_the_cut_of_keys_reaches_the_server(remote, llama):
    cache = remote(llama, kv_split=attnd.KVSplit(chunk_size=128, batch_invariant=True))
    kv_split = cache.cache.info().config.kv_split
    assert (kv_split.chunk_size, kv_split.batch_invariant) == (128, True)


def test_close_frees_the_servers_memory(client, llama):
    with RemoteCache(client, llama.config, max_tokens=64, dtype=torch.float32, name="closed") as cache:
        assert "closed" in [info.name for info in client.list_caches()]
    assert "closed" not in [info.name for info in client.list_caches()]
    cache.close()  # again is fine
