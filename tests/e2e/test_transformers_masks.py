"""Models whose masks are more than causal: images and prefixes that see all of themselves, windows of caches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import attnd

transformers = pytest.importorskip("transformers", reason="needs transformers")

from tests.e2e.test_transformers import COMMON, GREEDY, locally, make_model, padded_batch, remotely  # noqa: E402

pytestmark = pytest.mark.usefixtures("without_gradients")

VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
IMAGE = 90
WINDOW = 6


@pytest.fixture
def without_gradients() -> Iterator[None]:
    torch.manual_seed(3)
    with torch.no_grad():
        yield


def gemma3() -> Any:
    text = {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": WINDOW,
        "num_hidden_layers": 4,
    }
    config = transformers.Gemma3Config(
        text_config=COMMON | text,
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    torch.manual_seed(1)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def paligemma() -> Any:
    text = COMMON | {"model_type": "gemma", "tie_word_embeddings": False}
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=VISION, projection_dim=64, image_token_index=IMAGE, tie_word_embeddings=False
    )
    torch.manual_seed(1)
    return transformers.PaliGemmaForConditionalGeneration(config).eval()


def serve(model: Any, attention: str) -> None:
    """Of a model that sees too: only what it reads and says is served."""
    model.set_attn_implementation({"text_config": attention} if hasattr(model.config, "text_config") else attention)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    scale = expected.abs().max()
    torch.testing.assert_close(actual / scale, expected / scale, atol=1e-4, rtol=0)


def images(num_rows: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of rows with an image each, the first row padded at the left, and which are the image's."""
    tokens = torch.randint(2, IMAGE, (num_rows, end))
    kinds = torch.zeros_like(tokens)
    for row in range(num_rows):
        kinds[row, 4 + row : 8 + row] = 1
    return tokens.masked_fill(kinds == 1, IMAGE), kinds


def test_tokens_of_an_image_see_each_other(remote) -> None:
    model = gemma3()
    tokens, kinds = images(2, 14)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": kinds}
    inputs["pixel_values"] = torch.randn(2, 3, 16, 16)
    serve(model, "eager")
    expected, blind = model(**inputs).logits, model(**inputs | {"token_type_ids": torch.zeros_like(kinds)}).logits
    generated = model.generate(**inputs, **GREEDY)
    serve(model, "attnd")
    actual = model(**inputs, past_key_values=remote(model)).logits
    close(actual[mask == 1], expected[mask == 1])
    assert (expected - blind)[mask == 1].abs().max() > 0.1  # else they need not have
    assert torch.equal(model.generate(**inputs, past_key_values=remote(model), **GREEDY), generated)


def test_beams_of_prompts_with_images(remote) -> None:
    model = gemma3()
    tokens, kinds = images(2, 12)
    inputs = {"input_ids": tokens, "token_type_ids": kinds, "attention_mask": torch.ones_like(tokens)}
    inputs["pixel_values"] = torch.randn(2, 3, 16, 16)
    options = {"max_new_tokens": 10, "num_beams": 3, "do_sample": False}
    serve(model, "eager")
    expected = model.generate(**inputs, **options)
    serve(model, "attnd")
    assert torch.equal(model.generate(**inputs, past_key_values=remote(model), **options), expected)


def test_token_types_of_text_alone(remote) -> None:
    model = gemma3()
    tokens = torch.randint(2, IMAGE, (2, 9))
    inputs = {"input_ids": tokens, "token_type_ids": torch.zeros_like(tokens)}
    serve(model, "eager")
    expected = model(**inputs).logits
    serve(model, "attnd")
    close(model(**inputs, past_key_values=remote(model)).logits, expected)


def test_a_prefix_sees_all_of_itself(remote) -> None:
    model = paligemma()
    tokens = torch.randint(2, IMAGE, (2, 13))
    tokens[:, :4] = IMAGE
    kinds = torch.zeros_like(tokens)
    kinds[0, 8:], kinds[1, 10:] = 1, 1
    inputs = {"input_ids": tokens, "pixel_values": torch.randn(2, 3, 16, 16), "attention_mask": torch.ones_like(tokens)}
    serve(model, "eager")
    expected = model(**inputs, token_type_ids=kinds).logits
    generated = model.generate(**inputs, **GREEDY)
    serve(model, "attnd")
    close(model(**inputs, token_type_ids=kinds, past_key_values=remote(model)).logits, expected)
    assert torch.equal(model.generate(**inputs, past_key_values=remote(model), **GREEDY), generated)


def test_a_causal_layer_that_is_not_marked_as_such_needs_a_cache() -> None:
    """Gemma's layers in a PaliGemma: without a cache they are not taken for an encoder's."""
    model = paligemma()
    serve(model, "attnd")
    with pytest.raises(attnd.InvalidRequest, match="needs keys from a RemoteCache"):
        model.model.language_model(torch.ones(1, 5, dtype=torch.int64), use_cache=False)


def test_blocks_are_not_computed_again(remote) -> None:
    """Nobody noted them, so their KV is not known."""
    model = make_model("llama")
    cache = remote(model, on_cache_lost="recompute", model=model)
    model.set_attn_implementation("attnd")
    tokens = torch.randint(2, IMAGE, (1, 9))
    blocks = torch.full((1, 9), -1)
    blocks[:, 3:6] = 0
    mask = transformers.masking_utils.create_causal_mask(
        model.config, torch.zeros(1, 9, 64), None, cache, block_sequence_ids=blocks
    )
    model.model(tokens, attention_mask=mask, past_key_values=cache)
    cache.cache.delete()
    with pytest.raises(attnd.CacheLost, match="it cannot be computed again"):
        model(tokens[:, :1], past_key_values=cache)


def moshi() -> Any:
    config = transformers.MoshiConfig(**COMMON, sliding_window=WINDOW, ffn_dim=96, num_codebooks=2)
    torch.manual_seed(1)
    return transformers.MoshiForCausalLM(config).eval()


def test_a_window_that_only_the_cache_has(remote) -> None:
    """transformers' own cache drops what is behind the window; its masks hide nothing of a pass."""
    model, batch = moshi(), padded_batch([11, 11])
    assert torch.equal(remotely(model, batch, remote(model), **GREEDY), locally(model, batch, **GREEDY))
    cache, tokens = remote(model), batch["input_ids"]
    model.set_attn_implementation("attnd")
    model(tokens[:, :9], past_key_values=cache)
    with pytest.raises(attnd.Unsupported, match="of layer 0 is 6, and its masks have none: 2 new tokens"):
        model(tokens[:, 9:], past_key_values=cache)


def test_values_of_another_width_than_keys(remote) -> None:
    config = transformers.MiMoV2FlashConfig(
        **COMMON, v_head_dim=16, layer_types=["full_attention"] * 3, n_routed_experts=4, num_experts_per_tok=2
    )
    torch.manual_seed(1)
    model = transformers.MiMoV2FlashForCausalLM(config).eval()
    batch, cache = padded_batch([11, 19, 3]), remote(model)
    assert torch.equal(remotely(model, batch, cache, **GREEDY), locally(model, batch, **GREEDY))
    assert (cache.cache.info().config.head_dim, cache.cache.info().config.head_dim_v) == (32, 16)


def test_attention_weights_are_refused(remote) -> None:
    model = make_model("llama")
    model.set_attn_implementation("attnd")
    with pytest.raises(attnd.Unsupported, match="output_attentions is true, but a server gives no attention weights"):
        model(torch.ones(1, 3, dtype=torch.int64), past_key_values=remote(model), output_attentions=True)
