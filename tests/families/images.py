"""Prompts with images, for the multimodal families whose tokens for an image are easily counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

IMAGE, VIDEO, START, END = 95, 94, 93, 92
_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_VISION = {"num_hidden_layers": 2}
_QWEN_VISION = {"depth": 2, "embed_dim": 64, "out_hidden_size": 64, "num_position_embeddings": 64}


class Images(NamedTuple):
    """How a family takes an image.

    Attributes:
        overrides: of its configuration.
        num_tokens: of one image.
        given: from the model and the number of images, what the model gets beside tokens.
        start: the token before an image, if there must be one.
        types: the name of what marks image tokens, if there must be such a thing.
    """

    overrides: dict[str, Any]
    num_tokens: int
    given: Callable[[Any, int], dict[str, torch.Tensor]]
    start: int | None = None
    types: str | None = None


def add_images(images: Images, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The prompts with an image behind the first real token of each."""
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    piece = [*([] if images.start is None else [images.start]), *[IMAGE] * images.num_tokens]
    rows = []
    for row, real in zip(tokens, mask, strict=True):
        first = int(real.argmax()) + 1
        rows.append(torch.cat([row[:first], torch.tensor(piece), row[first:]]))
    grown = torch.cat([mask, mask.new_ones(len(mask), len(piece))], 1)
    result = {"input_ids": torch.stack(rows), "attention_mask": grown}
    if images.types is not None:
        result[images.types] = (result["input_ids"] == IMAGE).long()
    return result | images.given(model, len(tokens))


def _pixels(*shape: int) -> Callable[[Any, int], dict[str, torch.Tensor]]:
    return lambda model, number: {"pixel_values": _random(number, *shape)}


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def _with_sizes(model: Any, number: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": _random(number, 3, 32, 32), "image_sizes": torch.tensor([[32, 32]] * number)}


def _patches(model: Any, number: int) -> dict[str, torch.Tensor]:
    """Of images of 32 x 32, as Qwen takes them."""
    vision = model.config.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    grid = torch.tensor([[1, 4, 4]] * number)
    return {"pixel_values": _random(16 * number, width), "image_grid_thw": grid}


def _tiles(model: Any, number: int) -> dict[str, torch.Tensor]:
    """As Mllama takes them: one image of one tile, seen from every token."""
    num_tiles = model.config.vision_config.max_num_tiles
    tiles = torch.zeros(number, 1, num_tiles, dtype=torch.int64)
    tiles[..., 0] = 1
    return {
        "pixel_values": _random(number, 1, num_tiles, 3, 32, 32),
        "aspect_ratio_ids": torch.ones(number, 1, dtype=torch.int64),
        "aspect_ratio_mask": tiles,
    }


_SQUARE = _pixels(3, 32, 32)
_SEVERAL = _pixels(1, 3, 32, 32)
_CLIP = {"image_token_index": IMAGE, "vision_config": _VISION}
_SIGLIP = {"image_token_id": IMAGE, "vision_config": _VISION}
_QWEN2 = {"text_config": _MROPE, "vision_config": {**_QWEN_VISION, "hidden_size": 64}, **_IDS}
_QWEN2_5 = {
    **_QWEN2,
    "vision_config": {**_QWEN_VISION, "hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 32},
}
_QWEN3 = {"text_config": _MROPE, "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [0]}, **_IDS}
_MLLAMA = {
    "image_token_index": IMAGE,
    "text_config": {"cross_attention_layers": [1, 3]},
    "vision_config": {
        **_VISION,
        "attention_heads": 4,
        "num_global_layers": 1,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 128,
    },
}
_INTERNVL = {"image_token_id": IMAGE, "vision_config": {**_VISION, "image_size": [32, 32], "patch_size": [8, 8]}}

IMAGES: dict[str, Images] = {
    "aya_vision": Images(_CLIP, 4, _SQUARE),
    "gemma3": Images({**_CLIP, "mm_tokens_per_image": 4}, 4, _SQUARE, types="token_type_ids"),
    "idefics3": Images(_SIGLIP, 4, _SEVERAL),
    "internvl": Images(_INTERNVL, 4, _SQUARE),
    "llava": Images(_CLIP, 16, _SQUARE),
    "mistral3": Images(_CLIP, 4, _with_sizes),
    "mllama": Images(_MLLAMA, 1, _tiles),
    "paligemma": Images(_CLIP, 16, _SQUARE, types="token_type_ids"),
    "qwen2_5_vl": Images(_QWEN2_5, 4, _patches, START, "mm_token_type_ids"),
    "qwen2_vl": Images(_QWEN2, 4, _patches, START, "mm_token_type_ids"),
    "qwen3_5": Images(_QWEN3, 4, _patches, START, "mm_token_type_ids"),
    "qwen3_vl": Images(_QWEN3, 4, _patches, START, "mm_token_type_ids"),
    "smolvlm": Images(_SIGLIP, 4, _SEVERAL),
    "vipllava": Images({**_CLIP, "vision_feature_layers": [1, 2]}, 16, _SQUARE),
}
