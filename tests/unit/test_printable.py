"""Text of others on a terminal: one line, in which every character is one."""

import sys
import unicodedata

import pytest

from attnd.protocol.printable import printable


@pytest.mark.parametrize("text", ["", "plain", "naïve キャッシュ 🙂", r"C:\temp", "[bold]"])
def test_what_is_shown_stays(text):
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a\nb\r\t", r"a\nb\r\t"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x9b31m", r"\x9b31m"),
        ("user\u202etxt.exe", r"user\u202etxt.exe"),
        ("\u2066a\u2069", r"\u2066a\u2069"),
        ("a\u200bb\ufeff", r"a\u200bb\ufeff"),
        ("a\u2028b\u2029", r"a\u2028b\u2029"),
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_what_is_not_shown_is_escaped(text, escaped):
    assert printable(text) == escaped


def test_no_character_of_unicode_ends_a_line_or_hides():
    for code in range(sys.maxunicode + 1):
        text = printable(chr(code))
        assert text.isprintable(), hex(code)
        assert not any(unicodedata.category(each) in {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"} for each in text), hex(code)
