"""Errors survive the way over the wire."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf import any_pb2

import attnd
from attnd import errors
from attnd.v1 import error_pb2

CLASSES = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.AttndError)]
LEAVES = [cls for cls in CLASSES if cls is not errors.AttndError]


class FailedRpc(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, trailer: bytes | None = None) -> None:
        self._code, self._trailer = code, trailer

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "the details"

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return () if self._trailer is None else ((errors.STATUS_DETAILS_KEY, self._trailer),)


@pytest.mark.parametrize("cls", LEAVES)
def test_each_class_travels_in_band_and_in_the_trailer(cls: type[errors.AttndError]) -> None:
    message = errors.to_message(cls("page is 9", field="page", retry_after_s=0.0121))
    detail = any_pb2.Any()
    detail.Pack(message)
    trailer = error_pb2.Status(code=cls.code.value[0], details=[detail]).SerializeToString()
    for told in (errors.from_message(message), errors.from_rpc(FailedRpc(cls.code, trailer))):
        assert type(told) is cls
        assert (str(told), told.field, told.retry_after_s) == ("page is 9", "page", 0.013)


def test_without_a_hint_there_is_none() -> None:
    assert errors.from_message(errors.to_message(errors.Exhausted("full"))).retry_after_s is None


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_bare_status_has_a_class(code: grpc.StatusCode) -> None:
    told = errors.from_rpc(FailedRpc(code))
    assert type(told) in LEAVES or code is grpc.StatusCode.ABORTED
    assert str(told) == "the details"


def test_reasons_and_classes_are_one_to_one() -> None:
    reasons = [cls.reason for cls in LEAVES]
    assert sorted(reasons) == sorted(set(error_pb2.ErrorReason.values()) - {error_pb2.ERROR_REASON_UNSPECIFIED})


def test_the_drawn_tree_is_the_tree() -> None:
    drawn = [line.split()[1] for line in (errors.__doc__ or "").splitlines() if "──" in line]
    assert drawn == [
        cls.__name__ for cls in LEAVES if cls.__base__ is errors.AttndError or errors.AttndError in cls.__bases__
    ]
    assert all(hasattr(attnd, cls.__name__) for cls in CLASSES)
