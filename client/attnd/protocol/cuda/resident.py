"""Where the metadata of resident steps lies in a cuda plane's region: what client and server both go by.

It begins with the word that the worker counts up with each step. Lengths are int32 `[LENS_ROWS, max_reqs]`: in the
first row the number of requests and the version, then a row each of context lengths, of new tokens that count, and of
new tokens that are stored, the first ones. Page tables are int32 `[max_reqs, max_pages]`. A later version may have
lengths and page tables for each layer group.
"""

from __future__ import annotations

from typing import NamedTuple

from attnd.errors import InvalidRequest
from attnd.protocol.cuda.layout import ALIGNMENT, StepLayout

VERSION = 1
# Rows of the lengths, and what stands in them.
NUM_REQS, CONTEXT_LENS, VALID_LENS, STORED_LENS = range(4)
LENS_ROWS = 4
# Bytes into the memory of results: the number of the first step that was refused, 64 bits; 0: none was.
REFUSED = 512
# Bytes into the host's page of words: the number of the last step, by which a server that waits for none is woken.
WAKE = 1024
# Numbers that lie side by side and are copied together, by 16 bytes.
_GRAIN = 4
_WORD_BYTES = 64


class ResidentLayout(NamedTuple):
    """Where the metadata of a class of steps lies, in bytes from the region's start.

    Attributes:
        max_reqs: most requests of a step.
        max_pages: columns of the page tables.
        word: where the worker counts steps.
        lens: of the lengths.
        page_tables: of the page tables.
    """

    max_reqs: int
    max_pages: int
    word: int
    lens: int
    page_tables: int


def resident_tensors(layout: StepLayout) -> tuple[StepLayout, StepLayout]:
    """Where the tensors of a step's layers lie: of even layers as in `layout`, of odd ones K and V behind all others.

    So the server stores a layer's K and V after it has handed its output back, while the worker writes those of the
    next. It has stored the last layer's before it hands that back.
    """
    end = max(place.offset + place.num_bytes for place in layout)
    k = layout.k._replace(offset=_aligned(end))
    v = layout.v._replace(offset=_aligned(k.offset + k.num_bytes))
    return layout, layout._replace(k=k, v=v)


def tensors_end(layout: StepLayout) -> int:
    """Bytes from the region's start that these tensors take."""
    return max(place.offset + place.num_bytes for each in resident_tensors(layout) for place in each)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def rounded(number: int) -> int:
    """The least number that is not less and that metadata is laid out for."""
    return -(-number // _GRAIN) * _GRAIN


def metadata_bytes(max_reqs: int, max_pages: int) -> int:
    """What the metadata of steps takes."""
    lens = LENS_ROWS * 4 * rounded(max_reqs)
    return _WORD_BYTES + _aligned(lens) + 4 * rounded(max_reqs) * rounded(max_pages)


def resident_layout(max_reqs: int, max_pages: int, layout: StepLayout, region_bytes: int) -> ResidentLayout:
    """Where the metadata lies: at the region's end.

    Args:
        max_reqs: most requests of a step.
        max_pages: most pages of a request.
        layout: of the tensors of a step of the most requests.
        region_bytes: of the region.

    Raises:
        InvalidRequest: the region does not hold both.
    """
    num_bytes = metadata_bytes(max_reqs, max_pages)
    start = (region_bytes - num_bytes) // ALIGNMENT * ALIGNMENT
    if start < (end := tensors_end(layout)):
        raise InvalidRequest(
            f"steps of {max_reqs} requests with {max_pages} pages take {_aligned(end) + num_bytes} bytes of a cuda "
            f"plane's region, but it has {region_bytes}; the server's --cuda-region-bytes gives more",
            field="max_reqs",
        )
    lens = start + _WORD_BYTES
    tables = lens + -(-LENS_ROWS * 4 * rounded(max_reqs) // ALIGNMENT) * ALIGNMENT
    return ResidentLayout(rounded(max_reqs), rounded(max_pages), start, lens, tables)
