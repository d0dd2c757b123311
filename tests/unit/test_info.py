"""What `attnd info` prints, and what it prints when nobody answers."""

import io
from array import array

import pytest
from rich.console import Console

import attnd
from attnd.errors import Disconnected, Unsupported
from attnd.v1 import backend_pb2, cache_pb2, capabilities_pb2, plane_pb2, status_pb2, step_pb2, tensor_pb2
from attnd_server.cli import info

CAPABILITIES = capabilities_pb2.GetCapabilitiesResponse(
    version="9.8.7",
    epoch=42,
    devices=[
        capabilities_pb2.Device(name="cuda:0", description="A GPU", num_bytes_limit=80 << 30, num_bytes_used=3 << 29)
    ],
    backends=[
        capabilities_pb2.BackendState(backend=backend_pb2.BACKEND_NAIVE, available=True),
        capabilities_pb2.BackendState(backend=backend_pb2.BACKEND_TRITON_GROUPED, reason="no [compiler] here"),
    ],
    planes=[capabilities_pb2.PlaneState(plane=plane_pb2.PLANE_INLINE, available=True)],
    dtypes=[tensor_pb2.DTYPE_BFLOAT16],
    kv_dtypes=[tensor_pb2.DTYPE_FLOAT8_E4M3FN],
    layouts=[cache_pb2.LAYOUT_UNIFIED],
    masks=[step_pb2.MASK_BLOCK_CAUSAL],
    limits=capabilities_pb2.Limits(max_message_bytes=1 << 28, max_step_tokens=65_536),
)
CACHE = cache_pb2.CacheInfo(
    config=cache_pb2.CacheConfig(
        num_layers=30,
        num_kv_heads=3,
        head_dim=192,
        head_dim_v=128,
        page_size=16,
        num_pages=2048,
        dtype=tensor_pb2.DTYPE_BFLOAT16,
        kv_dtype=tensor_pb2.DTYPE_FLOAT8_E4M3FN,
        layout=cache_pb2.LAYOUT_DISTINCT,
    ),
    ttl_s=60,
    expires_in_s=41.6,
    num_bytes=90 << 20,
    num_pages_written=1234,
    name="[red]mine",
)


class FakeClient:
    def __init__(self, caches, status=None):
        self._caches = caches
        self._status = status or status_pb2.GetStatusResponse()

    def capabilities(self):
        return CAPABILITIES

    def list_caches(self):
        return self._caches

    def status(self):
        if isinstance(self._status, Exception):
            raise self._status
        return self._status

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def run(monkeypatch, connect):
    monkeypatch.setattr(attnd, "connect", connect)
    out, err = io.StringIO(), io.StringIO()
    code = info.run_info("host:1", 2.0, Console(file=out, width=160), Console(file=err, width=160))
    return code, out.getvalue(), err.getvalue()


def test_prints_capabilities_and_caches(monkeypatch):
    code, out, err = run(monkeypatch, lambda address, **_: FakeClient([CACHE]))
    assert (code, err) == (0, "")
    for text in (
        "host:1  attnd 9.8.7, epoch 42",
        "A GPU",
        "1.5 GiB",
        "80.0 GiB",
        "naive",
        "triton_grouped",
        "no: no [compiler] here",
        "inline",
        "bfloat16",
        "block_causal",
        "256.0 MiB",
        "65,536",
        "[red]mine",
        "30 layers x 3 heads x 192/128, bfloat16 in float8_e4m3fn, distinct",
        "1,234 of 2,048, 16 tokens each",
        "42 of 60 s",
    ):
        assert text in out


def test_pages_of_the_type_of_calls_are_not_told_twice():
    plain = cache_pb2.CacheInfo()
    plain.CopyFrom(CACHE)
    plain.config.kv_dtype = plain.config.dtype
    out = io.StringIO()
    Console(file=out, width=160).print(info.cache_table([plain]))
    assert "192/128, bfloat16, distinct" in out.getvalue()


def test_layer_groups_are_told_one_after_the_other(monkeypatch):
    told = cache_pb2.CacheInfo()
    told.CopyFrom(CACHE)
    told.config.Clear()
    told.config.num_layers, told.config.dtype = 3, tensor_pb2.DTYPE_BFLOAT16
    told.config.layout = cache_pb2.LAYOUT_UNIFIED
    for layers, head_dim, kv_dtype, page_size in (([0, 2], 64, 3, 16), ([1], 128, 6, 32)):
        numbers = tensor_pb2.Tensor(shape=[len(layers)], data=array("i", layers).tobytes())
        told.config.groups.add(
            layers=numbers,
            num_kv_heads=2,
            head_dim=head_dim,
            head_dim_v=head_dim,
            page_size=page_size,
            num_pages=100,
            kv_dtype=kv_dtype,
            window=head_dim,
        )
    out = io.StringIO()
    Console(file=out, width=240).print(info.cache_table([told]))
    assert "2 layers x 2 heads x 64, bfloat16, unified; 1 layers x 2 heads x 128, bfloat16 in" in out.getvalue()
    assert "1,234 of 200, 16/32 tokens each" in out.getvalue()
    said = info._cache_json(told)
    assert "num_pages" not in said
    assert [group["layers"] for group in said["groups"]] == [[0, 2], [1]]
    assert [(group["kv_dtype"], group["window"]) for group in said["groups"]] == [
        ("bfloat16", 64),
        ("float8_e4m3fn", 128),
    ]


def test_says_that_there_are_no_caches(monkeypatch):
    code, out, _ = run(monkeypatch, lambda address, **_: FakeClient([]))
    assert code == 0
    assert "No caches." in out


KERNELS = status_pb2.KernelStatus(
    num_loaded=1_234,
    num_compiling=1,
    num_failed=1,
    num_compiled=7,
    num_found=1_228,
    compiling=[status_pb2.CompilingKernel(name="store_kernel[HEAD_DIM=128]", seconds=1.25)],
    failed=[status_pb2.FailedKernel(name="merge_kernel[]", reason="no [layout]")],
)


def test_prints_kernels_that_are_there_and_on_their_way(monkeypatch):
    told = status_pb2.GetStatusResponse(kernels=KERNELS)
    code, out, _ = run(monkeypatch, lambda address, **_: FakeClient([], told))
    assert code == 0
    for text in ("1,234", "1,228", "compiling for 1.2 s", "store_kernel[HEAD_DIM=128]", "merge_kernel[]: no [layout]"):
        assert text in out
    said = info.to_json("host:1", CAPABILITIES, [], KERNELS)["kernels"]
    assert said["num_found"] == 1_228
    assert said["compiling"] == [{"name": "store_kernel[HEAD_DIM=128]", "seconds": 1.25}]
    assert said["failed"] == [{"name": "merge_kernel[]", "reason": "no [layout]"}]


def test_a_server_that_does_not_tell_of_kernels_has_no_such_table(monkeypatch):
    code, out, _ = run(monkeypatch, lambda address, **_: FakeClient([], Unsupported("no GetStatus")))
    assert code == 0
    assert "Kernels" not in out
    assert info.to_json("host:1", CAPABILITIES, [])["kernels"] is None


def test_nobody_answers(monkeypatch):
    def connect(address, timeout_s, connect_timeout_s, credentials):
        raise Disconnected(f"no connection to {address}:\n[refused] within {connect_timeout_s:g} s")

    assert run(monkeypatch, connect) == (1, "", "attnd info: no connection to host:1: [refused] within 2 s\n")


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 29, "1.5 GiB"), (5 << 50, "5120.0 TiB")]
)
def test_bytes_text(value, text):
    assert info.bytes_text(value) == text
