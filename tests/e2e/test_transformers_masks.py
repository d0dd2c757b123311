"""Masks of transformers models: padding on the right and between tokens, rows that ended early, masks of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import attnd

transformers = pytest.importorskip("transformers", reason="needs transformers")

from attnd.integrations.transformers import RemoteCache  # noqa: E402
from tests.e2e.test_transformers import GREEDY, PAD, VOCAB, locally, make_model, remotely  # noqa: E402

WINDOWED = ["mistral", "gemma2", "phimoe"]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def remote(client: attnd.Client) -> Iterator[Callable[..., RemoteCache]]:
    """Makes caches that are closed afterwards."""
    caches: list[RemoteCache] = []

    def make(model: Any, **options: Any) -> RemoteCache:
        model.set_attn_implementation("attnd")
        options = {"max_tokens": 512, "dtype": model.dtype, "page_size": 4} | options
        caches.append(RemoteCache(client, model.config, **options))
        return caches[-1]

    yield make
    for cache in caches:
        cache.close()


def masked(rows: list[str]) -> dict[str, torch.Tensor]:
    """A batch whose tokens are real where there is a 1."""
    mask = torch.tensor([[int(each) for each in row] for row in rows])
    return {"input_ids": torch.randint(2, VOCAB, mask.shape).masked_fill(mask == 0, PAD), "attention_mask": mask}


def both(model: Any, cache: RemoteCache, inputs: dict[str, torch.Tensor], cuts: list[int]) -> tuple[Any, Any]:
    """Logits of a prompt that comes in pieces, and eager's of the whole."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    pieces = []
    for first, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        given = {"attention_mask": mask[:, :end], "position_ids": positions[:, first:end]}
        pieces.append(model(ids[:, first:end], past_key_values=cache, **given).logits)
    model.set_attn_implementation("eager")
    expected = model(ids, attention_mask=mask, position_ids=positions).logits
    model.set_attn_implementation("attnd")
    return torch.cat(pieces, 1), expected


def sees_something(mask: torch.Tensor) -> torch.Tensor:
    """Where a row has a real token, or padding behind one: what eager attention says there is defined."""
    return mask.cumsum(1) > 0


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "mistral"])
def test_padding_on_the_right_is_sampled_from(remote, name: str) -> None:
    model = make_model(name)
    inputs = masked(["11111111", "11100000", "11111000"])
    one = {"max_new_tokens": 1, "do_sample": False}
    assert torch.equal(remotely(model, inputs, remote(model), **one), locally(model, inputs, **one))
    if name == "llama":  # windows count the padding that is between tokens from then on
        assert torch.equal(remotely(model, inputs, remote(model), **GREEDY), locally(model, inputs, **GREEDY))


MASKS = {
    "right": ["1111111111", "1110000000", "1000000000", "1111111110"],
    "between": ["1111111111", "1101101011", "0110011110", "0001000100"],
    "both sides": ["0011110000", "0000000001", "1000000001", "0111111110"],
}


