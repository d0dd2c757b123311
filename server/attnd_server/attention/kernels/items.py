"""The work list of the attention kernels: a row of int32 for each item, and what its columns mean.

An item is a tile of rows of one request over a range of its keys. `row = (new token, query head of a KV head)`
flattened: row r of a request is its new token `r // group` and query head `r % group` of those that share a program.
Where the keys of a request are many, they are cut into chunks; each chunk leaves a partial result and `merge.py` puts
these together. Chunks depend on the request alone. How many chunks one item takes may depend on the batch: results do
not.
"""

from __future__ import annotations

import triton.language as tl

ITEM_FIELDS = 20
# Columns of `merges`: first row of q, new tokens, first row of the partial results, chunks, new tokens that count.
MERGE_FIELDS = 5
# Elements past the last page table that Hopper's kernels may bring close, and never use.
PREFETCHED = 16
(
    TABLE,  # first element of its page table among the page tables
    Q_ROW,  # first row of q
    NUM_NEW,  # new tokens
    NUM_VALID,  # of which the first so many count
    CONTEXT_LEN,
    BLOCK_SIZE,  # of the mask; 1 is causal, a large one bidirectional
    PREFIX_LEN,
    PADDED_PREFIX_LEN,
    HOLE_START,  # cached positions [HOLE_START, HOLE_END) are not seen
    HOLE_END,
    HAS_ABSENT_PAGES,  # a page id within the context may be -1
    FIRST_ROW,  # first row of the item
    FIRST_KEY,  # cached keys of the item: [FIRST_KEY, END_KEY)
    END_KEY,
    CHUNK_KEYS,  # keys of a chunk
    FIRST_CHUNK,  # chunk that begins at FIRST_KEY
    NUM_CHUNKS,  # of the request; new tokens are seen with the last
    PARTIAL_ROW,  # first row of the request's partial results
    COUNTER,  # where programs count the chunks that are done
    NUM_ITEMS,  # of the launch; the same in every row
) = (tl.constexpr(column) for column in range(ITEM_FIELDS))
# What Hopper's items have there: the new tokens of the item's first row and of its last one, which may not exist.
FIRST_TOKEN, LAST_TOKEN = CHUNK_KEYS, COUNTER
