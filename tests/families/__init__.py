"""Model families of transformers with attention on a server, beside the same models with attention of their own.

Every family is a tiny model with random weights. `python -m tests.families` runs every behaviour of `behaviours.py` on
every family of `families.py`, and writes the table of docs/integrations.md.
"""
