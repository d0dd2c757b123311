"""Paged attention in Triton: the work of a step is planned on the host, kernels compute it."""
