"""Tokens, certificates and the principals that they prove, without a server."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest
import torch

import attnd
from attnd.errors import Unauthenticated
from attnd_server.attention.config import AttentionConfig
from attnd_server.build import build_service
from attnd_server.config import ServerConfig
from attnd_server.execution.work import SideWork
from attnd_server.identity import (
    ANYBODY,
    FileRefused,
    OpenByToken,
    Principals,
    ServerCertificates,
    TokenFile,
    refuse_if_revoked,
    wanted_until_revoked,
)
from attnd_server.identity.tokens import add_token, digest
from tests.certificates import Authority, needs_openssl
from tests.held_device import held


class Context:
    """gRPC's context of an RPC, as far as it says who calls."""

    def __init__(self, *metadata, auth_context=None):
        self._metadata, self._auth_context = metadata, auth_context or {}

    def invocation_metadata(self):
        return self._metadata

    def auth_context(self):
        return self._auth_context


def bearer(token, scheme="Bearer"):
    return Context(("user-agent", "x"), ("authorization", f"{scheme} {token}"))


def line(principal, token):
    return f"{principal} sha256:{digest(token).hex()}\n"


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "tokens"
    file.touch(mode=0o600)
    return file


def test_a_made_token_is_found_and_only_its_digest_is_in_the_file(tmp_path):
    path = tmp_path / "tokens"
    tokens = {add_token(str(path), name): name for name in ("alice", "bob", "spiffe://a.example/b")}
    assert path.stat().st_mode & 0o777 == 0o600
    assert not any(token in path.read_text() for token in tokens)
    file = TokenFile(str(path))
    assert {token: file.principal(token) for token in tokens} == tokens
    assert file.principal("alice") is None
    assert file.principal("") is None


def test_a_token_is_added_below_a_line_that_was_not_ended(path):
    path.write_text("# by hand\n\n" + line("alice", "1").strip())
    token = add_token(str(path), "bob")
    assert [TokenFile(str(path)).principal(each) for each in ("1", token)] == ["alice", "bob"]


@pytest.mark.parametrize("principal", ["", "two words", "-", "a" * 129, "#a", "a\n"])
def test_a_principal_that_the_file_could_not_hold_gets_no_token(tmp_path, principal):
    with pytest.raises(FileRefused, match=r"principal is .* but must be letters"):
        add_token(str(tmp_path / "tokens"), principal)
    assert not (tmp_path / "tokens").exists()


def test_a_principal_may_have_two_tokens(path):
    path.write_text(line("alice", "old") + line("alice", "new"))
    file = TokenFile(str(path))
    assert file.principal("old") == file.principal("new") == "alice"


SECRET = "this-is-a-token-in-the-wrong-place"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"alice {SECRET}\n", "line 1 must be 'PRINCIPAL sha256:DIGEST'"),
        (f"# all\n{SECRET}\n", "line 2 must be 'PRINCIPAL sha256:DIGEST'"),
        (line("alice", SECRET)[:-2] + "\n", "line 1 must be"),
        (line("alice", SECRET).upper(), "line 1 must be"),
        (line("alice", SECRET) + line("bob", SECRET), "line 2 must have a token that no line above has"),
        ("# nobody\n", "must have at least one token"),
        ("", "must have at least one token"),
    ],
)
def test_a_broken_file_is_refused_and_repeats_nothing_of_it(path, text, told):
    path.write_text(text)
    with pytest.raises(FileRefused) as raised:
        TokenFile(str(path))
    assert told in str(raised.value)
    assert str(path) in str(raised.value)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o620, 0o644, 0o666, 0o601])
def test_a_file_that_others_can_read_or_change_is_refused(path, mode):
    path.write_text(line("alice", "1"))
    path.chmod(mode)
    with pytest.raises(FileRefused, match=f"whose mode is {mode:04o}, but must give others nothing"):
        TokenFile(str(path))


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440])
def test_a_file_of_the_user_and_perhaps_its_group_is_taken(path, mode):
    path.write_text(line("alice", "1"))
    path.chmod(mode)
    assert TokenFile(str(path)).principal("1") == "alice"


def test_a_changed_file_counts_once_it_is_read_again(path, caplog):
    caplog.set_level(logging.INFO)
    path.write_text(line("alice", "1") + line("bob", "2"))
    file = TokenFile(str(path))
    alice, bob = file.principal("1"), file.principal("2")
    path.write_text(line("bob", "2") + line("carol", "3"))
    assert file.principal("1") == "alice"
    file.reload()
    assert (file.principal("1"), file.principal("2"), file.principal("3")) == (None, "bob", "carol")
    with pytest.raises(Unauthenticated, match="no longer known"):
        refuse_if_revoked(alice)
    refuse_if_revoked(bob)
    refuse_if_revoked(ANYBODY)
    path.write_text(line("alice", "1"))
    file.reload()
    refuse_if_revoked(alice)  # back again
    assert caplog.text.count("read again") == 2


