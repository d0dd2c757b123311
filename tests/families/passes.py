"""Behaviours of `model(...)` with a cache, pass after pass."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch

import attnd
from tests.families.behaviours import Absent, Result, Run, behaviour
from tests.families.ways import MAX_TOKENS, Local


@behaviour("turns", passes=True)
def turns(run: Run) -> Result:
    """A conversation in one cache; the second prompt is the whole of it, the third only what is new."""
    inputs = run.family.prompts([8])
    cache = run.way.cache(run.model)
    given = {} if cache is None else {"past_key_values": cache}
    first = run.generate(inputs, **given)
    new = run.family.prompts([5])["input_ids"]
    tokens = torch.cat([first.sequences, new], 1)
    second = run.generate({"input_ids": tokens}, past_key_values=first.past_key_values)
    last = torch.cat([second.sequences[:, -1:], new], 1)
    mask = torch.ones(1, second.sequences.shape[1] + new.shape[1])
    third = run.generate({"input_ids": last, "attention_mask": mask}, past_key_values=second.past_key_values)
    return {"first": first.sequences, "second": second.sequences, "third": third.sequences}


@behaviour("early end", passes=True)
def early_end(run: Run) -> Result:
    """A conversation of two, of whom one had ended early: what it was filled up with is padding from then on."""
    inputs = run.family.prompts([8, 6])
    probe = run.generate(inputs).sequences
    end = int(probe[0, 11])
    cache = run.way.cache(run.model)
    given = {} if cache is None else {"past_key_values": cache}
    first = run.generate(inputs, eos_token_id=end, pad_token_id=0, **given)
    new = run.family.prompts([5, 5])
    tokens = torch.cat([first.sequences, new["input_ids"]], 1)
    answered = first.sequences[:, 8:]
    ended = (answered == end).cumsum(1) - (answered == end).long() > 0
    mask = torch.cat([inputs["attention_mask"], (~ended).long(), new["attention_mask"]], 1)
    again = {"input_ids": tokens, "attention_mask": mask}
    second = run.generate(again, past_key_values=first.past_key_values)
    return {"first": first.sequences, "second": second.sequences, "logits": torch.stack(second.logits)}


@behaviour("pieces", passes=True)
def pieces(run: Run) -> Result:
    """Logits of a padded prompt in passes; in the first some rows have nothing but padding."""
    inputs = run.family.prompts([11, 19, 3])
    mask = inputs["attention_mask"]
    logits, _ = run.passes(inputs["input_ids"], mask, [4, 12, 13, 19], run.way.cache(run.model))
    return {"logits": logits[mask == 1]}


@behaviour("one pass", passes=True)
def one_pass(run: Run) -> Result:
    inputs = run.family.prompts([11, 19, 3])
    mask = inputs["attention_mask"]
    output = run.forward(inputs["input_ids"], attention_mask=mask, use_cache=False, output_hidden_states=True)
    states = torch.stack([state[mask == 1].flatten() for state in output.hidden_states[1:]])
    return {"logits": output.logits[mask == 1], "states": states}


@behaviour("packed", passes=True)
def packed(run: Run) -> Result:
    """Two prompts in a row, told by their positions."""
    if "position_ids" not in inspect.signature(run.model.forward).parameters:
        raise Absent
    positions = torch.cat([torch.arange(6), torch.arange(5)])[None]
    tokens = run.family.prompts([11])["input_ids"]
    return {"logits": run.forward(tokens, position_ids=positions, use_cache=False).logits}


@behaviour("own mask", passes=True)
def own_mask(run: Run) -> Result:
    """A mask of four dimensions, in which one token is hidden from the last three."""
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    mask[..., -3:, 2] = False
    return {"logits": run.forward(run.family.prompts([9])["input_ids"], attention_mask=mask, use_cache=False).logits}


@behaviour("crop", passes=True)
def crop(run: Run) -> Result:
    inputs = run.family.prompts([17, 13])
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = run.way.cache(run.model)
    if cache is not None:
        cache.activate_past_recording()
    logits, cache = run.passes(tokens, mask, [10, 15], cache)
    cache.crop(-4)
    other = torch.cat([tokens[:, :11], tokens[:, 11:].flip(1)], 1)
    logits, _ = run.passes(other, mask, [14, 17], cache, first=11)
    return {"logits": logits}


@behaviour("reorder", passes=True)
def reorder(run: Run) -> Result:
    inputs = run.family.prompts([7, 10, 10])
    cache = run.passes(inputs["input_ids"], inputs["attention_mask"], [10], run.way.cache(run.model))[1]
    rows = torch.tensor([2, 0, 2])
    cache.reorder_cache(rows)
    return _go_on(run, cache, inputs["attention_mask"][rows], 10)


@behaviour("select and repeat", passes=True)
def select_and_repeat(run: Run) -> Result:
    inputs = run.family.prompts([7, 10, 9])
    cache = run.passes(inputs["input_ids"], inputs["attention_mask"], [10], run.way.cache(run.model))[1]
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    return _go_on(run, cache, inputs["attention_mask"][[2, 2, 0, 0]], 10)


@behaviour("copy", passes=True)
def copied(run: Run) -> Result:
    """A prompt computed once, continued twice."""
    inputs = run.family.prompts([10, 7])
    cache = run.passes(inputs["input_ids"], inputs["attention_mask"], [10], run.way.cache(run.model))[1]
    other = copy.deepcopy(cache)
    first = _go_on(run, cache, inputs["attention_mask"], 10)["logits"]
    second = _go_on(run, other, inputs["attention_mask"], 10, seed=8)["logits"]
    return {"logits": torch.stack([first, second])}


@behaviour("two caches", passes=True)
def two_caches(run: Run) -> Result:
    """Two prompts by turns."""
    prompts = [run.family.prompts([9]), run.family.prompts([12])]
    caches = [run.passes(*prompt.values(), [5], run.way.cache(run.model))[1] for prompt in prompts]
    pairs = zip(prompts, caches, strict=True)
    logits = [run.passes(*prompt.values(), [7, 9], cache, first=5)[0] for prompt, cache in pairs]
    return {"logits": torch.cat(logits)}


@behaviour("interrupted", passes=True)
def interrupted(run: Run) -> Result:
    """A pass stops between two layers, and is sent again."""
    inputs = run.family.prompts([16])
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = run.passes(tokens, mask, [6], run.way.cache(run.model))[1]
    if not isinstance(run.way, Local):
        layer = _layers(run.model)[-1]
        hook = layer.register_forward_pre_hook(_stop)
        try:
            run.passes(tokens.flip(1), mask, [14], cache, first=6)
        except KeyboardInterrupt:
            pass
        finally:
            hook.remove()
    return {"logits": run.passes(tokens, mask, [14, 16], cache, first=6)[0]}


@behaviour("too long", passes=True)
def too_long(run: Run) -> Result:
    """A pass for which the pages do not suffice, and then a shorter one."""
    inputs = run.family.prompts([200] * 6)
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = run.passes(tokens, mask, [5], run.way.cache(run.model))[1]
    if not isinstance(run.way, Local):
        try:
            run.passes(tokens, mask, [200], cache, first=5)
        except attnd.Exhausted:
            pass
        else:
            raise AssertionError(f"1200 tokens fitted into {MAX_TOKENS}")
    return {"logits": run.passes(tokens, mask, [8, 9], cache, first=5)[0]}


@behaviour("inner module", passes=True)
def inner_module(run: Run) -> Result:
    """The decoder without its head, in pieces."""
    tokens = run.family.prompts([12])["input_ids"]
    decoder, cache, states = run.model.get_decoder(), run.way.cache(run.model), []
    with torch.no_grad():
        for first, end in ((0, 7), (7, 11), (11, 12)):
            output = decoder(input_ids=tokens[:, first:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            states.append(output.last_hidden_state)
    return {"states": torch.cat(states, 1)}


@behaviour("token types", passes=True)
def token_types(run: Run) -> Result:
    """All zero: text."""
    tokens = run.family.prompts([9])["input_ids"]
    names = [name for name in inspect.signature(run.model.forward).parameters if name.endswith("token_type_ids")]
    if not names:
        raise Absent
    types = dict.fromkeys(names, torch.zeros_like(tokens))
    return {"logits": run.forward(tokens, past_key_values=run.way.cache(run.model), **types).logits}


@behaviour("bfloat16", passes=True)
def bfloat16(run: Run) -> Result:
    return _half(run, torch.bfloat16)


@behaviour("float16", passes=True)
def float16(run: Run) -> Result:
    return _half(run, torch.float16)


def _half(run: Run, dtype: torch.dtype) -> Result:
    """How far half precision lies from single precision: of the median token, as an expert may be another for one."""
    inputs = run.family.prompts([12, 9])
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    exact_way = Local()
    model = run.family.build()
    with exact_way.serving(model):
        exact = Run(run.family, model, exact_way).passes(tokens, mask, [8, 12], None)[0][mask == 1]
    model = model.to(dtype)
    with run.way.serving(model):
        cache = run.way.cache(model)
        logits = Run(run.family, model, run.way).passes(tokens, mask, [8, 12], cache)[0][mask == 1]
    errors = (logits.float() - exact).square().mean(-1).sqrt()
    return {"error": errors.median() / exact.square().mean().sqrt()}


def _go_on(run: Run, cache: Any, mask: torch.Tensor, first: int, seed: int = 7) -> Result:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 90, (len(mask), first + 3), generator=generator)
    mask = torch.cat([mask, torch.ones(len(mask), 3, dtype=mask.dtype)], 1)
    return {"logits": run.passes(tokens, mask, [first + 2, first + 3], cache, first=first)[0]}


def _layers(model: Any) -> torch.nn.ModuleList:
    """The decoder's."""
    number = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == number]
    if not lists:
        raise Absent
    return lists[0]


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt
