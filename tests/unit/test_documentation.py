"""The pages' links lead somewhere, their commands exist, and the README's figures are those of the record."""

from __future__ import annotations

import importlib.util
import re
import shlex

import pytest
import typer

from attnd_server.cli import main as cli
from tests.documentation import PAGES, README, anchors, blocks, prose
from tests.servers import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()
SHELL = [line for block in blocks("sh") for line in block.text.splitlines() if line.strip()]
# `attnd ...` in a sentence, which may lack what an option or a command needs.
SPANS = sorted(
    {" ".join(span.split()) for page in PAGES for span in re.findall(r"`(attnd [a-z][^`]*)`", prose(page.read_text()))}
)
CHANGES = ROOT / "CHANGELOG.md"


def words_of(line):
    """A line of a shell, without its comment and where its output goes."""
    words = shlex.split(line, comments=True)
    return words[: words.index(">")] if ">" in words else words


def command_of(words):
    """What `attnd`'s arguments name, and the arguments that it gets."""
    command = typer.main.get_command(cli.app)
    while hasattr(command, "commands"):  # a group, of click or of the click that typer brings
        command, words = command.commands[words[0]], words[1:]
    return command, words


def parse(words):
    """Raises at unknown commands and options, bad values and too few arguments. Runs nothing."""
    command, rest = command_of(words)
    command.make_context(command.name, rest)


def links(page):
    """The links of a page that lead to files, and to its own headings."""
    return re.findall(r"\]\((?!\w+:)([^)\s]+)\)", prose(page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_the_readme_is_short_and_leads_to_the_pages():
    assert len(README.read_text().splitlines()) <= 160
    pages = {str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")}
    assert len(pages) >= 5
    assert {"docs/operating.md", "docs/planes.md", "docs/integrations.md", "docs/benchmarks.md"} <= pages & set(
        links(README)
    )


def test_twelve_lines_of_python_are_twelve():
    code = next(block for block in blocks("python") if block.page == "README.md")
    assert len([line for line in code.text.splitlines() if line.strip()]) == 12


@pytest.mark.parametrize("line", SHELL)
def test_shell_line_names_what_there_is(line):
    program, *words = words_of(line)
    if program == "make":
        assert f"\n{words[0]}:" in MAKEFILE
    elif program == "attnd":
        parse(words)
    elif program == "python":
        assert words[0] == "-m"
        assert importlib.util.find_spec(words[1]) is not None
    else:
        assert program == "pip", "a command that nothing here checks"


@pytest.mark.parametrize("line", ["serve --no-such-option", "serve --port many", "cache import", "no-such-command"])
def test_a_command_that_is_wrong_is_seen(line):
    with pytest.raises(Exception, match=r"(?i)no.such|many|missing"):
        parse(line.split())


@pytest.mark.parametrize("span", SPANS)
def test_command_in_a_sentence_has_its_options(span):
    command, rest = command_of(words_of(span)[1:])
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in rest if word.startswith("--")} <= known


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != CHANGES], ids=lambda page: str(page.relative_to(ROOT))
)
def test_extras_and_targets_in_a_sentence_exist(page):
    text = page.read_text()
    settings = (ROOT / "pyproject.toml").read_text()
    assert [name for name in re.findall(r"attnd\[([a-z]+)\]", text) if f"\n{name} = [" not in settings] == []
    assert [name for name in re.findall(r"`make ([a-z-]+)", text) if f"\n{name}:" not in MAKEFILE] == []


def numbers(text):
    return set(re.findall(r"(?<![\w.])\d+(?:[.,]\d+)*(?!\w)", text))


def test_figures_of_the_readme_stand_in_the_record():
    text = README.read_text().split("\n## Numbers\n", 1)[1].split("\n## ", 1)[0]
    assert len(numbers(text)) > 20
    assert numbers(text) - numbers((ROOT / "docs" / "benchmarks.md").read_text()) == set()


def test_the_readme_names_no_commits():
    assert re.findall(r"`[0-9a-f]{7,40}`", README.read_text()) == []
