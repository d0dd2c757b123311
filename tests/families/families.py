"""The families: every class of transformers that generates text, tiny, with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import transformers
from transformers.models.auto import modeling_auto

from tests.families.images import IMAGES
from tests.families.overrides import LEFT_OUT, OVERRIDES, VARIANTS
from tests.families.tiny import PAD, VOCAB, tiny_config

DECODERS = "decoder"
ENCODERS_DECODERS = "encoder-decoder"
MULTIMODAL = "multimodal"

# Parts of the names of parameters that begin as zeros, and would hide what they multiply.
_ZEROS = ("sink", "mm_input_projection", "_gate")
# Families that hear: their classes, and the shapes of what they hear.
_SPEECH = {"speech_to_text": "Speech2TextForConditionalGeneration", "whisper": "WhisperForConditionalGeneration"}
_FEATURES = {"speech_to_text": (40, 16), "whisper": (16, 32)}


class Family(NamedTuple):
    """What `behaviours.py` runs on.

    Attributes:
        name: transformers' name of the model type.
        class_name: of the model.
        kind: one of the constants above.
        overrides: of the configuration.
    """

    name: str
    class_name: str
    kind: str
    overrides: dict[str, Any]

    def build(self, seed: int = 1) -> Any:
        """The model, in evaluation mode, with attention "eager"."""
        model_class = getattr(transformers, self.class_name)
        config = tiny_config(model_class.config_class, self.overrides)
        if self.kind == DECODERS and hasattr(config, "is_decoder"):
            config.is_decoder = True
        torch.manual_seed(seed)
        model = model_class._from_config(config, attn_implementation="eager").eval()
        for name, parameter in model.named_parameters():
            if any(part in name for part in _ZEROS):
                torch.nn.init.normal_(parameter, std=1.0)
        return model

    def prompts(self, lengths: list[int], padding_side: str = "left") -> dict[str, torch.Tensor]:
        """Random tokens of these lengths, padded."""
        generator = torch.Generator().manual_seed(sum(lengths))
        if self.name in _FEATURES:
            return {"input_features": torch.randn(len(lengths), *_FEATURES[self.name], generator=generator)}
        longest = max(lengths)
        rows = [[0] * (longest - length) + [1] * length for length in lengths]
        mask = torch.tensor(rows if padding_side == "left" else [row[::-1] for row in rows])
        tokens = torch.randint(5, VOCAB - 5, mask.shape, generator=generator)
        return {"input_ids": tokens.masked_fill(mask == 0, PAD), "attention_mask": mask}


@cache
def families() -> dict[str, Family]:
    """Every family by its name."""
    found = {family.name: family for family in _families()}
    for name, (base, overrides) in VARIANTS.items():
        family = found[base]
        found[name] = family._replace(name=name, overrides={**family.overrides, **overrides})
    return found


def _families() -> Iterator[Family]:
    seen: set[str] = set()
    others = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.keys()
    others |= modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() | _SPEECH.keys()
    kinds = (
        (DECODERS, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (ENCODERS_DECODERS, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        (ENCODERS_DECODERS, _SPEECH),
        (MULTIMODAL, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    )
    for kind, names in kinds:
        for name, class_name in sorted(names.items(), key=lambda item: (item[0].count("_"), len(item[0]))):
            if kind == DECODERS and class_name.endswith("ForConditionalGeneration"):
                continue  # comes with the other multimodal ones
            if class_name in seen or class_name in LEFT_OUT:
                continue
            seen.add(class_name)
            label = f"{name} (decoder)" if kind == DECODERS and name in others else name
            overrides = IMAGES[label].overrides if label in IMAGES else OVERRIDES.get(label, {})
            yield Family(label, class_name, kind, overrides)
