"""Metadata of resident steps, by the million, before the GPU's check and the host's."""
