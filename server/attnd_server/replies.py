"""Results as messages."""

from __future__ import annotations

from attnd.tensors import Array, to_array
from attnd.v1 import backend_pb2, step_pb2
from attnd_server.steps import Call, Result


def call_reply(call: Call, result: Result, queue_us: int, kernel_us: int) -> step_pb2.CallReply:
    """The reply to `call`, without its tensors."""
    backend = backend_pb2.BACKEND_UNSPECIFIED
    if result.backend is not None:
        backend = backend_pb2.Backend.Value(f"BACKEND_{result.backend.name}")
    return step_pb2.CallReply(
        step_id=call.step.id, layer=call.layer, backend=backend, queue_us=queue_us, kernel_us=kernel_us
    )


def reply_arrays(result: Result) -> dict[str, Array]:
    """The reply's tensors, by field."""
    tensors = {"lse": result.lse, "output": result.output}
    return {name: to_array(tensor, name) for name, tensor in tensors.items() if tensor is not None}
