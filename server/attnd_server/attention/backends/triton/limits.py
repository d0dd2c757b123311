"""What Triton's kernels can serve, known without triton."""

# Longest context: positions of cached and new tokens, and sums of two of them, must fit the kernels' int32.
MAX_CONTEXT_LEN = 1 << 29
