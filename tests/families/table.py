"""The table of docs/integrations.md, from outcomes."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.families.behaviours import BEHAVIOURS
from tests.families.outcomes import ABSENT, EQUAL, REFUSED, Outcome

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
BEGIN, END = "<!-- made by make families -->", "<!-- end of what make families made -->"
# A refusal in so large a part of the families is the behaviour's, not a family's.
_COMMON = 0.8

# Behaviours with their ways, and why not.
Refusals = frozenset[tuple[str, str]]


def markdown(outcomes: Iterable[Outcome], made_with: str) -> str:
    """What stands between BEGIN and END.

    Args:
        outcomes: of all families.
        made_with: versions and commit.
    """
    outcomes = [outcome for outcome in outcomes if outcome.verdict != ABSENT]
    by_family: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_family[outcome.family].append(outcome)
    counts = Counter(outcome.verdict for outcome in outcomes)
    failed = counts.total() - counts[EQUAL] - counts[REFUSED]
    common = _common(by_family)
    lines = [
        f"{len(by_family)} families, {counts.total()} comparisons: {counts[EQUAL]} equal, "
        f"{counts[REFUSED]} refused with an `AttndError`, {failed} failed.",
        f"Made with {made_with}.",
        "",
        *(["Refused for every family, or nearly:", ""] if common else []),
        *[f"- {line}" for line in _told(frozenset(common.items()))],
        *([""] if common else []),
        "| Families | Equal | Refused beside that, and why |",
        "|---|---|---|",
    ]
    groups: dict[Refusals, list[str]] = defaultdict(list)
    for family, of_family in by_family.items():
        groups[_refusals(of_family, common)].append(family)
    for refusals, families in sorted(groups.items(), key=lambda group: (len(group[0]), -len(group[1]))):
        equal = [sum(outcome.verdict == EQUAL for outcome in by_family[family]) for family in families]
        number = f"{min(equal)}" if min(equal) == max(equal) else f"{min(equal)} to {max(equal)}"
        lines.append(
            f"| {', '.join(sorted(families))} | {number} | {'; '.join(_told(refusals))} |".replace("|  |", "| |")
        )
    names = sorted({outcome.behaviour for outcome in outcomes if BEHAVIOURS[outcome.behaviour].__doc__})
    lines += ["", "What the names mean:", "", *[f"- {_meaning(name)}" for name in names]]
    return "\n".join(lines) + "\n"


def write(text: str, page: Path = PAGE) -> None:
    """Puts it into the page."""
    before, found, rest = page.read_text().partition(BEGIN)
    if not found:
        raise ValueError(f"{page} has no line {BEGIN}")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}")


def _common(by_family: Mapping[str, list[Outcome]]) -> dict[str, str]:
    """Behaviours that are refused wherever anything works, with the reason that most get."""
    asked: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for of_family in by_family.values():
        if any(outcome.verdict == EQUAL and outcome.behaviour == "greedy" for outcome in of_family):
            asked.update({outcome.behaviour for outcome in of_family})
            for name, reason in _by_name(outcome for outcome in of_family if outcome.verdict in (EQUAL, REFUSED)):
                reasons[name][reason] += 1
    return {
        name: counter.most_common(1)[0][0]
        for name, counter in reasons.items()
        if counter.total() >= _COMMON * asked[_behaviour(name)]
    }


def _by_name(of_family: Iterable[Outcome]) -> Refusals:
    """What was not equal; with the way in the name, where the other way is another matter."""
    of_family = list(of_family)
    ways = {outcome.way for outcome in of_family}
    reasons: dict[tuple[str, str], set[str]] = defaultdict(set)
    for outcome in of_family:
        if outcome.verdict != EQUAL:
            verdict = "" if outcome.verdict == REFUSED else f"{outcome.verdict}: "
            reasons[outcome.behaviour, verdict + _reason(outcome.detail)].add(outcome.way)
    return frozenset(
        (behaviour if given == ways else f"{behaviour} ({', '.join(sorted(given))})", reason)
        for (behaviour, reason), given in reasons.items()
    )


def _refusals(of_family: list[Outcome], common: Mapping[str, str]) -> Refusals:
    """What is not said of every family; a failure always is."""
    refused = _by_name(outcome for outcome in of_family if outcome.verdict in (EQUAL, REFUSED))
    others = frozenset((name, reason) for name, reason in refused if name not in common)
    return others | (_by_name(of_family) - refused if _failed(of_family) else frozenset())


def _failed(of_family: Iterable[Outcome]) -> bool:
    return any(outcome.verdict not in (EQUAL, REFUSED) for outcome in of_family)


def _told(refusals: Refusals) -> list[str]:
    """A phrase for each reason."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, reason in sorted(refusals):
        by_reason[reason].append(name)
    return [f"{', '.join(_shortened(names))}: {reason}" for reason, names in by_reason.items()]


def _shortened(names: list[str]) -> list[str]:
    """Where answers are refused as such, the kinds of answers do not matter."""
    suffixes = [name.removeprefix("greedy") for name in names if _behaviour(name) == "greedy"]
    others = [name for name in names if not suffixes or not name.endswith(tuple(suffixes))]
    return [*(f"every answer{suffix}" for suffix in suffixes), *others]


def _behaviour(name: str) -> str:
    return name.partition(" (")[0]


def _meaning(name: str) -> str:
    text = (BEHAVIOURS[_behaviour(name)].__doc__ or "").strip().partition("\n")[0].rstrip(".")
    return f"**{name}**, {text[0].lower()}{text[1:]}" if text else f"**{name}**"


def _reason(detail: str) -> str:
    """An error's message, without what is another in each family."""
    text = detail.partition(": ")[2] if re.match(r"\w+: ", detail) else detail
    text = re.sub(r"\[[\d, ]+\]", "[...]", text)
    text = re.sub(r"(layer|layer_types) ?\[?\d+\]?", r"\1 ...", text)
    text = re.sub(r"\b\d+ new tokens behind \d+", "new tokens behind others", text)
    text = re.sub(r"the last \d+ tokens", "the last tokens", text)
    text = text if len(text) < 170 else f"{text[:160].rpartition(' ')[0]} ..."
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
