"""Launches that calls of several callers share, as CUDA graphs: one for a class of them, whoever is in it."""