@pytest.mark.parametrize("masks", list(MASKS))
@pytest.mark.parametrize("cuts", [[], [1], [3, 4], [1, 2, 3, 4, 5, 6, 7, 8, 9]], ids=str)
def test_padding_anywhere(remote, masks: str, cuts: list[int]) -> None:
    model, inputs = make_model("llama"), masked(MASKS[masks])
    actual, expected = both(model, remote(model), inputs, cuts)
    defined = sees_something(inputs["attention_mask"])
    torch.testing.assert_close(actual[defined], expected[defined], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("cuts", [[], [4], [7, 9]], ids=str)
def test_windows_over_padding_are_eagers_or_refused(remote, name: str, cuts: list[int]) -> None:
    """A window of 6: whatever is served is right, and what is refused would have been wrong."""
    model = make_model(name)
    served = 0
    for row in (
        "11111111110000",
        "11000000000000",
        "00111111111111",
        "11110100000000",
        "11111111011111",
        "11000000000011",
    ):
        inputs = masked([row])
        try:
            actual, expected = both(model, remote(model), inputs, cuts)
        except attnd.Unsupported as error:
            assert "has padding between tokens, but layer" in str(error)  # noqa: PT017
            assert "0" in row.strip("0")[:-1] or row.endswith("0")
            continue
        served += 1
        defined = sees_something(inputs["attention_mask"]) & _has_keys(inputs["attention_mask"], 6)
        torch.testing.assert_close(actual[defined], expected[defined], atol=1e-4, rtol=1e-4)
    assert served >= 2


def _has_keys(mask: torch.Tensor, window: int) -> torch.Tensor:
    """Where a real token is within the window: eager attention averages over what is masked where none is."""
    count = torch.nn.functional.pad(mask.cumsum(1), (window, 0))
    return count[:, window:] - count[:, :-window] > 0


def test_a_chat_goes_on_where_a_row_ended_early(remote) -> None:
    """generate feeds the padding of a row that has ended as if it were real; the next turn masks it."""
    model = make_model("llama")
    inputs = masked(["0011111", "1111111"])
    options = GREEDY | {"max_new_tokens": 9}
    ends = locally(model, inputs, **options)[0, 10].item()  # row 0 ends at its fourth token
    options |= {"eos_token_id": ends, "pad_token_id": PAD}
    cache = remote(model)
    first = remotely(model, inputs, cache, **options)
    assert torch.equal(first, locally(model, inputs, **options))
    assert (first[0] == PAD).sum() > 2
    new = torch.randint(2, VOCAB, (2, 3))
    mask = torch.cat([inputs["attention_mask"], (first[:, 7:] != PAD).long(), torch.ones_like(new)], 1)
    turn = {"input_ids": torch.cat([first, new], 1), "attention_mask": mask}
    assert torch.equal(remotely(model, turn, cache, **GREEDY), locally(model, turn, **GREEDY))


def test_tokens_hidden_at_the_end_of_a_row_are_forgotten_for_good(remote) -> None:
    model = make_model("llama")
    inputs = masked(["11111111", "11111111"])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = remote(model)
    model(ids, past_key_values=cache)
    hidden = mask.clone()
    hidden[0, 5:] = 0
    new = torch.randint(2, VOCAB, (2, 2))
    positions = torch.tensor([[5, 6], [8, 9]])
    longer = torch.cat([hidden, torch.ones_like(new)], 1)
    actual = model(new, attention_mask=longer, position_ids=positions, past_key_values=cache).logits
    model.set_attn_implementation("eager")
    whole = torch.cat([ids, new], 1)
    every = torch.cat([torch.arange(8).expand(2, 8), positions], 1)
    expected = model(whole, attention_mask=longer, position_ids=every).logits[:, 8:]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    model.set_attn_implementation("attnd")
    again = torch.ones(2, 11, dtype=torch.int64)
    with pytest.raises(
        attnd.InvalidRequest, match=r"attention_mask\[0\] has 10 real tokens .* must have 7, those that"
    ):
        model(new[:, :1], attention_mask=again, past_key_values=cache)
    first = torch.cat([longer, torch.ones(2, 1, dtype=torch.int64)], 1)
    first[1, 0] = 0
    with pytest.raises(attnd.InvalidRequest, match=r"attention_mask\[1\] has 9 real tokens .* or the first of them"):
        model(new[:, :1], attention_mask=first, past_key_values=cache)


def test_a_page_that_a_fork_has_too_is_not_forgotten(remote) -> None:
    model = make_model("llama")
    cache = remote(model)
    ids = torch.randint(2, VOCAB, (1, 8))
    model(ids, past_key_values=cache)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0, 1]])
    with cache.fork():
        with pytest.raises(attnd.InvalidRequest, match="because another row or a fork has the page of the last one"):
            model(ids[:, :1], attention_mask=mask, past_key_values=cache)
    model(ids[:, :1], attention_mask=mask, past_key_values=cache)


def changed(model: Any, layer: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Has a layer get another mask. Call `remove` of what is returned."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"attention_mask": change(kwargs["attention_mask"])}

    return model.model.layers[layer].self_attn.register_forward_pre_hook(hook, with_kwargs=True)


def test_each_layers_mask_is_looked_at(remote) -> None:
    model, inputs = make_model("llama"), masked(["0111", "1111"])
    for layer in (1, 2):
        other = changed(model, layer, torch.ones_like)
        with pytest.raises(
            attnd.InvalidRequest, match=f"attention_mask of layer {layer} is another than that of layer 0"
        ):
            model(**inputs, past_key_values=remote(model))
        other.remove()
    same = changed(model, 1, torch.clone)
    actual, expected = both(model, remote(model), inputs, [])
    same.remove()
    defined = sees_something(inputs["attention_mask"])
    torch.testing.assert_close(actual[defined], expected[defined], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*WINDOWED, "gpt_oss"])
def test_a_mask_that_was_copied_has_its_window_still(remote, name: str) -> None:
    """As by accelerate, which copies a layer's inputs to its device."""
    model, inputs = make_model(name), masked(["0011111111111111", "1111111111111111"])
    handles = [changed(model, layer, torch.clone) for layer in range(3)]
    cache = remote(model)
    actual, expected = both(model, cache, inputs, [9])
    for handle in handles:
        handle.remove()
    defined = sees_something(inputs["attention_mask"])
    torch.testing.assert_close(actual[defined], expected[defined], atol=1e-4, rtol=1e-4)


def test_sinks_that_were_changed_in_place_count_at_once(remote) -> None:
    model = make_model("gpt_oss")
    ids = torch.randint(2, VOCAB, (1, 12))
    sinks = [layer.self_attn.sinks for layer in model.model.layers]
    logits = {}
    for attention in ("attnd", "eager"):
        cache = remote(model) if attention == "attnd" else transformers.DynamicCache(config=model.config)
        model.set_attn_implementation(attention)
        model(ids[:, :10], past_key_values=cache)
        for each in sinks:
            each += 3.0
        logits[attention] = model(ids[:, 10:], past_key_values=cache).logits
        for each in sinks:
            each -= 3.0
    torch.testing.assert_close(logits["attnd"], logits["eager"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("again", [RemoteCache.reset, lambda cache: cache.crop(-10)])
def test_sinks_whose_data_was_changed_count_from_the_next_prompt_on(remote, again: Callable[..., None]) -> None:
    model, inputs = make_model("gpt_oss"), masked(["1111111111"])
    cache = remote(model)
    both(model, cache, inputs, [5])
    for layer in model.model.layers:
        layer.self_attn.sinks.data.add_(3.0)
    again(cache)
    actual, expected = both(model, cache, inputs, [5])
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
