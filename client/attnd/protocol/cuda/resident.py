"""Where the metadata of resident steps lies in a cuda plane's region: what client and server both go by.

It begins with the word that the worker counts up with each step. Lengths are int32 `[LENS_ROWS, max_reqs]`: in the
first row the number of requests and the version, then a row each of context lengths, of new tokens that count, and of
new tokens that are stored, the first ones. Page tables are int32 `[max_reqs, max_pages]`. A later version may have
lengths and page tables for each layer group.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from attnd.errors import InvalidRequest
from attnd.protocol.cuda.layout import ALIGNMENT, Geometry, StepLayout, step_layout

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
# Most tokens of a step whose places all have in common; more than the most requests of a resident step.
MOST_COMMON_TOKENS = 1024
_NO_LIMIT = 1 << 62
# Layouts that are kept, of a process: a decode loop asks for the same in each step.
_KEPT = 256


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


@lru_cache(maxsize=_KEPT)
def layer_layouts(
    num_tokens: int, num_heads: int, geometry: Geometry, region_bytes: int, layout_tokens: int = 0
) -> tuple[StepLayout, StepLayout]:
    """Where the tensors of a step's even and odd layers lie.

    Args:
        num_tokens: rows of each.
        num_heads: query heads; 0 in a store-only step.
        geometry: of the cache.
        region_bytes: of the region, as far as it is for tensors.
        layout_tokens: 0: all layers have theirs as `step_layout` says. Else as `resident_tensors` of so many tokens.

    Raises:
        InvalidRequest: the region does not hold them.
    """
    if not layout_tokens:
        layout = step_layout(num_tokens, num_heads, geometry, region_bytes)
        return layout, layout
    if layout_tokens < num_tokens:
        rule = f"must be 0, or at least the {num_tokens} tokens of the step"
        raise InvalidRequest(f"layout_tokens is {layout_tokens}, but {rule}", field="layout_tokens")
    even, odd = resident_tensors(step_layout(layout_tokens, num_heads, geometry, region_bytes))
    if (end := tensors_end((even, odd))) > region_bytes:
        rule = f"take {end} bytes of a cuda plane's region, but it has {region_bytes} for them"
        raise InvalidRequest(f"layers of {layout_tokens} tokens {rule}", field="layout_tokens")
    return even.first_rows(num_tokens), odd.first_rows(num_tokens)


@lru_cache(maxsize=_KEPT)
def common_tokens(num_heads: int, geometry: Geometry, region_bytes: int) -> int:
    """The `layout_tokens` of all steps that have no more, so that a worker's CUDA graph serves any of them; 0: none.

    As many as a decode step may have, if they take no more than half of the region.
    """
    count = MOST_COMMON_TOKENS
    while count:
        layout = step_layout(count, num_heads, geometry, _NO_LIMIT)
        if tensors_end(resident_tensors(layout)) <= region_bytes // 2:
            return count
        count //= 2
    return 0


def tensors_end(layouts: tuple[StepLayout, StepLayout]) -> int:
    """Bytes from the region's start that the tensors of even and odd layers take."""
    return max(place.offset + place.num_bytes for each in layouts for place in each)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def rounded(number: int) -> int:
    """The least number that is not less and that metadata is laid out for."""
    return -(-number // _GRAIN) * _GRAIN


def metadata_bytes(max_reqs: int, max_pages: int) -> int:
    """What the metadata of steps takes."""
    lens = LENS_ROWS * 4 * rounded(max_reqs)
    return _WORD_BYTES + _aligned(lens) + 4 * rounded(max_reqs) * rounded(max_pages)


def resident_layout(
    max_reqs: int, max_pages: int, layouts: tuple[StepLayout, StepLayout], region_bytes: int
) -> ResidentLayout:
    """Where the metadata lies: at the region's end.

    Args:
        max_reqs: most requests of a step.
        max_pages: most pages of a request.
        layouts: of the tensors of a step of the most requests, of even and odd layers.
        region_bytes: of the region.

    Raises:
        InvalidRequest: the region does not hold both.
    """
    num_bytes = metadata_bytes(max_reqs, max_pages)
    start = (region_bytes - num_bytes) // ALIGNMENT * ALIGNMENT
    if start < (end := tensors_end(layouts)):
        raise InvalidRequest(
            f"steps of {max_reqs} requests with {max_pages} pages take {_aligned(end) + num_bytes} bytes of a cuda "
            f"plane's region, but it has {region_bytes}; the server's --cuda-region-bytes gives more",
            field="max_reqs",
        )
    lens = start + _WORD_BYTES
    tables = lens + -(-LENS_ROWS * 4 * rounded(max_reqs) // ALIGNMENT) * ALIGNMENT
    return ResidentLayout(rounded(max_reqs), rounded(max_pages), start, lens, tables)


def resident_places(
    max_reqs: int,
    max_pages: int,
    query_len: int,
    num_heads: int,
    geometry: Geometry,
    region_bytes: int,
    layout_tokens: int = 0,
) -> tuple[tuple[StepLayout, StepLayout], ResidentLayout]:
    """Where the tensors of a step of the most requests lie, of even and odd layers, and the metadata.

    Args:
        max_reqs: most requests of a step.
        max_pages: most pages of a request.
        query_len: new tokens of a request.
        num_heads: query heads.
        geometry: of the cache.
        region_bytes: of the region.
        layout_tokens: as of `layer_layouts`, at least the tokens of the most requests; 0: these.

    Raises:
        InvalidRequest: the region does not hold both.
    """
    most = max_reqs * query_len
    layout_tokens = layout_tokens or most
    layouts = layer_layouts(most, num_heads, geometry, region_bytes, layout_tokens)
    whole = layer_layouts(layout_tokens, num_heads, geometry, region_bytes, layout_tokens)
    return layouts, resident_layout(max_reqs, max_pages, whole, region_bytes)
