"""The commands `attnd demo` and `attnd chat`."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

import typer

from attnd_server.cli.credentials import with_credentials
from attnd_server.cli.options import Device, option
from attnd_server.cli.parsers import number, whole
from attnd_server.cli.streams import output


class Dtype(str, Enum):
    """Types that the demo's model may have."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


Address = Annotated[
    str | None,
    option("ATTND_ADDRESS", "A server that runs already.", metavar="HOST:PORT", show_default="starts one of its own"),
]
ModelPath = Annotated[
    str | None,
    option("ATTND_MODEL_PATH", "A model's folder or GGUF file.", metavar="PATH", show_default="SmolLM2-135M-Instruct"),
]


@with_credentials
def demo(
    device: Device = "auto",
    max_new_tokens: Annotated[int, typer.Option(parser=whole(1), metavar="N", help="Tokens of each answer.")] = 48,
    dtype: Annotated[Dtype, typer.Option(help="Type of the model and its KV.")] = Dtype.FLOAT32,
    model_path: ModelPath = None,
    address: Address = None,
    credentials: Any = None,
) -> None:
    """Let a real model answer with attention from a server, then with its own, and compare."""
    from attnd_server.cli.demo.demo import run_demo

    code = run_demo(
        console=output(),
        device=device,
        max_new_tokens=max_new_tokens,
        dtype=dtype.value,
        model_path=model_path,
        address=address,
        credentials=credentials,
    )
    raise typer.Exit(code)


@with_credentials
def chat(
    device: Device = "auto",
    max_new_tokens: Annotated[int, typer.Option(parser=whole(1), metavar="N", help="Most tokens of an answer.")] = 512,
    temperature: Annotated[
        float, typer.Option(parser=number(0), metavar="X", help="0 always takes the likeliest token.")
    ] = 0.7,
    model_path: ModelPath = None,
    address: Address = None,
    credentials: Any = None,
) -> None:
    """Talk with the demo's model, its attention served by a server."""
    from attnd_server.cli.demo.chat import run_chat

    code = run_chat(
        console=output(),
        device=device,
        max_new_tokens=max_new_tokens,
        address=address,
        model_path=model_path,
        temperature=temperature,
        credentials=credentials,
    )
    raise typer.Exit(code)
