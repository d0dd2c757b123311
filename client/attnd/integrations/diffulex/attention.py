"""The attention layer of a model whose attention is served: a module without parameters. Needs torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from attnd.cache import Cache
from attnd.errors import InvalidRequest
from attnd.foreign_metadata import check_options, from_diffulex
from attnd.integrations.diffulex import metadata as diffulex
from attnd.integrations.diffulex.geometry import check_geometry
from attnd.integrations.model_pass import ModelPass
from attnd.integrations.model_session import ModelSession
from attnd.planes.cuda.session import CudaSession
from attnd.planes.cuda.step import CudaStep
from attnd.protocol.attention_options import BACKENDS, AttentionOptions
from attnd.protocol.step_metadata import StepMetadata
from attnd.protocol.steps.batch_lens import query_lens_of
from attnd.session import Session
from attnd.steps import Step

unchosen = {"auto"}
"""Names of an `attn_impl` that leave the backend to the cache; a runner of another package may have one of its own."""


class Attention(nn.Module):
    """Attention of one layer, computed by a server: `softmax(scale * q k) v` over the pages and the new tokens.

    Construct the model with it, then number its layers with `attach(model, session)`. Which requests, pages and masks
    a forward pass is about comes from the function installed by `attnd.set_fetch_fn_for_attn_metadata`, when the layer
    runs. Outputs have no gradient.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        scale: float,
        num_kv_heads: int,
        attn_impl: str = "auto",
        sliding_window: int | None = None,
    ) -> None:
        """A layer that is not attached yet.

        Args:
            num_heads: query heads, a multiple of `num_kv_heads`.
            head_dim: elements per head of q and k.
            scale: factor of q.k.
            num_kv_heads: KV heads.
            attn_impl: the backend by name; "auto" is the cache's choice. Diffulex's "naive" attends the batch's own
                rows alone and looks at no metadata; here it is the server's reference, over pages and metadata as every
                other backend. Its "triton" is what it calls its paged attention, and after
                `attnd.integrations.diffulex.install()` means the cache's choice.
            sliding_window: tokens that a token sees, itself included; None is all.

        Raises:
            InvalidRequest: no such backend, or heads that do not divide.
        """
        super().__init__()
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise InvalidRequest(
                f"num_heads is {num_heads}, but must be a multiple of num_kv_heads, {num_kv_heads}", field="num_heads"
            )
        if attn_impl not in BACKENDS:  # Diffulex's names are among them
            raise InvalidRequest(
                f"attn_impl is {attn_impl!r}, but must be one of {', '.join(BACKENDS)}", field="attn_impl"
            )
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.scale = scale
        self.num_kv_heads = num_kv_heads
        self.attn_impl = attn_impl
        self.sliding_window = sliding_window
        self.layer: int | None = None
        self._steps: _Steps | None = None
        self._options = AttentionOptions(
            scale=scale,
            window=sliding_window or 0,
            backend="" if attn_impl in unchosen else attn_impl,
        )

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any = None) -> torch.Tensor:
        """Attention of the running forward pass.

        Args:
            q: `[num_tokens, num_heads * head_dim]` or `[num_tokens, num_heads, head_dim]`, of the cache's dtype.
            k: `[num_tokens, num_kv_heads * head_dim]` or `[num_tokens, num_kv_heads, head_dim]`.
            v: `[num_tokens, num_kv_heads * head_dim_v]` or `[num_tokens, num_kv_heads, head_dim_v]`.
            mask: must be None: the metadata says what is seen. (Diffulex adds a tensor to the scores of "naive", and
                ignores it elsewhere.)

        Returns:
            `[num_tokens, num_heads * head_dim_v]`, in q's dtype and on its device.

        Raises:
            InvalidRequest: a wrong shape, a mask, a layer that is not attached, or a CUDA graph that is captured while
                it is not, or while its session has no cuda plane.
            AttndError: as `Step.attend`.
        """
        if mask is not None:
            given = "a tensor" if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
            rule = "must be None: the step's metadata says what is seen, and a mask would change nothing"
            raise InvalidRequest(f"mask is {given}, but {rule}", field="mask")
        q = _in_heads(q, self.num_heads, self.head_dim, "q")
        k = _in_heads(k, self.num_kv_heads, self.head_dim, "k")
        v = _in_heads(v, self.num_kv_heads, 0, "v")
        if not q.shape[0]:
            return q.new_zeros(0, self.num_heads * v.shape[2])
        if self._steps is None or self.layer is None:
            rule = "must be: attnd.attach(model, session)"
            if not diffulex.is_warming_up():
                raise InvalidRequest(f"the layer is not attached to a server, but {rule}")
            if _is_capturing():
                rule += " before; its zeros would be replayed for ever"
                raise InvalidRequest(f"the layer is not attached while a CUDA graph is captured, but {rule}")
            return q.new_zeros(q.shape[0], self.num_heads * v.shape[2])
        output = self._steps.attend(self.layer, q, k, v, self._options)
        return output.reshape(q.shape[0], -1)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        layer = "not attached" if self.layer is None else f"layer={self.layer}"
        return (
            f"{layer}, num_heads={self.num_heads}, head_dim={self.head_dim}, num_kv_heads={self.num_kv_heads}, "
            f"attn_impl={self.attn_impl!r}"
        )


