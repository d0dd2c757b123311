"""Kernels of Triton on this process' GPU: how they are launched, whatever they compute."""
