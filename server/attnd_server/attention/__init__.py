"""Attention over tensors: no message, no client. `ops` chooses a backend, which calls kernels."""
