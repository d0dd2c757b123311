"""What the host and the device both go by when they cut the keys of a request into parts for Hopper's kernels."""

from __future__ import annotations

# Greater than any position, and the sum with one fits int32.
EVERYTHING = 1 << 30
# What starting and merging one more part of a request costs on Hopper's kernels, in tiles of keys.
PART_COST = 5
# Where the cut follows the batch: programs that it may add, for each multiprocessor. Where that is too few, requests
# are so many or so unlike that the order of the items matters more than the cut; and it bounds the partial results.
MOST_WAVES = 4
# Where the parts of a diffusion block's keys follow its own length alone: how many, and tiles of the shortest.
OWN_PARTS, MIN_OWN_TILES = 4, 4
# Keys of a chunk for each new token at least: its partial results are written and read once more, and must stay few
# beside the KV that it reads. One where the length of a chunk is given.
KEYS_PER_NEW_TOKEN = 64
MAX_LEAST_CHUNK = 1 << 20
