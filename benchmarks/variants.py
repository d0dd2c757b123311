"""How many variants of each kernel in Triton a random mix of calls needs, and how long they take to compile.

`python -m benchmarks.variants --count-only` needs no GPU: steps are planned and launched with a driver that only knows
a GPU's name, and what Triton would compile is counted. `--checkout` does it with the code of another checkout. Where
the code can say what a cache needs, a variant that it does not say is an error. Hopper's kernel of many rows may be
another one for what a cache does not know: a group that its code does not have ahead, and options.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Hopper's kernel of many rows, and its arguments that only calls know; of those, what calls without options have.
MANY_ROWS = "hopper_attention_kernel"
OF_CALLS = {"NEW_TOKENS": True, "WINDOW": False, "SOFTCAP": False, "ALIBI": False, "SINKS": False, "LSE": False}
ALSO_OF_CALLS = ("GROUP", "partial_output", "partial_lse")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.variants", description=__doc__)
    parser.add_argument("--checkout", type=Path, default=ROOT, metavar="PATH", help="whose code; default: this one")
    parser.add_argument("--calls", type=int, default=1000, metavar="N", help="default: 1000")
    parser.add_argument("--geometries", type=int, default=20, metavar="N", help="default: 20")
    parser.add_argument("--arch", type=int, default=90, metavar="SM", help="of the GPU; default: 90")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--count-only", action="store_true", help="compile nothing")
    parser.add_argument("--samples", type=int, default=2, metavar="N", help="of a kernel to compile; default: 2")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows to this file")
    return parser.parse_args(arguments)


@dataclass
class Variants:
    """What Triton is asked to compile, in place of its compiling it.

    Attributes:
        seen: for each kernel the variants, with what compiles one.
        needed: the keys of those that the cache at hand needs, by kernel; None: nobody says. Of Hopper's kernel of many
            rows also what is left of each without what calls alone know.
        groups: those for which that kernel is needed.
        collects: whether what is asked for is what a cache needs.
        unforeseen: variants that a call needed, and its cache was not said to need.
    """

    seen: dict[str, dict[str, Any]] = field(default_factory=dict)
    needed: dict[str, set[str]] | None = None
    groups: Sequence[int] = ()
    collects: bool = False
    unforeseen: set[str] = field(default_factory=set)

    def install(self) -> None:
        """From now on Triton says what it would compile, and launches nothing."""
        from triton.runtime.jit import JITFunction

        compile_now = JITFunction._do_compile

        def note(
            kernel: Any, key: str, signature: Any, device: int, constexprs: Any, options: Any, attrs: Any, warmup: bool
        ) -> None:
            name = kernel.__name__.strip("_")
            told = {kernel.arg_names[path[0]]: value for path, value in constexprs.items() if len(path) == 1}
            of_cache = _of_cache(kernel.arg_names, signature, constexprs, attrs, options) if name == MANY_ROWS else key
            if self.collects:
                assert self.needed is not None
                self.needed.setdefault(name, set()).update((key, of_cache))
                return
            given = key, signature, device, constexprs, options, attrs, True
            self.seen.setdefault(name, {})[key] = lambda: compile_now(kernel, *given)
            is_plain = told.get("GROUP") in self.groups and told.items() >= OF_CALLS.items()
            known = key if name != MANY_ROWS or is_plain else of_cache
            if self.needed is not None and known not in self.needed.get(name, ()):
                self.unforeseen.add(f"{name}: {key}")

        JITFunction._do_compile = note


def _of_cache(names: Sequence[str], signature: Any, constexprs: Any, attrs: Any, options: Any) -> str:
    """What is left of a variant of Hopper's kernel of many rows without what calls alone know."""
    left = [name not in OF_CALLS and name not in ALSO_OF_CALLS for name in names]
    types = {name: kind for name, kind in signature.items() if left[names.index(name)]}
    return str(
        [types, *({path: each[path] for path in each if left[path[0]]} for each in (constexprs, attrs)), options]
    )


