"""What needs a server of a later version is refused before it is sent, and what any server knows is not."""

from __future__ import annotations

import ast
import re
import zipfile
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

import attnd
from attnd.errors import Unsupported
from attnd.planes.sent_steps import SentSteps
from attnd.protocol.features import KNOWN, MissingFeatures, missing_features, needs_features
from attnd.protocol.packing import int32_tensor
from attnd.v1 import attention_pb2, cache_pb2, capabilities_pb2, step_pb2, tensor_pb2
from attnd_server.service.capabilities import FEATURES
from tests.released.versions import WHEELS
from tests.wire.calls import DIFFUSION_BLOCKS, NEXT_TOKENS, PROMPTS

OLD = missing_features(capabilities_pb2.GetCapabilitiesResponse(version="0.1.0"))
REF = cache_pb2.CacheRef(id=b"x", epoch=1)
PREFILL, DECODE = PROMPTS, NEXT_TOKENS
# Every field that a step of 0.1.0 could have.
BLOCKS = replace(DIFFUSION_BLOCKS, valid_lens=[2, 0])
NOTHING_NEW = attnd.StepMetadata([0, 2], [0, 0], [[0], [1]], [16, 17])
CACHE_ONLY = attnd.StepMetadata([1, 1], [5, 8], [[0, 3], [1, 2]], cache_only=True)
STORE_ONLY = attnd.StepMetadata([1, 1], [5, 8], [[0, 3], [1, 2]], [13, 16], store_only=True)
OF_OLD = [PREFILL, DECODE, BLOCKS, NOTHING_NEW, CACHE_ONLY, STORE_ONLY]
# What messages of 0.1.0 did not have: what a server must know, and what it may as well not see.
NEEDY = {
    *(f"attnd.v1.Step.{field}" for field in ("store_first", "window", "attend_new", "first_position", "groups")),
    *(f"attnd.v1.CacheConfig.{field}" for field in ("groups", "v_dtype")),
}
HARMLESS = {
    "attnd.v1.Step.traceparent",
    "attnd.v1.GetCapabilitiesResponse.features",
    # Of caches with layer groups, which no such server has.
    "attnd.v1.CopyPagesRequest.group",
    "attnd.v1.RenewCacheRequest.group",
    "attnd.v1.WarmUpRequest.group",
    # Of resident steps, which a server offers when a plane is opened.
    "attnd.v1.CudaPlane.has_resident_steps",
    "attnd.v1.CudaPlaneRequest.has_mps",
    "attnd.v1.CudaStep.after_resident",
    "attnd.v1.CudaStep.layout_tokens",
    *(f"attnd.v1.AttendRequest.{field}" for field in ("resident_steps", "resident_resume")),
    *(f"attnd.v1.AttendResponse.{field}" for field in ("resident_steps", "resident_refusal", "resident_resume")),
}
GROUP = cache_pb2.LayerGroup(num_kv_heads=1, head_dim=8, page_size=4, num_pages=2)


def test_an_old_server_lacks_everything() -> None:
    assert OLD is not None
    assert OLD.version == "0.1.0"
    assert OLD.features == KNOWN
    assert set(capabilities_pb2.Feature.values()) - {capabilities_pb2.FEATURE_UNSPECIFIED} == KNOWN


def released_fields(version: str) -> dict[str, set[str]]:
    """Names of the fields of each message, as the wheel of a release has them."""
    fields: dict[str, set[str]] = {}
    with zipfile.ZipFile(WHEELS[version]) as wheel:
        for name in wheel.namelist():
            if name.startswith("attnd/v1/") and name.endswith("_pb2.py"):
                (literal,) = re.findall(r"AddSerializedFile\((b'.*')\)", wheel.read(name).decode())
                file = descriptor_pb2.FileDescriptorProto.FromString(ast.literal_eval(literal))
                for message in file.message_type:
                    fields[f"{file.package}.{message.name}"] = {field.name for field in message.field}
    return fields


def test_every_later_field_needs_a_feature_or_none() -> None:
    pool = descriptor_pool.Default()
    later = {
        f"{message}.{field.name}"
        for message, known in released_fields("0.1.0").items()
        for field in pool.FindMessageTypeByName(message).fields
        if field.name not in known
    }
    assert later == NEEDY | HARMLESS


def test_a_server_of_this_version_lacks_nothing() -> None:
    assert missing_features(capabilities_pb2.GetCapabilitiesResponse(features=FEATURES)) is None


def test_features_that_nobody_knows_yet_make_no_difference() -> None:
    told = capabilities_pb2.GetCapabilitiesResponse(features=[*FEATURES, 1000])  # type: ignore[list-item]
    assert missing_features(told) is None
    told.features.remove(capabilities_pb2.FEATURE_V_DTYPE)
    lacking = missing_features(told)
    assert lacking is not None
    assert lacking.features == {capabilities_pb2.FEATURE_V_DTYPE}


