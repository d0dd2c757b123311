"""What is kept of each release, and that the last one's contract is what `make lint` holds the protos against."""

from __future__ import annotations

import re
import zipfile

import pytest

from tests.released.versions import WHEELS
from tests.servers import ROOT

DATA = ROOT / "tests" / "data"
RELEASES = sorted((path.name for path in DATA.iterdir()), key=lambda version: [*map(int, version.split("."))])


def test_lint_holds_the_protos_against_the_last_release() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.findall(r"^RELEASED_PROTOS := (.*)$", makefile, re.M) == [f"tests/data/{RELEASES[-1]}/protos"]
    assert "$(BIN)buf breaking --against $(RELEASED_PROTOS)\n" in makefile


@pytest.mark.parametrize("version", RELEASES)
def test_each_release_has_its_contract_its_wire_and_its_wheel(version: str) -> None:
    wheel = f"attnd-{version}-py3-none-any.whl"
    assert {path.name for path in (DATA / version).iterdir()} == {"protos", "wire", wheel}
    assert WHEELS[version].name == wheel
    with zipfile.ZipFile(WHEELS[version]) as packages:
        assert f'__version__ = "{version}"' in packages.read("attnd/_version.py").decode()
        protos = {name for name in packages.namelist() if re.fullmatch(r"attnd/v1/\w+_pb2\.py", name)}
    kept = {path.stem for path in (DATA / version / "protos" / "attnd" / "v1").iterdir()}
    assert protos == {f"attnd/v1/{name}_pb2.py" for name in kept}


def test_every_release_is_told_of() -> None:
    told = re.findall(r"^## \[(\d.*?)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert sorted(told) == sorted(RELEASES)
