"""`attnd kernels`: compiles kernels before a server needs them, on a machine that need not have a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from attnd_server.cli.texts import bytes_text

if TYPE_CHECKING:
    from attnd_server.attention.config import AttentionConfig
    from attnd_server.device.kernels.folder import KernelFolder
    from attnd_server.device.kernels.spec import KernelSpec

TARGETS = ("sm_80", "sm_89", "sm_90")
HEAD_DIMS = (64, 128, 256)
DTYPES = ("bfloat16", "float16")
# A kernel belongs to a number of KV heads and to a page size: those of most models of 7 to 70 billion parameters.
_NUM_KV_HEADS, _PAGE_SIZE = 8, 16
# Of progress, for each kind of GPU, where no terminal shows it.
_LINES = 10


@dataclass(frozen=True)
class Outcome:
    """What became of the kernels for a kind of GPU.

    Attributes:
        target: the kind.
        num_found: kernels that were there.
        num_compiled: kernels that were not.
        errors: of those that could not be compiled.
        wall_s: how long it took.
        num_bytes: of all kernels for it.
    """

    target: str
    num_found: int
    num_compiled: int
    errors: tuple[str, ...]
    wall_s: float
    num_bytes: int


def run_kernels(
    folder: str,
    targets: Sequence[str],
    head_dims: Sequence[int],
    dtypes: Sequence[str],
    fp8: bool,
    places: int,
    console: Console,
    errors: Console,
) -> int:
    """Compiles what caches of common geometries can need, and prints a table.

    Args:
        folder: as `serve --kernel-cache`.
        targets: kinds of GPU, as "sm_90".
        head_dims: of the caches.
        dtypes: of calls.
        fp8: whether pages may be FP8 as well.
        places: kernels compiled at once; 0: half of the cores.
        console: where the table goes.
        errors: where progress and errors go.

    Returns:
        The exit code: 0, or 1 if a kernel could not be compiled.
    """
    import tempfile

    from attnd_server.device.kernels.launchers import link_without_driver

    outcomes = []
    with tempfile.TemporaryDirectory() as scratch:
        link_without_driver(Path(scratch))
        for target in targets:
            configs = list(geometries(head_dims, dtypes, fp8))
            with errors.status(f"{target}: looking for what is needed") as status:

                def tell(done: int, num: int, target: str = target) -> None:
                    text = f"{target}: {done} of {num} kernels"
                    status.update(text)
                    if not errors.is_terminal and done * _LINES // num > (done - 1) * _LINES // num:
                        errors.print(text)  # a log of a build has some lines, not one for each kernel

                outcomes.append(compile_for(folder, target, configs, places, tell))
            for text in outcomes[-1].errors:
                errors.print(f"{target}: {text}", markup=False, highlight=False)
    table = Table("GPU", "kernels", "compiled now", "failed", "seconds", "size")
    for each in outcomes:
        numbers = (each.num_found + each.num_compiled, each.num_compiled, len(each.errors), f"{each.wall_s:.0f}")
        table.add_row(each.target, *map(str, numbers), bytes_text(each.num_bytes))
    console.print(table)
    return 1 if any(each.errors for each in outcomes) else 0


def geometries(head_dims: Sequence[int], dtypes: Sequence[str], fp8: bool) -> Iterator[AttentionConfig]:
    """Caches of common models. GPUs without FP8 need nothing for pages of it."""
    import torch

    from attnd_server.attention.config import FP8, AttentionConfig

    for kv_dtype, name, head_dim in product((None, FP8) if fp8 else (None,), dtypes, head_dims):
        yield AttentionConfig(
            num_layers=1,
            num_kv_heads=_NUM_KV_HEADS,
            head_dim=head_dim,
            num_pages=64,
            page_size=_PAGE_SIZE,
            dtype=getattr(torch, name),
            kv_dtype=kv_dtype,
        )


def compile_for(folder: str, target: str, configs: Sequence[AttentionConfig], places: int, tell: Any) -> Outcome:
    """Compiles what caches can need on a kind of GPU.

    Args:
        folder: as `serve --kernel-cache`.
        target: the kind.
        configs: of the caches.
        places: kernels compiled at once; 0: half of the cores.
        tell: is told how many are done, and how many there are.

    Raises:
        OSError: the folder cannot be used.
    """
    from triton.runtime.driver import driver

    from attnd_server.build import kernel_modules
    from attnd_server.device.kernels import launchers
    from attnd_server.device.kernels.compiler import ProcessCompiler
    from attnd_server.device.kernels.disk import has_kernel
    from attnd_server.device.kernels.folder import KernelFolder
    from attnd_server.device.kernels.named_gpu import NamedGpu

    began, arch = time.monotonic(), int(target.removeprefix("sm_"))
    kept = KernelFolder.open(folder, target)
    kept.install()
    gpu = NamedGpu.of(arch, number=arch)
    driver.set_active(gpu)
    is_hopper = arch == 90
    compiler = ProcessCompiler(gpu.get_current_target(), kernel_modules(is_hopper), kept, places=places)
    try:
        launchers.build_for_driver()
        specs = _needed(configs, is_hopper)
        missing = [spec for spec in specs if not has_kernel(spec)]
        futures: list[Future[None]] = [compiler.submit(spec, urgent=False) for spec in missing]
        for number, _ in enumerate(as_completed(futures)):
            tell(number + 1, len(missing))
        failed = tuple(str(error) for future in futures if (error := future.exception()) is not None)
    finally:
        compiler.close()
    num_found = len(specs) - len(missing)
    size = _num_bytes(kept)
    return Outcome(target, num_found, len(missing) - len(failed), failed, time.monotonic() - began, size)


def _needed(configs: Sequence[AttentionConfig], is_hopper: bool) -> list[KernelSpec]:
    """What caches can need, each kernel once."""
    from attnd_server.attention.backends.triton.needed import needed_launches
    from attnd_server.device.kernels.launch import collecting

    with collecting() as specs:
        for config in configs:
            for launch in needed_launches(config, is_hopper):
                launch()
    return list(specs)


def _num_bytes(folder: KernelFolder) -> int:
    return sum(each.stat().st_size for each in Path(folder.path).glob("*/*"))
