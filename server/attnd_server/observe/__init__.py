"""Logs, counts, Prometheus, and verification of a sample of the calls."""
