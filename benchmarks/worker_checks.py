"""That workers compute the same: nobody's time counts whose attention is wrong."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.report import WrongResult, refuse_wrong
from benchmarks.worker_ways import Way

NUM_STEPS = 3
"""That are checked: the first, one that reads what it stored, and one whose shape the server has captured by then."""

HIDDEN_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Most ||hidden - local's|| / ||local's|| of a request after the last layer.

Attention itself is held to the rounding of one result, see `refuse_wrong_way`. Here 32 layers add up what two right
kernels round differently: each of some 300 results on the way is rounded to 8 bits, 0.1 % of it, in a direction of its
own once the inputs differ at all, which is 2 % together; softmax makes a little more of it. Simulated with two bfloat16
softmaxes it is 2.5 %; without any attention it is 90 %.
"""


def first_tokens(way: Way, seed: int = 0) -> torch.Tensor:
    """int64 `[NUM_STEPS, num_reqs]`: tokens to begin steps with, the same for all ways."""
    model = way.cell.model
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(model.shape.vocab, (NUM_STEPS, way.cell.batch.num_reqs), generator=generator)
    return drawn.to(model.device)


def refuse_wrong_way(way: Way, expected: Sequence[torch.Tensor] | None) -> list[torch.Tensor]:
    """Runs a few steps behind the contexts, with tokens that are given, and compares attention with float64.

    Every layer is looked at in three requests, and in the first step four layers are in all of them. What is compared
    are outputs given the way's own q, k and v: so no rounding of earlier layers counts, and a wrong page shows.

    Args:
        way: to run.
        expected: what a way with attention has returned, to which one with attention must come too.

    Returns:
        `[num_reqs, hidden]` after each step.

    Raises:
        WrongResult: an output is wrong.
    """
    tokens, state, num_layers = first_tokens(way), way.state, way.cell.contexts.shape.num_layers
    earlier: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(num_layers)]
    result = []
    way.restart(tokens[0])
    for index in range(NUM_STEPS):
        state.tokens.copy_(tokens[index])
        way.step(more=index + 1 < NUM_STEPS)
        if way.attends:
            _refuse_wrong_attention(way, index, earlier)
        result.append(state.hidden.clone())
        if way.attends and expected is not None:
            what = f"{way.name}, the hidden state after step {index}"
            refuse_wrong(what, result[-1], expected[index].double(), HIDDEN_LIMITS[state.hidden.dtype])
    return result


def refuse_wrong_in_place(way: Way, expected: Sequence[torch.Tensor]) -> None:
    """Has a way spare its copies, if it can. Raises WrongResult: its hidden states are not the same bits then."""
    if not way.go_in_place():
        return
    tokens = first_tokens(way)
    way.restart(tokens[0])
    for index in range(NUM_STEPS):
        way.state.tokens.copy_(tokens[index])
        way.step(more=index + 1 < NUM_STEPS)
        if not torch.equal(way.state.hidden, expected[index]):
            raise WrongResult(f"{way.name}: without copies the hidden state after step {index} has other bits")


def _refuse_wrong_attention(way: Way, index: int, earlier: list[list[tuple[torch.Tensor, torch.Tensor]]]) -> None:
    """Of a step, behind those whose k and v are in `earlier`, by layer; adds this one's."""
    contexts, num_reqs = way.cell.contexts, way.cell.batch.num_reqs
    last = contexts.shape.num_layers - 1
    some, whole = sorted({0, num_reqs // 2, num_reqs - 1}), {0, last // 3, 2 * last // 3, last}
    for layer, call in enumerate(way.state.calls):
        requests = range(num_reqs) if index == 0 and layer in whole else some
        contexts.refuse_wrong(f"{way.name}, step {index}", layer, call, earlier[layer], requests)
        earlier[layer].append((call.k.clone(), call.v.clone()))
