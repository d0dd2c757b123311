"""Encoder-decoders of transformers: cross-attention on a server, the encoder in the worker."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import attnd

transformers = pytest.importorskip("transformers", reason="needs transformers")

from attnd.integrations.transformers import RemoteCache, RemotePair, attach  # noqa: E402

VOCAB = 61
BART = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
    "init_std": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "forced_bos_token_id": None,
}
MODELS = {
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)),
    "marian": lambda: transformers.MarianMTModel(transformers.MarianConfig(**BART)),
    "pegasus": lambda: transformers.PegasusForConditionalGeneration(transformers.PegasusConfig(**BART)),
    "m2m_100": lambda: transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(**BART)),
}
GREEDY = {"min_new_tokens": 10, "max_new_tokens": 10, "do_sample": False}


def make(name: str) -> Any:
    torch.manual_seed(1)
    return MODELS[name]().eval()


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def inputs(lengths: tuple[int, ...] = (9, 4, 12)) -> dict[str, torch.Tensor]:
    """Sources of these lengths, padded on the right as encoders' are."""
    mask = torch.tensor([[1] * length + [0] * (max(lengths) - length) for length in lengths])
    return {"input_ids": torch.randint(3, VOCAB, mask.shape) * mask, "attention_mask": mask}


def eager(model: Any, given: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    model.set_attn_implementation("eager")
    tokens: torch.Tensor = model.generate(**given, **options)
    return tokens


@pytest.mark.parametrize("name", list(MODELS))
def test_greedy_tokens_attached(client, name: str) -> None:
    model, given = make(name), inputs()
    expected = eager(model, given, **GREEDY)
    assert len({tuple(row) for row in expected.tolist()}) > 1  # the source matters
    with attach(model, client, max_tokens=512, page_size=4):
        assert torch.equal(model.generate(**given, **GREEDY), expected)
    assert torch.equal(model.generate(**given, **GREEDY), expected)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}, {"do_sample": True, "top_k": 20}],
    ids=str,
)
def test_ways_to_generate(client, options: dict[str, Any]) -> None:
    model, given = make("bart"), inputs()
    options = GREEDY | options
    torch.manual_seed(5)
    expected = eager(model, given, **options)
    with attach(model, client, max_tokens=1024, page_size=4):
        torch.manual_seed(5)
        assert torch.equal(model.generate(**given, **options), expected)


def test_guidance(client) -> None:
    """Its second context is an encoder's input of one token, with a mask of several."""
    model, given = make("bart"), inputs((7,))
    expected = eager(model, given, **GREEDY, guidance_scale=1.5)
    with attach(model, client, max_tokens=512, page_size=4):
        assert torch.equal(model.generate(**given, **GREEDY, guidance_scale=1.5), expected)


def test_a_pair_by_hand_is_used_again_after_reset(client) -> None:
    model = make("bart")
    with RemotePair(client, model.config, max_tokens=256, dtype=model.dtype, page_size=4) as pair:
        for given in (inputs(), inputs((5, 17))):
            expected = eager(model, given, **GREEDY)
            model.set_attn_implementation("attnd")
            assert torch.equal(model.generate(**given, past_key_values=pair, **GREEDY), expected)
            pair.reset()
        assert pair.self_attention_cache.num_pages_used == 0
        assert pair.cross_attention_cache.lease.pool.num_used == 0


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("where", ["self_attn", "encoder_attn"])
def test_a_stopped_pass_may_be_run_again(client, layer: int, where: str) -> None:
    model, given = make("bart"), inputs()
    ids = torch.randint(3, VOCAB, (3, 8))
    model.set_attn_implementation("eager")
    expected = model(**given, decoder_input_ids=ids).logits
    model.set_attn_implementation("attnd")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with RemotePair(client, model.config, max_tokens=256, dtype=model.dtype, page_size=4) as pair:
        pieces = []
        for first, end in ((0, 5), (5, 8)):
            module = getattr(model.model.decoder.layers[layer], where)
            handle = module.register_forward_pre_hook(stop)
            with pytest.raises(KeyboardInterrupt):
                model(**given, decoder_input_ids=ids[:, first:end], past_key_values=pair)
            handle.remove()
            pieces.append(model(**given, decoder_input_ids=ids[:, first:end], past_key_values=pair).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-4, rtol=1e-4)


