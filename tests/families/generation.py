"""Behaviours of `model.generate`."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedTokenizerFast, pipeline

from tests.families.behaviours import Absent, Result, Run, behaviour
from tests.families.families import DECODERS, ENCODERS_DECODERS
from tests.families.images import IMAGES, add_images
from tests.families.tiny import VOCAB
from tests.families.ways import ByHand


@behaviour("greedy")
def greedy(run: Run) -> Result:
    return run.generated(run.family.prompts([11, 19, 3, 14]), max_new_tokens=12)


@behaviour("one token")
def one_token(run: Run) -> Result:
    """A prompt of one token, and an answer of one."""
    return run.generated(run.family.prompts([1]), max_new_tokens=1)


@behaviour("right padding")
def right_padding(run: Run) -> Result:
    return run.generated(run.family.prompts([7, 12, 4], "right"))


@behaviour("hole")
def hole(run: Run) -> Result:
    """Padding in the middle of a row."""
    inputs = run.family.prompts([13, 9])
    inputs["attention_mask"][0, 5:8] = 0
    return run.generated(inputs)


@behaviour("sampled")
def sampled(run: Run) -> Result:
    return run.generated(run.family.prompts([9, 5]), do_sample=True, top_k=20, num_return_sequences=2)


@behaviour("beams")
def beams(run: Run) -> Result:
    options = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 14, "eos_token_id": 7}
    return run.chosen(run.family.prompts([5, 13]), **options)


@behaviour("beam sample")
def beam_sample(run: Run) -> Result:
    return run.chosen(run.family.prompts([8, 6]), num_beams=3, do_sample=True, top_k=20)


@behaviour("prompt lookup")
def prompt_lookup(run: Run) -> Result:
    inputs = run.family.prompts([5])
    inputs = {name: value.repeat(1, 4) for name, value in inputs.items()}
    return run.chosen(inputs, prompt_lookup_num_tokens=3, max_new_tokens=16)


@behaviour("assisted")
def assisted(run: Run) -> Result:
    """A draft whose guesses are right at times."""
    draft = run.family.build()
    with torch.no_grad():
        draft.get_output_embeddings().weight[::3] += 0.2
    return run.chosen(run.family.prompts([9]), assistant_model=draft, max_new_tokens=14)


@behaviour("CFG")
def cfg(run: Run) -> Result:
    return run.chosen(run.family.prompts([8, 8]), guidance_scale=1.5)


@behaviour("chunked prefill")
def chunked_prefill(run: Run) -> Result:
    if run.family.kind == ENCODERS_DECODERS:
        raise Absent
    return run.generated(run.family.prompts([17, 12]), prefill_chunk_size=5)


@behaviour("use_cache=False")
def use_cache_false(run: Run) -> Result:
    return run.generated(run.family.prompts([7, 5]), use_cache=False, max_new_tokens=4)


@behaviour("embeddings")
def embeddings(run: Run) -> Result:
    inputs = run.family.prompts([9, 6])
    with torch.no_grad():
        inputs["inputs_embeds"] = run.model.get_input_embeddings()(inputs.pop("input_ids"))
    return run.generated(inputs)


@behaviour("image")
def image(run: Run) -> Result:
    """Prompts with images, by beams too."""
    if run.family.name not in IMAGES:
        raise Absent
    inputs = add_images(IMAGES[run.family.name], run.model, run.family.prompts([9, 4]))
    greedy_tokens = run.generated(inputs)
    return {**greedy_tokens, "beams": run.chosen(inputs, num_beams=3)["tokens"]}


@behaviour("draft served")
def draft_served(run: Run) -> Result:
    """A draft that attends as its model does."""
    draft = run.family.build()
    with torch.no_grad():
        draft.get_output_embeddings().weight[::3] += 0.2
    with run.way.serving(draft):
        return run.chosen(run.family.prompts([9]), assistant_model=draft, max_new_tokens=14)


@behaviour("early exit")
def early_exit(run: Run) -> Result:
    """The first layers are the draft."""
    return run.chosen(run.family.prompts([9]), assistant_early_exit=2)


@behaviour("static cache")
def static_cache(run: Run) -> Result:
    return run.generated(run.family.prompts([9, 6]), cache_implementation="static", disable_compile=True)


@behaviour("another cache")
def another_cache(run: Run) -> Result:
    """A cache of transformers' own, passed by hand."""
    cache: Any = DynamicCache(config=run.model.config.get_text_config(decoder=True))
    if run.family.kind == ENCODERS_DECODERS:
        cache = EncoderDecoderCache(cache, DynamicCache())
    return run.generated(run.family.prompts([9, 6]), past_key_values=cache)


