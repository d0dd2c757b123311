"""One client of `benchmarks.callers`, a process of its own: decode steps over one plane, as fast as it can.

It connects, fills a cache, checks what comes back, and does as it is told (see `benchmarks.told_seconds`). It ends with
its input.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack

import torch

import attnd
from benchmarks.endpoints import TIMEOUT_S
from benchmarks.told_seconds import run_as_told
from benchmarks.way_timing import Samples
from benchmarks.ways import plane_way, warm_up
from benchmarks.workload import MODELS, DecodeStep


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.caller", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("address")
    parser.add_argument("--plane", required=True)
    parser.add_argument("--device", required=True, help="of tensors that a plane wants there, and of the check")
    parser.add_argument("--model", choices=[heads.name for heads in MODELS], required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--kv-bytes", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    return parser.parse_args()


@torch.inference_mode()
def run(options: argparse.Namespace) -> None:
    """Until the input ends."""
    attnd.tune_process()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads = next(heads for heads in MODELS if heads.name == options.model)
    step = DecodeStep(options.tokens, options.context, dtype, heads, device, options.kv_bytes)
    with ExitStack() as stack:
        client = stack.enter_context(attnd.connect(options.address, timeout_s=TIMEOUT_S))
        cache = stack.enter_context(client.create_cache(**step.geometry))
        step.fill(cache)
        warm_up(step, cache, device)
        session = stack.enter_context(cache.session(plane=options.plane))
        way = plane_way(options.plane, step, session, device)
        step.check(options.plane, cache, way.open())
        session.close()  # while it waits, it takes none of the planes that a server has
        run_as_told(lambda call_us: Samples(call_us).add_step(way, len(step.layers)), session.close)


if __name__ == "__main__":
    run(parse())
