"""What the packages export, pinned: a change here is a change for users."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys

import pytest

import attnd
import attnd_server

CLIENT = [
    "Array",
    "Attention",
    "AttentionOptions",
    "AttnMetaDataBase",
    "AttndError",
    "Cache",
    "CacheLost",
    "CacheSpec",
    "Client",
    "Credentials",
    "CudaSession",
    "CudaStep",
    "DeadlineExceeded",
    "Disconnected",
    "EpochMismatch",
    "Exhausted",
    "FN_TYPE_AttnMetaDataFetch",
    "InvalidRequest",
    "KVSplit",
    "LayerGroup",
    "PagePool",
    "PagedSequence",
    "PendingCall",
    "PermissionDenied",
    "ResidentShape",
    "ResidentSteps",
    "ServerFault",
    "Session",
    "Step",
    "StepGroup",
    "StepMetadata",
    "Timings",
    "Unauthenticated",
    "Unsupported",
    "WarmUp",
    "__version__",
    "aio",
    "attach",
    "connect",
    "errors",
    "fetch_attn_metadata",
    "from_diffulex",
    "infer_prefill_flags",
    "is_warming_up",
    "reset_warming_up",
    "set_fetch_fn_for_attn_metadata",
    "set_warming_up",
    "tune_process",
]


def test_client_exports() -> None:
    assert attnd.__all__ == CLIENT == sorted(CLIENT)
    assert all(getattr(attnd, name) is not None for name in attnd.__all__)


def test_asyncio_client_exports() -> None:
    assert attnd.aio.__all__ == ["AsyncCache", "AsyncClient", "AsyncSession", "AsyncStep", "connect"]
    assert all(getattr(attnd.aio, name) is not None for name in attnd.aio.__all__)


def test_integrations_export() -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    from attnd.integrations import transformers
    from attnd.integrations.diffulex import attention, metadata

    names = ["Attachment", "RemoteCache", "RemotePair", "attach", "detach", "register"]
    assert transformers.__all__ == names
    assert attnd.Attention is attention.Attention
    assert attnd.attach is attention.attach
    assert {"AttnMetaDataBase", "fetch_attn_metadata", "from_diffulex"} <= set(metadata.__all__)
    assert all(getattr(metadata, name) is getattr(attnd, name) for name in metadata.__all__)


def public_methods(kind: type) -> dict[str, list[tuple[str, object]]]:
    return {
        name: [(parameter.name, parameter.default) for parameter in inspect.signature(method).parameters.values()]
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_")
    }


@pytest.mark.parametrize(("sync", "aio"), [(attnd.Client, attnd.aio.AsyncClient), (attnd.Cache, attnd.aio.AsyncCache)])
def test_both_clients_have_the_same_methods(sync: type, aio: type) -> None:
    assert public_methods(sync) == public_methods(aio)
    assert (sync.__doc__ or "").partition(".")[0] == (aio.__doc__ or "").partition(".")[0]


def test_create_cache_takes_the_fields_of_a_spec() -> None:
    parameters = inspect.signature(attnd.Client.create_cache).parameters
    fields = {field.name: field for field in dataclasses.fields(attnd.CacheSpec)}
    assert list(parameters) == ["self", *fields]
    for name, field in fields.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == (
            inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        )
        assert f"\n    {name}: " in (attnd.Client.create_cache.__doc__ or "")


def test_server_exports_the_names_that_people_know() -> None:
    known = {
        "AttentionBackend",
        "AttentionConfig",
        "AttentionKernel",
        "AttentionMetadata",
        "KVSplitConfig",
        "NaiveAttention",
        "PrecisionMode",
        "SlidingWindowAttention",
        "TritonAttentionOps",
        "TritonPagedAttention",
        "reference_torch_attention",
        "triton_attention",
        "triton_grouped_attention",
    }
    assert known <= set(attnd_server.__all__)
    assert attnd_server.__all__ == sorted(attnd_server.__all__)
    assert all(getattr(attnd_server, name) is not None for name in attnd_server.__all__)


def test_importing_the_client_loads_neither_torch_nor_the_server() -> None:
    program = "import sys, attnd; print(sorted({'torch', 'triton', 'numpy', 'attnd_server'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
