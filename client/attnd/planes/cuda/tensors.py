"""Which tensors of a worker a cuda plane takes, and how they are copied."""

from __future__ import annotations

import sys
from typing import Any

from attnd.errors import InvalidRequest
from attnd.protocol.cuda.copies import Copy
from attnd.protocol.cuda.layout import Place


def copy_in(address: int, tensor: Any) -> Copy | None:
    """How a tensor `[num_tokens, num_heads, head_dim]` gets to `address`; None: its tokens are not dense."""
    num_tokens, num_heads, head_dim = tensor.shape
    token, head, element = tensor.stride()
    if (head_dim > 1 and element != 1) or (num_heads > 1 and head != head_dim):
        return None
    size = tensor.element_size()
    row_bytes = num_heads * head_dim * size
    return Copy(address, tensor.data_ptr(), num_tokens, row_bytes, row_bytes if num_tokens == 1 else token * size)


def check_capture(cuda: Any, index: int) -> None:
    """Refuses a capture that would go without what is enqueued on a GPU.

    Args:
        cuda: `torch.cuda`.
        index: of the worker's GPU.

    Raises:
        InvalidRequest: a CUDA graph is being captured on a stream of another GPU.
    """
    current = cuda.current_device()
    if current != index and cuda.is_current_stream_capturing():
        rule = (
            f"a session on cuda:{index} needs one of its own: torch.cuda.graph(..., stream=torch.cuda.Stream({index}))"
        )
        raise InvalidRequest(f"a CUDA graph is being captured on a stream of cuda:{current}, but {rule}", field="q")


def check_tensor(name: str, value: Any, place: Place, dtype: Any, device: Any) -> Any:
    """`value`, if it is what lies at `place`.

    Args:
        name: to use in errors.
        value: a torch tensor.
        place: where it goes.
        dtype: torch's.
        device: torch's.

    Raises:
        InvalidRequest: it is another shape, dtype or device.
    """
    is_tensor = isinstance(value, sys.modules["torch"].Tensor)
    if is_tensor and value.shape == place.shape and value.dtype is dtype and value.device == device:
        return value
    found: tuple[Any, ...] = (
        tuple(getattr(value, "shape", ())),
        getattr(value, "dtype", None),
        getattr(value, "device", None),
    )
    for what, is_so, must in zip(("shape", "dtype", "device"), found, (place.shape, dtype, device), strict=True):
        if is_so != must:
            given = f"{what} {list(is_so) if what == 'shape' else is_so}"
            rule = f"must have {list(must) if what == 'shape' else must} on this step's cuda plane"
            raise InvalidRequest(f"{name} has {given}, but {rule}", field=name)
    return value
