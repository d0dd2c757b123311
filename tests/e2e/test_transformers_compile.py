"""A compiled transformers model: the same logits, and nothing is compiled once for each layer."""

from __future__ import annotations

import pytest
import torch

import attnd

transformers = pytest.importorskip("transformers", reason="needs transformers")
dynamo = pytest.importorskip("torch._dynamo", reason="needs torch.compile")

from torch._dynamo.testing import CompileCounter  # noqa: E402

from attnd.integrations.transformers import RemoteCache  # noqa: E402
from tests.e2e.test_transformers import COMMON  # noqa: E402


@torch.no_grad()
def test_no_layer_is_compiled_apart(any_client: attnd.Client) -> None:
    ids = torch.randint(2, 97, (1, 11))
    num_frames = []
    for num_layers in (2, 4):
        torch.manual_seed(1)
        config = transformers.Qwen3Config(**COMMON | {"num_hidden_layers": num_layers})
        model = transformers.Qwen3ForCausalLM(config).eval()
        model.set_attn_implementation("eager")
        expected = model(ids).logits
        model.set_attn_implementation("attnd")
        dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter)
        pieces = []
        with RemoteCache(any_client, config, max_tokens=64, dtype=model.dtype) as cache:
            for first, end in ((0, 9), (9, 10), (10, 11)):
                pieces.append(compiled(ids[:, first:end], past_key_values=cache).logits)
                if end == 10:
                    num_frames.append(counter.frame_count)
            assert counter.frame_count == num_frames[-1]  # tokens of one length are compiled once
        torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-4, rtol=1e-4)
    assert num_frames[0] == num_frames[1] > 0
