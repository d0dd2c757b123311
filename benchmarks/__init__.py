"""Benchmarks: each prints a table, writes JSON and draws a plot. See README.md beside this file."""
