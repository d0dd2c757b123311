"""Chooses the backend of a step from a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from attnd.errors import Unsupported
from attnd_server.attention.auto_choice import kind_of, orders_for
from attnd_server.attention.backends.base import AttentionKernel, DecodeShape
from attnd_server.attention.config import AttentionBackend, AttentionConfig
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions, decode_step
from attnd_server.device.indexed import with_index


class _Off(Exception):
    """A backend cannot run here; the text says why."""


def _naive(device: torch.device) -> AttentionKernel:
    from attnd_server.attention.backends.naive import NaiveAttention

    return NaiveAttention()


def _sdpa(device: torch.device) -> AttentionKernel:
    from attnd_server.attention.backends.sdpa import SdpaAttention

    return SdpaAttention()


def _triton(backend: AttentionBackend) -> Callable[[torch.device], AttentionKernel]:
    def load(device: torch.device) -> AttentionKernel:
        from attnd_server.attention.backends.triton import attention as triton

        reason = triton.availability(device)
        if reason is not None:
            raise _Off(reason)
        return triton.TritonPagedAttention(backend)

    return load


def _flash_attn(device: torch.device) -> AttentionKernel:
    from attnd_server.attention.backends import flash_attn, flash_libraries

    library = flash_libraries.find(device, _capability(device))
    if isinstance(library, str):
        raise _Off(library)
    return flash_attn.FlashAttention(library)


def _xformers(device: torch.device) -> AttentionKernel:
    from attnd_server.attention.backends import xformers

    library = xformers.find(device, _capability(device))
    if isinstance(library, str):
        raise _Off(library)
    return xformers.XformersAttention(library)


def _capability(device: torch.device) -> tuple[int, int]:
    """The device's compute capability; (0, 0) on a processor."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


# Each backend and what makes its kernel or raises _Off. A new backend is one line here.
_LOADERS: dict[AttentionBackend, Callable[[torch.device], AttentionKernel]] = {
    AttentionBackend.NAIVE: _naive,
    AttentionBackend.SDPA: _sdpa,
    AttentionBackend.TRITON: _triton(AttentionBackend.TRITON),
    AttentionBackend.TRITON_GROUPED: _triton(AttentionBackend.TRITON_GROUPED),
    AttentionBackend.FLASH_ATTN: _flash_attn,
    AttentionBackend.XFORMERS: _xformers,
}


@dataclass(frozen=True, eq=False)
class Plan:
    """A step made ready for its layers.

    Attributes:
        kernel: the backend that was chosen.
        state: what its `plan` gave.
        run: attention of one layer of q, k, v and pages: output and lse; see `AttentionKernel.run`.
        launch: the same into output and lse that are given before q; see `AttentionKernel.launch`.
        runs_in_pieces: whether the kernel is one of `RunsInPieces` and the step has no token that it reads stored.
        reads_stored: whether K and V must be stored first; see `ReadsStored`.
    """

    kernel: AttentionKernel
    state: Any
    run: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = field(init=False, repr=False)
    launch: Callable[..., None] = field(init=False, repr=False)
    reads_stored: bool = field(init=False, repr=False)
    runs_in_pieces: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Binds the kernel's methods once: a layer calls them without a frame of Python between."""
        asked = getattr(self.kernel, "reads_stored", None)
        object.__setattr__(self, "reads_stored", asked is not None and asked(self.state))
        object.__setattr__(self, "runs_in_pieces", hasattr(self.kernel, "pieces") and not self.reads_stored)
        object.__setattr__(self, "run", partial(self.kernel.run, self.state))
        object.__setattr__(self, "launch", partial(self.kernel.launch, self.state))

    @property
    def backend(self) -> AttentionBackend:
        """The backend's name."""
        return self.kernel.backend


class TritonAttentionOps:
    """One interface over all backends of a device, with automatic selection that tells its reasons.

    Args:
        device: where pages and tensors lie.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = with_index(device)
        self._kernels: dict[AttentionBackend, AttentionKernel] = {}
        self._reasons: dict[AttentionBackend, str] = {}
        self._orders = orders_for(self.device, _capability(self.device))
        for backend, load in _LOADERS.items():
            try:
                self._kernels[backend] = load(self.device)
            except _Off as reason:
                self._reasons[backend] = str(reason)

    @property
    def has_kernels(self) -> bool:
        """Whether kernels of ours run on the device."""
        return AttentionBackend.TRITON in self._kernels

    def states(self) -> list[tuple[AttentionBackend, str | None]]:
        """Every backend with None, or the reason why it is off on this device."""
        return [(backend, self._reasons.get(backend)) for backend in _LOADERS]

    def choose(
        self,
        config: AttentionConfig,
        metadata: AttentionMetadata,
        options: AttentionOptions,
        among: tuple[AttentionBackend, ...] = tuple(AttentionBackend),
    ) -> AttentionKernel:
        """The kernel for a step: the call's backend, else the cache's, else the fastest `among` those that support it.

        Raises:
            Unsupported: the named backend is off or cannot serve the step, and why.
        """
        backend = config.backend if options.backend is None else options.backend
        refusals = []
        if backend is AttentionBackend.AUTO:
            order = self._orders[kind_of(config, metadata, options, self.device)]
            candidates = tuple(candidate for candidate in order if candidate in among)
            if not candidates:
                refusals.append(f"none of {', '.join(each.value for each in among)} is chosen on {self.device}")
        else:
            candidates = (backend,)
        for candidate in candidates:
            reason = self._refusal(candidate, config, metadata, options)
            if reason is None:
                return self._kernels[candidate]
            refusals.append(f"{candidate.value} {reason}")
        raise Unsupported(
            f"backend is {backend.value}, but must be one that can serve this step: {'; '.join(refusals)}",
            field="backend",
        )

    def plan(
        self,
        config: AttentionConfig,
        metadata: AttentionMetadata,
        options: AttentionOptions,
        among: tuple[AttentionBackend, ...] = tuple(AttentionBackend),
    ) -> Plan:
        """Chooses a kernel as `choose` does and lets it plan the step.

        Raises:
            Unsupported: see `choose`.
        """
        kernel = self.choose(config, metadata, options, among)
        return Plan(kernel, kernel.plan(config, metadata, options, self.device))

    def kernel_for(self, config: AttentionConfig, shape: DecodeShape, options: AttentionOptions) -> AttentionKernel:
        """The kernel that a decode step of a shape gets.

        Raises:
            Unsupported: see `choose`.
        """
        step = decode_step(shape.num_reqs, shape.query_len, shape.max_context_len, config.page_size)
        return self.choose(config, step, options)

    def attend(
        self,
        config: AttentionConfig,
        metadata: AttentionMetadata,
        options: AttentionOptions,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        pages: LayerPages,
    ) -> tuple[torch.Tensor, torch.Tensor | None, AttentionBackend]:
        """One layer at once: output, lse and the backend that computed them. Stores nothing.

        Raises:
            Unsupported: see `choose`.
        """
        plan = self.plan(config, metadata, options)
        output, lse = plan.run(q, k, v, pages)
        return output, lse, plan.backend

    def _refusal(
        self,
        backend: AttentionBackend,
        config: AttentionConfig,
        metadata: AttentionMetadata,
        options: AttentionOptions,
    ) -> str | None:
        if backend in self._reasons:
            return f"is off: {self._reasons[backend]}"
        kernel = self._kernels[backend]
        if not kernel.supports_context_length(metadata.max_context_len):
            return f"cannot serve a context of {metadata.max_context_len} tokens"
        reason = kernel.supports(config, metadata, options)
        return reason and f"cannot serve it: {reason}"
