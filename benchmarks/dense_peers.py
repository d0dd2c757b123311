"""Peers that torch has, for prefill without context: they know no pages."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernel_cases import Case
from benchmarks.kernel_runs import NotThere
from benchmarks.kernel_tensors import Tensors
from benchmarks.peers import Prepared, Way


class Sdpa:
    """One backend of torch's scaled_dot_product_attention; dense and causal steps only."""

    def __init__(self, name: str, backend: SDPBackend) -> None:
        self.name, self._backend = name, backend

    def prepare(self, case: Case, tensors: Tensors) -> Prepared:
        """Tries grouped heads, else repeats those of K and V, which is not timed."""
        if not case.is_dense or case.block_size != 1:
            raise NotThere("serves dense causal prefill only")
        q, k, v = _batched(case, tensors)
        group = case.num_heads // case.num_kv_heads

        def attend(k: torch.Tensor, v: torch.Tensor, grouped: bool) -> torch.Tensor:
            with sdpa_kernel(self._backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

        try:
            attend(k, v, True)
        except RuntimeError:
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
            return Prepared(lambda layer: attend(k, v, False), lambda output: _rows(case, output))
        return Prepared(lambda layer: attend(k, v, True), lambda output: _rows(case, output))


class Flex:
    """FlexAttention, compiled for the cell; dense steps, causal or block-causal."""

    name = "Flex"

    def prepare(self, case: Case, tensors: Tensors) -> Prepared:
        """Compiles."""
        if not case.is_dense:
            raise NotThere("serves dense prefill only")
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        q, k, v = _batched(case, tensors)
        block_size, num_tokens = case.block_size, case.query_lens[0]

        def seen(batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return key < (row // block_size + 1) * block_size

        torch.compiler.reset()  # else it gives up compiling after a few shapes
        mask = create_block_mask(seen, None, None, num_tokens, num_tokens, device=q.device)
        attend = torch.compile(flex_attention, dynamic=False)
        return Prepared(
            lambda layer: attend(q, k, v, block_mask=mask, enable_gqa=True), lambda output: _rows(case, output)
        )


def _batched(case: Case, tensors: Tensors) -> list[torch.Tensor]:
    """q, k and v as `[num_reqs, heads, query_len, head_dim]`, sharing memory."""
    return [x.view(case.num_reqs, -1, *x.shape[1:]).transpose(1, 2) for x in (tensors.q, tensors.k, tensors.v)]


def _rows(case: Case, output: torch.Tensor) -> torch.Tensor:
    """`[num_reqs, num_heads, query_len, head_dim]` as `[num_tokens, num_heads, head_dim]`."""
    return output.transpose(1, 2).reshape(case.num_tokens, case.num_heads, case.head_dim)


def dense_peers(*, compiled: bool) -> list[Way]:
    """Peers for prefill without context. FlexAttention only if `compiled`: that takes a while."""
    peers: list[Way] = [Sdpa("cuDNN", SDPBackend.CUDNN_ATTENTION), Sdpa("flash", SDPBackend.FLASH_ATTENTION)]
    return [*peers, Flex()] if compiled else peers
