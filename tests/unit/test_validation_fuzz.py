"""Whatever arrives: an AttndError or a step that is safe, by a check in plain Python loops."""

from __future__ import annotations

import itertools
import struct

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from attnd.errors import AttndError
from attnd.protocol.tensors import Array
from attnd.v1 import attention_pb2, cache_pb2, step_pb2, tensor_pb2
from attnd_server.attention.config import AttentionConfig
from attnd_server.config import ServerConfig
from attnd_server.service import validation
from tests.unit.wire_messages import CONFIG, LIMITS, NUM_PAGES, PAGE_SIZE, step, tensor

NUM_SLOTS = NUM_PAGES * PAGE_SIZE
STEP_TENSORS = [
    "cu_seqlens_q",
    "context_lens",
    "page_tables",
    "slot_mapping",
    "valid_lens",
    "masks",
    "prefix_lens",
    "padded_prefix_lens",
    "attend_new",
    "first_position",
]

fuzz = settings(deadline=None, derandomize=True, max_examples=300)


def mostly(good, bad):
    """Nine of `good` to one of `bad`."""
    return st.integers(0, 9).flatmap(lambda draw: good if draw else bad)


# --- what is sent ------------------------------------------------------------------------------------------------

extents = st.one_of(st.integers(-3, 5), st.integers(-(2**63), 2**63 - 1))
wild_tensors = st.builds(
    tensor_pb2.Tensor,
    dtype=st.integers(-2, 9),
    shape=st.lists(extents, max_size=5),
    data=st.binary(max_size=80),
)
# The header fits the data, the values are anything.
honest_tensors = st.one_of(
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=6).map(tensor),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6).map(lambda values: tensor(values, "int64")),
    st.lists(st.lists(st.integers(-3, NUM_PAGES + 1), min_size=2, max_size=2), max_size=3).map(tensor),
    st.lists(st.floats(width=32), min_size=2, max_size=4).map(lambda values: tensor(values, "float32")),
    st.just(tensor_pb2.Tensor(dtype=4, shape=[2], region=tensor_pb2.Region(id=1, offset=2**63))),
)
tensors = st.one_of(wild_tensors, honest_tensors)


@st.composite
def valid_steps(draw):
    """A step that keeps every rule, close to the edges: small pages, holes, shared pages, slots beside the context."""
    num_reqs = draw(st.integers(1, 3))
    max_pages = draw(st.integers(0, 4))
    query_lens = draw(st.lists(st.integers(0, 3), min_size=num_reqs, max_size=num_reqs).filter(any))
    is_decode = draw(st.booleans())
    if is_decode:
        query_lens = [max(query_lens)] * num_reqs

    def per_request(low, high):
        return draw(st.lists(st.integers(low, high), min_size=num_reqs, max_size=num_reqs))

    row = st.lists(st.integers(-1, NUM_PAGES - 1), min_size=max_pages, max_size=max_pages)
    prefix_lens = per_request(0, 9)
    message = step(
        kind=step_pb2.STEP_KIND_DECODE if is_decode else step_pb2.STEP_KIND_PREFILL,
        cu_seqlens_q=tensor([sum(query_lens[:r]) for r in range(num_reqs + 1)]),
        context_lens=tensor(per_request(0, max_pages * PAGE_SIZE)),
        page_tables=tensor([draw(row) for _ in range(num_reqs)]),
        slot_mapping=None,
        mask=draw(st.integers(1, 4)),
        masks=tensor(per_request(1, 4)) if draw(st.booleans()) else None,
        block_size=draw(st.sampled_from([1, 4, 2**32 - 1])),
        prefix_lens=tensor(prefix_lens),
        padded_prefix_lens=tensor([start + size for start, size in zip(prefix_lens, per_request(0, 5), strict=True)]),
        mask_prefix_hole=draw(st.booleans()),
        valid_lens=tensor([draw(st.integers(0, length)) for length in query_lens]),
    )
    message.window = draw(st.sampled_from([0, 0, 1, 4, 5, 2**31, 2**32 - 1]))
    if message.block_size <= 4 and draw(st.booleans()):
        message.first_position.CopyFrom(tensor([at * message.block_size for at in per_request(0, 2)]))
    mode = draw(st.sampled_from(["store", "store", "store", "store_only", "cache_only", "store_nothing"]))
    if mode in ("store", "store_nothing"):
        message.store_first = draw(st.booleans())
        if draw(st.booleans()):
            message.attend_new.CopyFrom(tensor(per_request(0, 1)))
    message.cache_only = mode == "cache_only"
    message.store_only = mode == "store_only"
    if mode in ("store", "store_only"):
        taken = set() if message.store_first else read_slots(message)
        free = draw(st.permutations(sorted(set(range(NUM_SLOTS)) - taken)))
        slots = [free.pop() if free and draw(st.integers(0, 4)) else -1 for _ in range(sum(query_lens))]
        message.slot_mapping.CopyFrom(tensor(slots, draw(st.sampled_from(["int32", "int64"]))))
    return message


