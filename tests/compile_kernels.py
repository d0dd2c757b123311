"""Compiles the GPU kernels for one compute capability, on any machine: `python tests/compile_kernels.py 90`.

Prints JSON: for each case the error, or the bytes of shared memory and of the stack frame of each kernel of it. The
cases go through the kernels' own launchers, with a driver that knows a GPU's name and tensors without data, so that
what is compiled is what a launch compiles. It is a script because tests run in Triton's interpreter: see
`interpreter.py`; run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from attnd_server.attention.backends.triton.needed import without_data as empty
from attnd_server.attention.config import DISTINCT_LANES, FP8, Layout
from attnd_server.attention.kernels.decode_items import decode_items
from attnd_server.attention.kernels.gather import read_kv
from attnd_server.attention.kernels.items import ITEM_FIELDS, MERGE_FIELDS
from attnd_server.attention.kernels.launch_shapes import HOPPER_DECODE_ROWS, HOPPER_ROWS, launch_shape
from attnd_server.attention.kernels.merge import merge
from attnd_server.attention.kernels.paged_attention import paged_attention
from attnd_server.attention.kernels.store import store_kv
from attnd_server.attention.kv_split import KVSplitConfig
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.device.kernels.named_gpu import NamedGpu

# A script has its own folder there. Last, because `tests` would have a triton that is imported after it interpret.
sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.sooner import launched_sooner

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
NUM_PAGES = PAGE_SIZE = 16
NUM_KV_HEADS = 8
BF16, FP32 = torch.bfloat16, torch.float32
NAMES = {BF16: "bf16", FP32: "fp32", FP8: "fp8"}


@dataclass(frozen=True)
class Case:
    """One layer of a step.

    Attributes:
        dtype: of the call's tensors.
        head_dim: of K and V.
        tokens: of each request.
        kv_dtype: of the pages; None: `dtype`.
        v_dtype: of V's pages; None: `kv_dtype`.
        group: query heads of a KV head.
        layout: of the pages.
        cached_only: without new tokens.
        options: with every option.
        split: with requests of several chunks.
    """

    dtype: torch.dtype
    head_dim: int
    tokens: int = 1
    kv_dtype: torch.dtype | None = None
    group: int = 4
    layout: Layout = Layout.UNIFIED
    cached_only: bool = False
    options: bool = False
    split: bool = True
    v_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        names = [NAMES[self.dtype], f"dim {self.head_dim}", f"{self.tokens} x {self.group} rows", self.layout.value]
        is_mixed = self.v_dtype not in (None, self.kv_dtype)
        names += [f"fp8 {'K' if is_mixed else 'pages'}"] * (self.kv_dtype is FP8) + ["fp8 V"] * (self.v_dtype is FP8)
        names += ["cached only"] * self.cached_only
        return ", ".join(names + ["split"] * self.split + ["options"] * self.options)

    def outputs(self) -> tuple[torch.Tensor | None, ...]:
        """Output, lse, partial output and partial lse."""
        heads = (self.tokens, self.group * NUM_KV_HEADS)
        partial = empty(*heads, self.head_dim, dtype=FP32), empty(*heads, dtype=FP32)
        output = empty(*heads, self.head_dim, dtype=self.dtype)
        return (output, self.per_head(*heads), *(partial if self.split else (None, None)))

    def new(self, is_seen: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """K and V of the call."""
        shape = self.tokens, NUM_KV_HEADS, self.head_dim
        return (empty(*shape, dtype=self.dtype), empty(*shape, dtype=self.dtype)) if is_seen else (None, None)

    def pages(self) -> LayerPages:
        """Of a layer."""
        k_dtype = self.kv_dtype or self.dtype
        dtypes = k_dtype, self.v_dtype or k_dtype
        scales = [empty(NUM_KV_HEADS, dtype=FP32) if dtype is FP8 else None for dtype in dtypes]
        if self.layout is Layout.UNIFIED:
            shape = NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, self.head_dim
            return LayerPages(*(empty(*shape, dtype=dtype) for dtype in dtypes), *scales)
        shape = NUM_PAGES, NUM_KV_HEADS, self.head_dim // DISTINCT_LANES, PAGE_SIZE, DISTINCT_LANES
        v_shape = *shape[:2], self.head_dim, PAGE_SIZE
        return LayerPages(empty(*shape, dtype=dtypes[0]), empty(*v_shape, dtype=dtypes[1]), *scales)

    def query(self) -> torch.Tensor:
        """Of the call."""
        return empty(self.tokens, self.group * NUM_KV_HEADS, self.head_dim, dtype=self.dtype)

    def per_head(self, *shape: int) -> torch.Tensor | None:
        """What an option brings, or None without options."""
        return empty(*shape, dtype=FP32) if self.options else None

    def numbers(self) -> dict[str, Any]:
        """Scale, softcap and window."""
        return {"scale": 0.1, "softcap": 30.0 * self.options, "window": 1000 * self.options}


def tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Page tables and items."""
    return empty(4, 16, dtype=torch.int32), empty(8, ITEM_FIELDS, dtype=torch.int32)


