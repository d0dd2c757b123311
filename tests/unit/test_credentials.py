"""What a client shows a server, before there is one."""

from __future__ import annotations

import pytest

import attnd


def test_no_token_is_no_metadata_and_a_token_is_not_shown_to_people():
    assert attnd.Credentials().metadata() is None
    credentials = attnd.Credentials("a-token")
    assert credentials.metadata() == (("authorization", "Bearer a-token"),)
    assert "a-token" not in repr(credentials)


@pytest.mark.parametrize("token", ["two words", "line\n", "\u00e9", "\x7f"])
def test_a_token_that_no_header_can_carry_is_refused_and_not_repeated(token):
    for made in (lambda: attnd.Credentials(token), lambda: attnd.Credentials(lambda: token).metadata()):
        with pytest.raises(attnd.InvalidRequest, match="token must be characters of ASCII") as raised:
            made()
        assert token not in str(raised.value)
        assert raised.value.field == "token"


def test_what_gives_no_token_is_not_taken_for_nobody():
    with pytest.raises(attnd.InvalidRequest, match="and at least one"):
        attnd.Credentials(lambda: "").metadata()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"cert": "c"}, "key is absent, but must be given, as cert is"),
        ({"key": "k"}, "cert is absent, but must be given, as key is"),
        ({"ca": "c", "tls": False}, "ca is c, but must be absent without tls"),
        ({"cert": "c", "key": "k", "tls": False}, "cert is c, but must be absent without tls"),
        ({"server_name": "s", "tls": False}, "server_name is s, but must be absent without tls"),
    ],
)
def test_options_that_do_not_go_together(arguments, told):
    with pytest.raises(attnd.InvalidRequest) as raised:
        attnd.Credentials(**arguments)
    assert str(raised.value) == told


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(attnd.InvalidRequest, match=r"ca is .*none, which cannot be read: No such file"):
        attnd.connect("localhost:1", credentials=attnd.Credentials(ca=str(tmp_path / "none")))
