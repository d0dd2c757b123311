"""Passes of a transformers model that are stopped in the middle, and what comes after them: as if they never were."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import attnd
from tests.interrupted_generation import interrupted
from tests.servers import ServerProcess

transformers = pytest.importorskip("transformers", reason="needs transformers")

from attnd.integrations.transformers import RemoteCache  # noqa: E402
from tests.e2e.test_transformers import COMMON, GREEDY, locally, make_model, padded_batch, remotely  # noqa: E402

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def _llama() -> Any:
    return make_model("llama")


@pytest.fixture
def llama(_llama: Any) -> Any:
    _llama.set_attn_implementation("attnd")
    return _llama


@pytest.fixture(params=["raise", "recompute"])
def make(request: pytest.FixtureRequest, client: attnd.Client) -> Iterator[Callable[..., RemoteCache]]:
    """Makes caches of both kinds."""
    caches: list[RemoteCache] = []

    def of(model: Any, **options: Any) -> RemoteCache:
        options = {"max_tokens": 512, "dtype": model.dtype, "page_size": 4} | options
        if request.param == "recompute":
            options |= {"on_cache_lost": "recompute", "model": model}
        caches.append(RemoteCache(client, model.config, **options))
        return caches[-1]

    yield of
    for cache in caches:
        cache.close()


def tokens(num_tokens: int = 24, num_rows: int = 1) -> torch.Tensor:
    return torch.randint(2, 97, (num_rows, num_tokens))


def eager(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    model.set_attn_implementation("eager")
    logits: torch.Tensor = model(ids, **options).logits
    model.set_attn_implementation("attnd")
    return logits


def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def stopped(model: Any, layer: int, error: BaseException, run: Callable[[], Any], before: bool = True) -> None:
    """Runs a pass that ends with `error`, before or after the attention of a layer."""

    def stop(*_: object) -> None:
        raise error

    attention = model.model.layers[layer].self_attn
    register = attention.register_forward_pre_hook if before else attention.register_forward_hook
    handle = register(stop)
    try:
        with pytest.raises(type(error)):
            run()
    finally:
        handle.remove()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a hook")], ids=["interrupt", "exception"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_stopped_pass_may_be_run_again(make, llama, layer: int, error: BaseException) -> None:
    cache, ids = make(llama), tokens()
    expected = eager(llama, ids)
    check(llama(ids[:, :8], past_key_values=cache).logits, expected[:, :8])
    stopped(llama, layer, error, lambda: llama(ids[:, 8:24], past_key_values=cache))
    assert cache.get_seq_length() == 8
    check(llama(ids[:, 8:], past_key_values=cache).logits, expected[:, 8:])
    assert (cache.get_seq_length(), cache.num_pages_used) == (24, 6)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_pass_stopped_after_a_layers_attention(make, llama, layer: int) -> None:
    cache, ids = make(llama), tokens()
    llama(ids[:, :8], past_key_values=cache)
    stopped(llama, layer, KeyboardInterrupt(), lambda: llama(ids[:, 8:], past_key_values=cache), before=False)
    check(llama(ids[:, 8:], past_key_values=cache).logits, eager(llama, ids)[:, 8:])


BEHIND: dict[str, Callable[[Any], Any]] = {
    "last attention": lambda model: model.model.layers[2].self_attn,
    "last mlp": lambda model: model.model.layers[2].mlp,
    "norm": lambda model: model.model.norm,
    "decoder": lambda model: model.model,
    "head": lambda model: model.lm_head,
}


@pytest.mark.parametrize("where", list(BEHIND))
@pytest.mark.parametrize("length", [0, 8])
def test_a_pass_stopped_behind_its_last_layer(make, llama, where: str, length: int) -> None:
    cache, ids = make(llama), tokens()
    if length:
        llama(ids[:, :length], past_key_values=cache)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    handle = BEHIND[where](llama).register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        llama(ids[:, length:], past_key_values=cache)
    handle.remove()
    assert cache.get_seq_length() == length
    check(llama(ids[:, length:], past_key_values=cache).logits, eager(llama, ids)[:, length:])
    assert (cache.get_seq_length(), cache.num_pages_used) == (24, 6)


def test_what_fails_after_the_models_call_takes_nothing_back(make, llama) -> None:
    cache, ids = make(llama), tokens()

    class Loop(torch.nn.Module):
        def forward(self, past_key_values: RemoteCache) -> None:
            for first in (0, 8, 16):
                llama(ids[:, first : first + 8], past_key_values=past_key_values)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Loop()(past_key_values=cache)
    assert cache.get_seq_length() == 24
    more = tokens(2)
    check(llama(more, past_key_values=cache).logits, eager(llama, torch.cat([ids, more], 1))[:, 24:])


def test_the_first_pass_stopped_and_then_another_batch(make, llama) -> None:
    cache, ids = make(llama), tokens(num_rows=2)
    stopped(llama, 1, KeyboardInterrupt(), lambda: llama(tokens(40), past_key_values=cache))
    check(llama(ids, past_key_values=cache).logits, eager(llama, ids))
    assert cache.num_pages_used == 2 * 6


def test_stopped_again_and_again_with_other_tokens(make, llama) -> None:
    cache, ids = make(llama), tokens()
    llama(ids[:, :5], past_key_values=cache)
    for layer, length in ((2, 30), (1, 1), (1, 7), (2, 3)):
        stopped(llama, layer, KeyboardInterrupt(), lambda n=length: llama(tokens(n), past_key_values=cache))
    check(llama(ids[:, 5:], past_key_values=cache).logits, eager(llama, ids)[:, 5:])


CHANGES: dict[str, tuple[Callable[[RemoteCache], Any], list[int], int]] = {
    "crop": (lambda cache: cache.crop(-3), [0, 1, 2], 6),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0], 9),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2], 9),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2], 9),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_rows_changed_after_a_stopped_pass(make, llama, change: str) -> None:
    cache, ids = make(llama), tokens(9, 3)
    llama(ids, past_key_values=cache)
    stopped(llama, 2, KeyboardInterrupt(), lambda: llama(tokens(10, 3), past_key_values=cache))
    do, rows, length = CHANGES[change]
    do(cache)
    assert cache.get_seq_length() == length
    whole = torch.cat([ids[rows, :length], tokens(6, len(rows))], 1)
    check(llama(whole[:, length:], past_key_values=cache).logits, eager(llama, whole)[:, length:])


def test_a_stopped_pass_of_a_padded_batch(make, llama) -> None:
    inputs = padded_batch([11, 19, 3])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = make(llama)
    expected = eager(llama, ids, attention_mask=mask, position_ids=positions)

    def run(first: int, end: int) -> torch.Tensor:
        given = {"attention_mask": mask[:, :end], "position_ids": positions[:, first:end]}
        logits: torch.Tensor = llama(ids[:, first:end], past_key_values=cache, **given).logits
        return logits

    run(0, 10)
    stopped(llama, 1, KeyboardInterrupt(), lambda: run(10, 19))
    actual = run(10, 19)
    check(actual[mask[:, 10:] == 1], expected[:, 10:][mask[:, 10:] == 1])


def test_too_few_pages_in_the_middle_of_a_prompt(make, llama) -> None:
    cache, ids = make(llama, max_tokens=24), tokens()
    llama(ids[:, :8], past_key_values=cache)
    with pytest.raises(attnd.Exhausted):
        llama(tokens(17), past_key_values=cache)
    check(llama(ids[:, 8:], past_key_values=cache).logits, eager(llama, ids)[:, 8:])


@pytest.mark.parametrize("error", [attnd.DeadlineExceeded("late"), attnd.Exhausted("full"), KeyboardInterrupt()])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layers_call_that_fails(make, llama, monkeypatch, layer: int, error: BaseException) -> None:
    cache, ids = make(llama), tokens()
    llama(ids[:, :8], past_key_values=cache)
    step = attnd.Step.attend

    def fails(self: attnd.Step, number: int, *args: Any) -> Any:
        output = step(self, number, *args)
        if number == layer:
            raise error
        return output

    monkeypatch.setattr(attnd.Step, "attend", fails)
    with pytest.raises(type(error)):
        llama(ids[:, 8:], past_key_values=cache)
    monkeypatch.undo()
    assert cache.get_seq_length() == 8
    check(llama(ids[:, 8:], past_key_values=cache).logits, eager(llama, ids)[:, 8:])


def test_generation_goes_on_after_an_interrupt(make, llama) -> None:
    inputs = padded_batch([9])
    expected = locally(llama, inputs, **GREEDY)
    cache = make(llama)
    run = lambda streamer: remotely(llama, inputs, cache, **GREEDY, streamer=streamer)  # noqa: E731
    seen = interrupted(llama.model.layers[1], 5, run)
    assert len(seen) == 9 + 5
    so_far = {"input_ids": torch.tensor([seen])}
    assert torch.equal(remotely(llama, so_far, cache, **GREEDY | {"max_new_tokens": 12 - 5}), expected)


def test_a_copy_of_pages_that_fails_leaves_no_garbage(make, llama, monkeypatch) -> None:
    cache, ids = make(llama), tokens(9, 2)
    llama(ids, past_key_values=cache)

    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(attnd.Cache, "copy_pages", fails)
    with pytest.raises(KeyboardInterrupt):
        cache.reorder_cache(torch.tensor([1, 1]))
    monkeypatch.undo()
    for use in (
        lambda: llama(tokens(1, 2), past_key_values=cache),
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: cache.crop(-1),
        cache.fork,
    ):
        with pytest.raises(attnd.InvalidRequest, match=r"selecting rows was stopped in the middle.*reset\(\) it"):
            use()
    cache.reset()
    check(llama(ids, past_key_values=cache).logits, eager(llama, ids))


def test_after_a_restart_the_pass_is_run_again(tmp_path: Path, llama) -> None:
    """The README's advice: adopt, and send the step again."""
    ids = tokens()
    expected = eager(llama, ids)
    options = ["--device", "cpu", "--snapshot-dir", str(tmp_path / "snapshots"), "--drain-s", "0.2"]
    server = ServerProcess(tmp_path / "log", *options)
    with attnd.connect(server.address, connect_timeout_s=60) as client:
        cache = RemoteCache(client, llama.config, max_tokens=64, dtype=llama.dtype, page_size=4)
        llama(ids[:, :8], past_key_values=cache)
        others = []

        def restart(*_: object) -> None:
            handle.remove()
            server.terminate()
            server.wait()
            others.append(ServerProcess(tmp_path / "log", *options, "--restore", port=server.port))

        handle = llama.model.layers[1].register_forward_pre_hook(restart)
        with pytest.raises((attnd.Disconnected, attnd.CacheLost)):
            llama(ids[:, 8:], past_key_values=cache)
        cache.cache.adopt()
        check(llama(ids[:, 8:], past_key_values=cache).logits, expected[:, 8:])
        cache.close()
    for each in (server, *others):
        each.stop()


