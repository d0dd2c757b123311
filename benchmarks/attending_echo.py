"""The bare echoes with attention behind them: the least that it costs in another process, whoever hands it over.

A core that waits for another process sleeps, and what runs after that finds other data in its caches. So this takes
longer than an echo and the backend one after the other, the more so on virtual machines, whose cores the host wakes.

On a GPU the tensors of a layer are there already, so that copies to it and back are not in this.

`python -m benchmarks.attending_echo STEP THREADS [SOCKET MEMORY]` checks the backend's layers of a step, then serves
`benchmarks.echo`, or with two descriptors `benchmarks.doorbell_echo`. The reply to each call comes after a layer.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from attnd.protocol.shm.sockets import map_memory
from attnd.tuning import tune_process
from benchmarks import doorbell_echo, echo
from benchmarks.backend_alone import BackendAlone
from benchmarks.servers import running
from benchmarks.workload import DecodeStep, Heads

MODULE = "benchmarks.attending_echo"
# As `attnd serve` has its threads of torch.
DEFAULTS = {"OMP_WAIT_POLICY": "PASSIVE"}


@contextmanager
def stream_echo(step: DecodeStep, num_threads: int) -> Iterator[echo.StreamEcho]:
    """A gRPC stream to an echo that attends `step`, in a process of its own."""
    with ExitStack() as stack:
        address = stack.enter_context(running(MODULE, encoded(step), str(num_threads), defaults=DEFAULTS))
        stream = echo.StreamEcho(stack.enter_context(echo.connect(address)))
        stack.callback(stream.close)
        yield stream


def doorbell(step: DecodeStep, num_threads: int) -> doorbell_echo.DoorbellEcho:
    """The same by shared memory. Its first call waits until the process is there."""
    return doorbell_echo.DoorbellEcho(MODULE, encoded(step), str(num_threads), defaults=DEFAULTS)


def encoded(step: DecodeStep) -> str:
    dtype = str(step.dtype).removeprefix("torch.")
    return json.dumps([step.num_reqs, step.context_len, dtype, list(step.heads), step.kv_bytes, str(step.device)])


def decoded(text: str) -> DecodeStep:
    num_reqs, context_len, dtype, heads, kv_bytes, device = json.loads(text)
    return DecodeStep(num_reqs, context_len, getattr(torch, dtype), Heads(*heads), torch.device(device), kv_bytes)


def attending(step: DecodeStep) -> Callable[[], None]:
    """Computes the next layer of the step, one after the other. Raises WrongResult if the backend's are wrong."""
    if step.device.type == "cuda":
        torch.cuda.set_device(step.device)
    backend = BackendAlone(step, step.device)
    step.fill(backend)
    call = backend.open()
    step.check("backend behind an echo", backend, call)
    layers = itertools.cycle(range(len(step.layers)))

    def attend() -> None:
        call(next(layers))

    return attend


@torch.inference_mode()
def main(step: str, num_threads: str, *descriptors: str) -> None:
    """Serves until it is ended, or its socket is."""
    tune_process()
    torch.set_num_threads(int(num_threads))
    attend = attending(decoded(step))
    if descriptors:
        connection, memory = map(int, descriptors)
        doorbell_echo.serve(socket.socket(fileno=connection), map_memory(memory, doorbell_echo.NUM_BYTES), attend)
    else:
        asyncio.run(echo.serve(attend))


if __name__ == "__main__":
    main(*sys.argv[1:])
