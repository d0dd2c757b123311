"""Tensors and arrays made of received bytes are aligned, wherever the bytes lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from attnd.protocol.tensors import Array, dtype_of, from_array, torch_tensor

VALUES = np.arange(30, dtype=np.float32).reshape(2, 3, 5)
DTYPE = dtype_of("float32")


@pytest.mark.parametrize("offset", range(64))
@pytest.mark.parametrize("like", [torch.empty(0), np.empty(0)], ids=["torch", "numpy"])
def test_what_is_made_of_received_bytes_is_aligned(like: Any, offset: int) -> None:
    room = memoryview(bytearray(VALUES.nbytes + 128))
    start = offset - torch.frombuffer(room, dtype=torch.uint8).data_ptr() % 64
    data = room[start % 64 :][: VALUES.nbytes]
    data[:] = VALUES.tobytes()
    array = Array(DTYPE, VALUES.shape, data)
    assert torch_tensor(array).data_ptr() % 64 == offset
    made = from_array(array, like)
    assert type(made) is type(like)
    assert (made.data_ptr() if isinstance(made, torch.Tensor) else made.ctypes.data) % 64 == 0
    assert np.array_equal(np.asarray(made), VALUES)


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("like", [torch.empty(0), np.empty(0)], ids=["torch", "numpy"])
def test_no_bytes_at_all_keep_their_shape(like: Any, shape: tuple[int, ...]) -> None:
    assert tuple(from_array(Array(DTYPE, shape, memoryview(b"")), like).shape) == shape