@pytest.mark.parametrize("call", ["model", "decoder", "wrapper", "compiled"])
def test_recompute_whoever_calls_the_decoder(client, llama, call: str) -> None:
    """In equal chunks: none of them may be taken for the one before."""
    ids = tokens()
    llama.set_attn_implementation("eager")
    expected = llama.model(ids).last_hidden_state
    llama.set_attn_implementation("attnd")

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama.model

        def forward(self, ids: torch.Tensor, past_key_values: Any) -> Any:
            return self.inner(ids, past_key_values=past_key_values)

    compiled = torch.compile(llama.model, backend="eager") if call == "compiled" else None
    callers = {"decoder": llama.model, "wrapper": Wrapper(), "compiled": compiled}
    kinds = {"max_tokens": 64, "dtype": llama.dtype, "on_cache_lost": "recompute", "model": llama}
    with RemoteCache(client, llama.config, **kinds) as cache:
        pieces = []
        for first in range(0, 24, 8):
            if first == 16:
                cache.cache.delete()
            piece = ids[:, first : first + 8]
            if call == "model":
                output = llama(piece, past_key_values=cache, output_hidden_states=True).hidden_states[-1]
            else:
                output = callers[call](piece, past_key_values=cache).last_hidden_state
            pieces.append(output)
    check(torch.cat(pieces, 1), expected)


