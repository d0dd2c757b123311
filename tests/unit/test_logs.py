"""One event a line, whichever the format."""

import io
import json
import logging
import re
import sys
import unicodedata

import pytest

from attnd_server.observe import logs

log = logging.getLogger("attnd_server.test")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def _root_logger_as_it_was():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def written(log_format, stream=None, level="info"):
    stream = stream or io.StringIO()
    logs.setup(level, log_format, stream)
    return lambda: stream.getvalue().splitlines()


def test_json_has_time_level_event_and_fields():
    lines = written("json")
    log.info("lease ended", extra={"cache": "demo", "num_bytes": 4096})
    (line,) = lines()
    event = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event.pop("ts"))
    assert event == {
        "level": "info",
        "event": "lease ended",
        "logger": "attnd_server.test",
        "cache": "demo",
        "num_bytes": 4096,
    }


def test_json_is_one_line_whatever_is_in_it():
    lines = written("json")
    log.warning("two\nlines", extra={"value": object(), "level": "mine", "text": "a\nb"})
    event = json.loads("\n".join(lines()))
    assert len(lines()) == 1
    assert event["event"] == "two\nlines"
    assert event["text"] == "a\nb"
    assert event["level"] == "warning"


def test_json_carries_a_traceback_as_a_field():
    lines = written("json")
    try:
        raise ValueError("no")
    except ValueError:
        log.exception("failed", extra={"id": "7f"})
    (line,) = lines()
    event = json.loads(line)
    assert event["exception"].endswith("ValueError: no")
    assert event["id"] == "7f"


def test_text_has_time_level_event_and_fields():
    lines = written("text")
    log.error("call %s", "failed", extra={"cache": "my demo", "layer": 3, "empty": ""})
    (line,) = lines()
    assert re.fullmatch(r'\d\d:\d\d:\d\d\.\d{3} error call failed  cache="my demo" layer=3 empty=""', line)


def test_text_puts_a_traceback_below():
    lines = written("text")
    try:
        raise ValueError("no")
    except ValueError:
        log.exception("failed")
    assert lines()[0].endswith("error failed")
    assert lines()[-1] == "ValueError: no"


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("category", ["Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"])
def test_what_somebody_chose_shows_no_character_that_is_none(category, log_format):
    every = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) == category]
    chosen = f"a{''.join(every[:300])}b"
    stream = io.StringIO()
    lines = written(log_format, stream)
    # To our handler alone: pytest's would put half a surrogate pair into its report, which no worker can send.
    alone = logging.Logger("attnd_server.test")
    alone.handlers = [each for each in logging.getLogger().handlers if getattr(each, "stream", None) is stream]
    try:
        raise ValueError(chosen)
    except ValueError:
        alone.exception("refused %s", chosen, extra={"label": chosen, "plain": f"a{every[0]}"})
    text = "".join(lines())  # splitlines splits at all that any program takes for the end of a line
    assert text.isprintable()
    if log_format == "json":
        assert json.loads(text)["label"] == chosen
    else:
        assert "plain=" in lines()[0]
        assert lines()[1].startswith("Traceback")


def test_a_message_of_several_lines_looks_like_no_line_of_the_log():
    lines = written("text")
    forged = "no\n14:03:07.512 info  lease ended  cache=theirs"
    try:
        raise ValueError(forged)
    except ValueError:
        log.exception("failed: %s", forged, extra={"label": forged})
    assert [line for line in lines() if re.match(r"\d\d:\d\d:", line)] == lines()[:1]


def test_an_escape_is_not_taken_for_what_stands_there():
    lines = written("text")
    log.info("event", extra={"label": "a\u202eb", "other": r"a\u202eb", "both": "a\u202e\\b"})
    assert lines()[0].endswith(r'label="a\u202eb" other=a\u202eb both="a\u202e\\b"')


def test_other_languages_are_shown():
    lines = written("text")
    log.info("caché écrit", extra={"label": "キャッシュ", "error": "nicht möglich"})
    assert lines()[0].endswith('caché écrit  label=キャッシュ error="nicht möglich"')


@pytest.mark.parametrize(("stream", "is_json"), [(Terminal(), False), (io.StringIO(), True)])
def test_auto_is_text_on_a_terminal_only(stream, is_json):
    lines = written("auto", stream)
    log.info("event")
    assert lines()[0].startswith("{") == is_json


def test_level():
    lines = written("text", level="warning")
    log.info("unseen")
    log.warning("seen")
    assert len(lines()) == 1


def test_other_libraries_are_written_too():
    lines = written("json")
    logging.getLogger("grpc").warning("from gRPC")
    assert json.loads(lines()[0])["logger"] == "grpc"


def test_a_second_setup_replaces_the_first():
    first, second = written("json"), written("text")
    log.info("once")
    assert (len(first()), len(second())) == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("loud",), "level is 'loud', but must be one of debug, info, warning, error"),
        (("info", "xml"), "log_format is 'xml', but must be one of auto, text, json"),
    ],
)
def test_setup_refuses(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        logs.setup(*arguments)
