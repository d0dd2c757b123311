"""`attnd demo`: a real model answers with attention from a server, then with its own, and the two are compared."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table

from attnd.errors import AttndError
from attnd_server.cli.demo.model import Model
from attnd_server.cli.demo.prompts import PROMPTS
from attnd_server.cli.demo.setup import start
from attnd_server.cli.texts import shown

if TYPE_CHECKING:
    from attnd.client import Client
    from attnd.credentials import Credentials
    from attnd.timings import Timings
    from attnd_server.cli.demo.generate import Answer

PAGE_SIZE = 16


class Remote(NamedTuple):
    """What the run with a server gave.

    Attributes:
        answers: to each of PROMPTS.
        timings: of all calls.
        num_pages_used: most pages at one time.
        num_pages: pages of the cache.
        device: the server's.
    """

    answers: list[Answer]
    timings: Timings
    num_pages_used: int
    num_pages: int
    device: str


def run_demo(
    *,
    console: Console,
    device: str,
    max_new_tokens: int,
    dtype: str,
    model_path: str | None,
    address: str | None,
    credentials: Credentials | None = None,
) -> int:
    """Runs the demo.

    Args:
        console: where to write.
        device: of the model, and of the server that is started: "cpu", "cuda:0", or "auto".
        max_new_tokens: tokens of each answer.
        dtype: of the model.
        model_path: a model's folder or GGUF file; None is SmolLM2.
        address: a server that runs already; None starts one.
        credentials: what to show that server.

    Returns:
        The exit code: 0 if both answered with the same tokens, 130 after Ctrl-C, else 1.
    """
    try:
        with ExitStack() as stack:
            model, client, address = start(
                stack,
                console,
                device=device,
                dtype=dtype,
                model_path=model_path,
                address=address,
                credentials=credentials,
            )
            return _compare(console, model, client, address, max_new_tokens)
    except AttndError as error:
        console.print(shown(f"error: {error}"), style="red")
        return 1
    except KeyboardInterrupt:
        console.print("\ninterrupted")
        return 130


def _compare(console: Console, model: Model, client: Client, address: str, max_new_tokens: int) -> int:
    from attnd_server.cli.demo.generate import generate, prompt_tokens

    remote = _remotely(console, model, client, address, max_new_tokens)
    with console.status("the same with the model's own attention"):
        generate(model, prompt_tokens(model, PROMPTS[0].messages()), max_new_tokens=2)  # warm up
        local = [
            generate(model, prompt_tokens(model, prompt.messages()), max_new_tokens=max_new_tokens)
            for prompt in PROMPTS
        ]
    console.print(_table(model, remote, local))
    equal = [ours.tokens == theirs.tokens for ours, theirs in zip(remote.answers, local, strict=True)]
    for prompt, ours, theirs, same in zip(PROMPTS, remote.answers, local, equal, strict=True):
        if not same:
            console.print(f"{prompt.question} The model's own attention answers differently:", style="red")
            console.print(f"  remote {ours.tokens}\n  local  {theirs.tokens}", markup=False)
    return 0 if all(equal) else 1


def _remotely(console: Console, model: Model, client: Client, address: str, max_new_tokens: int) -> Remote:
    """Answers the prompts with attention from the server, streaming the text."""
    from attnd.integrations.transformers import RemoteCache
    from attnd_server.cli.demo.generate import generate, prompt_tokens

    prompts = [prompt_tokens(model, prompt.messages()) for prompt in PROMPTS]
    max_tokens = max(tokens.shape[1] for tokens in prompts) + max_new_tokens
    network = model.model
    with RemoteCache(
        client, network.config, max_tokens=max_tokens, page_size=PAGE_SIZE, dtype=network.dtype, name="demo"
    ) as cache:
        device = client.capabilities().devices[0].name
        console.print(shown(f"{model.name} on {network.device}, attention on {device} at {address}"), highlight=False)
        generate(model, prompts[0], max_new_tokens=2, cache=cache)  # warm up
        if device.startswith("cuda"):
            cache.cache.warm_up(num_heads=network.config.num_attention_heads, max_reqs=1)
        cache.session.reset_timings()
        answers, num_pages_used = [], 0
        for prompt, tokens in zip(PROMPTS, prompts, strict=True):
            cache.reset()
            console.print(Rule(style="dim"))
            console.print(prompt.question, style="bold", highlight=False)
            console.print(f"{prompt.about} {tokens.shape[1]} tokens", style="dim", highlight=False)

            def write(text: str) -> None:
                console.print(text, end="", markup=False, highlight=False, soft_wrap=True)

            answers.append(generate(model, tokens, max_new_tokens=max_new_tokens, cache=cache, write=write))
            console.print()
            num_pages_used = max(num_pages_used, cache.num_pages_used)
        console.print(Rule(style="dim"))
        return Remote(answers, cache.timings(), num_pages_used, cache.cache.config.num_pages, device)


def _table(model: Model, remote: Remote, local: list[Answer]) -> Padding:
    equal = all(ours.tokens == theirs.tokens for ours, theirs in zip(remote.answers, local, strict=True))
    timings = remote.timings
    table = Table("", "remote", "local", box=None, pad_edge=False)
    table.add_row("tokens equal", "[green]yes[/]" if equal else "[red]no[/]")
    speeds = [_tokens_per_s(answers) for answers in (remote.answers, local)]
    ratio = f"  ({speeds[0] / speeds[1]:.2f} x local)" if speeds[1] else ""
    table.add_row("tokens per second", f"{speeds[0]:.1f}{ratio}", f"{speeds[1]:.1f}")
    firsts = [", ".join(f"{answer.first_s:.2f}" for answer in answers) for answers in (remote.answers, local)]
    table.add_row("seconds to the first token", *firsts)
    table.add_row("calls", f"{timings.num_calls} in {timings.num_steps} steps")
    table.add_row("time of a call, p50 / p99", f"{_quantile(timings, 0.5):.2f} / {_quantile(timings, 0.99):.2f} ms")
    table.add_row("time in wire / queue / copies / kernel", _split(timings))
    table.add_row("backend", f"{timings.backend} on {remote.device}", f"sdpa on {model.model.device}")
    table.add_row("plane", timings.plane)
    table.add_row("pages used", f"{remote.num_pages_used} of {remote.num_pages}, {PAGE_SIZE} tokens each")
    return Padding(table, (1, 0))


def _tokens_per_s(answers: list[Answer]) -> float:
    """Tokens per second after the first of each answer, whose time is the prompt's."""
    num_tokens = sum(len(answer.tokens) - 1 for answer in answers)
    seconds = sum(answer.rest_s for answer in answers)
    return num_tokens / seconds if seconds else 0.0


def _quantile(timings: Timings, q: float) -> float:
    """Milliseconds that a share `q` of the last calls did not exceed."""
    times_us = sorted(timings.call_us)
    return times_us[min(len(times_us) - 1, int(q * len(times_us)))] / 1e3 if times_us else 0.0


def _split(timings: Timings) -> str:
    """Where the time of all calls went."""
    copies_us = timings.copy_in_us + timings.copy_out_us
    parts = [timings.wire_us, timings.queue_us, copies_us, timings.kernel_us]
    total = sum(parts) or 1.0
    shares = " / ".join(f"{part / total:.0%}" for part in parts)
    return f"{shares} of {total / 1e6:.2f} s"
