"""Models whose layers do not all attend: keys and values lie on the server, states of other layers here."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import attnd

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("transformers.models.lfm2", reason="needs a transformers with a cache for convolutions")

from attnd.integrations.transformers import RemoteCache  # noqa: E402
from tests.e2e.test_transformers import GREEDY, VOCAB, locally, padded_batch, remotely  # noqa: E402
from tests.e2e.test_transformers_stops import eager, tokens  # noqa: E402
from tests.hybrid_models import FULL, MODELS, make_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def without_gradients() -> Iterator[None]:
    torch.manual_seed(3)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return {}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest, made: dict[str, Any]) -> Any:
    if request.param not in made:
        made[request.param] = make_model(request.param)
    made[request.param].set_attn_implementation("attnd")
    return made[request.param]


def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    scale = expected.abs().max()
    torch.testing.assert_close(actual / scale, expected / scale, atol=1e-4, rtol=0)


def test_greedy_tokens_of_a_padded_batch(model, remote) -> None:
    batch, cache = padded_batch([11, 19, 3, 14]), remote(model)
    assert torch.equal(remotely(model, batch, cache, **GREEDY), locally(model, batch, **GREEDY))
    served = sum(layer_type in (FULL, "hybrid") for layer_type in model.config.layer_types)
    assert cache.cache.info().config.num_layers == served
    assert cache.timings().num_calls == 12 * served


def test_beam_search(model, remote) -> None:
    batch = padded_batch([5, 13])
    options = {"max_new_tokens": 16, "do_sample": False, "num_beams": 4, "num_return_sequences": 2}
    assert torch.equal(remotely(model, batch, remote(model), **options), locally(model, batch, **options))


def test_a_conversation_goes_on_in_the_same_cache(model, remote) -> None:
    cache, local = remote(model), transformers.DynamicCache(config=model.config)
    inputs, more = padded_batch([8]), tokens(5)
    for _ in range(2):
        actual = remotely(model, inputs, cache, **GREEDY)
        assert torch.equal(actual, locally(model, inputs, past_key_values=local, **GREEDY))
        longer = torch.cat([actual, more], 1)
        inputs = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
    assert cache.timings().num_steps == 24


def eager_pieces(model: Any, ids: torch.Tensor, *ends: int) -> torch.Tensor:
    """Logits of passes that end at these columns: a recurrence in several pieces is rounded as such."""
    cache, pieces, first = transformers.DynamicCache(config=model.config), [], 0
    for end in ends:
        pieces.append(eager(model, ids[:, first:end], past_key_values=cache))
        first = end
    return torch.cat(pieces, 1)


def test_logits_of_a_prompt_in_pieces(model, remote) -> None:
    cache, ids = remote(model), tokens(19, 2)
    expected = eager_pieces(model, ids, 1, 8, 9, 19)
    pieces = [
        model(ids[:, first:end], past_key_values=cache).logits for first, end in ((0, 1), (1, 8), (8, 9), (9, 19))
    ]
    check(torch.cat(pieces, 1), expected)


def stopped(model: Any, module: Any, error: BaseException, cache: RemoteCache, ids: torch.Tensor) -> None:
    """Runs a pass that ends with `error` in a module."""

    def stop(*_: object) -> None:
        raise error

    handle = module.register_forward_pre_hook(stop)
    try:
        with pytest.raises(type(error)):
            model(ids, past_key_values=cache)
    finally:
        handle.remove()


def modules_of(model: Any) -> list[Any]:
    """Linear modules, each in the middle of a layer that attends, has states, or mixes: a pass may stop in all."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ("in_proj" in name or "out_proj" in name or "q_proj" in name)
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a hook")], ids=["interrupt", "exception"])
def test_a_stopped_pass_may_be_run_again(model, remote, error: BaseException) -> None:
    ids = tokens(20)
    expected = eager_pieces(model, ids, 8, 12, 13, 20)
    assert len(modules_of(model)) >= 4
    for module in modules_of(model):
        cache = remote(model)
        stopped(model, module, error, cache, tokens(6))  # the first one: nothing is left of it, nor of its batch size
        check(model(ids[:, :8], past_key_values=cache).logits, expected[:, :8])
        for first, end in ((8, 12), (12, 13)):
            stopped(model, module, error, cache, tokens(end - first))
            assert cache.get_seq_length() == first
            check(model(ids[:, first:end], past_key_values=cache).logits, expected[:, first:end])
        assert cache.get_seq_length() == 13
        check(model(ids[:, 13:], past_key_values=cache).logits, expected[:, 13:])
        cache.close()


