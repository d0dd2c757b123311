"""What demo and chat begin with: a model here, a server there, and the connection between them."""

from __future__ import annotations

import os
from contextlib import ExitStack

from rich.console import Console

import attnd
from attnd_server.cli.demo.local_server import LocalServer
from attnd_server.cli.demo.model import Model, find_model, load_model


def start(
    stack: ExitStack,
    console: Console,
    *,
    device: str,
    dtype: str,
    model_path: str | None,
    address: str | None,
    credentials: attnd.Credentials | None = None,
) -> tuple[Model, attnd.Client, str]:
    """Loads a model, and connects to a server or starts one meanwhile.

    Args:
        stack: ends the connection and the server.
        console: for the progress bar.
        device: of the model, and of the server that is started: "cpu", "cuda:0", or "auto".
        dtype: of the model: "float32", "float16" or "bfloat16".
        model_path: a model's folder or GGUF file; None is SmolLM2.
        address: a server that runs already; None starts one.
        credentials: what to show that server.

    Returns:
        The model, the connection, and the server's address.

    Raises:
        InvalidRequest: there is no such model.
        Disconnected: there is no such server, or it did not start.
    """
    attnd.tune_process()
    path = find_model(model_path)
    if address is not None:  # before the model, so that a wrong address is told at once
        client = stack.enter_context(attnd.connect(address, credentials=credentials))
        return load_model(path, device=device, dtype=dtype, console=console), client, address
    server = stack.enter_context(LocalServer(device=device))
    model = load_model(path, device=device, dtype=dtype, console=console)
    address = server.wait()
    _share_core(server)
    return model, stack.enter_context(attnd.connect(address)), address


def _share_core(server: LocalServer) -> None:
    """On two cores: moves this thread to the core of the server, which runs while this thread waits for it.

    Between two operations torch's other thread spins on a core, and would keep it from a server that was woken there.
    """
    if server.core is not None:
        import torch

        torch.ones(1 << 20).exp_()  # big enough that torch starts its threads: they would inherit the one core
        os.sched_setaffinity(0, {server.core})
