"""`attnd chat`: the conversation stays on the server from one message to the next."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

import attnd

pytest.importorskip("transformers", reason="needs transformers")

from attnd.integrations.transformers import RemoteCache  # needs transformers
from attnd_server.cli.demo.chat import Conversation, run_chat
from attnd_server.cli.demo.generate import generate, prompt_tokens
from attnd_server.cli.demo.model import Model, load_model
from tests.tiny_model import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    return load_model(folder, device="cpu", dtype="float32", console=Console(file=io.StringIO()))


@pytest.fixture
def cache(client: attnd.Client, model: Model) -> Iterator[RemoteCache]:
    with RemoteCache(client, model.model.config, max_tokens=256, dtype=model.model.dtype) as cache:
        yield cache


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=100)


def said(console: Console) -> str:
    written = console.file.getvalue()
    console.file.seek(0)
    console.file.truncate()
    return written


def test_an_answer_depends_on_all_that_was_said(model, cache, console):
    conversation = Conversation(model, cache, max_new_tokens=8, temperature=0)
    conversation.say("the ferry to the island", console)
    first = said(console)
    before = cache.timings().bytes_sent
    conversation.say("a captain on the pier", console)
    second = said(console)
    again = [
        {"role": "user", "content": "the ferry to the island"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "a captain on the pier"},
    ]
    tokens = prompt_tokens(model, again)
    assert generate(model, tokens, max_new_tokens=8).text == second
    # What was said before was not sent again.
    sent = cache.timings().bytes_sent - before
    cache.reset()
    before = cache.timings().bytes_sent
    generate(model, tokens, max_new_tokens=8, cache=cache)
    assert sent < 0.7 * (cache.timings().bytes_sent - before)


def test_a_conversation_that_is_too_long(model, cache, console):
    conversation = Conversation(model, cache, max_new_tokens=8, temperature=0)
    with pytest.raises(attnd.Exhausted, match="max_tokens gives 16 pages"):
        conversation.say("ferry " * 260, console)
    conversation.say("the ferry", console)
    assert said(console)


def test_chat_until_an_empty_line(model, server_address, console, monkeypatch, tmp_path):
    lines = iter(["the boat", "/new", "the horn", ""])
    monkeypatch.setattr(console, "input", lambda prompt: next(lines))
    folder = str(save_tiny_model(tmp_path))
    options = {"device": "cpu", "max_new_tokens": 4, "model_path": folder, "temperature": 0.5}
    assert run_chat(console=console, address=server_address, **options) == 0
    assert "attention at" in said(console)
