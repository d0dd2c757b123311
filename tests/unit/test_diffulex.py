"""Diffulex's metadata as steps: what each token sees must be what it sees in that engine."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnd
import attnd_server
from attnd.errors import InvalidRequest
from attnd.foreign_metadata import check_options
from attnd.integrations.diffulex import metadata as diffulex
from attnd.integrations.diffulex.geometry import check_geometry
from attnd.integrations.diffulex.metadata import AttnMetaDataBase, from_diffulex
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.warming_up import this_thread_warms_up
from attnd.v1 import cache_pb2
from tests.unit.plain import PlainCache, elements, one_row, seen

REF = cache_pb2.CacheRef(id=b"0123456789abcdef", epoch=1)


def _int32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _autoregressive(**changes) -> AttnMetaDataBase:
    """Two requests in decode: 5 and 33 cached tokens."""
    fields = {
        "cu_seqlens_q": _int32([0, 1, 2]),
        "context_lens": _int32([5, 33]),
        "page_tables": _int32([[2, -1], [4, 1]]),
        "slot_mapping": _int32([2 * 32 + 5, 1 * 32 + 1]),
    }
    return AttnMetaDataBase(**{**fields, **changes})


def _blocks(**changes) -> AttnMetaDataBase:
    """Block-diffusion, blocks of 4: request 0 in prefill with 6 of 8 tokens in its prompt, request 1 in decode."""
    metadata = AttnMetaDataBase(
        cu_seqlens_q=_int32([0, 8, 12]),
        context_lens=_int32([0, 8]),
        page_tables=_int32([[0, 1, -1], [2, 3, 4]]),
        slot_mapping=_int32([*range(8), -1, -1, -1, -1]),
        page_size=4,
        block_size=4,
    )
    fields = {
        "valid_slices": _int32([8, 11]),
        "status_table": _int32([0, 1]),
        "prefix_lens": _int32([6, 6]),
        "padded_prefix_lens": _int32([8, 8]),
    }
    metadata.init_multi_block(**{**fields, **changes})
    return metadata


class TestAutoregressive:
    def test_decode(self) -> None:
        step = from_diffulex(_autoregressive())
        assert (step.kind, step.mask, step.block_size) == ("decode", "causal", 0)
        message = step.to_message(1, REF)
        assert elements(message.cu_seqlens_q) == [0, 1, 2]
        assert elements(message.context_lens) == [5, 33]
        assert elements(message.page_tables) == [[2, -1], [4, 1]]
        assert elements(message.slot_mapping) == [69, 33]
        assert not message.HasField("valid_lens")
        assert not message.HasField("prefix_lens")

    @pytest.mark.parametrize("is_prefill", [True, [True, False], [True], (False, True)])
    def test_prefill(self, is_prefill) -> None:
        assert from_diffulex(_autoregressive(is_prefill=is_prefill)).kind == "prefill"

    def test_unequal_lengths_are_a_prefill(self) -> None:
        metadata = _autoregressive(cu_seqlens_q=_int32([0, 1, 3]), slot_mapping=None)
        assert from_diffulex(metadata).kind == "prefill"

    def test_nothing_is_stored_if_the_engine_says_so(self) -> None:
        assert from_diffulex(_autoregressive(need_kv_cache_store_static=False)).slot_mapping is None
        assert from_diffulex(_autoregressive(slot_mapping=None)).slot_mapping is None

    def test_any_object_with_the_attributes_will_do(self) -> None:
        bare = SimpleNamespace(cu_seqlens_q=[0, 2, 3])
        message = from_diffulex(bare).to_message(1, REF)
        assert elements(message.context_lens) == [0, 0]
        assert message.page_tables.shape == [2, 0]
        assert not message.HasField("slot_mapping")
        numpy = SimpleNamespace(
            cu_seqlens_q=np.array([0, 1]), context_lens=np.array([3]), page_tables=np.array([[7]]), is_prefill=False
        )
        message = from_diffulex(numpy).to_message(1, REF)
        assert elements(message.page_tables) == [[7]]

    def test_requests_that_pad_a_graph_are_dropped(self) -> None:
        metadata = _autoregressive(
            cu_seqlens_q=_int32([0, 1, 2, 2, 2]),
            context_lens=_int32([5, 33, 0, 0]),
            page_tables=_int32([[2, -1], [4, 1], [0, 0], [0, 0]]),
            slot_mapping=_int32([69, 33, -1, -1]),
        )
        step = from_diffulex(metadata)
        assert step.kind == "decode"
        message = step.to_message(1, REF)
        assert elements(message.cu_seqlens_q) == [0, 1, 2]
        assert elements(message.page_tables) == [[2, -1], [4, 1]]
        assert elements(message.slot_mapping) == [69, 33]

    def test_no_tokens_at_all(self) -> None:
        step = from_diffulex(_autoregressive(cu_seqlens_q=_int32([0]), slot_mapping=None))
        assert (step.kind, step.mask, step.query_lens) == ("prefill", "causal", [])


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"cu_seqlens_q": None}, "cu_seqlens_q is None, but must say where each request starts"),
            ({"cu_seqlens_q": _int32([1, 2])}, "cu_seqlens_q starts with [1], but must start with 0"),
            ({"context_lens": _int32([5])}, "context_lens has 1 elements, but must have 2, one a request"),
            ({"status_table": _int32([1])}, "status_table has 1 elements, but must have 2"),
            ({"context_lens": torch.tensor([1.0, 2.0])}, "context_lens has dtype float32"),
            (
                {"slot_mapping": _int32([3, 4, 5])},
                "slot_mapping has 3 elements, but must be -1 past the step's 2 tokens",
            ),
        ],
    )
    def test_names_the_attribute(self, changes: dict, message: str) -> None:
        with pytest.raises(InvalidRequest) as caught:
            from_diffulex(_autoregressive(**changes))
        assert message in str(caught.value)
        assert caught.value.field == next(iter(changes))

    def test_geometry_is_compared_with_the_cache(self) -> None:
        check_geometry(_autoregressive(), cache_pb2.CacheConfig(page_size=32))
        check_geometry(SimpleNamespace(), cache_pb2.CacheConfig(page_size=16, layout=cache_pb2.LAYOUT_DISTINCT))
        with pytest.raises(InvalidRequest, match="page_size is 32, but must be 16 as in the cache"):
            check_geometry(_autoregressive(), cache_pb2.CacheConfig(page_size=16))
        distinct = cache_pb2.CacheConfig(page_size=32, layout=cache_pb2.LAYOUT_DISTINCT)
        with pytest.raises(InvalidRequest, match="kv_cache_layout is 'unified', but must be 'distinct'"):
            check_geometry(_autoregressive(), distinct)


class TestBlockDiffusion:
    def test_block_causal(self) -> None:
        step = from_diffulex(_blocks())
        assert (step.kind, step.mask, step.block_size) == ("prefill", "block_causal", 4)
        assert step.valid_lens == [8, 3]
        assert step.prefix_lens is None

    def test_decode_of_whole_blocks(self) -> None:
        metadata = _blocks(status_table=_int32([1, 2]), valid_slices=_int32([4, 8]))
        metadata.cu_seqlens_q = _int32([0, 4, 8])
        metadata.slot_mapping = None
        step = from_diffulex(metadata)
        assert (step.kind, step.mask, step.valid_lens) == ("decode", "block_causal", None)

    def test_prefix_full_for_prefill_only(self) -> None:
        step = from_diffulex(_blocks(is_prefix_full=True))
        assert step.mask == ["prefix_full", "block_causal"]
        assert (step.prefix_lens, step.padded_prefix_lens, step.mask_prefix_hole) == ([6, 6], [8, 8], False)

    def test_prefix_causal_for_prefill_only(self) -> None:
        assert from_diffulex(_blocks(is_prefix_full=True, prefix_causal=True)).mask == ["causal", "block_causal"]
        step = from_diffulex(_blocks(prefix_causal=True, status_table=_int32([0, 0])))
        assert (step.mask, step.block_size) == ("causal", 0)

    def test_prefix_hole(self) -> None:
        message = from_diffulex(_blocks(mask_prefix_hole=True)).to_message(1, REF)
        assert seen(message, 1, 0) == ([0, 1, 2, 3, 4, 5], [0, 1, 2])

    def test_neither_block_causal_nor_autoregressive_is_bidirectional(self) -> None:
        metadata = _blocks()
        metadata.is_block_causal = False
        assert from_diffulex(metadata).mask == "bidirectional"


def _engine_sees(metadata: AttnMetaDataBase, request: int, i: int) -> tuple[list[int], list[int]]:
    """What a token sees in Diffulex, asked of each key one by one; see `seen`."""
    start = int(metadata.cu_seqlens_q[request])
    valid = int(metadata.valid_slices[request]) - start
    context, block = int(metadata.context_lens[request]), metadata.block_size
    prefix, padded = int(metadata.prefix_lens[request]), int(metadata.padded_prefix_lens[request])
    prefilling = int(metadata.status_table[request]) == 0
    if i >= valid:
        return [], []

    def sees_new(j: int) -> bool:
        within_block = context + j < ((context + i) // block + 1) * block
        if metadata.prefix_causal and prefilling:
            return j <= i
        if not metadata.is_block_causal:
            return True
        if not (metadata.is_prefix_full and prefilling):
            return within_block
        # The prefix is counted from the first new token, the blocks behind it by position.
        pure = i < prefix and j < prefix
        return pure or (prefix <= i < padded and j < padded) or (i >= padded and within_block)

    cached = [p for p in range(context) if not (metadata.mask_prefix_hole and prefix <= p < padded)]
    return cached, [j for j in range(valid) if sees_new(j)]


@st.composite
def _block_steps(draw: st.DrawFn) -> AttnMetaDataBase:
    block = draw(st.sampled_from([2, 4]))
    is_prefix_full = draw(st.booleans())
    bounds, valid_ends, contexts, status, prefixes, padded = [0], [], [], [], [], []
    for _ in range(draw(st.integers(1, 3))):
        prefix = draw(st.integers(0, 9))
        prefixes.append(prefix)
        padded.append(-(-prefix // block) * block)
        status.append(draw(st.sampled_from([0, 1, 2])))
        contexts.append(draw(st.integers(0, 12)))
        num_new = draw(st.integers(1, 12))
        valid_ends.append(bounds[-1] + draw(st.integers(0, num_new)))
        bounds.append(bounds[-1] + num_new)
    metadata = AttnMetaDataBase(
        cu_seqlens_q=_int32(bounds),
        context_lens=_int32(contexts),
        page_tables=torch.arange(3 * len(contexts), dtype=torch.int32).reshape(-1, 3),
        page_size=4,
        block_size=block,
    )
    metadata.init_multi_block(
        _int32(valid_ends),
        1,
        is_prefix_full,
        _int32(status),
        _int32(prefixes),
        _int32(padded),
        mask_prefix_hole=draw(st.booleans()),
        prefix_causal=draw(st.booleans()),
    )
    metadata.is_block_causal = draw(st.integers(0, 3)) > 0
    return metadata


def _hole_cannot_be_said(metadata: AttnMetaDataBase) -> bool:
    """Whether a request hides cached positions by the numbers with which it counts new tokens."""
    if not (metadata.is_block_causal and metadata.is_prefix_full and metadata.mask_prefix_hole):
        return False
    columns = zip(
        metadata.status_table, metadata.prefix_lens, metadata.padded_prefix_lens, metadata.context_lens, strict=True
    )
    return not metadata.prefix_causal and any(
        status == 0 and prefix < min(padded, context) for status, prefix, padded, context in columns
    )


@settings(deadline=None, max_examples=200)
@given(_block_steps())
def test_every_token_sees_what_it_sees_in_the_engine(metadata: AttnMetaDataBase) -> None:
    if _hole_cannot_be_said(metadata):
        with pytest.raises(InvalidRequest, match="mask_prefix_hole hides") as caught:
            from_diffulex(metadata)
        assert caught.value.field == "mask_prefix_hole"
        return
    message = from_diffulex(metadata).to_message(1, REF)
    bounds = metadata.cu_seqlens_q.tolist()
    for request in range(metadata.num_reqs):
        for i in range(bounds[request + 1] - bounds[request]):
            assert seen(message, request, i) == _engine_sees(metadata, request, i), (request, i)


class TestPrefixBehindAContext:
    """Prefixes of requests in prefill, counted from the first new token there and from the first cached one here."""

    def _metadata(self, **changes) -> AttnMetaDataBase:
        """Request 0 without a context; request 1 with one of 4, of which the page table names a page of 4."""
        metadata = AttnMetaDataBase(
            cu_seqlens_q=_int32([0, 5, 16]),
            context_lens=_int32([0, 4]),
            page_tables=_int32([[0, 1, -1, -1], [2, 3, 4, 5]]),
            slot_mapping=_int32([*range(5), *range(12, 23)]),
            page_size=4,
            block_size=4,
        )
        metadata.init_multi_block(
            **{
                "valid_slices": _int32([5, 16]),
                "is_prefix_full": True,
                "status_table": _int32([0, 0]),
                "prefix_lens": _int32([2, 5]),
                "padded_prefix_lens": _int32([4, 8]),
                **changes,
            }
        )
        return metadata

    def test_positions_have_the_context_added(self) -> None:
        step = from_diffulex(self._metadata())
        assert (step.prefix_lens, step.padded_prefix_lens) == ([2, 9], [4, 12])

    def test_requests_in_decode_keep_theirs(self) -> None:
        step = from_diffulex(self._metadata(status_table=_int32([0, 1]), mask_prefix_hole=True))
        assert (step.prefix_lens, step.padded_prefix_lens) == ([2, 5], [4, 8])

    def test_the_metadata_is_not_changed(self) -> None:
        metadata = self._metadata(prefix_lens=[2, 5], padded_prefix_lens=[4, 8])
        assert from_diffulex(metadata).prefix_lens == from_diffulex(metadata).prefix_lens == [2, 9]

    def test_a_hole_that_hides_nothing_is_no_hindrance(self) -> None:
        message = from_diffulex(self._metadata(mask_prefix_hole=True)).to_message(1, REF)
        assert seen(message, 1, 0) == ([0, 1, 2, 3], [0, 1, 2, 3, 4])

    def test_a_hole_in_the_context_cannot_be_said(self) -> None:
        hole = {"mask_prefix_hole": True, "prefix_lens": _int32([2, 3])}
        with pytest.raises(InvalidRequest, match=r"mask_prefix_hole hides \[3, 4\) of request 1"):
            from_diffulex(self._metadata(**hole))
        # Where the mask does not count new tokens, the hole is as ever.
        assert from_diffulex(self._metadata(**hole, prefix_causal=True)).prefix_lens == [2, 3]


class TestCacheOnly:
    """Fast-dLLM v2 refines one sub-block against a cache that holds the whole buffer."""

    def _metadata(self, **changes) -> AttnMetaDataBase:
        """Sub-blocks of 4: request 0 refines positions 4..8 of 12, request 1 positions 8..12 of 12; pages of 8."""
        metadata = AttnMetaDataBase(
            cu_seqlens_q=_int32([0, 4, 8]),
            context_lens=_int32([12, 12]),
            page_tables=_int32([[3, 0, -1], [1, 2, -1]]),
            slot_mapping=_int32([28, 29, 30, 31, 16, 17, 18, 19]),
            page_size=8,
            block_size=8,
        )
        metadata.init_multi_block(_int32([4, 8]), 2, False, _int32([2, 2]), _int32([0, 0]), _int32([0, 0]))
        metadata.fdv2_cache_only = True
        for name, value in changes.items():
            setattr(metadata, name, value)
        return metadata

    @pytest.mark.parametrize("slots", [None, _int32([-1] * 8)], ids=["none", "all_minus_one"])
    def test_without_a_store_calls_have_only_queries(self, slots) -> None:
        step = from_diffulex(self._metadata(slot_mapping=slots))
        assert step.cache_only
        assert step.slot_mapping is None
        assert from_diffulex(self._metadata(need_kv_cache_store_static=False)).cache_only

    def test_a_store_into_the_context_becomes_a_hole(self) -> None:
        step = from_diffulex(self._metadata())
        assert (step.kind, step.mask, step.cache_only, step.mask_prefix_hole) == (
            "decode",
            "bidirectional",
            False,
            True,
        )
        assert (step.prefix_lens, step.padded_prefix_lens) == ([4, 8], [8, 12])

    def test_gives_what_the_engine_gives(self) -> None:
        torch.manual_seed(0)
        cache = PlainCache(num_slots=32, page_size=8, num_kv_heads=2, head_dim=8)
        cache.k, cache.v = torch.randn_like(cache.k), torch.randn_like(cache.v)
        q = torch.randn(8, 4, 8, dtype=torch.float64)
        k, v = torch.randn(2, 8, 2, 8, dtype=torch.float64)
        metadata = self._metadata(valid_slices=_int32([4, 7]), slot_mapping=_int32([28, 29, 30, 31, 16, 17, 18, -1]))
        engine = PlainCache(num_slots=32, page_size=8, num_kv_heads=2, head_dim=8)
        engine.k, engine.v = cache.k.clone(), cache.v.clone()
        engine.store(metadata.slot_mapping.tolist(), k, v)
        expected = torch.zeros_like(q)
        for request, pages in enumerate(([3, 0], [1, 2])):
            slots = [pages[p // 8] * 8 + p % 8 for p in range(12)]
            for i in range(4 if request == 0 else 3):
                expected[4 * request + i] = one_row(q[4 * request + i], engine.k[slots], engine.v[slots], 0.3)

        output = cache.attend(from_diffulex(metadata).to_message(1, REF), q, k, v, 0.3)

        torch.testing.assert_close(output, expected)
        assert torch.equal(cache.k, engine.k)
        assert torch.equal(cache.v, engine.v)

    @pytest.mark.parametrize(
        ("options", "field"),
        [
            (AttentionOptions(window=6), "window"),
            (AttentionOptions(alibi_slopes=torch.tensor([0.5, 0.25])), "alibi_slopes"),
        ],
        ids=["window", "alibi"],
    )
    def test_layers_that_look_at_positions_are_refused(self, options: AttentionOptions, field: str) -> None:
        step = from_diffulex(self._metadata())
        with pytest.raises(InvalidRequest, match=f"{field} .* must be absent in a step with fdv2_cache_only") as caught:
            check_options(step, options)
        assert caught.value.field == field
        check_options(step, AttentionOptions(scale=0.3, softcap=4.0, sinks=[0.0, 1.0]))
        check_options(from_diffulex(self._metadata(slot_mapping=None)), options)

    @pytest.mark.parametrize(
        ("slots", "index"),
        [
            ([28, 30, 29, 31, 16, 17, 18, 19], 1),
            ([28, 29, 30, 31, -1, -1, -1, -1], 4),
            ([28, 29, 30, -1, 16, 17, 18, 19], 3),
            ([28, 29, 30, 31, 18, 19, 20, 21], 6),
            ([40, 41, 42, 43, 16, 17, 18, 19], 0),
        ],
        ids=["out_of_order", "request_not_stored", "token_not_stored", "past_the_context", "page_not_in_table"],
    )
    def test_other_stores_cannot_be_said(self, slots: list[int], index: int) -> None:
        with pytest.raises(
            InvalidRequest, match=rf"slot_mapping\[{index}\] is {slots[index]}, but .* contiguous"
        ) as caught:
            from_diffulex(self._metadata(slot_mapping=_int32(slots)))
        assert caught.value.field == "slot_mapping"

    def test_a_stored_token_that_does_not_count_cannot_be_said(self) -> None:
        with pytest.raises(InvalidRequest, match=r"slot_mapping\[7\] is 19, but .* the 3 valid tokens of request 1"):
            from_diffulex(self._metadata(valid_slices=_int32([4, 7])))

    def test_the_hole_is_taken(self) -> None:
        hole = {"mask_prefix_hole": True, "prefix_lens": _int32([0, 3]), "padded_prefix_lens": _int32([0, 4])}
        with pytest.raises(InvalidRequest, match=r"mask_prefix_hole hides \[3, 4\) of request 1"):
            from_diffulex(self._metadata(**hole))
        hole["padded_prefix_lens"] = _int32([0, 3])
        assert from_diffulex(self._metadata(**hole)).prefix_lens == [4, 8]


class TestMirroredNames:
    def test_properties(self) -> None:
        metadata = _autoregressive(is_prefill=[True, False])
        assert (metadata.num_reqs, metadata.has_prefill, metadata.all_prefill) == (2, True, False)
        assert metadata.need_kv_cache_store
        assert not AttnMetaDataBase().need_kv_cache_store
        assert not AttnMetaDataBase(slot_mapping=_int32([])).need_kv_cache_store
        assert not AttnMetaDataBase(is_prefill=[]).all_prefill
        assert AttnMetaDataBase(is_prefill=True).all_prefill
        static = _autoregressive(has_prefill_static=True, all_prefill_static=True, need_kv_cache_store_static=False)
        assert (static.has_prefill, static.all_prefill, static.need_kv_cache_store) == (True, True, False)

    @pytest.mark.parametrize(
        ("is_prefill", "flags"),
        [
            (True, (True, True)),
            (False, (False, False)),
            ([], (False, False)),
            ([False, True], (True, False)),
            (torch.tensor([1, 2]), (True, True)),
        ],
    )
    def test_prefill_flags(self, is_prefill, flags: tuple[bool, bool]) -> None:
        assert attnd.infer_prefill_flags(is_prefill) == flags

    def test_chunk_size(self) -> None:
        metadata = _blocks(buffer_size=3)
        assert metadata.chunk_size == 12
        assert AttnMetaDataBase(block_size=8).chunk_size == 8

    def test_defaults(self) -> None:
        metadata = AttnMetaDataBase()
        assert (metadata.page_size, metadata.block_size, metadata.kv_cache_layout) == (32, 32, "unified")
        assert metadata.is_prefill == [False]
        assert not hasattr(metadata, "use_multi_block")

    def test_fetch_function(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(diffulex, "_fetch", None)
        with pytest.raises(InvalidRequest, match="set_fetch_fn_for_attn_metadata"):
            attnd.fetch_attn_metadata()
        marker = object()
        attnd.set_fetch_fn_for_attn_metadata(lambda: marker)
        assert attnd.fetch_attn_metadata() is marker

    def test_warming_up(self) -> None:
        assert not attnd.is_warming_up()
        attnd.set_warming_up(True)
        try:
            assert attnd.is_warming_up()
            assert diffulex.WARMING_UP is True
        finally:
            attnd.reset_warming_up()
        assert not attnd.is_warming_up()
        assert diffulex.WARMING_UP is False

    def test_client_and_server_have_one_state(self) -> None:
        assert attnd_server.is_warming_up is attnd.is_warming_up
        assert attnd_server.set_warming_up is attnd.set_warming_up
        assert attnd_server.reset_warming_up is attnd.reset_warming_up

    def test_a_thread_that_warms_up_ends_nobody_elses_warm_up(self) -> None:
        elsewhere: list[bool] = []
        with this_thread_warms_up():
            other = threading.Thread(target=lambda: elsewhere.append(attnd.is_warming_up()))
            other.start()
            other.join()
            assert attnd.is_warming_up()
        assert (elsewhere, attnd.is_warming_up()) == ([False], False)
        attnd.set_warming_up(True)
        try:
            with this_thread_warms_up():
                pass
            assert attnd.is_warming_up()
        finally:
            attnd.reset_warming_up()
