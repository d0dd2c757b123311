"""A few hostile blocks of metadata, GPU beside host, and that the soak of millions of them sees what is wrong."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

pytest.importorskip("triton", reason="triton is not installed")

from attnd.errors import InvalidRequest
from attnd.protocol.cuda.resident import STORED_LENS
from attnd_server.attention.kernels.resident import state as words
from attnd_server.attention.metadata import AttentionMetadata
from attnd_server.service.validation import resident_step
from tests import interpreter
from tests.hostile_metadata import CLASSES, NAMES, RIGHT, config_of, hostile_blocks, limits_of
from tests.soak.resident_metadata.__main__ import main
from tests.soak.resident_metadata.soak import Here, soak
from tests.soak.resident_metadata.verdicts import STEP_HEADER, Outcome, Plan, Rule

pytestmark = pytest.mark.skipif(interpreter.reason_against() is not None, reason=str(interpreter.reason_against()))

KERNELS = "attnd_server.attention.kernels.resident.metadata"
# Of these blocks some are right and some are wrong, or not all of the faults below would be seen.
PLAN = Plan(seed=1, num_blocks=6)


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[str]:
    with interpreter.interpreter() as device:
        yield device


def outcome_of(device: str, plan: Plan, num_batches: int = 1, **options: Any) -> Outcome:
    outcome = Outcome()
    soak(plan, num_batches, device, Here(), outcome, **options)
    return outcome


def test_the_gpu_does_as_the_host_with_blocks_of_all_classes(device: str) -> None:
    num_rounds, count = 2, 1 if device == "cpu" else 64
    outcome = outcome_of(device, Plan(seed=3, num_blocks=count), num_rounds * len(CLASSES))
    assert outcome.disagreement is None
    assert outcome.verdicts.total() == num_rounds * len(CLASSES) * count
    assert outcome.num_rewritten == len(CLASSES) * count
    assert outcome.num_mixed > 0
    assert {verdict for _, verdict in outcome.verdicts} == {"accepted", "refused"}


def test_the_command_tells_what_it_counted(tmp_path: Path) -> None:
    with pytest.raises(typer.Exit) as ended:
        main(blocks=2, seed=5, processes=1, launches_per_read=0, device="cuda:0", out=tmp_path / "result")
    assert ended.value.exit_code == 0
    result = json.loads((tmp_path / "result").read_text())
    assert (result["blocks"], result["accepted"] + result["refused"]) == (2, 2)
    assert (result["ended"], result["disagreement"]) == ("well", None)


def stores_nothing(lens: Any, *others: Any) -> AttentionMetadata:
    lens = lens.copy()
    lens[STORED_LENS] = 0
    return resident_step(lens, *others)


def refuses_all(*_: Any) -> AttentionMetadata:
    raise InvalidRequest("no", field="")


@pytest.mark.parametrize("rule", [stores_nothing, refuses_all])
def test_a_host_of_another_opinion_is_seen(device: str, rule: Rule) -> None:
    disagreement = outcome_of(device, PLAN, rule=rule).disagreement
    assert disagreement is not None
    assert disagreement["wrong"]
    assert len(disagreement["worker page_tables"]) == CLASSES[0].max_reqs
    assert disagreement["host"].startswith("refused: no" if rule is refuses_all else "accepted")


def write_past(name: str) -> Callable[[Any], None]:
    def write(buffers: Any) -> None:
        flat = getattr(buffers, name).view(-1)
        flat.as_strided((len(flat) + 1,), (1,))[len(flat)] = 0

    return write


def store_though_refused(buffers: Any) -> None:
    if buffers.state[words.REFUSED]:
        buffers.slots[-1] = 3


def accept_all(buffers: Any) -> None:
    buffers.state[words.REFUSED] = 0


def lose_a_page(buffers: Any) -> None:
    buffers.written.zero_()


def store_elsewhere(buffers: Any) -> None:
    buffers.slots[buffers.slots >= 0] ^= 1


def plan_longer(buffers: Any) -> None:
    buffers.step[STEP_HEADER] += 1


def tag_another(buffers: Any) -> None:
    buffers.tags[5] -= 1


def mark_another(buffers: Any) -> None:
    buffers.marks[-1] -= 1


def copy_wrongly(buffers: Any) -> None:
    buffers.lens[-1, -1] += 1


FAULTS = [
    *((write_past(name), "canaries") for name in ("lens", "page_tables", "step", "slots", "tags", "marks", "written")),
    (store_though_refused, "a token is stored"),
    (accept_all, "REFUSED"),
    (lose_a_page, "written"),
    (store_elsewhere, "the slots differ"),
    (plan_longer, "lengths differ"),
    (copy_wrongly, "the private copy"),
    (tag_another, "tags or marks"),
    (mark_another, "tags or marks"),
]


@pytest.mark.parametrize(("fault", "told"), FAULTS)
def test_kernels_that_do_wrong_are_seen(device: str, fault: Callable[[Any], None], told: str) -> None:
    from attnd_server.attention.kernels.resident.metadata import take_step

    def take(sizes: Any, buffers: Any, *block: Any) -> None:
        take_step(sizes, buffers, *block)
        fault(buffers)

    disagreement = outcome_of(device, PLAN, take=take).disagreement
    assert disagreement is not None
    assert [text for text in disagreement["wrong"] if told in text]


def test_the_command_prints_what_differs_and_fails(
    device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(f"{KERNELS}.take_step", lambda *_: None)
    with pytest.raises(typer.Exit) as ended:
        main(blocks=1, seed=8, processes=0, launches_per_read=0, device="cuda:0", out=None)
    assert ended.value.exit_code == 1
    captured = capsys.readouterr()
    for told in ("seed: 8", "batch: 0", "host: ", "gpu: ", "worker lens: [[", "private page_tables: [["):
        assert told in captured.err
    assert json.loads(captured.out)["ended"] == "at a block that differs"


def test_ctrl_c_ends_it_with_what_was_counted(
    device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from attnd_server.attention.kernels.resident import metadata

    take_step, calls = metadata.take_step, []

    def take(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        take_step(*args)

    monkeypatch.setattr(metadata, "take_step", take)
    with pytest.raises(typer.Exit) as ended:
        main(blocks=4, seed=1, processes=0, launches_per_read=1, device="cuda:0", out=None)
    assert ended.value.exit_code == 130
    assert json.loads(capsys.readouterr().out)["blocks"] == 2


@pytest.mark.parametrize("sizes", CLASSES, ids=lambda sizes: "-".join(map(str, sizes)))
def test_the_blocks_are_what_they_say(sizes: Any) -> None:
    """No GPU: the host accepts all that are right, and of each way to spoil them refuses some."""
    config, limits, verdicts = config_of(sizes), limits_of(sizes), Counter[tuple[str, bool]]()
    right, spoilt, ways = hostile_blocks(sizes, np.random.default_rng(7), 400)
    _, again, _ = hostile_blocks(sizes, np.random.default_rng(7), 400)
    assert all(np.array_equal(a, b) for a, b in zip(spoilt, again, strict=True))
    assert {blocks.lens.dtype for blocks in (right, spoilt)} == {blocks.tables.dtype for blocks in (right, spoilt)}
    for index, way in enumerate(ways):
        resident_step(right.lens[index], right.tables[index], sizes, config, limits)
        try:
            resident_step(spoilt.lens[index], spoilt.tables[index], sizes, config, limits)
            verdicts[NAMES[way], True] += 1
        except InvalidRequest:
            verdicts[NAMES[way], False] += 1
    assert verdicts[NAMES[RIGHT], False] == 0
    assert [name for name in NAMES if name != NAMES[RIGHT] and not verdicts[name, False]] == []
    assert sum(count for (_, is_accepted), count in verdicts.items() if is_accepted) > 100