def attach(model: nn.Module, session: Session | CudaSession | ModelSession | Cache) -> int:
    """Numbers the `Attention` layers of a model in the order of `model.modules()`, and has `session` serve them.

    A layer that the model uses twice gets one number. Attaching again replaces what was there.

    Args:
        model: with layers of this class.
        session: a `ModelSession`, over the fastest plane there is and with steps of any size; or a session of one
            plane, as it is. A cache is a ModelSession of it.

    Returns:
        The number of layers.

    Raises:
        InvalidRequest: the model has no such layer, or its geometry is not the cache's; nothing is attached then.
    """
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    session = ModelSession(session) if isinstance(session, Cache) else session
    config = session.cache.config
    if not 0 < len(layers) <= config.num_layers:
        raise InvalidRequest(
            f"model has {len(layers)} attnd.Attention layers, but must have 1..{config.num_layers} for this cache",
            field="num_layers",
        )
    for number, module in enumerate(layers):
        for field in ("num_kv_heads", "head_dim"):
            if getattr(module, field) != getattr(config, field):
                raise InvalidRequest(
                    f"{field} of layer {number} is {getattr(module, field)}, but must be {getattr(config, field)} "
                    "as in the cache",
                    field=field,
                )
    steps = _Steps(session, [module._options for module in layers])
    for number, module in enumerate(layers):
        module.layer, module._steps = number, steps
    return len(layers)


class _Steps:
    """The step of the running forward pass: opened by its first layer, shared by the others."""

    def __init__(self, session: Session | CudaSession | ModelSession, options: list[AttentionOptions]) -> None:
        self._session = session
        self._options = options  # of every layer
        self._metadata: Any = None  # held, so that its identity is not given to a later object
        self._step: Step | CudaStep | ModelPass | None = None
        self._kv = True
        self._layers: set[int] = set()
        self._warm: set[tuple[bytes, int, int, int]] = set()  # what the server warmed up for

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        if q.is_cuda and not isinstance(self._session, CudaSession) and _is_capturing():
            rule = "must be cuda while a CUDA graph is captured: cache.session(plane='cuda')"
            is_one = isinstance(self._session, Session)
            given = f"plane is {self._session.plane or 'not cuda'}" if is_one else "the session is a ModelSession"
            raise InvalidRequest(f"{given}, but {rule}", field="plane")
        step = self._current(layer)
        if diffulex.is_warming_up():
            self._warm_up(q.shape[1], options)
        new_k, new_v = (k, v) if self._kv else (None, None)
        try:
            output: torch.Tensor = step.attend(layer, q, new_k, new_v, options)
            if isinstance(step, ModelPass) and len(self._layers) == len(self._options):
                step.finish()  # before anything is made of the last output
        except BaseException:
            self._step = None  # the stream may have ended: whoever tries again needs another step
            raise
        return output

    def _current(self, layer: int) -> Step | CudaStep | ModelPass:
        """The open step if `layer` belongs to it, else a new one.

        It does not belong to it if the metadata is another object, or if the layer ran already: then this is another
        forward pass, of a runner that changes its metadata in place.
        """
        metadata = diffulex.fetch_attn_metadata()
        if self._step is None or metadata is not self._metadata or layer in self._layers:
            self._step = None
            self._step = self._open(metadata)
            self._metadata, self._layers = metadata, set()
        self._layers.add(layer)
        return self._step

    def _open(self, metadata: Any) -> Step | CudaStep | ModelPass:
        if not isinstance(metadata, StepMetadata):
            check_geometry(metadata, self._session.cache.config)
            metadata = from_diffulex(metadata)
        if metadata.store_only:
            raise InvalidRequest("store_only is True, but must be False: a layer has an output", field="store_only")
        for options in self._options:
            check_options(metadata, options)
        self._kv = not metadata.cache_only
        self._opened = metadata
        if isinstance(self._session, ModelSession):
            return self._session.begin(metadata, layers=tuple(range(len(self._options))))
        return self._session.step(metadata)

    def _warm_up(self, num_heads: int, options: AttentionOptions) -> None:
        """Has the server warm up for the open step, if it is a decode step of a shape that is new."""
        if self._opened.kind != "decode" or self._opened.cache_only:
            return
        lens = query_lens_of(self._opened.lens)
        shape = (options.encoded, num_heads, lens[0], len(lens))
        if shape not in self._warm:
            self._session.cache.warm_up(num_heads=num_heads, query_len=lens[0], max_reqs=len(lens), options=options)
            self._warm.add(shape)


def _is_capturing() -> bool:
    """Whether what is launched now is captured in a CUDA graph."""
    try:
        return torch.cuda.is_current_stream_capturing()
    except RuntimeError:  # torch was built without CUDA
        return False


def _in_heads(tensor: torch.Tensor, num_heads: int, head_dim: int, field: str) -> torch.Tensor:
    """`tensor` as `[num_tokens, num_heads, head_dim]`; a head_dim of 0 is whatever the tensor has."""
    shape = list(tensor.shape)
    if len(shape) == 2 and shape[1] % num_heads == 0:
        tensor = tensor.reshape(shape[0], num_heads, shape[1] // num_heads)
    if tensor.dim() != 3 or tensor.shape[1] != num_heads or head_dim not in (0, tensor.shape[2]):
        dim = head_dim or "head_dim_v"
        raise InvalidRequest(
            f"{field} has shape {shape}, but must be [num_tokens, {num_heads} * {dim}] or "
            f"[num_tokens, {num_heads}, {dim}]",
            field=field,
        )
    return tensor
