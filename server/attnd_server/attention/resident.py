"""What a class of resident steps has in common: their numbers, which kernels and the host's validation both go by."""

from __future__ import annotations

from typing import NamedTuple


class ResidentSizes(NamedTuple):
    """The numbers of a class.

    Attributes:
        max_reqs: most requests of a step.
        max_pages: columns of the page tables.
        query_len: new tokens of each request.
        page_size: tokens of a page.
        num_pages: of the cache.
        max_context_len: most cached tokens of a request.
        window: tokens of the window of all layers; 0: there is none.
        block_size: of the mask; 1 is causal, 0 bidirectional.
    """

    max_reqs: int
    max_pages: int
    query_len: int
    page_size: int
    num_pages: int
    max_context_len: int
    window: int
    block_size: int
