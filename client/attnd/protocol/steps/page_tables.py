"""Page tables of any kind as the wire has them: equally long rows."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any, NoReturn

from attnd.errors import InvalidRequest
from attnd.protocol.integers import integers, is_sequence
from attnd.protocol.tensors import Array
from attnd.v1 import tensor_pb2


def page_tables_array(tables: Any, field: str) -> Array:
    """An int32 Array of equally long rows, or of a 2-D array.

    Raises:
        InvalidRequest: rows that differ in length, not integers, or beyond 32 bits.
    """
    if not is_sequence(tables):
        return integers(tables, field)
    try:
        lens = set(map(len, tables))
        flat = array("i", list(chain.from_iterable(tables)))
    except (TypeError, OverflowError):
        _refuse_rows(tables, field)
    if len(lens) > 1:
        _refuse_rows(tables, field)
    return Array(tensor_pb2.DTYPE_INT32, (len(tables), max(lens, default=0)), memoryview(flat).cast("B"))


def _refuse_rows(tables: Sequence[Any], field: str) -> NoReturn:
    """Says which row of page tables is wrong."""
    num_pages = 0
    for request, row in enumerate(tables):
        try:
            packed = array("i", list(row))
        except (TypeError, OverflowError) as error:
            raise InvalidRequest(f"{field}[{request}] must hold 32-bit integers: {error}", field=field) from None
        num_pages = len(packed) if request == 0 else num_pages
        if len(packed) != num_pages:
            rule = f"must have {num_pages} as {field}[0]; pad with -1"
            raise InvalidRequest(f"{field}[{request}] has {len(packed)} pages, but {rule}", field=field)
    raise InvalidRequest(f"{field} must hold rows of one length, but its rows have none", field=field)