def test_a_pass_that_was_not_seen_is_a_refusal_when_it_is_needed(client, llama) -> None:
    ids = tokens()
    expected = eager(llama, ids)
    kinds = {"max_tokens": 64, "dtype": llama.dtype, "on_cache_lost": "recompute", "model": llama}
    twin = copy.deepcopy(llama)
    twin.set_attn_implementation("attnd")
    with RemoteCache(client, llama.config, **kinds) as cache:
        llama(ids[:, :8], past_key_values=cache)
        check(twin(ids[:, 8:16], past_key_values=cache).logits, expected[:, 8:16])  # nobody watches it
        cache.cache.delete()
        with pytest.raises(attnd.CacheLost, match="not through the decoder of the model that was given"):
            llama(ids[:, 16:], past_key_values=cache)


def test_a_stop_before_the_first_layer_gives_its_tokens_to_no_other_pass(client, llama) -> None:
    ids, others = tokens(), tokens()
    kinds = {"max_tokens": 64, "dtype": llama.dtype, "on_cache_lost": "recompute", "model": llama}
    twin = copy.deepcopy(llama)
    twin.set_attn_implementation("attnd")
    with RemoteCache(client, llama.config, **kinds) as cache:
        stopped(llama, 0, KeyboardInterrupt(), lambda: llama(others[:, :8], past_key_values=cache))
        twin(ids[:, :8], past_key_values=cache)  # as many tokens as the stopped pass was to have
        cache.cache.delete()
        with pytest.raises(attnd.CacheLost, match="cannot be computed again"):
            llama(ids[:, 8:], past_key_values=cache)


