"""Resident steps: what a GPU checks, plans and runs while the processor only keeps the next launch queued."""
