"""Steady load with random kills, for longer than the suite has time: `python -m tests.soak --help`."""