@behaviour("two threads")
def two_threads(run: Run) -> Result:
    """Two answers at the same time."""
    prompts = [run.family.prompts([9, 6]), run.family.prompts([5])]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run.chosen, prompts)
    return {"first": first["tokens"], "second": second["tokens"]}


@behaviour("model copied")
def model_copied(run: Run) -> Result:
    """What is changed in the copy changes nothing in the model."""
    other = copy.deepcopy(run.model)
    with torch.no_grad():
        other.get_output_embeddings().weight.neg_()
    copied = Run(run.family, other, run.way)
    inputs = run.family.prompts([9, 6])
    return {**run.generated(inputs), "copied": copied.generated(inputs)["tokens"]}


@behaviour("inference mode")
def inference_mode(run: Run) -> Result:
    with torch.inference_mode():
        tokens = run.chosen(run.family.prompts([9, 6]))["tokens"]
    return {"tokens": tokens.clone()}


@behaviour("gradients")
def gradients(run: Run) -> Result:
    """Training, which no server does."""
    cache = run.way.cache(run.model) if run.family.kind != ENCODERS_DECODERS else None
    given = {} if cache is None else {"past_key_values": cache}
    with torch.enable_grad():
        run.model(input_ids=run.family.prompts([6])["input_ids"], **given).logits.square().sum().backward()
    norms = [parameter.grad.norm() for parameter in run.model.parameters() if parameter.grad is not None]
    run.model.zero_grad(set_to_none=True)
    return {"norms": torch.stack(norms)}


@behaviour("attentions")
def attentions(run: Run) -> Result:
    """Weights of attention, which no server gives."""
    cache = run.way.cache(run.model) if run.family.kind != ENCODERS_DECODERS else None
    output = run.forward(run.family.prompts([6])["input_ids"], output_attentions=True, past_key_values=cache)
    given = getattr(output, "attentions", None) or getattr(output, "decoder_attentions", None)
    return {"number": torch.tensor(len([weights for weights in given or () if weights is not None]))}


@behaviour("encoder outputs")
def encoder_outputs(run: Run) -> Result:
    """What was encoded once is decoded twice."""
    if run.family.kind != ENCODERS_DECODERS:
        raise Absent
    inputs = run.family.prompts([9, 6])
    with torch.no_grad():
        encoded = run.model.get_encoder()(**inputs)
    mask = {name: value for name, value in inputs.items() if name == "attention_mask"}
    first = run.generated({**mask, "encoder_outputs": copy.deepcopy(encoded)})
    return {**first, "beams": run.chosen({**mask, "encoder_outputs": encoded}, num_beams=3)["tokens"]}


@behaviour("pipeline")
def text_pipeline(run: Run) -> Result:
    """A list of prompts, two at a time."""
    if run.family.kind != DECODERS or isinstance(run.way, ByHand):
        raise Absent
    words = Tokenizer(WordLevel({str(number): number for number in range(VOCAB)}, unk_token="0"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", padding_side="left")
    generate = pipeline("text-generation", model=run.model, tokenizer=tokenizer, batch_size=2)
    prompts = ["5 6 7 8 9 10 11", "12 13", "14 15 16 17", "18"]
    answers = generate(prompts, max_new_tokens=6, do_sample=False)
    numbers = [[int(word) for word in answer[0]["generated_text"].split()] for answer in answers]
    return {"tokens": torch.tensor([number for row in numbers for number in row])}