def launch_paged(case: Case) -> None:
    """Decode if a request has one token, else prefill; as `TritonPlan` launches it."""
    dims = max(16, triton.next_power_of_2(case.head_dim))
    item_size = 1 if case.kv_dtype is FP8 and case.v_dtype in (None, FP8) else case.dtype.itemsize
    heads = case.group * NUM_KV_HEADS
    paged_attention(
        *case.outputs(), empty(64, dtype=torch.int32) if case.split else None, case.query(),
        *case.new(not case.cached_only), case.pages(), *tables(), case.per_head(heads),
        case.per_head(heads), tile=launch_shape(case.tokens, case.group, dims, item_size),
        may_be_split=case.split, heads=case.group, compute=case.dtype, **case.numbers(),
    )  # fmt: skip


def launch_hopper(case: Case) -> None:
    """Decode if there are few rows, else prefill."""
    # Only for Hopper: this module need not load for others.
    from attnd_server.attention.kernels.hopper.attention import hopper_attention

    heads = case.group * NUM_KV_HEADS
    given = (
        *case.outputs(), case.query(), *case.new(not case.cached_only), case.pages(), *tables(),
        case.per_head(heads), case.per_head(heads),
    )  # fmt: skip
    rows = max(16, triton.next_power_of_2(case.tokens * case.group))
    rows = rows if rows <= HOPPER_DECODE_ROWS else HOPPER_ROWS
    hopper_attention(*given, rows=rows, num_multiprocessors=132, **case.numbers())


def launch_hopper_sooner(case: Case) -> None:
    """What stands in for a kernel that is compiled for longer."""
    with launched_sooner() as names:
        launch_hopper(case)
    assert names


def launch_hopper_fp8(case: Case) -> None:
    """Decode over FP8."""
    from attnd_server.attention.kernels.hopper.decode_fp8 import hopper_decode_fp8

    heads = case.group * NUM_KV_HEADS
    given = (
        *case.outputs(), case.query(), *case.new(not case.cached_only), case.pages(), *tables(),
        case.per_head(heads), case.per_head(heads),
    )  # fmt: skip
    rows = max(16, triton.next_power_of_2(case.tokens * case.group))
    hopper_decode_fp8(*given, rows=rows, num_multiprocessors=132, **case.numbers())


def launch_merge(case: Case) -> None:
    """The launch that merges what Hopper's kernels leave."""
    merges = empty(3, MERGE_FIELDS, dtype=torch.int32)
    sinks = case.per_head(case.group * NUM_KV_HEADS)
    merge(*case.outputs(), merges, sinks, heads=case.group, max_tokens=case.tokens)


def launch_items(case: Case) -> None:
    """The launch that lays out a decode step for Hopper's kernels."""
    shapes = (64, ITEM_FIELDS), (300, MERGE_FIELDS), (4096,)
    decode_items(
        *(empty(*shape, dtype=torch.int32) for shape in shapes), query_len=case.tokens, group=case.group,
        num_groups=NUM_KV_HEADS, rows=16, num_multiprocessors=132, num_looked_at=17, kv_split=KVSplitConfig(),
        is_chunked=case.tokens == 1, is_even=case.tokens > 1, window=0,
    )  # fmt: skip


