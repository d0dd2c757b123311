"""One forward pass of a model, layer by layer."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from attnd.integrations.model_runs import CudaRun, Left, Model, StreamRun
from attnd.planes.leases import Lease
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.requests import DEFAULT_OPTIONS
from attnd.protocol.step_metadata import StepMetadata

# Types of devices from which cuda planes take tensors.
GPUS = ("cuda",)


class Runs(Protocol):
    """What a pass needs of its session.

    Attributes:
        model: what is known of the model.
    """

    model: Model

    @property
    def cache(self) -> Lease:
        """That the pass reads and writes."""

    def run(self, of: ModelPass, device: torch.device, num_heads: int) -> CudaRun | StreamRun:
        """How a pass is run, whose layers have so many query heads."""

    def left(self, of: ModelPass, run: CudaRun, left: Left) -> StreamRun:
        """How a pass is run from here, that cannot stay on the cuda plane."""

    def end(self, run: CudaRun) -> None:
        """Waits until a pass is over, which nobody goes on with. Raises AttndError: it failed."""


class ModelPass:
    """One forward pass. Made by `ModelSession.begin`; the next one ends it."""

    def __init__(self, session: Runs, metadata: StepMetadata, layers: tuple[int, ...] | None) -> None:
        """Opens nothing yet."""
        self.metadata = metadata
        self._session = session
        self._layers = layers
        self._run: CudaRun | StreamRun | None = None
        self._options: list[AttentionOptions] = []  # of the layers so far, as long as these come in order
        self._has_failed = False  # and somebody was told

    def open(self, device: torch.device) -> None:
        """Tells the server of a pass whose layers are as those of the last one, with tensors on `device`."""
        model = self._session.model
        if model.options:
            self._run = run = self._session.run(self, device, model.num_heads)
            if isinstance(run, CudaRun):
                run.open(model.num_heads, model.options)

    def attend(
        self,
        layer: int,
        q: torch.Tensor | None,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        options: AttentionOptions = DEFAULT_OPTIONS,
    ) -> Any:
        """Attention of one layer, as `Step.attend`. On a cuda plane the output comes later.

        Raises:
            Unsupported: the plane that was asked for cannot be had, or the step is too large and cannot be split.
            AttndError: as `Step.attend`. The pass is of no use any more then.
        """
        given = k if q is None else q
        assert given is not None
        try:
            if self._run is None:
                self._run = self._session.run(self, given.device, 0 if q is None else q.shape[1])
            run = self._run
            try:
                output = run.attend(layer, q, k, v, options)
            except Left as left:
                assert isinstance(run, CudaRun)
                self._run = self._session.left(self, run, left)
                output = self._run.attend(layer, q, k, v, options)
        except BaseException:
            self._has_failed = True
            raise
        if layer == len(self._options) and q is not None:
            self._options.append(options)
            if len(self._options) == self._session.cache.config.num_layers:
                self._session.model.num_heads, self._session.model.options = q.shape[1], tuple(self._options)
        return output

    def finish(self) -> None:
        """Waits until the server has done the whole pass; over shm or inline it has. Again does nothing.

        Raises:
            AttndError: it failed, so its outputs mean nothing.
        """
        run, self._run = self._run, None
        if not isinstance(run, CudaRun):
            return
        if self._has_failed:
            run.give_up()
        else:
            self._session.end(run)

    def why_no_cuda(self, device: torch.device, num_layers: int) -> str:
        """Why it is not for a cuda plane; "": it is."""
        if self._layers not in (None, tuple(range(num_layers))):
            return f"the model attends layers {list(self._layers or ())}, and must attend all {num_layers} in order"
        return "" if device.type in GPUS else f"the model's tensors are on {device}, and must be on a GPU"