def test_no_plane_opens_a_step_with_a_removed_token(path):
    path.write_text(line("alice", "1") + line("bob", "2"))
    file = TokenFile(str(path))
    alice = file.principal("1")
    service = build_service(ServerConfig(device="cpu", kv_bytes=1 << 20))
    try:
        config = AttentionConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=1, dtype=torch.float32)
        cache = service.caches.create(config, principal=alice, ttl_s=9, name="")
        ref = cache.info().cache
        message = attnd.StepMetadata([1], [0], [[0]], [0]).to_message(1, ref)
        assert service.step(message, alice)[0].cache is cache
        path.write_text(line("bob", "2"))
        file.reload()
        with pytest.raises(Unauthenticated, match="no longer known"):
            service.step(message, alice)
    finally:
        service.executor.close()


def test_what_a_removed_token_opened_ends_after_its_notice_and_nothing_else(path, monkeypatch):
    path.write_text(line("alice", "1") + line("bob", "2"))
    file = TokenFile(str(path))
    opened, ended = OpenByToken(), []
    monkeypatch.setattr(OpenByToken, "NOTICE_S", 0.0)
    alice, bob = file.principal("1"), file.principal("2")
    with opened.held(alice, lambda: ended.append("hers")), opened.held(bob, lambda: ended.append("his")):
        with (
            opened.held(alice, lambda: ended.append("closed")),
            opened.held(ANYBODY, lambda: ended.append("anybody's")),
        ):
            opened.end_revoked()
        path.write_text(line("bob", "2"))
        file.reload()
        for expected in ([], ["hers"], ["hers"]):
            opened.end_revoked()
            assert ended == expected


def test_a_token_that_comes_back_in_time_ends_nothing(path, monkeypatch):
    path.write_text(line("alice", "1"))
    file = TokenFile(str(path))
    opened, ended = OpenByToken(), []
    monkeypatch.setattr(OpenByToken, "NOTICE_S", 0.0)
    with opened.held(file.principal("1"), lambda: ended.append("hers")):
        for known in (line("bob", "2"), line("alice", "1"), line("bob", "2")):
            path.write_text(known)
            file.reload()
            opened.end_revoked()
        assert ended == []
        opened.end_revoked()
        assert ended == ["hers"]


@pytest.mark.parametrize("kind", ["call", "side work"])
def test_what_waits_is_not_started_once_its_token_has_gone(path, kind):
    path.write_text(line("alice", "1") + line("bob", "2"))
    file = TokenFile(str(path))
    alice, executor = file.principal("1"), build_service(ServerConfig(device="cpu", kv_bytes=1 << 20)).executor
    done, ran, answered = [], [], threading.Event()

    def work():
        ran.append(kind)
        return b"done"

    def settled(result, error):
        done.append((result, error))
        answered.set()

    try:
        release = threading.Event()
        with held(executor):
            if kind == "side work":
                executor.submit(SideWork(alice, lambda: release.wait(30) and b""), lambda *_: None)
            waiting = SideWork(alice, work) if kind == "side work" else work
            executor.submit(waiting, settled, is_wanted=wanted_until_revoked(alice))
            path.write_text(line("bob", "2"))
            file.reload()
            release.set()
        assert answered.wait(30)
    finally:
        executor.close()
    assert ran == []
    assert [type(error) for _, error in done] == [Unauthenticated]
    assert wanted_until_revoked(ANYBODY) is None


def test_a_token_that_is_given_to_another_is_revoked_for_the_first(path):
    path.write_text(line("alice", "1"))
    file = TokenFile(str(path))
    alice = file.principal("1")
    path.write_text(line("bob", "1"))
    file.reload()
    assert alice.is_revoked
    assert file.principal("1") == "bob"


@pytest.mark.parametrize("fault", ["text", "empty", "mode", "gone"])
def test_a_broken_new_file_keeps_the_old_tokens_and_is_told_once(path, caplog, fault):
    path.write_text(line("alice", SECRET))
    file = TokenFile(str(path))
    alice = file.principal(SECRET)
    if fault == "text":
        path.write_text(f"alice {SECRET}\n")
    elif fault == "empty":
        path.write_text("")
    elif fault == "mode":
        path.chmod(0o644)
    else:
        path.unlink()
    for _ in range(3):
        file.reload()
        assert file.principal(SECRET) == "alice"
    assert not alice.is_revoked
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert SECRET not in caplog.text