def test_rows_change_and_forks_go_on_apart(client) -> None:
    model, given = make("bart"), inputs()
    ids = torch.randint(3, VOCAB, (3, 9))
    model.set_attn_implementation("attnd")
    with RemotePair(client, model.config, max_tokens=512, dtype=model.dtype, page_size=4) as pair:
        model(**given, decoder_input_ids=ids[:, :7], past_key_values=pair)
        pair.crop(-2)
        fork = copy.deepcopy(pair)
        rows = {"pair": [2, 0], "fork": [0, 1, 2]}
        pair.batch_select_indices(torch.tensor([2, 0]))
        for name, each in (("pair", pair), ("fork", fork)):
            chosen = rows[name]
            mine = {key: value[chosen] for key, value in given.items()}
            actual = model(**mine, decoder_input_ids=ids[chosen, 5:], past_key_values=each).logits
            model.set_attn_implementation("eager")
            expected = model(**mine, decoder_input_ids=ids[chosen]).logits[:, 5:]
            model.set_attn_implementation("attnd")
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
        fork.close()


def test_a_dropped_fork_gives_its_pages_back(client) -> None:
    model, given = make("bart"), inputs()
    model.set_attn_implementation("attnd")
    with RemotePair(client, model.config, max_tokens=512, dtype=model.dtype, page_size=4) as pair:
        model(**given, decoder_input_ids=torch.randint(3, VOCAB, (3, 4)), past_key_values=pair)
        pools = pair.self_attention_cache.rows.lease.pool, pair.cross_attention_cache.lease.pool
        used = [pool.num_used for pool in pools]
        fork = pair.fork()
        del fork
        gc.collect()
        deadline = time.monotonic() + 20  # a thread gives them back
        while [pool.num_used for pool in pools] != used:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        pair.cross_attention_cache.reset()
        while pools[1].num_used:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_whisper(client) -> None:
    kinds = {key: value for key, value in BART.items() if not key.startswith("forced")}
    config = transformers.WhisperConfig(
        **kinds, num_mel_bins=8, max_source_positions=20, max_target_positions=64, suppress_tokens=None
    )
    torch.manual_seed(1)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    model.generation_config.suppress_tokens = model.generation_config.begin_suppress_tokens = None
    features = torch.randn(2, 8, 40)
    ids = torch.randint(3, VOCAB, (2, 6))
    model.set_attn_implementation("eager")
    expected = model(features, decoder_input_ids=ids).logits
    with attach(model, client, max_tokens=256):
        torch.testing.assert_close(model(features, decoder_input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
        first = model(features, decoder_input_ids=ids[:, :4])
        rest = model(features, decoder_input_ids=ids[:, 4:], past_key_values=first.past_key_values)
        actual = torch.cat([first.logits, rest.logits], 1)
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
        del first, rest


def test_errors_say_what_to_do(client) -> None:
    bart = make("bart")
    kinds = {"max_tokens": 64, "dtype": torch.float32}
    with pytest.raises(attnd.Unsupported, match="encoder-decoder, but must be a decoder: give it a RemotePair"):
        RemoteCache(client, bart.config, **kinds)
    with pytest.raises(attnd.InvalidRequest, match="no encoder-decoder, but must be: RemoteCache is for a decoder"):
        RemotePair(client, transformers.LlamaConfig(), **kinds)
    with pytest.raises(attnd.Unsupported, match="adds a bias by position to its scores"):
        RemotePair(client, transformers.T5Config(), **kinds)
    with pytest.raises(attnd.InvalidRequest, match="max_source_tokens is 0, but must be at least 1"):
        RemotePair(client, bart.config, **kinds, max_source_tokens=0)
    with pytest.raises(attnd.Unsupported, match="its keys do not come from tokens alone"):
        attach(bart, client, max_tokens=64, on_cache_lost="recompute")
