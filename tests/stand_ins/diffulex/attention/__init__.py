"""Loads its class when it is first asked for."""

from . import metadata
from .metadata import AttnMetaDataBase, set_fetch_fn_for_attn_metadata

__all__ = ["AttnMetaDataBase", "metadata", "set_fetch_fn_for_attn_metadata"]


def __getattr__(name):
    if name == "Attention":
        from .attn_impl import Attention

        return Attention
    raise AttributeError(name)