class NamedGpu:
    """All that Triton asks of a driver before it launches."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        """The first."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """None in particular."""
        return 0

    def get_current_target(self) -> Any:
        """What to compile for."""
        return self._target


def geometries(number: int, has_fp8: bool, numbers: random.Random) -> Iterator[tuple[dict[str, Any], int]]:
    """Fields of caches, and query heads of a KV head: those of common models, and odd ones."""
    import torch

    for _ in range(number):
        fp8, dtype = (
            has_fp8 and numbers.random() < 0.25,
            numbers.choice([torch.bfloat16] * 4 + [torch.float16, torch.float32]),
        )
        fields = {
            "num_layers": 2,
            "num_kv_heads": numbers.choice([1, 2, 4, 8, 8, 8, 16, 32]),
            "head_dim": numbers.choice([64, 80, 128, 128, 128, 256]),
            "num_pages": 4,
            "page_size": numbers.choice([8, 16, 16, 16, 32, 64, 128, 48]),
            "dtype": dtype,
            "layout": numbers.choice(["unified"] * 6 + ["distinct"]),
        }
        if fp8:
            fields["kv_dtype"] = torch.float8_e4m3fn
        yield fields, numbers.choice([1, 2, 3, 4, 4, 5, 7, 8, 8, 16])


def run_calls(options: argparse.Namespace, variants: Variants) -> None:
    """Plans and launches the mix: each call of a random cache, with random options and lengths."""
    import torch

    from attnd_server.attention.config import AttentionConfig, Layout

    hopper = options.arch // 10 == 9
    pretend(hopper)
    numbers = random.Random(options.seed)
    caches = []
    for fields, group in geometries(options.geometries, options.arch >= 89, numbers):
        config = AttentionConfig(**(fields | {"layout": Layout(fields["layout"])}))
        caches.append((config, group, _needed(config, hopper, variants)))
    for _ in range(options.calls):
        config, group, variants.needed = numbers.choice(caches)
        with torch.inference_mode():
            _call(config, group, numbers, hopper)
    variants.needed = None


def pretend(hopper: bool) -> None:
    """Has the planning take a processor for the GPU."""
    from importlib import import_module

    for name in ("launches", "planning", "fixed_plan"):
        module: Any = import_module(f"attnd_server.attention.backends.triton.{name}")
        serves = getattr(module, "hopper_serves", None)
        if serves is None:
            launches: Any = import_module("attnd_server.attention.backends.triton.launches")
            serves = getattr(launches, "hopper_serves", None) or _served(launches.fits_hopper)
        module.fits_hopper = lambda config, dtype, device, serves=serves: hopper and serves(config, dtype)
        module.multiprocessors = lambda device: 132
    plan: Any = import_module("attnd_server.attention.backends.triton.plan")
    plan.multiprocessors = lambda device: 132


def _served(fits_hopper: Any) -> Any:
    """`hopper_serves` of code that has none."""
    import torch

    fits_hopper.__globals__["_hopper_kernels_load"] = lambda device: True
    return lambda config, dtype: fits_hopper(config, dtype, torch.device("cuda"))


def _needed(config: Any, hopper: bool, variants: Variants) -> dict[str, set[str]] | None:
    """The variants that the code says a cache needs; None: it does not say."""
    try:
        from attnd_server.attention.backends.triton import needed
    except ModuleNotFoundError:
        return None
    variants.needed, variants.collects = {}, True
    variants.groups = getattr(needed, "GROUPS_AHEAD", ())
    for launch in needed.needed_launches(config, hopper):
        launch()
    variants.collects = False
    return variants.needed


def _call(config: Any, group: int, numbers: random.Random, hopper: bool) -> None:
    """One step of one layer: stored, attended to, and sometimes read."""
    import torch

    from attnd_server.attention.backends.base import DecodeShape
    from attnd_server.attention.backends.triton.attention import TritonPagedAttention
    from attnd_server.attention.config import AttentionBackend
    from attnd_server.attention.kernels.gather import read_kv
    from attnd_server.attention.kernels.store import store_kv
    from attnd_server.attention.layer_pages import LayerPages
    from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions

    def rarely(chance: float) -> bool:
        return numbers.random() < chance

    num_reqs = numbers.choice([1, 2, 3, 5, 8, 20, 40])
    query_len = numbers.choice([1] * 5 + [2, 4, 5, 8, 16, 17, 32, 64, 100, 256, 300, 700])
    # One of the two is whole for all requests, as in decode and block decode.
    alike = query_len <= 256 and not rarely(0.2)
    query_lens = [query_len if alike else numbers.randint(1, query_len + 1) for _ in range(num_reqs)]
    contexts = [numbers.choice([0, 1, 17, 500, 3000, 9000, 40_000]) for _ in range(num_reqs)]
    num_pages = -(-max(contexts) // config.page_size) + 1
    tables = torch.zeros(num_reqs, num_pages, dtype=torch.int32)
    is_absent = rarely(0.05) and max(contexts) > 0
    if is_absent:
        tables[contexts.index(max(contexts)), 0] = -1
    zeros, num_tokens = torch.zeros(num_reqs, dtype=torch.int64), sum(query_lens)
    more: dict[str, Any] = {}
    if rarely(0.05):
        more["seen_new"] = torch.rand(num_tokens) < 0.5
    if rarely(0.05):
        more["without_sinks"] = torch.rand(num_reqs) < 0.5
    metadata = AttentionMetadata(
        is_decode=alike and max(contexts) > 0,
        num_tokens=num_tokens,
        cu_seqlens_q=torch.tensor([0, *query_lens]).cumsum(0),
        context_lens=torch.tensor(contexts),
        page_tables=tables,
        slot_mapping=None,
        valid_lens=torch.tensor(query_lens),
        block_sizes=zeros + numbers.choice([0, 1, 1, query_len]),
        prefix_lens=zeros,
        padded_prefix_lens=zeros,
        hole_starts=zeros,
        hole_ends=zeros + (1 if rarely(0.05) else 0),
        cache_only=rarely(0.1) and not more,
        **more,
    )
    heads = config.num_kv_heads * group
    grouped = not rarely(0.15)
    backend = AttentionBackend.TRITON_GROUPED if grouped else AttentionBackend.TRITON
    options = AttentionOptions(
        num_heads=heads,
        scale=numbers.choice([0.1, 1.0, -0.5]),
        softcap=30.0 if rarely(0.15) else 0.0,
        window=numbers.choice([1, 100, 5000]) if rarely(0.2) else 0,
        alibi_slopes=torch.ones(heads) if rarely(0.1) else None,
        sinks=torch.ones(heads) if rarely(0.2) else None,
        return_lse=rarely(0.3),
        backend=backend,
    )
    q = torch.empty(num_tokens, heads, config.head_dim, dtype=config.dtype)
    k = torch.empty(num_tokens, config.num_kv_heads, config.head_dim, dtype=config.dtype)
    v = torch.empty(num_tokens, config.num_kv_heads, config.head_dim_v, dtype=config.dtype)
    k_dtype = config.kv_dtype or config.dtype
    # Scales of the second layer, which need not be aligned.
    scales = [
        torch.ones(2 * config.num_kv_heads)[config.num_kv_heads :] if is_quantised else None
        for is_quantised in (config.k_is_quantised, config.v_is_quantised)
    ]
    pages = LayerPages(
        torch.empty(4, *config.k_shape[1:], dtype=k_dtype),
        torch.empty(4, *config.v_shape[1:], dtype=config.v_dtype or k_dtype),
        *scales,
    )
    store_kv(pages, k, v, torch.zeros(num_tokens, dtype=torch.int64), config.layout)
    if rarely(0.1):
        read_kv(pages, torch.zeros(num_tokens, dtype=torch.int64), config.layout, config.dtype)
    kernel = TritonPagedAttention(backend)
    plan: Any = None
    if metadata.is_decode and hopper and rarely(0.6):
        shape = DecodeShape(num_reqs, query_len, max(contexts))
        plan = kernel.fixed_plan(config, shape, options, torch.device("cpu"))
        plan = None if isinstance(plan, str) or plan.refusal(metadata) else plan.plan
    if plan is None:
        plan = kernel.plan(config, metadata, options, torch.device("cpu"))
    output = torch.empty(num_tokens, heads, config.head_dim_v, dtype=config.dtype)
    lse = torch.empty(num_tokens, heads) if options.return_lse else None
    new = (None, None) if metadata.cache_only else (k, v)
    plan.launch(output, lse, q, *new, pages)


def compile_seconds(variants: Variants, samples: int) -> dict[str, float]:
    """Seconds to compile a variant of each kernel from an empty cache, the mean of some."""
    numbers, result = random.Random(0), {}
    for name, found in sorted(variants.seen.items()):
        chosen = numbers.sample(sorted(found), min(samples, len(found)))
        seconds = []
        for key in chosen:
            with tempfile.TemporaryDirectory() as folder:
                os.environ["TRITON_CACHE_DIR"] = folder
                start = time.perf_counter()
                found[key]()
                seconds.append(time.perf_counter() - start)
        result[name] = sum(seconds) / len(seconds)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 1 if a call needed what its cache was not said to need."""
    options = parse(arguments)
    sys.path[:0] = [str(options.checkout.resolve() / name) for name in ("client", "server")]
    import triton
    from rich.console import Console
    from rich.table import Table

    from benchmarks.report import write_json

    triton.runtime.driver.set_active(NamedGpu(options.arch))
    variants = Variants()
    variants.install()
    run_calls(options, variants)
    seconds = {} if options.count_only else compile_seconds(variants, options.samples)
    rows = [
        {"kernel": name, "variants": len(found), "seconds": seconds.get(name)}
        for name, found in sorted(variants.seen.items())
    ]
    about = f"{options.calls} random calls, {options.geometries} geometries, sm_{options.arch}"
    table = Table(title=f"variants of kernels: {about}")
    for column in ("kernel", "variants", "s to compile one", "all"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for row in rows:
        once = row["seconds"]
        times = ("", "") if once is None else (f"{once:.2f}", f"{once * row['variants']:.0f}")
        table.add_row(row["kernel"], str(row["variants"]), *times)
    table.add_row("all", str(sum(row["variants"] for row in rows)), "", "")
    console = Console()
    console.print(table)
    for each in sorted(variants.unforeseen):
        console.print(f"not among what its cache needs: {each}", markup=False, highlight=False, soft_wrap=True)
    if options.json:
        parameters = {"calls": options.calls, "geometries": options.geometries, "arch": options.arch}
        write_json(options.json, "variants", parameters | {"seed": options.seed}, rows)
    return 1 if variants.unforeseen else 0


if __name__ == "__main__":
    sys.exit(main())