def test_the_first_pass_stopped_and_then_another_batch(model, remote) -> None:
    cache, ids = remote(model), tokens(7, 3)
    stopped(model, modules_of(model)[-1], KeyboardInterrupt(), cache, tokens(11))
    check(model(ids, past_key_values=cache).logits, eager(model, ids))


def test_a_refused_pass_leaves_the_states(model, remote) -> None:
    cache, ids = remote(model, max_tokens=12), tokens(10)
    expected = eager_pieces(model, ids, 8, 10)
    model(ids[:, :8], past_key_values=cache)
    with pytest.raises(attnd.Exhausted):
        model(tokens(9), past_key_values=cache)
    check(model(ids[:, 8:], past_key_values=cache).logits, expected[:, 8:])


def test_rows_selected_and_repeated(model, remote) -> None:
    ids, cache = tokens(9, 4), remote(model)
    model(ids, past_key_values=cache)
    cache.batch_select_indices(torch.tensor([3, 1]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 2, 0, 3]))
    rows, new = [3, 1, 3, 1], tokens(2, 4)
    check(model(new, past_key_values=cache).logits, eager(model, torch.cat([ids[rows], new], 1))[:, -2:])


@pytest.mark.parametrize("fork", [RemoteCache.fork, copy.deepcopy], ids=["fork", "deepcopy"])
def test_forks_go_on_apart(model, remote, fork: Any) -> None:
    ids, new, newer, cache = tokens(9, 2), tokens(6, 2), tokens(6, 2), remote(model)
    model(ids, past_key_values=cache)
    with fork(cache) as other:
        check(model(new, past_key_values=other).logits, eager(model, torch.cat([ids, new], 1))[:, -6:])
        check(model(newer, past_key_values=cache).logits, eager(model, torch.cat([ids, newer], 1))[:, -6:])
        check(model(new, past_key_values=other).logits, eager(model, torch.cat([ids, new, new], 1))[:, -6:])


def test_reset_for_another_batch(model, remote) -> None:
    cache, ids = remote(model), tokens(7, 2)
    model(tokens(12, 3), past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    check(model(ids, past_key_values=cache).logits, eager(model, ids))


def test_what_transformers_asks_of_a_cache(model, remote) -> None:
    """As of its own cache, but that windows hide nothing."""
    cache, local, ids = remote(model), transformers.DynamicCache(config=model.config), tokens(7)
    for _ in range(2):
        for name in ("is_linear", "is_dummy", "is_sliding", "is_compileable", "is_croppable"):
            assert getattr(cache, name) == getattr(local, name), name
        assert cache.get_seq_length() == local.get_seq_length()
        assert cache.get_mask_sizes(3, 0) == local.get_mask_sizes(3, 0)
        assert cache.has_previous_state() == local.has_previous_state()
        assert cache.get_max_length() == local.get_max_length()
        model(ids, past_key_values=cache)
        model.set_attn_implementation("eager")
        model(ids, past_key_values=local)
        model.set_attn_implementation("attnd")


def test_crop_of_a_recorded_convolution(remote) -> None:
    model, ids = make_model("lfm2"), tokens(20)
    cache, expected = remote(model), eager(model, ids)
    model(ids[:, :12], past_key_values=cache)
    with pytest.raises(attnd.Unsupported, match="has not recorded the last 2 tokens"):
        cache.crop(-2)
    cache.activate_past_recording()
    model(torch.cat([ids[:, 12:15], tokens(3)], 1), past_key_values=cache)
    with pytest.raises(attnd.Unsupported, match="has not recorded the last 7 tokens"):
        cache.crop(-7)
    assert cache.get_seq_length() == 18
    cache.crop(-3)
    check(model(ids[:, 15:], past_key_values=cache).logits, expected[:, 15:])


def test_crop_of_a_recurrence_is_refused(remote) -> None:
    model, ids = make_model("qwen3_next"), tokens(20)
    cache, expected = remote(model), eager(model, ids)
    cache.activate_past_recording()
    model(ids[:, :12], past_key_values=cache)
    with pytest.raises(attnd.Unsupported, match=r"layer 0 has a recurrence, .*: reset\(\)"):
        cache.crop(-2)
    cache.crop(0)
    check(model(ids[:, 12:], past_key_values=cache).logits, expected[:, 12:])


def test_prompt_lookup_decoding(remote) -> None:
    model = make_model("lfm2")
    inputs = {"input_ids": torch.randint(2, VOCAB, (1, 6)).repeat(1, 4)}
    options = {"max_new_tokens": 24, "do_sample": False}
    actual = remotely(model, inputs, remote(model), **options, prompt_lookup_num_tokens=4)
    assert torch.equal(actual, locally(model, inputs, **options))
