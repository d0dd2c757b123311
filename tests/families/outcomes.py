"""Runs a behaviour locally and on a server, and says how the two compare."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import attnd
import tests.families.generation
import tests.families.passes  # noqa: F401  # both fill BEHAVIOURS
from tests.families.behaviours import BEHAVIOURS, Absent, Result, Run
from tests.families.families import Family
from tests.families.ways import Local, blind_attention

EQUAL = "equal"
REFUSED = "refused"
WRONG = "WRONG"
RAW = "raw error"
ABSENT = "absent"

# Of the largest logit. Float32, four layers.
TOLERANCE = 1e-3
# Stopped in the middle, it leaves the model with fewer layers.
_LEAVES_TRACES = {"early exit"}
_ASKED_ANYWAY = {"one token", "beams", "use_cache=False", "image", "pieces", "one pass", "attentions"}


class Outcome(NamedTuple):
    """Of one behaviour of one family.

    Attributes:
        verdict: one of the constants above.
        detail: the error's first line, or what differs.
        seconds: that the served run took.
    """

    family: str
    way: str
    behaviour: str
    verdict: str
    detail: str
    seconds: float


def compare(family: Family, ways: dict[str, Callable[[], Any]], names: Iterable[str]) -> Iterator[Outcome]:
    """Every behaviour in every way; of a family whose answers are refused altogether, few."""
    model = family.build()
    refused: set[str] = set()
    for name in names:
        if len(refused) == len(ways) and name not in _ASKED_ANYWAY:
            continue
        expected = _local(family, model, name)
        if name in _LEAVES_TRACES:
            model = family.build()
        for label, make_way in ways.items():
            started = time.perf_counter()
            if isinstance(expected, str):
                verdict, detail = ABSENT, expected
            else:
                verdict, detail = _served(family, model, name, make_way(), expected)
            if verdict == REFUSED and name == "greedy":
                refused.add(label)
            if name in _LEAVES_TRACES:
                model = family.build()
            yield Outcome(family.name, label, name, verdict, detail, round(time.perf_counter() - started, 2))


def register_blind() -> None:
    """Makes "blind" known, an attention that sees the last token only."""
    AttentionInterface.register("blind", blind_attention)
    AttentionMaskInterface.register("blind", eager_mask)


def sees_attention(family: Family) -> bool:
    """Whether logits of the family depend on what attention gives: one for which they do not tests nothing."""
    register_blind()
    model = family.build()
    logits = []
    for attention in ("eager", "blind"):
        way = Local(attention)
        with way.serving(model):
            logits.append(BEHAVIOURS["greedy"](Run(family, model, way))["logits"][0])
    return bool((logits[0] - logits[1]).abs().max() > 20 * TOLERANCE * logits[0].abs().max())


def _local(family: Family, model: Any, name: str) -> Result | str:
    way = Local()
    with way.serving(model):
        try:
            return BEHAVIOURS[name](Run(family, model, way))
        except Absent:
            return "not for this family"
        except Exception as error:
            return _line(error)


def _served(family: Family, model: Any, name: str, way: Any, expected: Result) -> tuple[str, str]:
    try:
        with way.serving(model):
            actual = BEHAVIOURS[name](Run(family, model, way))
    except Absent:
        return ABSENT, "not in this way"
    except attnd.AttndError as error:
        return REFUSED, _line(error)
    except Exception as error:
        return RAW, _line(error) + _place(error)
    finally:
        model.set_attn_implementation("eager")
    for key, tensor in expected.items():
        if difference := _difference(key, actual[key], tensor):
            return WRONG, difference
    return EQUAL, ""


def _difference(key: str, actual: torch.Tensor, expected: torch.Tensor) -> str:
    if actual.shape != expected.shape:
        return f"{key} have shape {list(actual.shape)}, not {list(expected.shape)}"
    if key == "error":  # of half precision
        return f"error is {actual:.2g}, not {expected:.2g}" if actual > 2 * expected + 1e-3 else ""
    if not expected.is_floating_point():
        wrong = (actual != expected).nonzero()
        return f"{key} differ, first at {wrong[0].tolist()}" if len(wrong) else ""
    finite = expected.isfinite()
    if not torch.equal(finite, actual.isfinite()):
        return f"{key} are not finite in other places"
    scale = expected[finite].abs().max()
    error = ((actual - expected)[finite].abs().max() / scale).item()
    return f"{key} differ by {error:.2g} of the largest" if error > TOLERANCE else ""


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "attnd" in frame.filename] or frames
    return f" ({own[-1].filename.rsplit('/', 1)[-1]}:{own[-1].lineno})"