def test_copies_of_a_watched_model_have_their_own_weights(client) -> None:
    llama = make_model("llama")  # one without hooks of transformers', which cannot be pickled
    ids = tokens()
    kinds = {"max_tokens": 64, "dtype": llama.dtype, "on_cache_lost": "recompute", "model": llama}
    with RemoteCache(client, llama.config, **kinds):
        for twin in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
            for weight in twin.parameters():
                weight.mul_(0.5)
            fresh = transformers.LlamaForCausalLM(llama.config).eval()
            fresh.load_state_dict(twin.state_dict())
            check(eager(twin, ids), eager(fresh, ids))
            assert (eager(twin, ids) - eager(llama, ids)).abs().max() > 0.1


def test_the_decoder_is_watched_while_a_cache_is_open(client, llama) -> None:
    kinds = {"max_tokens": 64, "dtype": llama.dtype, "on_cache_lost": "recompute", "model": llama}
    caches = [RemoteCache(client, llama.config, **kinds) for _ in range(3)]
    assert len(llama.model._forward_pre_hooks) == 1
    caches.pop().close()
    caches.pop()  # dropped, not closed
    gc.collect()
    assert len(llama.model._forward_pre_hooks) == 1
    caches.pop().close()
    assert not llama.model._forward_pre_hooks


@pytest.mark.parametrize("num_layers", [1, 2])
def test_attention_that_is_not_attnd_is_noticed(client, num_layers: int) -> None:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**COMMON | {"num_hidden_layers": num_layers})
    model = transformers.LlamaForCausalLM(config).eval()
    kinds = {"max_tokens": 64, "dtype": model.dtype}
    for end in (lambda cache: model(tokens(1), past_key_values=cache), RemoteCache.reset, RemoteCache.close):
        model.set_attn_implementation("sdpa")
        cache = RemoteCache(client, config, **kinds)
        model(tokens(4), past_key_values=cache) if num_layers == 1 else cache.update(*torch.zeros(2, 1, 2, 1, 32), 0)
        with pytest.raises(
            attnd.Unsupported, match=r"attended without the server.*set_attn_implementation\(\"attnd\"\)"
        ):
            end(cache)
        cache.close()

    def local_pass() -> None:
        with RemoteCache(client, config, **kinds) as cache:
            model(tokens(4), past_key_values=cache)

    def failing_block() -> None:
        with RemoteCache(client, config, **kinds) as cache:
            cache.update(*torch.zeros(2, 1, 2, 1, 32), 0)
            raise ZeroDivisionError

    with pytest.raises(attnd.Unsupported, match="attended without the server"):
        local_pass()
    with pytest.raises(ZeroDivisionError):  # the error of the block is the one to tell
        failing_block()


