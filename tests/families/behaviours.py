"""What a user does with a model. Each behaviour is run locally and on the server, and must give the same.

A behaviour returns tensors: whole numbers must be equal, others close.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.families.families import ENCODERS_DECODERS, Family
from tests.families.tiny import PAD
from tests.families.ways import Way

Result = dict[str, torch.Tensor]


class Absent(Exception):
    """The model or transformers does not do this, whatever attends."""


@dataclass
class Run:
    """A model that attends in some way."""

    family: Family
    model: Any
    way: Way

    def generate(self, inputs: dict[str, Any], **options: Any) -> Any:
        """Greedy and of ten tokens, if nothing else is said."""
        torch.manual_seed(2)
        defaults = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        defaults["suppress_tokens"] = [PAD]  # in an answer it would be padding for the next turn
        return self.way.generate(self.model, inputs, **{**defaults, **options})

    def generated(self, inputs: dict[str, Any], **options: Any) -> Result:
        """Tokens and logits."""
        if self.family.name == "whisper":  # whose results take caches apart, key by key
            return self.chosen(inputs, **options)
        output = self.generate(inputs, **options)
        return {"tokens": output.sequences, "logits": torch.stack(output.logits)}

    def chosen(self, inputs: dict[str, Any], **options: Any) -> Result:
        """Tokens only: where the logits are those of something else, or not of every token."""
        return {"tokens": self.generate(inputs, return_dict_in_generate=False, output_logits=False, **options)}

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor | None, **options: Any) -> Any:
        """One pass, without what the model does not know."""
        known = {*inspect.signature(self.model.forward).parameters, "output_attentions", "output_hidden_states"}
        wanted = {name: value for name, value in options.items() if name in known}
        return self.model(input_ids=tokens, **wanted) if tokens is not None else self.model(**wanted)

    def passes(self, tokens: torch.Tensor, mask: torch.Tensor, ends: list[int], cache: Any, first: int = 0) -> Any:
        """Logits of passes that end at these columns, and the cache."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = []
        for end in ends:
            options = {"attention_mask": mask[:, :end], "position_ids": positions[:, first:end]}
            output = self.forward(tokens[:, first:end], past_key_values=cache, use_cache=True, **options)
            logits.append(output.logits)
            cache = cache if cache is not None else output.past_key_values
            first = end
        return torch.cat(logits, 1), cache


BEHAVIOURS: dict[str, Callable[[Run], Result]] = {}
# Behaviours of `model(...)` with a cache, for models that have no encoder.
PASSES: set[str] = set()


def behaviour(name: str, passes: bool = False) -> Callable[[Any], Any]:
    """Puts a function into the table."""

    def enter(function: Callable[[Run], Result]) -> Callable[[Run], Result]:
        BEHAVIOURS[name] = function
        if passes:
            PASSES.add(name)
        return function

    return enter


def behaviours_of(family: Family) -> list[str]:
    """What is run on a family."""
    return [name for name in BEHAVIOURS if family.kind != ENCODERS_DECODERS or name not in PASSES]
