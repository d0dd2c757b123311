"""What a layer computes besides softmax(scale * q k) v."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from attnd.errors import InvalidRequest
from attnd.protocol.packing import float32_tensor, uint32
from attnd.v1 import backend_pb2, step_pb2

# "auto", "naive", "sdpa", ...: every backend of the contract by the name that people type.
BACKENDS: dict[str, backend_pb2.Backend.ValueType] = {
    name.removeprefix("BACKEND_").lower(): number for name, number in backend_pb2.Backend.items() if number
}
# By the wire's number; a store-only step has none.
BACKEND_NAMES: dict[int, str] = {number: name for name, number in BACKENDS.items()}


def backend_of(name: str) -> backend_pb2.Backend.ValueType:
    """The wire's backend of a name such as "sdpa"; "" leaves it unset.

    Raises:
        InvalidRequest: no such backend.
    """
    if name == "":
        return backend_pb2.BACKEND_UNSPECIFIED
    try:
        return BACKENDS[name]
    except (KeyError, TypeError):
        names = ", ".join(BACKENDS)
        raise InvalidRequest(f"backend is {name!r}, but must be one of {names}", field="backend") from None


@dataclass(frozen=True, eq=False)
class AttentionOptions:
    """Options of a call. Make one object per kind of layer and keep it: its message is built once.

    Attributes:
        scale: factor of q.k, any finite number; None is `head_dim ** -0.5`.
        softcap: score becomes `softcap * tanh(score / softcap)`; 0 is off.
        window: a token at p sees no position j with `p - j >= window`; 0 is the window of the step or of the layer's
            group, and off where these have none. A step that has one takes no other. One wider than any context, up to
            2^32 - 1, hides nothing.
        alibi_slopes: `[num_heads]`, adds `alibi_slopes[h] * (kp - p)` to the score. Floats in a sequence, or in an
            array or tensor of any floating type; read once, as float32.
        sinks: `[num_heads]`, adds `exp(sinks[h])` to the denominator. Likewise.
        return_lse: also return lse, the natural logarithm of the softmax's denominator, sinks included: the sink itself
            for a row that sees no key, -inf without one.
        backend: name of the backend; "" is the cache's choice.
    """

    scale: float | None = None
    softcap: float = 0.0
    window: int = 0
    alibi_slopes: Any = None
    sinks: Any = None
    return_lse: bool = False
    backend: str = ""

    @cached_property
    def message(self) -> step_pb2.AttentionOptions:
        """The wire's form; shared, so never to be changed.

        Raises:
            InvalidRequest: a field holds what the wire cannot carry. Ranges are left to the server.
        """
        return step_pb2.AttentionOptions(
            scale=None if self.scale is None else _float(self.scale, "scale"),
            softcap=_float(self.softcap, "softcap"),
            window=uint32(self.window, "window"),
            alibi_slopes=float32_tensor(self.alibi_slopes, "alibi_slopes"),
            sinks=float32_tensor(self.sinks, "sinks"),
            return_lse=bool(self.return_lse),
            backend=backend_of(self.backend),
        )

    @cached_property
    def encoded(self) -> bytes:
        """`message`, serialized."""
        return self.message.SerializeToString()


def _float(value: Any, field: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InvalidRequest(f"{field} is {value!r}, but must be a number", field=field) from None
