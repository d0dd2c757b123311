"""A decode step of a model like Llama 3, all but its attention: random weights, one new token for each request.

The step reads and writes tensors that stay where they are, and lengths advance on the device, so that a CUDA graph of
it is one step after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional

from benchmarks.worker_kernels import EPSILON, FUSED, PLAIN, Operations, Split

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Attention of a layer of q, k and v `[num_reqs, heads, head_dim]`, as q."""

_ROPE_THETA = 500_000.0


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model.

    Attributes:
        name: for people.
        num_layers: layers.
        hidden: elements of the residual.
        num_heads: query heads.
        num_kv_heads: KV heads.
        head_dim: elements of a head.
        ffn: elements between the two projections of the feed-forward part.
        vocab: tokens that there are.
        dtype: of weights, activations and KV.
    """

    name: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    dtype: torch.dtype

    @property
    def scale(self) -> float:
        """Factor of q.k."""
        return float(self.head_dim**-0.5)


LLAMA_8B = ModelShape("Llama 3 8B", 32, 4096, 32, 8, 128, 14_336, 128_256, torch.bfloat16)
TINY = ModelShape("a tiny model", 2, 128, 4, 2, 32, 256, 512, torch.float32)
"""For the dry run on a processor."""


class Call(NamedTuple):
    """What the attention of a layer got and gave in the last step."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    output: torch.Tensor


class State:
    """What a worker's steps read and leave behind, on its device.

    Attributes:
        tokens: int64 `[num_reqs]`: of the next step, which the step before has sampled.
        positions: int64 `[num_reqs]`: of these tokens, and so the lengths of the contexts.
        hidden: `[num_reqs, hidden]`, the last step's after the last norm.
        calls: attention of each layer of the last step. That all are kept costs a graph memory, and no time.
    """

    def __init__(self, num_reqs: int, shape: ModelShape, device: torch.device) -> None:
        self.tokens = torch.zeros(num_reqs, dtype=torch.int64, device=device)
        self.positions = torch.zeros(num_reqs, dtype=torch.int64, device=device)
        self.hidden = torch.zeros(num_reqs, shape.hidden, dtype=shape.dtype, device=device)
        self.calls: list[Call] = []

    def restart(self, tokens: torch.Tensor, context_len: int) -> None:
        """Goes back to the first step, behind contexts of `context_len` tokens."""
        self.tokens.copy_(tokens)
        self.positions.fill_(context_len)


@dataclass(frozen=True, eq=False)
class _Layer:
    """Weights, `[out, in]` as torch's linear has them."""

    qkv: torch.Tensor
    output: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    attention_norm: torch.Tensor
    ffn_norm: torch.Tensor


class Model:
    """The weights, and a step."""

    def __init__(self, shape: ModelShape, max_positions: int, device: torch.device) -> None:
        """Draws weights.

        Scores have a deviation of about 1.6, as trained ones have, and attention adds as much to the residual as the
        feed-forward part does. With equal deviations everywhere it would add a thirtieth, and a wrong output of it
        would be lost in the roundings of all else.

        Args:
            shape: sizes.
            max_positions: positions up to which the table of RoPE goes.
            device: of the weights.
        """
        self.shape, self.device = shape, device
        self._operations: Operations = FUSED if device.type == "cuda" else PLAIN
        hidden, head_dim = shape.hidden, shape.head_dim
        generator = torch.Generator(device).manual_seed(0)

        def weights(out: int, into: int, gain: float) -> torch.Tensor:
            """Of a projection that makes numbers of deviation 1 to such of deviation `gain`."""
            drawn = torch.empty(out, into, dtype=shape.dtype, device=device)
            return drawn.normal_(0.0, gain * into**-0.5, generator=generator)

        ones = torch.ones(hidden, dtype=shape.dtype, device=device)
        of_heads = shape.num_heads * head_dim
        self._layers = [
            _Layer(
                qkv=weights(of_heads + 2 * shape.num_kv_heads * head_dim, hidden, 1.28),
                output=weights(hidden, of_heads, 3.2),
                gate_up=weights(2 * shape.ffn, hidden, 1.28),
                down=weights(hidden, shape.ffn, 0.24),
                attention_norm=ones,
                ffn_norm=ones,
            )
            for _ in range(shape.num_layers)
        ]
        self._embedding = weights(shape.vocab, hidden, hidden**0.5)
        self._last_norm = ones
        self._lm_head = weights(shape.vocab, hidden, 1.0)
        self._rope = rope_table(max_positions, head_dim, device)

    @property
    def num_bytes(self) -> int:
        """That a step reads of the weights: all but the embedding."""
        layers = sum(
            weight.nbytes for layer in self._layers for weight in (layer.qkv, layer.output, layer.gate_up, layer.down)
        )
        return layers + self._lm_head.nbytes

    def forward(self, state: State, attend: Attend, into: Callable[[int], Split | None] = lambda layer: None) -> None:
        """A step: samples the next tokens, and advances. May run in a capture.

        Args:
            state: of the worker.
            attend: attention of a layer.
            into: where q, k and v of a layer are to be written; None: anywhere.
        """
        operations, shape, linear = self._operations, self.shape, functional.linear
        num_reqs = len(state.tokens)
        state.calls = []
        residual = functional.embedding(state.tokens, self._embedding)
        normed = functional.rms_norm(residual, (shape.hidden,), self._layers[0].attention_norm, EPSILON)
        norms_after = [*(layer.attention_norm for layer in self._layers[1:]), self._last_norm]
        for index, (layer, norm_after) in enumerate(zip(self._layers, norms_after, strict=True)):
            projected = linear(normed, layer.qkv)
            q, k, v = operations.rotate(
                projected, self._rope, state.positions, shape.num_heads, shape.num_kv_heads, into(index)
            )
            output = attend(index, q, k, v)
            state.calls.append(Call(q, k, v, output))
            normed = operations.add_norm(residual, linear(output.reshape(num_reqs, -1), layer.output), layer.ffn_norm)
            gated = operations.silu_mul(linear(normed, layer.gate_up))
            normed = operations.add_norm(residual, linear(gated, layer.down), norm_after)
        state.hidden.copy_(normed)
        state.tokens.copy_(linear(normed, self._lm_head).argmax(-1))
        state.positions.add_(1)


def rope_table(num_positions: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """Cosines, then sines, float32 `[num_positions, head_dim]`."""
    frequencies = _ROPE_THETA ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim)
    angles = torch.arange(num_positions, device=device, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1).float()
