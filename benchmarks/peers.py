"""Who computes the cells: our backends, and FlashAttention-3 if it is found at run time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch

from attnd_server.attention.backends.base import AttentionKernel, DecodeShape, FixedPlan
from attnd_server.attention.config import AttentionBackend, AttentionConfig
from attnd_server.attention.kv_split import KVSplitConfig
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions
from attnd_server.attention.ops import TritonAttentionOps
from benchmarks.exactness import FP8_LIMIT
from benchmarks.graph_timing import host_us
from benchmarks.kernel_cases import FP8, Case
from benchmarks.kernel_runs import OURS, NotThere
from benchmarks.kernel_tensors import Tensors

FP8_PRODUCTS_LIMIT = 0.1
"""Largest relative error of kernels that multiply in FP8 too: FP8 has 3 bits after the first."""


@dataclass(frozen=True)
class Prepared:
    """A cell made ready: what is done once per step is done.

    Attributes:
        call: launches a layer and returns its output.
        rows: the output as `[num_tokens, num_heads, head_dim]`.
        scaled: whether it multiplies FP8 pages by their scales.
        limit: largest relative error; None is that of the output's type.
        row_limit: largest of a token and head; likewise.
        plan_us: host time of the plan, if it was measured.
    """

    call: Callable[[int], torch.Tensor]
    rows: Callable[[torch.Tensor], torch.Tensor] = lambda output: output
    scaled: bool = True
    limit: float | None = None
    row_limit: float | None = None
    plan_us: float | None = None


class Way(Protocol):
    """One who computes cells."""

    @property
    def name(self) -> str:
        """Its column."""

    def prepare(self, case: Case, tensors: Tensors) -> Prepared:
        """Makes a cell ready. Raises NotThere."""


class Ours:
    """One of our backends.

    Args:
        backend: which.
        device: that it runs on.
        kv_split: how the KV of a request is cut; None is automatic.
    """

    name = OURS

    def __init__(self, backend: AttentionBackend, device: torch.device, kv_split: KVSplitConfig | None = None) -> None:
        self._backend, self._device, self._kv_split = backend, device, kv_split or KVSplitConfig()
        self._ops = TritonAttentionOps(device)

    def prepare(self, case: Case, tensors: Tensors) -> Prepared:
        """Plans the step, and measures how long that takes. Raises attnd.Unsupported."""
        config = replace(tensors.config(case), kv_split=self._kv_split)
        options, metadata = case.options(self._backend), case.metadata()
        kernel = self._ops.choose(config, metadata, options)
        limit = FP8_LIMIT if config.is_quantised else None
        fixed = self._fixed_plan(kernel, config, metadata, options)
        if fixed is not None:
            # The last layer must not write over the first layer's output, which is checked too.
            outputs = [torch.empty_like(tensors.q) for _ in range(2)]

            def run_fixed(layer: int) -> torch.Tensor:
                output = outputs[min(layer, 1)]
                fixed.launch(output, None, tensors.q, tensors.k, tensors.v, tensors.layers[layer])
                return output

            return Prepared(run_fixed, limit=limit, plan_us=self._plan_us(case, fixed.update))

        state = kernel.plan(config, metadata, options, self._device)

        def run(layer: int) -> torch.Tensor:
            return kernel.run(state, tensors.q, tensors.k, tensors.v, tensors.layers[layer])[0]

        plan_us = self._plan_us(case, lambda step: kernel.plan(config, step, options, self._device))
        return Prepared(run, limit=limit, plan_us=plan_us)

    def _fixed_plan(
        self, kernel: AttentionKernel, config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions
    ) -> FixedPlan | None:
        """A fixed plan that holds the step, if it is a decode step and the kernel has one: what serves decode."""
        if not metadata.is_decode:
            return None
        shape = DecodeShape(metadata.num_reqs, metadata.query_lens[0], metadata.max_context_len)
        plan = kernel.fixed_plan(config, shape, options, self._device)
        if isinstance(plan, str):
            return None
        plan.update(metadata)
        return plan

    def _plan_us(self, case: Case, plan: Callable[[AttentionMetadata], object]) -> float:
        """Host time of a plan. Metadata is made before: a step has it by then. Each has its own: it keeps results."""
        steps = [case.metadata() for _ in range(31)]
        for step in steps:
            _ = step.columns, step.max_context_len  # as validation does
        return host_us(lambda: plan(steps.pop()), self._device, 31)


class FlashAttention3:
    """FlashAttention-3 through a module `fa3`, which has `load`, `plan` and `attend`.

    Args:
        folder: that holds the module and what it loads, or None.
        device: that it runs on.
    """

    name = "FA3"

    def __init__(self, folder: Path | None, device: torch.device) -> None:
        self._folder, self._device = folder, device
        self._loaded: tuple[Any, Any] | str | None = None  # the module and its operators, or why they are not there

    def _load(self) -> tuple[Any, Any]:
        """The module and its operators; tried once."""
        if self._loaded is None:
            self._loaded = self._try()
        if isinstance(self._loaded, str):  # and no exception that is kept: its traceback would keep a cell's tensors
            raise NotThere(f"not found: {self._loaded}")
        return self._loaded

    def _try(self) -> tuple[Any, Any] | str:
        if self._folder is None:
            return "no --peers FOLDER is given"
        if self._device.type != "cuda":
            return "it needs a GPU"
        folder = str(self._folder.resolve())
        sys.path.insert(0, folder)
        try:
            module = import_module("fa3")
            return module, module.load(folder)
        except Exception as error:  # whatever the folder's code does wrong
            return f"{type(error).__name__}: {error}"
        finally:
            sys.path.remove(folder)

    def prepare(self, case: Case, tensors: Tensors) -> Prepared:
        """Computes the scheduler's metadata of the step."""
        module, ops = self._load()
        if case.block_size != 1 and not case.sees_all:
            raise NotThere("has no block-causal mask")
        dense, in_fp8, device = case.is_dense, case.kv_dtype is FP8, self._device
        seq_lens, cu_seqlens_q = torch.tensor(case.seq_lens).int().to(device), case.cu_seqlens_q.int().to(device)
        q = tensors.q.to(FP8) if in_fp8 else tensors.q
        common = {
            "max_query_len": max(case.query_lens),
            "max_context_len": max(case.seq_lens),
            "seq_lens": seq_lens,
            "cu_seqlens_q": cu_seqlens_q,
            "causal": case.block_size == 1,
        }
        metadata = module.plan(
            ops,
            num_reqs=case.num_reqs,
            num_heads=case.num_heads,
            num_kv_heads=case.num_kv_heads,
            head_dim=case.head_dim,
            dtype=q.dtype,
            page_size=None if dense else case.page_size,
            **common,
        )
        page_tables = None if dense else case.page_tables.clamp(min=0).int().to(device)
        together = [x.view(case.num_reqs, -1, *x.shape[1:]) for x in (tensors.k, tensors.v)] if dense else None
        # The last layer must not write over the first layer's output, which is checked too.
        outputs = [torch.empty_like(tensors.q) for _ in range(2)]

        def call(layer: int) -> torch.Tensor:
            caches, output = together or tensors.layers[layer][:2], outputs[min(layer, 1)]
            module.attend(
                ops, q, *caches, output, page_tables=page_tables, scale=case.scale, metadata=metadata, **common
            )
            return output

        limit = FP8_PRODUCTS_LIMIT if in_fp8 else None
        return Prepared(call, scaled=False, limit=limit, row_limit=limit and 2 * limit)
