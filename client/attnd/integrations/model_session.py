"""The forward passes of a model on a cache: over the fastest plane there is, in as many steps as it takes.

What adapters need of sessions. A step on a cuda plane wants the options of all layers when it opens: those of the last
pass are told, and in the first pass those of its first layer. If a layer has others, this one and those after it are
attended over a stream, and the next pass knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from attnd.errors import Unsupported
from attnd.integrations.model_pass import ModelPass
from attnd.integrations.model_runs import MOST_OPEN_STEPS, CudaRun, Left, Model, StreamRun
from attnd.integrations.split_steps import Most, split
from attnd.planes.choice import REFUSALS, check_plane
from attnd.protocol import frames
from attnd.timings import Timings, summed
from attnd.v1 import capabilities_pb2

if TYPE_CHECKING:
    from attnd.cache import Cache
    from attnd.planes.cuda.session import CudaSession
    from attnd.protocol.step_metadata import StepMetadata
    from attnd.session import Session

# Passes in a row that left the cuda plane, after which no other tries it.
MAX_LEFT = 3
# Bytes of a message beside the tensors of a call: its header, with slopes and sinks of thousands of heads.
HEADER_BYTES = 64 << 10


class ModelSession:
    """Runs the forward passes of a model on a cache, one after the other. One thread at a time.

    "auto" is the plane that `attnd.connect` was told, if that is one; else cuda where the model's tensors lie on a GPU
    that reaches the server's, else shm where both are on one host, else inline. On "cuda" a pass whose tensors exceed
    the plane's region goes over shm or inline all the same, in parts, and so does the end of a first pass whose layers
    differ. A model whose layers do not come in order, each once, or which is on several GPUs, is not for the cuda
    plane: with "auto" it goes over shm or inline, with "cuda" it is refused.

    A pass over a cuda plane returns its outputs before they are there, as torch's own operations do. What goes wrong is
    told by `ModelPass.finish`, and at the latest when the next pass begins; then its outputs mean nothing. So finish a
    pass before its results leave the model: before a token is sampled.

    Attributes:
        model: what is known of the model from its passes.
    """

    def __init__(self, cache: Cache, plane: str = "auto", *, like: ModelSession | None = None) -> None:
        """Opens nothing yet: the first pass does.

        Args:
            cache: that the passes read and write.
            plane: "auto", "cuda", "shm" or "inline".
            like: a session of the same model, from which it knows the options of all layers before the first pass.

        Raises:
            InvalidRequest: no such plane.
        """
        self.model: Model = Model() if like is None else like.model
        self._cache = cache
        self._wanted = check_plane(plane)
        self._stream: Session | None = None
        self._cuda: CudaSession | None = None
        self._last: Session | CudaSession | None = None  # that served last
        self._why_not_cuda = ""  # it did not, if it did not
        self._server_refusal = ""  # why no pass tries a cuda plane any more
        self._is_proven = False  # whether the server has served one there
        self._num_left = 0
        self._limits: capabilities_pb2.Limits | None = None
        self._pass: ModelPass | None = None  # the last one
        self._past: list[Timings] = []  # of sessions that are gone

    @property
    def plane(self) -> str:
        """Of the last pass: "cuda", "shm" or "inline"; "" before the first."""
        return "" if self._last is None else self._last.plane

    @property
    def refusals(self) -> Mapping[str, str]:
        """By the name of each plane that is better than that of the last pass, why it was not on that."""
        refusals = {} if self._last is None else dict(self._last.refusals)
        return refusals | ({"cuda": self._why_not_cuda} if self._why_not_cuda else {})

    @property
    def cache(self) -> Cache:
        """That the passes read and write. Another of the same geometry may be put in its place; what is open ends."""
        return self._cache

    @cache.setter
    def cache(self, cache: Cache) -> None:
        self.close()
        self._past += [session.timings() for session in self._sessions]
        self._stream = self._cuda = self._last = None
        self._cache = cache

    def begin(
        self, metadata: StepMetadata, *, device: torch.device | None = None, layers: tuple[int, ...] | None = None
    ) -> ModelPass:
        """Begins a pass, once the one before is over.

        Args:
            metadata: of the whole pass.
            device: where the tensors of its layers lie: then the server hears of the pass now, if there was one before.
                None: it does with the first layer.
            layers: of the cache, as the pass attends them. None: all, each once.

        Raises:
            AttndError: the pass before failed, so its outputs mean nothing; or as `ModelPass.attend`.
        """
        self.settle()
        self._pass = begun = ModelPass(self, metadata, layers)
        if device is not None:
            begun.open(device)
        return begun

    def begin_apart(self, every: Sequence[StepMetadata]) -> list[StreamRun]:
        """Begins a pass whose tokens are attended in several steps, each layer in all of them before the next.

        Steps of a cuda plane have all their layers in a row, so these go over shm or inline.

        Args:
            every: of the steps. What one stores, those after it may read.

        Returns:
            One for each step. In each layer, `attend` of all of them in order.

        Raises:
            AttndError: the pass before failed, so its outputs mean nothing; or there is no such plane.
        """
        self.settle()
        why = f"a pass of {len(every)} kinds of tokens takes a step for each, and must be one"
        return [self._stream_run(metadata, why, MOST_OPEN_STEPS // len(every)) for metadata in every]

    def settle(self) -> None:
        """Waits until the server has done every pass. Call it before anything else is done with the cache's pages.

        A pass that was not attended to its last layer is over then, and the cuda plane that it was on.

        Raises:
            AttndError: the last pass failed, so its outputs mean nothing. What was told already is not told again.
        """
        last, self._pass = self._pass, None
        if last is not None:
            last.finish()

    def timings(self) -> Timings:
        """Where the time of all calls so far went, on all planes together."""
        return summed([*self._past, *(session.timings() for session in self._sessions)], self.plane)

    def reset_timings(self) -> None:
        """Starts counting anew."""
        self._past.clear()
        for session in self._sessions:
            session.reset_timings()

    def close(self) -> None:
        """Ends what is open, and a pass under way. The cache stays. The next pass opens again, and what it can have."""
        self._pass = self._limits = None
        self._server_refusal, self._is_proven, self._num_left = "", False, 0
        for session in self._sessions:
            session.close()

    @property
    def _sessions(self) -> list[Session | CudaSession]:
        return [session for session in (self._stream, self._cuda) if session is not None]

    @property
    def _wanted_plane(self) -> str:
        return self._cache.default_plane.name if self._wanted == "auto" else self._wanted

    # --- for ModelPass ---

    def run(self, of: ModelPass, device: torch.device, num_heads: int) -> CudaRun | StreamRun:
        """How a pass is run, whose layers have so many query heads."""
        run = self._cuda_run(of, device, num_heads) if self._wanted_plane in ("auto", "cuda") else ""
        if isinstance(run, str):
            return self._stream_run(of.metadata, run)
        self._last, self._why_not_cuda = self._cuda, ""
        return run

    def left(self, of: ModelPass, run: CudaRun, left: Left) -> StreamRun:
        """How a pass is run from here, that cannot stay on the cuda plane."""
        run.leave()
        self._note(left)
        if left.error is not None and self._wanted_plane == "cuda":
            raise left.error
        return self._stream_run(of.metadata, str(left))

    def end(self, run: CudaRun) -> None:
        """Waits until a pass is over, which nobody goes on with. Raises AttndError: it failed."""
        if run.is_complete:
            run.finish()
            self._is_proven, self._num_left = True, 0
        else:
            run.leave()
            self._note(Left("the model does not attend all layers in each pass, and must"))

    def _note(self, left: Left) -> None:
        self._num_left += 1
        if not left.is_models:
            self._server_refusal = str(left)
        elif left.error is not None or self._num_left >= MAX_LEFT:
            self.model.why_no_cuda = str(left)

    def _stream_run(self, metadata: StepMetadata, why_not_cuda: str, most_open: int = MOST_OPEN_STEPS) -> StreamRun:
        if self._stream is None:
            wanted = self._wanted_plane
            self._stream = self._cache.session(plane="auto" if wanted == "cuda" else wanted)
        self._last, self._why_not_cuda = self._stream, why_not_cuda
        most = self._most()
        assert self._limits is not None
        most_bytes = min(self._limits.max_message_bytes, frames.MAX_MESSAGE_BYTES) - HEADER_BYTES
        return StreamRun(self._stream, metadata, most, most_bytes, most_open)

    def _cuda_run(self, of: ModelPass, device: torch.device, num_heads: int) -> CudaRun | str:
        """A run on the cuda plane, or why there is none. Raises AttndError where that must not be."""
        is_pinned, num_layers = self._wanted_plane == "cuda", self._cache.config.num_layers
        why = self.model.why_no_cuda or self._server_refusal or of.why_no_cuda(device, num_layers)
        if why and is_pinned:
            raise Unsupported(f"plane is cuda, but {why}", field="plane")
        num_tokens = of.metadata.num_tokens
        if why or len(split(of.metadata, self._most(), self._cache.config.page_size)) > 1:
            return why or f"a pass of {num_tokens} tokens takes several steps, and must be one"
        if self._cuda is None:
            self._cuda = self._cache.session(plane="cuda")
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                if not self._cuda.fits(num_tokens, num_heads):
                    more = "the server's --cuda-region-bytes gives more"
                    return f"the tensors of {num_tokens} tokens are larger than the plane's region; {more}"
        except REFUSALS as error:
            if is_pinned:
                raise
            self._server_refusal = str(error)
            return self._server_refusal
        return CudaRun(self._cuda, of.metadata, self.model, is_proven=self._is_proven)

    def _most(self) -> Most:
        """What one step may have, whatever its tensors take."""
        if self._limits is None:
            data = self._cache.transport.unary("GetCapabilities", b"", self._cache.timeout_s)
            self._limits = frames.parse(capabilities_pb2.GetCapabilitiesResponse, data).limits
        assert self._limits is not None
        return Most(self._limits.max_step_tokens, self._limits.max_step_reqs, self._limits.max_page_table_elements)
