"""Tensors of requests: lengths and page ids, and elements of q, k and v of which none has to be made for each."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

import numpy as np

from attnd.v1 import tensor_pb2

# Elements of calls come from here. Reinterpreted in a type of two bytes they are still finite.
_VALUES = np.random.default_rng(7).standard_normal(1 << 14).astype(np.float32)
BYTES = {
    tensor_pb2.DTYPE_FLOAT32: _VALUES.tobytes(),
    tensor_pb2.DTYPE_FLOAT16: _VALUES.astype(np.float16).tobytes(),
}
SIZES = {tensor_pb2.DTYPE_FLOAT32: 4, tensor_pb2.DTYPE_FLOAT16: 2}


def ints(values: Sequence[int], *shape: int, wide: bool = False) -> tensor_pb2.Tensor:
    """An int32 or int64 tensor; of one dimension if no shape is given."""
    dtype = tensor_pb2.DTYPE_INT64 if wide else tensor_pb2.DTYPE_INT32
    data = array("q" if wide else "i", values).tobytes()
    return tensor_pb2.Tensor(dtype=dtype, shape=shape or (len(values),), data=data)


def floats(random_: random.Random, dtype: int, *shape: int) -> tensor_pb2.Tensor:
    """Numbers of order 1."""
    size = SIZES[dtype]
    num_bytes = int(np.prod(shape)) * size
    source = BYTES[dtype]
    if num_bytes >= len(source):  # of a cache that a spoiled message asked for and got
        source *= num_bytes // len(source) + 2
    start = random_.randrange((len(source) - num_bytes) // size) * size
    data = source[start : start + num_bytes]
    return tensor_pb2.Tensor(dtype=tensor_pb2.Dtype.ValueType(dtype), shape=shape, data=data)
