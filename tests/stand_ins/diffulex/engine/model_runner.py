"""The base of runners: loads the model, allocates, warms up."""

import torch

from diffulex.attention.metadata import reset_warming_up, set_warming_up
from diffulex.model.plain import Plain


class ModelRunnerBase:
    def __init__(self, config):
        self.config = config
        self.page_size = config.page_size
        self.has_left = False
        self.model = Plain(config.attn_impl)
        self.allocate_kv_cache()
        set_warming_up(True)
        self.warmup_model()
        reset_warming_up()

    def allocate_kv_cache(self):
        self.config.num_pages = 1000
        self.kv_cache = torch.zeros(1)

    def exit(self):
        self.has_left = True
