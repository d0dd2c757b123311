"""Kernels by which a GPU takes, checks and accepts the metadata of resident steps."""