def launch_store(case: Case) -> None:
    """The store of new tokens."""
    slots = empty(case.tokens, dtype=torch.int64)
    store_kv(case.pages(), *case.new(True), slots, case.layout)


def launch_gather(case: Case) -> None:
    """The read of slots."""
    read_kv(case.pages(), empty(case.tokens, dtype=torch.int64), case.layout, case.dtype)


def cases(capability: int) -> list[tuple[Callable[[Case], None], Case]]:
    """What is compiled: on every GPU a little of everything, the most where shared memory is least."""
    few, some, many, distinct = 4, 200, 512, Layout.DISTINCT
    paged = [Case(BF16, 128, many, split=False), Case(BF16, 128, some), Case(BF16, 128, few, group=8, options=True)]
    paged += [Case(BF16, 80, many, layout=distinct, cached_only=True, split=False)]
    moves = [Case(BF16, 128), Case(FP32, 80, layout=distinct)]
    if capability >= 89:
        paged += [Case(BF16, 64, kv_dtype=FP8)]
        moves += [Case(BF16, 128, kv_dtype=FP8), Case(BF16, 128, v_dtype=FP8)]
    if capability <= 89:
        paged += [Case(BF16, 256), Case(FP32, 128)]
    if capability == 89:
        paged += [Case(BF16, 64, many, split=False), Case(BF16, 128, 16, options=True), Case(FP32, 256)]
        paged += [Case(BF16, 128, some, FP8, options=True), Case(BF16, 256, some, FP8)]
        paged += [Case(BF16, 128, some, layout=distinct, options=True)]
        paged += [Case(BF16, 80, few, FP8, layout=distinct)]
        paged += [Case(BF16, 128, some, v_dtype=FP8), Case(BF16, 256, few, FP8, v_dtype=BF16, options=True)]
    chosen = [(launch_paged, case) for case in paged]
    chosen += [(launch, case) for launch in (launch_store, launch_gather) for case in moves]
    chosen += [(launch_merge, Case(BF16, 128)), (launch_merge, Case(BF16, 80, few, options=True))]
    if capability == 90:
        hopper = [Case(BF16, 64), Case(BF16, 128, 16, options=True)]
        hopper += [Case(BF16, 64, many, split=False), Case(BF16, 128, 32, group=8, options=True), Case(BF16, 256, many)]
        hopper_fp8 = [Case(BF16, 128, kv_dtype=FP8), Case(BF16, 128, 5, FP8, options=True), Case(BF16, 256, 1, FP8)]
        hopper_fp8 += [Case(BF16, 128, 16, FP8, options=True), Case(BF16, 256, 5, FP8, cached_only=True, split=False)]
        chosen += [(launch_hopper, case) for case in hopper]
        chosen += [(launch_hopper_sooner, case) for case in hopper[2:]]
        chosen += [(launch_items, Case(BF16, 128)), (launch_items, Case(BF16, 128, few))]
        chosen += [(launch_hopper_fp8, case) for case in hopper_fp8]
    return chosen


def stack_bytes(cubin: bytes) -> int:
    """Bytes of a kernel's stack frame: registers that did not fit."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"STACK:(\d+)", usage)
    assert found, usage
    return max(map(int, found))


def compile_all(capability: int) -> dict[str, dict[str, Any]]:
    """Resources of the kernel that each case launches, or what went wrong, by the case's name."""
    triton.runtime.driver.set_active(NamedGpu.of(capability))
    launch_or_compile, compiled = JITFunction.run, []

    def compile_only(*args: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(launch_or_compile(*args, warmup=True, **kwargs))

    JITFunction.run = compile_only
    results = {}
    for launch, case in cases(capability):
        name = f"{launch.__name__.removeprefix('launch_')}: {case}"
        compiled.clear()
        try:
            launch(case)
            (kernel,) = compiled
            results[name] = {"shared": kernel.metadata.shared, "stack": stack_bytes(kernel.asm["cubin"])}
        except Exception as error:  # each case is to have its line
            # Of a device function's error, Triton's own says only where it was called.
            results[name] = {"error": str(error.__cause__ or error)}
    return results


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1])), indent=1))
