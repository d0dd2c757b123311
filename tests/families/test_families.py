"""A few families, every behaviour; `make families` runs them all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import attnd

pytest.importorskip("transformers", reason="needs transformers")

from tests.families import outcomes  # needs transformers
from tests.families.behaviours import BEHAVIOURS, behaviours_of
from tests.families.families import ENCODERS_DECODERS, families
from tests.families.table import markdown
from tests.families.ways import Attached, ByHand, Local

CHOSEN = ("llama", "gemma3", "jamba", "marian")
# What no server does, whatever the family.
NEVER = {"static cache", "own mask", "gradients", "attentions", "packed"}
# A cache by hand serves the calls that it is passed to.
NEEDS_ATTACH = {"CFG", "draft served", "early exit", "another cache", "use_cache=False", "one pass"}
# Windows count columns, with the padding between tokens.
NEEDS_NO_WINDOW = {"right padding", "hole", "early end"}
MAY_BE_REFUSED = {
    "llama": NEVER | {"model copied"},
    "gemma3": NEVER | NEEDS_NO_WINDOW | {"model copied"},
    "jamba": NEVER | {"model copied", "crop"},  # of a recurrence nothing can be taken out again
    "marian": NEVER | {"model copied"},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


CASES = [(name, behaviour) for name in CHOSEN for behaviour in behaviours_of(families()[name])]


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize(("name", "behaviour"), CASES)
def test_a_behaviour_is_as_with_eager_attention_or_refused(name: str, behaviour: str, client: attnd.Client) -> None:
    ways = {"by hand": lambda: ByHand(client), "attached": lambda: Attached(client)}
    has_encoder = families()[name].kind == ENCODERS_DECODERS  # only attached ones are served
    needs_attach = BEHAVIOURS.keys() if has_encoder else NEEDS_ATTACH
    for outcome in outcomes.compare(families()[name], ways, [behaviour]):
        allowed = {outcomes.EQUAL, outcomes.ABSENT}
        if behaviour in MAY_BE_REFUSED[name] or (outcome.way == "by hand" and behaviour in needs_attach):
            allowed.add(outcomes.REFUSED)
        assert outcome.verdict in allowed, outcome


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("behaviour", ["greedy", "beams", "assisted", "turns", "pieces", "crop", "reorder", "float16"])
def test_a_comparison_sees_attention_that_sees_the_last_token_only(behaviour: str) -> None:
    outcomes.register_blind()
    [outcome] = outcomes.compare(families()["llama"], {"blind": lambda: Local("blind")}, [behaviour])
    assert outcome.verdict in (outcomes.WRONG, outcomes.ABSENT), outcome


@pytest.mark.parametrize("name", CHOSEN)
def test_logits_of_a_family_depend_on_attention(name: str) -> None:
    assert outcomes.sees_attention(families()[name])


def test_the_table_groups_families_and_tells_why() -> None:
    made = [
        outcomes.Outcome("a", "attached", "greedy", outcomes.EQUAL, "", 0.1),
        outcomes.Outcome("b", "attached", "greedy", outcomes.EQUAL, "", 0.1),
        outcomes.Outcome("c", "attached", "greedy", outcomes.REFUSED, "Unsupported: q | has shape [1, 2]", 0.1),
        outcomes.Outcome("d", "attached", "greedy", outcomes.WRONG, "logits differ", 0.1),
        outcomes.Outcome("d", "attached", "beams", outcomes.ABSENT, "not for this family", 0.0),
        *[outcomes.Outcome(name, "attached", "crop", outcomes.REFUSED, "Unsupported: never", 0.1) for name in "abfg"],
        *[outcomes.Outcome(name, "attached", "greedy", outcomes.EQUAL, "", 0.1) for name in "efg"],
        outcomes.Outcome("e", "attached", "crop", outcomes.WRONG, "logits differ", 0.1),
    ]
    text = markdown(made, "a version")
    assert "7 families, 12 comparisons: 5 equal, 5 refused with an `AttndError`, 2 failed." in text
    assert "- crop: never\n" in text
    assert "| a, b, f, g | 1 | |" in text
    assert "| e | 1 | crop: WRONG: logits differ |" in text  # which crop is not for the others
    assert r"| c | 0 | every answer: q \| has shape [...] |" in text
    assert "| d | 0 | every answer: WRONG: logits differ |" in text