@st.composite
def almost_valid_steps(draw):
    """A valid step, but for one tensor or one element of a tensor."""
    message = draw(valid_steps())
    if message.HasField("slot_mapping") and draw(st.booleans()):
        set_element(draw, message.slot_mapping, st.integers(0, NUM_SLOTS - 1))
        return message
    field = getattr(message, draw(st.sampled_from([name for name in STEP_TENSORS if message.HasField(name)])))
    if field.data and draw(st.booleans()):
        set_element(draw, field, st.integers(-2, NUM_PAGES))
    else:
        field.CopyFrom(draw(tensors))
    return message


def set_element(draw, message, elements):
    values = integers(message)
    values[draw(st.integers(0, len(values) - 1))] = draw(elements)
    kind = {tensor_pb2.DTYPE_INT32: "i", tensor_pb2.DTYPE_INT64: "q"}[message.dtype]
    message.data = struct.pack(f"<{len(values)}{kind}", *values)


# --- what is safe, read straight off step.proto ------------------------------------------------------------------


def attempt(function, *args, **kwargs):
    """`(result, None)`, or `(None, error)` if an AttndError came out; any other exception fails the test."""
    try:
        return function(*args, **kwargs), None
    except AttndError as error:
        return None, error


def integers(message):
    kind = {tensor_pb2.DTYPE_INT32: "i", tensor_pb2.DTYPE_INT64: "q"}[message.dtype]
    return [value for (value,) in struct.iter_unpack(f"<{kind}", message.data)]


