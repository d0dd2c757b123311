"""`attnd chat`: talk with a model whose attention and memory are on a server."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from rich.console import Console

from attnd.errors import AttndError, Exhausted
from attnd_server.cli.demo.model import Model
from attnd_server.cli.demo.setup import start
from attnd_server.cli.texts import shown

if TYPE_CHECKING:
    from attnd.credentials import Credentials
    from attnd.integrations.transformers import RemoteCache

MAX_TOKENS = 4096
HELP = "An empty line or Ctrl-D ends the chat, /new starts another, Ctrl-C stops an answer."


def run_chat(
    *,
    console: Console,
    device: str,
    max_new_tokens: int,
    address: str | None,
    model_path: str | None,
    temperature: float,
    credentials: Credentials | None = None,
) -> int:
    """Runs the chat.

    Args:
        console: where to write, and to read from.
        device: of the model, and of the server that is started: "cpu", "cuda:0", or "auto".
        max_new_tokens: most tokens of an answer.
        address: a server that runs already; None starts one.
        model_path: a model's folder or GGUF file; None is SmolLM2.
        temperature: 0 takes the likeliest token.
        credentials: what to show the server at `address`.

    Returns:
        The exit code: 0, or 1 after an error.
    """
    try:
        with ExitStack() as stack:
            model, client, address = start(
                stack,
                console,
                device=device,
                dtype="float32",
                model_path=model_path,
                address=address,
                credentials=credentials,
            )
            from attnd.integrations.transformers import RemoteCache

            network = model.model
            cache = stack.enter_context(
                RemoteCache(client, network.config, max_tokens=MAX_TOKENS, dtype=network.dtype, name="chat")
            )
            if client.capabilities().devices[0].name.startswith("cuda"):
                cache.cache.warm_up(num_heads=network.config.num_attention_heads, max_reqs=1)
            console.print(shown(f"{model.name} on {network.device}, attention at {address}. {HELP}"), highlight=False)
            _talk(console, Conversation(model, cache, max_new_tokens, temperature))
            return 0
    except AttndError as error:
        console.print(shown(f"error: {error}"), style="red")
        return 1
    except KeyboardInterrupt:
        console.print()
        return 130


class Conversation:
    """Messages so far, and a cache that holds the tokens of most of them."""

    def __init__(self, model: Model, cache: RemoteCache, max_new_tokens: int, temperature: float) -> None:
        """Starts without messages."""
        self._model = model
        self._cache = cache
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self._messages: list[dict[str, str]] = []
        self._cached: list[int] = []  # tokens in the cache
        self._cache.reset()

    def say(self, text: str, console: Console) -> None:
        """Answers `text`, streaming. An answer that is stopped or fails is forgotten with its question.

        Raises:
            Exhausted: the conversation is too long.
        """
        from attnd_server.cli.demo.generate import generate, prompt_tokens

        messages = [*self._messages, {"role": "user", "content": text}]
        tokens = prompt_tokens(self._model, messages)
        self._keep_common(tokens[0].tolist())
        try:
            answer = generate(
                self._model,
                tokens,
                max_new_tokens=self._max_new_tokens,
                cache=self._cache,
                temperature=self._temperature,
                write=lambda text: console.print(text, end="", markup=False, highlight=False, soft_wrap=True),
            )
        except BaseException:
            self._cached = []
            self._cache.reset()  # which tokens it holds by now is unknown
            raise
        # The last token was not fed back yet.
        self._cached = (tokens[0].tolist() + answer.tokens)[: self._cache.get_seq_length()]
        self._messages = [*messages, {"role": "assistant", "content": answer.text}]

    def _keep_common(self, tokens: list[int]) -> None:
        """Crops the cache to the tokens that the new prompt starts with; at least one must be left to compute."""
        common = 0
        for cached, token in zip(self._cached, tokens[:-1], strict=False):
            if cached != token:
                break
            common += 1
        self._cache.crop(common - len(self._cached))


def _talk(console: Console, conversation: Conversation) -> None:
    while True:
        try:
            text = console.input("\n[bold]you[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            text = ""
        if not text:
            return
        if text == "/new":
            conversation.clear()
            continue
        try:
            conversation.say(text, console)
        except KeyboardInterrupt:
            console.print("\nstopped", style="dim")
        except Exhausted as error:
            console.print(shown(error), "/new starts another conversation", sep="\n", style="red")
        console.print()
