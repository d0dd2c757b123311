"""Attention kernels for Hopper GPUs, in Gluon, with their copies and matrix products written out."""
