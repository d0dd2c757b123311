"""Caches: leases on pages, the memory that pages lie in, and snapshots."""