def test_the_same_fault_is_told_again_after_it_was_repaired(path, caplog):
    path.write_text(line("alice", "1"))
    file = TokenFile(str(path))
    for _ in range(2):
        path.chmod(0o644)
        file.reload()
        path.chmod(0o600)
        file.reload()
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


def test_without_tokens_and_certificates_everybody_is_anybody():
    principals = Principals()
    assert principals.of(None) == ANYBODY
    assert principals.refusal(()) is None


def test_a_token_names_the_principal(path):
    path.write_text(line("alice", "1"))
    principals = Principals(TokenFile(str(path)), by_certificate=True)  # a token is asked for beside a certificate
    for scheme in ("Bearer", "bearer", "BEARER"):
        assert principals.of(bearer("1", scheme)) == "alice"
        assert principals.refusal(bearer("1", scheme).invocation_metadata()) is None


@pytest.mark.parametrize(
    "context",
    [
        Context(),
        Context(auth_context={"x509_common_name": [b"alice"]}),
        bearer(SECRET),
        bearer(""),
        bearer("1", "Basic"),
        bearer("1 "),
        Context(("authorization", "1")),
        Context(("authorization", "Bearer 1"), ("authorization", "Bearer 1")),
        Context(("authorization-bin", b"Bearer 1")),
        Context(("authorization", f"Bearer {SECRET}\udcff")),
    ],
)
def test_no_or_a_wrong_token_is_nobody(path, context):
    path.write_text(line("alice", "1"))
    principals = Principals(TokenFile(str(path)))
    with pytest.raises(Unauthenticated) as raised:
        principals.of(context)
    refusal = principals.refusal(context.invocation_metadata())
    assert str(refusal) == str(raised.value)
    assert SECRET not in str(refusal)


@pytest.mark.parametrize(
    ("auth_context", "name"),
    [
        ({"x509_common_name": [b"alice"], "x509_subject_alternative_name": [b"a", b"b"]}, "alice"),
        ({"x509_common_name": [b""], "x509_subject_alternative_name": [b"spiffe://a"]}, "spiffe://a"),
        ({"x509_subject_alternative_name": [b"a.example"]}, "a.example"),
    ],
)
def test_a_certificate_names_the_principal(auth_context, name):
    principals = Principals(by_certificate=True)
    assert principals.of(Context(auth_context=auth_context)) == name
    assert principals.refusal(()) is None  # whoever is here has shown one


@pytest.mark.parametrize("names", [[], [b"a", b"b"]])
def test_a_certificate_without_a_name_of_its_own_is_nobody(names):
    with pytest.raises(Unauthenticated, match=f"it has {len(names)}"):
        Principals(by_certificate=True).of(Context(auth_context={"x509_subject_alternative_name": names}))


@needs_openssl
def test_certificates_that_cannot_be_served_are_refused(tmp_path):
    authority = Authority(tmp_path)
    one, other = authority.issue("one", "/CN=one"), authority.issue("other", "/CN=other")
    ServerCertificates(one.cert, one.key, authority.ca)
    with pytest.raises(FileRefused, match="must be a certificate and its key"):
        ServerCertificates(one.cert, other.key)
    with pytest.raises(FileRefused, match=r"tls_client_ca is .*, but must be certificates"):
        ServerCertificates(one.cert, one.key, one.key)
    with pytest.raises(FileRefused, match=r"tls_cert is .*, which cannot be read: No such file"):
        ServerCertificates(str(tmp_path / "none"), one.key)
    os.chmod(one.key, 0o644)
    with pytest.raises(FileRefused, match=r"tls_key is .*, whose mode is 0644"):
        ServerCertificates(one.cert, one.key)


@needs_openssl
def test_half_changed_certificates_wait_for_the_other_half(tmp_path, caplog):
    authority = Authority(tmp_path)
    one, other = authority.issue("one", "/CN=one"), authority.issue("other", "/CN=other")
    certificates = ServerCertificates(one.cert, one.key)
    certificates.credentials()
    certificates.reload()
    assert certificates._take_changed() is None
    Path(one.cert).write_bytes(Path(other.cert).read_bytes())
    certificates.reload()
    assert certificates._take_changed() is None
    assert "is not used" in caplog.text
    Path(one.key).write_bytes(Path(other.key).read_bytes())
    certificates.reload()
    assert certificates._take_changed() is not None
    assert certificates._take_changed() is None