def test_two_threads_on_one_cache(client, llama) -> None:
    ids = tokens()
    expected = eager(llama, ids)
    inside, go_on = threading.Event(), threading.Event()
    results: dict[str, Any] = {}

    def wait(*_: object) -> None:
        if threading.current_thread() is first:
            inside.set()
            assert go_on.wait(30)

    def run(name: str) -> None:
        try:
            with torch.no_grad():
                results[name] = llama(ids, past_key_values=cache).logits
        except attnd.AttndError as error:
            results[name] = error

    for layer in (0, 1, 2):
        with RemoteCache(client, llama.config, max_tokens=64, dtype=llama.dtype) as cache:
            first, second = (threading.Thread(target=run, args=(name,)) for name in ("first", "second"))
            hook = llama.model.layers[layer].self_attn.register_forward_hook(wait)
            inside.clear()
            go_on.clear()
            first.start()
            assert inside.wait(30)
            second.start()
            second.join(30)
            go_on.set()
            first.join(30)
            hook.remove()
        check(results["first"], expected)
        if layer < 2:  # after its last layer a pass is over
            assert isinstance(results["second"], attnd.InvalidRequest)
            assert "one pass at a time" in str(results["second"])
        else:
            assert not isinstance(results["second"], Exception)


def test_a_thread_goes_on_where_another_was_stopped(client, llama) -> None:
    ids = tokens()
    with RemoteCache(client, llama.config, max_tokens=64, dtype=llama.dtype) as cache:

        def stop() -> None:
            with torch.no_grad():
                stopped(llama, 1, RuntimeError("stop"), lambda: llama(ids, past_key_values=cache))

        other = threading.Thread(target=stop)
        other.start()
        other.join()
        check(llama(ids, past_key_values=cache).logits, eager(llama, ids))


def test_a_dropped_cache_frees_its_memory(client, llama) -> None:
    cache = RemoteCache(client, llama.config, max_tokens=64, dtype=llama.dtype, name="dropped")
    llama(tokens(), past_key_values=cache)
    fork = cache.fork()

    def is_there() -> bool:
        return "dropped" in [info.name for info in client.list_caches()]

    del cache
    gc.collect()
    time.sleep(0.2)
    assert is_there()  # the fork has it
    del fork
    gc.collect()
    deadline = time.monotonic() + 30
    while is_there():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("how", [RemoteCache.fork, copy.deepcopy])
def test_a_fork_goes_on_apart(make, llama, how: Callable[[RemoteCache], RemoteCache]) -> None:
    cache = make(llama)
    ids = tokens(10, 2)
    llama(ids, past_key_values=cache)
    used = cache.num_pages_used
    fork = how(cache)
    assert cache.num_pages_used == used + 2  # of three pages a row the last is its own
    for each in (cache, fork, cache, fork):
        length = each.get_seq_length()
        more = tokens(3, 2)
        whole = torch.cat([ids if length == 10 else each.whole, more], 1)
        check(llama(more, past_key_values=each).logits, eager(llama, whole)[:, length:])
        each.whole = whole
    fork.close()
    assert cache.num_pages_used == 2 * 4
    check(llama(tokens(1, 2), past_key_values=cache).logits[:, :0], torch.empty(2, 0, 97))


def test_a_fork_is_computed_again_too(client, llama) -> None:
    kinds = {"max_tokens": 128, "dtype": llama.dtype, "on_cache_lost": "recompute", "model": llama, "page_size": 4}
    ids = tokens(10)
    with RemoteCache(client, llama.config, **kinds) as cache:
        llama(ids, past_key_values=cache)
        with cache.fork() as fork:
            cache.cache.delete()
            for each in (fork, cache):
                more = tokens(5)
                expected = eager(llama, torch.cat([ids, more], 1))[:, 10:]
                check(llama(more, past_key_values=each).logits, expected)
