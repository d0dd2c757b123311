"""Attacks on the server's borders, for longer than the suite has time: `python -m tests.fuzz --help`."""
