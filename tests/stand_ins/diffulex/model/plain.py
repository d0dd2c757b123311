"""A model that is nearly all attention."""

from torch import nn

from diffulex.attention import Attention

HEADS, KV_HEADS, DIM, LAYERS = 4, 2, 8, 2


class Block(nn.Module):
    def __init__(self, attn_impl):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(HEADS * DIM, heads * DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
        self.attn = Attention(HEADS, DIM, DIM**-0.5, KV_HEADS, attn_impl=attn_impl)

    def forward(self, hidden, mask=None):
        return hidden + self.attn(self.q(hidden), self.k(hidden), self.v(hidden), mask)


class Plain(nn.Module):
    def __init__(self, attn_impl):
        super().__init__()
        self.blocks = nn.ModuleList(Block(attn_impl) for _ in range(LAYERS))

    def forward(self, hidden):
        for block in self.blocks:
            hidden = block(hidden)
        return hidden
