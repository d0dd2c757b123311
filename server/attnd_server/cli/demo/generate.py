"""One prompt and its answer, token by token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import TextStreamer

from attnd_server.cli.demo.model import Model

if TYPE_CHECKING:
    from attnd.integrations.transformers import RemoteCache

Write = Callable[[str], None]


@dataclass
class Answer:
    """What a model said.

    Attributes:
        prompt_len: tokens of the prompt.
        tokens: of the answer.
        text: of the answer.
        first_s: seconds until its first token.
        rest_s: seconds from there to its last.
    """

    prompt_len: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    first_s: float = 0.0
    rest_s: float = 0.0


def prompt_tokens(model: Model, messages: Sequence[dict[str, str]]) -> torch.Tensor:
    """Int64 `[1, num_tokens]` on the model's device: a conversation, up to where the model's turn begins.

    Args:
        model: whose chat template is used; without one, the messages are joined.
        messages: dicts with "role" and "content".
    """
    tokenizer = model.tokenizer
    if tokenizer.chat_template is None:
        text = "\n".join(message["content"] for message in messages)
        tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    else:
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        tokens = tokenizer.apply_chat_template(messages, **options)["input_ids"]
    placed: torch.Tensor = tokens.to(model.model.device)
    return placed


def generate(
    model: Model,
    tokens: torch.Tensor,
    *,
    max_new_tokens: int,
    cache: RemoteCache | None = None,
    temperature: float = 0.0,
    write: Write = lambda text: None,
) -> Answer:
    """Answers a prompt, with the model's own attention or with a server's.

    Args:
        model: what answers.
        tokens: int64 `[1, num_tokens]`, all of the prompt; what `cache` holds already is not computed again.
        max_new_tokens: most tokens of the answer.
        cache: where keys and values lie; None: in the model's process.
        temperature: 0 takes the likeliest token.
        write: gets the text as it comes.
    """
    model.model.set_attn_implementation("sdpa" if cache is None else "attnd")
    stream = _Stream(model.tokenizer, write)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    started = time.perf_counter()
    with torch.inference_mode():
        output = model.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            streamer=stream,
            **sampling,
        )
    num_prompt = tokens.shape[1]
    return Answer(
        prompt_len=num_prompt,
        tokens=output[0, num_prompt:].tolist(),
        text=stream.text,
        first_s=stream.times[0] - started,
        rest_s=stream.times[-1] - stream.times[0],
    )


class _Stream(TextStreamer):
    """Passes text on as soon as it is sure, and notes when each token came."""

    def __init__(self, tokenizer: Any, write: Write) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []
        self.text = ""
        self._write = write

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, then one token after the other."""
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)  # type: ignore[no-untyped-call]  # transformers gives it no types

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Takes text that later tokens do not change."""
        self.text += text
        self._write(text)