@pytest.mark.parametrize("metadata", OF_OLD)
def test_old_steps_need_nothing(metadata: attnd.StepMetadata) -> None:
    assert OLD is not None
    OLD.check_step(metadata.to_message(1, REF))


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("store_first", {"store_first": True}),
        ("window", {"window": 1}),
        ("attend_new", {"attend_new": int32_tensor([1, 1], "")}),
        ("attend_new", {"attend_new": tensor_pb2.Tensor()}),
        ("first_position", {"first_position": int32_tensor([0, 0], "")}),
        ("groups", {"groups": [step_pb2.StepGroup()]}),
        ("window", {"groups": [step_pb2.StepGroup(), step_pb2.StepGroup(window=5)]}),
        ("context_lens", {"context_lens": int32_tensor([0, -2], "")}),
    ],
)
def test_what_is_new_of_steps_is_refused(field: str, changes: dict[str, Any]) -> None:
    message = PREFILL.to_message(1, REF)
    message.MergeFrom(step_pb2.Step(**{name: value for name, value in changes.items() if name != "context_lens"}))
    if "context_lens" in changes:
        message.context_lens.CopyFrom(changes["context_lens"])
    feature = {
        "store_first": capabilities_pb2.FEATURE_STORE_FIRST,
        "window": capabilities_pb2.FEATURE_STEP_WINDOW,
        "attend_new": capabilities_pb2.FEATURE_ATTEND_NEW,
        "first_position": capabilities_pb2.FEATURE_FIRST_POSITION,
        "groups": capabilities_pb2.FEATURE_LAYER_GROUPS,
        "context_lens": capabilities_pb2.FEATURE_PADDED_ROWS,
    }[field]
    with pytest.raises(Unsupported, match=rf"^{field} is given, but the server is of version 9\.8, which") as told:
        MissingFeatures("9.8", frozenset({feature})).check_step(message)
    assert told.value.field == field
    if field != "window" or "groups" not in changes:
        MissingFeatures("9.8", KNOWN - {feature}).check_step(message)


def test_decode_without_new_tokens_of_a_request_is_padding() -> None:
    lens = {"query_lens": [1, 0], "context_lens": [3, 6], "page_tables": [[0, -1], [1, 2]]}
    padded = MissingFeatures("0.1.0", frozenset({capabilities_pb2.FEATURE_PADDED_ROWS}))
    padded.check_step(attnd.StepMetadata(**lens).to_message(1, REF))
    with pytest.raises(Unsupported, match="padded its batch with"):
        padded.check_step(attnd.StepMetadata(**lens, kind="decode").to_message(1, REF))


@pytest.mark.parametrize("context_len", [-1, -3])
def test_other_negative_lengths_are_left_to_the_server(context_len: int) -> None:
    assert OLD is not None
    OLD.check_step(attnd.StepMetadata([2], [context_len], [[0]]).to_message(1, REF))


def test_halves_of_elements_are_left_to_the_server() -> None:
    assert OLD is not None
    message = DECODE.to_message(1, REF)
    message.context_lens.data = b"abc"
    OLD.check_step(message)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (cache_pb2.CacheConfig(groups=[GROUP]), "groups"),
        (cache_pb2.CacheConfig(v_dtype=tensor_pb2.DTYPE_FLOAT16), "v_dtype"),
    ],
)
def test_what_is_new_of_caches_is_refused(config: cache_pb2.CacheConfig, field: str) -> None:
    assert OLD is not None
    request = cache_pb2.CreateCacheRequest(config=config)
    assert needs_features(request)
    with pytest.raises(Unsupported, match=rf"^{field} is given, but the server is of version 0\.1\.0, which has no "):
        OLD.check_cache(request)


def test_old_caches_need_nothing() -> None:
    spec = attnd.CacheSpec(
        num_layers=2,
        num_kv_heads=1,
        head_dim=8,
        num_pages=6,
        head_dim_v=16,
        kv_dtype="float8_e4m3fn",
        k_scales=0.5,
        v_scales=[2.0],
        kv_split=attnd.KVSplit(chunk_size=16),
    )
    assert not needs_features(spec.to_message())


def test_a_version_cannot_write_to_terminals() -> None:
    with pytest.raises(Unsupported, match=r"of version 1\\x1b\[2J, which"):
        MissingFeatures("1\x1b[2J", KNOWN).check_step(step_pb2.Step(store_first=True))


class StoreFirst(attnd.StepMetadata):
    """A step of a later version."""

    def to_message(self, *args: Any) -> step_pb2.Step:
        message = super().to_message(*args)
        message.store_first = True
        return message


def test_no_later_step_is_told_by_one_that_was_refused() -> None:
    tables = [[request, *range(10, 40)] for request in range(4)]
    lens = [1] * 4, [400] * 4
    steps = SentSteps()
    first = steps.message(attnd.StepMetadata(*lens, tables), REF, 1.0, OLD)
    steps.answered(first.id, "step", attention_pb2.StepReply(step_id=first.id, takes_deltas=True))
    with pytest.raises(Unsupported):
        steps.message(StoreFirst(*lens, [[9, *row[1:]] for row in tables]), REF, 1.0, OLD)
    told = steps.message(attnd.StepMetadata(*lens, tables), REF, 1.0, OLD)
    assert told.page_table_delta.base_step_id == first.id
    assert told.id > first.id
