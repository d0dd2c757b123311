"""What a launch of a kernel does that is not on the device: in a process whose Triton compiles, for a GPU not here."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.servers import ROOT

pytestmark = pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")

BEGIN = """
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import torch
import triton

from attnd_server.device.kernels import launch
from attnd_server.device.kernels.launch import KernelMissing, collecting, here
from attnd_server.device.kernels.named_gpu import NamedGpu
from tests.compile_kernels import BF16, Case, launch_store

triton.runtime.driver.set_active(NamedGpu.of(90))


class Library:
    def __init__(self):
        self.asked, self.ready = [], Future()

    def ask(self, kernel, key, spec):
        self.asked.append((kernel, key, spec))
        return launch.Asked(self.ready, Future())

    def load(self):
        launched = []
        handle = SimpleNamespace(
            run=lambda *args: launched.append(args[:3]), function=None, packed_metadata=None,
            launch_metadata=lambda *args: None,
        )
        for kernel, key, _ in self.asked:
            kernel.device_caches[0][0][key] = handle
        self.ready.set_result(None)
        return launched


def step():
    launch_store(Case(BF16, 128))
"""


def run(script: str, **variables: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")} | variables
    command = [sys.executable, "-c", BEGIN + script]
    process = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr


def test_a_thread_that_must_not_wait_is_told_and_may_launch_later() -> None:
    run("""
library = Library()
launch.install(0, library)
here.may_wait = False
try:
    step()
    raise AssertionError("it was launched")
except KernelMissing as missing:
    assert missing.ready is library.ready and "_store_kernel" in str(missing)
launched = library.load()
step()
assert len(launched) == 1 and len(library.asked) == 1
""")


def test_other_threads_wait_and_learn_what_is_wrong() -> None:
    run("""
library, launched = Library(), []
launch.install(0, library)
threading.Timer(0.3, lambda: launched.append(library.load())).start()
step()
assert len(launched[0]) == 1
library.ready, library.asked = Future(), []
library.ready.set_exception(ZeroDivisionError())
for may_wait in (True, False):
    here.may_wait = may_wait
    try:
        launch_store(Case(BF16, 64))
        raise AssertionError("it was launched")
    except ZeroDivisionError:
        pass
""")


def test_what_is_collected_is_what_a_launch_asks_for_and_is_not_launched() -> None:
    run("""
with collecting() as specs:
    step()
    step()
    with collecting() as inner:
        launch_store(Case(BF16, 64))
    other = threading.Thread(target=lambda: seen.append(launch.here.collected))
    seen = []
    other.start(); other.join()
assert len(specs) == len(inner) == 1 and seen == [None]
library = Library()
launch.install(0, library)
library.ready.set_exception(ZeroDivisionError())
try:
    step()
except ZeroDivisionError:
    pass
((_, _, asked),) = library.asked
assert list(specs) == [asked] and hash(asked) == hash(next(iter(specs)))
library.ready = Future()
library.load()
step()
with collecting() as specs:
    step()
assert not specs, "it is there"
""")


STEPS = """
from benchmarks.variants import pretend
from attnd_server.attention.backends.triton.attention import TritonPagedAttention
from attnd_server.attention.config import AttentionBackend, AttentionConfig
from attnd_server.attention.kv_split import KVSplitConfig
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.attention.metadata import AttentionOptions
from tests.oracle import Case as Step, Request


def run(page_size, *requests, **fields):
    config = AttentionConfig(
        num_layers=1, num_kv_heads=2, head_dim=128, num_pages=64, page_size=page_size, dtype=BF16, **fields
    )
    metadata = Step([Request(*each, each[1], [0] * 600) for each in requests]).metadata()
    options = AttentionOptions(num_heads=8, scale=1.0, backend=AttentionBackend.TRITON_GROUPED)
    plan = TritonPagedAttention(AttentionBackend.TRITON_GROUPED).plan(config, metadata, options, torch.device("cpu"))
    new = [torch.empty(metadata.num_tokens, heads, 128, dtype=BF16) for heads in (8, 2, 2)]
    pages = LayerPages(*(torch.empty(64, page_size, 2, 128, dtype=BF16) for _ in "kv"), None, None)
    plan.run(*new, pages)


pretend(hopper=True)
"""


def test_a_call_that_misses_a_kernel_has_all_of_its_kernels_brought_at_once() -> None:
    """Two requests whose kernels differ, for Hopper's GPUs: a decode kernel, and one that has another for meanwhile."""
    run(f"""
{STEPS}
library, library.asked_for_all = Library(), []
library.ask_for_all = library.asked_for_all.append
launch.install(0, library)
here.may_wait = False
try:
    run(16, (5, 1), (0, 300))
    raise AssertionError("it was launched")
except KernelMissing as missing:
    assert missing.ready is library.ready
((_, _, first),) = library.asked
(specs,) = library.asked_for_all
assert first in specs
names = {{spec.name: sooner and sooner.options["num_warps"] for spec, sooner in specs.items()}}
assert names == {{"hopper_decode_kernel": None, "_hopper_attention_kernel": 8}}, names
""")


def test_requests_in_one_chunk_have_the_faster_kernel_unless_bits_must_not_depend_on_others() -> None:
    run(f"""
{STEPS}
def variants(query_len, **fields):
    kernels = []
    for contexts in ([20], [20, 4000]):  # of which no request is in chunks, and one is
        with collecting() as specs:
            run(8, *((context_len, query_len) for context_len in contexts), **fields)
        kernels.append({{spec for spec in specs if spec.name == "_paged_attention_kernel"}})
    return kernels


assert len(set.union(*variants(32))) == 2
whole, cut = variants(32, kv_split=KVSplitConfig(batch_invariant=True))
assert whole == cut and len(whole) == 1
assert len(set.union(*variants(1))) == len(set.union(*variants(300))) == 1
""")


def test_kernels_of_others_compile_where_they_are_launched() -> None:
    run("""
launch.install(0, Library())
kernel, compiled = launch_store.__globals__["store_kv"].__globals__["_store_kernel"], []
kernel.module = "others.kernels"
kernel.device_caches[0]  # sets what it compiles with


def compile(*args, **options):
    compiled.append(args)
    nothing = lambda *args: None
    return SimpleNamespace(run=nothing, function=None, packed_metadata=None, launch_metadata=nothing)


kernel.compile = compile
step()
assert len(compiled) == 1
""")


def test_a_kernel_is_found_on_disk_once_it_was_compiled(tmp_path: Path) -> None:
    script = """
from attnd_server.device.kernels.disk import has_kernel
with collecting() as specs:
    step()
    launch_store(Case(BF16, 64))
one, other = specs
assert not has_kernel(one)
one.compile()
assert has_kernel(one) and not has_kernel(other)
"""
    run(script, TRITON_CACHE_DIR=str(tmp_path))
