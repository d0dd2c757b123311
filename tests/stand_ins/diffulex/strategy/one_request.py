"""A runner of one request, whose pages are 0, 1, 2, ... of its cache."""

import torch

from diffulex.attention.metadata import AttnMetaDataBase, set_fetch_fn_for_attn_metadata
from diffulex.engine.model_runner import ModelRunnerBase

_metadata = AttnMetaDataBase()


def fetch_metadata():
    return _metadata


class OneRequestRunner(ModelRunnerBase):
    def __init__(self, config):
        set_fetch_fn_for_attn_metadata(fetch_metadata)
        super().__init__(config)

    def allocate_kv_cache(self):
        super().allocate_kv_cache()
        self.kv_cache = torch.zeros(2)

    def warmup_model(self):
        self.warm = self.run(torch.ones(3, 32), 0, is_stored=False)

    @torch.inference_mode()
    def run(self, hidden, context_len, is_stored=True):
        global _metadata
        num_tokens = len(hidden)
        positions = torch.arange(context_len, context_len + num_tokens, dtype=torch.int32)
        _metadata = AttnMetaDataBase(
            is_prefill=[num_tokens > 1],
            cu_seqlens_q=torch.tensor([0, num_tokens], dtype=torch.int32),
            slot_mapping=positions if is_stored else torch.full_like(positions, -1),
            context_lens=torch.tensor([context_len], dtype=torch.int32),
            page_tables=torch.arange(4, dtype=torch.int32)[None],
            page_size=self.page_size,
        )
        return self.model(hidden)