def read_slots(message):
    """Every slot that the step reads as context."""
    if message.store_only:
        return set()
    context_lens, ends = integers(message.context_lens), integers(message.cu_seqlens_q)
    firsts = integers(message.first_position) if message.HasField("first_position") else [0] * len(context_lens)
    max_pages = message.page_tables.shape[1]
    table = integers(message.page_tables)
    read = set()
    for request, context_len in enumerate(context_lens):
        for position in range(context_len if ends[request] < ends[request + 1] else 0):
            if message.window and context_len - position >= message.window:
                continue
            page = table[request * max_pages + position // PAGE_SIZE]
            in_hole = message.mask_prefix_hole and (
                integers(message.prefix_lens)[request]
                <= firsts[request] + position
                < integers(message.padded_prefix_lens)[request]
            )
            if page >= 0 and not in_hole:
                read.add(page * PAGE_SIZE + position % PAGE_SIZE)
    return read


def assert_safe(message, metadata):
    cu_seqlens_q = integers(message.cu_seqlens_q)
    assert cu_seqlens_q[0] == 0
    assert cu_seqlens_q == sorted(cu_seqlens_q)
    query_lens = [end - start for start, end in itertools.pairwise(cu_seqlens_q)]
    assert 1 <= len(query_lens) <= LIMITS.max_step_reqs
    if metadata.is_decode:
        query_lens = [length for length in query_lens if length]
        assert len(set(query_lens)) == 1
    assert metadata.query_lens == query_lens
    assert metadata.num_tokens == sum(query_lens) <= LIMITS.max_step_tokens
    assert metadata.num_reqs == len(query_lens)

    max_pages = metadata.page_tables.shape[1]
    for request, context_len in enumerate(metadata.context_lens.tolist()):
        assert 0 <= context_len <= max_pages * PAGE_SIZE
        assert 0 <= metadata.valid_lens[request] <= query_lens[request]
        assert all(-1 <= page < NUM_PAGES for page in metadata.page_tables[request].tolist())
        assert 0 <= metadata.prefix_lens[request] <= metadata.padded_prefix_lens[request]
        assert 0 <= metadata.hole_starts[request] <= metadata.hole_ends[request]
        assert 0 <= metadata.block_sizes[request] < 2**32

    if metadata.slot_mapping is None:
        assert not metadata.store_only
        return
    assert not metadata.cache_only
    stored = [slot for slot in metadata.slot_mapping.tolist() if slot != -1]
    assert metadata.slot_mapping.shape == (metadata.num_tokens,)
    assert all(0 <= slot < NUM_SLOTS for slot in stored)
    assert len(set(stored)) == len(stored)
    assert metadata.reads_stored == bool(set(stored) & read_slots(message))
    assert message.store_first or not metadata.reads_stored


@fuzz
@given(valid_steps())
def test_a_valid_step_is_accepted(message):
    assert_safe(message, validation.step(message, CONFIG, LIMITS))


@settings(fuzz, max_examples=500)
@given(almost_valid_steps())
def test_an_accepted_step_is_safe(message):
    metadata, error = attempt(validation.step, message, CONFIG, LIMITS)
    if error is None:
        assert_safe(message, metadata)
        return
    # What it was refused for is true.
    assert error.field in step_pb2.Step.DESCRIPTOR.fields_by_name
    if "must not be a slot" in str(error):
        assert set(integers(message.slot_mapping)) & read_slots(message)
    elif "must differ" in str(error):
        stored = [slot for slot in integers(message.slot_mapping) if slot != -1]
        assert len(set(stored)) < len(stored)


@fuzz
@given(st.dictionaries(st.sampled_from(STEP_TENSORS), tensors))
def test_no_tensor_of_a_step_gets_past(fields):
    message = step(**fields)
    metadata, error = attempt(validation.step, message, CONFIG, LIMITS)
    if error is None:
        assert_safe(message, metadata)
    else:
        assert str(error).startswith(error.field)


@fuzz
@given(
    st.builds(
        step_pb2.Step,
        kind=st.integers(-1, 4),
        mask=st.integers(-1, 9),
        block_size=st.integers(0, 2**32 - 1),
        mask_prefix_hole=st.booleans(),
        cache_only=st.booleans(),
        store_only=st.booleans(),
        **{field: st.one_of(st.none(), tensors) for field in STEP_TENSORS},
    )
)
def test_no_step_raises_anything_else(message):
    metadata, error = attempt(validation.step, message, CONFIG, LIMITS)
    if error is None:
        assert_safe(message, metadata)


def int32s(low, high, max_size=6, **kwargs):
    return st.lists(st.integers(low, high), max_size=max_size, **kwargs)


@st.composite
def changed_steps(draw):
    """A step whose page tables are told by those of step 0, which are those that it was drawn with; mostly right."""
    message = draw(valid_steps())
    num_reqs, max_pages = message.page_tables.shape
    base = validation.step(message, CONFIG, LIMITS)
    width = draw(mostly(st.integers(max_pages, 5), st.sampled_from([0, 12, 13, 2**32 - 1])))
    indices = draw(
        mostly(int32s(0, min(max(0, num_reqs * width - 1), 2**31 - 1), unique=True).map(sorted), int32s(-1, 70))
    )
    pages = draw(mostly(int32s(-1, NUM_PAGES - 1, min_size=len(indices), max_size=len(indices)), int32s(-2, NUM_PAGES)))
    exact = {"min_size": num_reqs, "max_size": num_reqs}
    message.page_table_delta.CopyFrom(
        step_pb2.PageTableDelta(
            base_step_id=draw(mostly(st.just(0), st.integers(0, 2**64 - 1))),
            source_rows=draw(mostly(int32s(-1, num_reqs - 1, **exact), int32s(-2, num_reqs)).map(tensor)),
            max_pages=width,
            indices=tensor(indices),
            pages=draw(mostly(st.just(tensor(pages)), tensors)),
        )
    )
    message.ClearField("page_tables")
    return message, base


@settings(fuzz, max_examples=500)
@given(changed_steps())
def test_an_accepted_delta_gives_a_table_that_is_safe(message_and_base):
    message, base = message_and_base
    before = base.tables_as_sent.tolist()
    metadata, error = attempt(validation.step, message, CONFIG, LIMITS, {0: [base]})
    assert base.tables_as_sent.tolist() == before
    if error is not None:
        assert error.field.partition(".")[0] in step_pb2.Step.DESCRIPTOR.fields_by_name
        return
    delta = message.page_table_delta
    blank = [-1] * delta.max_pages
    rows = [(before[row] if row >= 0 else []) for row in integers(delta.source_rows)]
    table = [page for row in rows for page in (row + blank)[: delta.max_pages]]
    for index, page in zip(integers(delta.indices), integers(delta.pages), strict=True):
        table[index] = page
    assert metadata.tables_as_sent.flatten().tolist() == table
    message.page_tables.CopyFrom(tensor(metadata.tables_as_sent.numpy()))
    assert_safe(message, metadata)


few_slots = st.lists(mostly(st.integers(0, NUM_SLOTS - 1), st.integers(-1, NUM_SLOTS)), max_size=6).map(tensor)


@fuzz
@given(mostly(few_slots, tensors), st.booleans())
def test_no_slots_raise_anything_else(message, unique):
    accepted, error = attempt(validation.slots, message, CONFIG, "slot_mapping", unique=unique)
    if error is not None:
        assert error.field == "slot_mapping"
        return
    slots = accepted.tolist()
    assert slots == integers(message)
    assert all(0 <= slot < NUM_SLOTS for slot in slots)
    assert not unique or len(set(slots)) == len(slots)


few_pages = st.lists(mostly(st.integers(0, NUM_PAGES - 1), st.integers(-1, NUM_PAGES)), min_size=2, max_size=2).map(
    tensor
)
pages = mostly(few_pages, tensors)


@fuzz
@given(pages, pages)
def test_no_copy_raises_anything_else(sources, targets):
    message = cache_pb2.CopyPagesRequest(source_pages=sources, target_pages=targets)
    accepted, error = attempt(validation.copy_pages, message, CONFIG)
    if error is not None:
        return
    read, written = (copied.tolist() for copied in accepted)
    assert len(read) == len(written) == len(set(written))
    assert not set(read) & set(written)
    assert all(0 <= page < NUM_PAGES for page in read + written)


arrays = st.builds(
    Array,
    dtype=st.integers(-2, 9),
    shape=st.lists(extents, max_size=5).map(tuple),
    data=st.binary(max_size=64).map(memoryview),
)
# One token, in shapes and lengths that are mostly right.
fitting_arrays = st.builds(
    Array,
    dtype=mostly(st.just(tensor_pb2.DTYPE_FLOAT32), st.integers(0, 5)),
    shape=mostly(st.just((1, 2, 8)), st.sampled_from([(1, 4, 8), (1, 16), (1, 2, -8), (2, 1, 8)])),
    data=mostly(st.just(bytes(64)), st.sampled_from([bytes(128), bytes(63)])).map(memoryview),
)
fitting_fields = st.sampled_from(["qkv", "q", "kv"]).flatmap(
    lambda fields: st.fixed_dictionaries({field: mostly(fitting_arrays, arrays) for field in fields})
)
payloads = mostly(fitting_fields, st.dictionaries(st.sampled_from("qkv"), arrays))
SMALL = AttentionConfig(num_layers=2, num_kv_heads=2, head_dim=8, num_pages=2, page_size=4, dtype=CONFIG.dtype)


@fuzz
@given(payloads, st.sampled_from(["plain", "cache_only", "store_only"]))
def test_no_call_raises_anything_else(received, mode):
    changes = {} if mode == "plain" else {mode: True}
    if mode == "cache_only":
        changes["slot_mapping"] = None
    one = {"cu_seqlens_q": tensor([0, 1]), "context_lens": tensor([1]), "page_tables": tensor([[1]])}
    message = step(**{**one, "slot_mapping": tensor([2]), **changes})
    metadata = validation.step(message, SMALL, ServerConfig())
    accepted, error = attempt(validation.call, step_pb2.Call(), received, SMALL, metadata)
    if error is not None:
        return
    q, k, v, num_heads = accepted
    assert (q is None) == (mode == "store_only")
    assert q is None or (q.shape == (1, num_heads, 8) and num_heads in (2, 4))
    assert (k is None) == (v is None) == (mode == "cache_only")
    assert k is None or k.shape == v.shape == (1, 2, 8)


@fuzz
@given(mostly(st.just(tensor([3])), tensors), payloads)
def test_no_chunk_raises_anything_else(slots, received):
    message = attention_pb2.StoreKvRequest(layer=1, slot_mapping=slots)
    accepted, error = attempt(validation.store_kv, message, received, SMALL)
    if error is not None:
        return
    targets, k, v = accepted
    assert k.shape == v.shape == (len(targets), 2, 8)


@fuzz
@given(
    st.builds(
        step_pb2.AttentionOptions,
        scale=st.one_of(st.none(), st.floats(width=32)),
        softcap=st.floats(width=32),
        window=st.integers(0, 2**32 - 1),
        alibi_slopes=st.one_of(st.none(), tensors),
        sinks=st.one_of(st.none(), tensors),
        backend=st.integers(-1, 9),
    )
)
def test_no_options_raise_anything_else(message):
    options, error = attempt(validation.options, message, CONFIG, 2)
    if error is not None:
        return
    assert abs(options.scale) < float("inf")
    assert 0 <= options.softcap < float("inf")
    assert 0 <= options.window < 2**31
    assert options.alibi_slopes is None or options.alibi_slopes.isfinite().all()
    assert options.sinks is None or (options.sinks < float("inf")).all()


@fuzz
@given(
    st.builds(
        cache_pb2.CreateCacheRequest,
        config=st.builds(
            cache_pb2.CacheConfig,
            **{
                field: mostly(st.sampled_from([8, 64, 512]), st.sampled_from([0, 7, 1025, 2**32 - 1]))
                for field in ("num_layers", "num_kv_heads", "head_dim", "head_dim_v", "page_size", "num_pages")
            },
            dtype=mostly(st.integers(1, 3), st.sampled_from([0, 4, 77])),
            **{
                field: mostly(st.integers(0, 2), st.sampled_from([9, -1]))
                for field in ("layout", "backend", "precision")
            },
            kv_split=st.builds(
                cache_pb2.KvSplit,
                chunk_size=mostly(st.sampled_from([0, 16, 1024]), st.integers(0, 2**32 - 1)),
                max_splits=mostly(st.integers(0, 1024), st.integers(0, 2**32 - 1)),
                batch_invariant=st.sampled_from([None, False, True]),
            ),
        ),
        ttl_s=mostly(st.floats(1, 60), st.floats()),
        name=st.text(max_size=200),
    )
)
def test_no_cache_raises_anything_else(message):
    accepted, error = attempt(validation.create_cache, message, LIMITS)
    if error is not None:
        return
    shape, ttl_s, name = accepted
    config = shape.common
    assert config.num_slots >= 1
    lengths = np.array([0, 1, LIMITS.max_context_len], np.int32)
    assert (-(-lengths // config.kv_split.chunk_keys(lengths)) <= config.kv_split.max_splits).all()
    assert 1 <= ttl_s <= LIMITS.max_ttl_s
    assert len(name) <= 128
