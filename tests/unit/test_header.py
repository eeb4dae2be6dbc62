"""Headers and frames: what is written is read, what is damaged is refused."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.dispatch.header import (
    HEADER_BYTES,
    OLDEST_VERSION,
    VERSION,
    Header,
    Kind,
    ReplyFrame,
    RequestFrame,
)
from workers.dispatch.options import LinkTerms, MessageShape
from workers.errors import ConfigError, DispatchError

SHAPE = MessageShape(hidden_size=24, top_k=3, dtype=torch.float32)

headers = st.builds(
    Header,
    kind=st.sampled_from(list(Kind)),
    message_id=st.integers(0, 2**62),
    incarnation=st.integers(0, 2**32 - 1),
    layer=st.integers(0, 2**16 - 1),
    micro_batch=st.integers(0, 255),
    attempt=st.integers(0, 255),
    term=st.integers(0, 2**32 - 1),
    num_rows=st.integers(0, 2**31),
    capacity=st.integers(0, 2**31),
    buffer=st.integers(0, 255),
    flags=st.integers(0, 255),
    status=st.integers(0, 255),
    view_version=st.integers(0, 2**62),
    queue_depth=st.integers(0, 2**16 - 1),
    payload_checksum=st.integers(0, 2**32 - 1),
    version=st.just(VERSION),
)


@settings(derandomize=True, deadline=None)
@given(headers)
def test_a_header_is_read_as_it_was_written(header):
    raw = memoryview(bytearray(HEADER_BYTES))
    header.pack_into(raw)
    assert Header.unpack_from(raw) == header


@settings(derandomize=True, deadline=None)
@given(headers, st.integers(0, HEADER_BYTES - 1), st.integers(1, 255))
def test_no_changed_byte_goes_unnoticed(header, at, flip):
    raw = memoryview(bytearray(HEADER_BYTES))
    header.pack_into(raw)
    raw[at] ^= flip
    with pytest.raises(DispatchError):
        Header.unpack_from(raw)


def test_the_previous_version_is_read_and_written():
    raw = memoryview(bytearray(HEADER_BYTES))
    Header(Kind.DATA, 5, 1, queue_depth=9, payload_checksum=7, version=OLDEST_VERSION).pack_into(
        raw
    )
    read = Header.unpack_from(raw)
    assert (read.version, read.message_id) == (OLDEST_VERSION, 5)
    assert (read.queue_depth, read.payload_checksum) == (0, 0)


@pytest.mark.parametrize("version", [0, VERSION + 1])
def test_other_versions_are_refused(version):
    raw = memoryview(bytearray(HEADER_BYTES))
    Header(Kind.DATA, 5, 1, version=version).pack_into(raw)
    with pytest.raises(DispatchError, match="version"):
        Header.unpack_from(raw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("hidden", "top_k"), [(24, 3), (7, 1), (1, 32), (4096, 10)])
def test_rows_survive_the_copy_of_a_prefix(dtype, hidden, top_k):
    shape = MessageShape(hidden_size=hidden, top_k=top_k, dtype=dtype)
    sent, received = RequestFrame(shape, 6), RequestFrame(shape, 9)
    x = torch.randn(4, hidden).to(dtype)
    ids = np.arange(4 * top_k, dtype=np.int32).reshape(4, top_k) - 1
    weights = np.random.default_rng(0).random((4, top_k), dtype=np.float32)
    rows = sent.rows(4)
    rows.values_RH[:] = x
    rows.masks_R[:] = range(4)
    rows.ids_RK[:] = ids
    rows.weights_RK[:] = weights
    sent.seal(Header(Kind.DATA, 1, 1, num_rows=4), payload_checksum=True)

    message = sent.message(4)
    received.data[: len(message)] = message

    header = received.open()
    assert header.num_rows == 4
    rows = received.rows(header.num_rows)
    assert torch.equal(rows.values_RH, x)
    assert rows.masks_R.tolist() == [0, 1, 2, 3]
    assert np.array_equal(rows.ids_RK, ids)
    assert np.array_equal(rows.weights_RK, weights)


def test_changed_rows_are_noticed_when_they_are_summed():
    frame = ReplyFrame(SHAPE, 4)
    frame.values_CH[:2] = 1.0
    frame.seal(Header(Kind.REPLY, 1, 1, num_rows=2), payload_checksum=True)
    frame.values_CH[1, 3] = 2.0
    with pytest.raises(DispatchError, match="changed"):
        frame.open()


def test_more_rows_than_fit_are_refused_on_both_sides():
    frame = RequestFrame(SHAPE, 4)
    with pytest.raises(DispatchError):
        frame.message(5)
    frame.seal(Header(Kind.DATA, 1, 1, num_rows=5))
    with pytest.raises(DispatchError):
        frame.open()


def test_masks_hold_every_bit():
    frame = ReplyFrame(SHAPE, 2)
    frame.rows(1).masks_R[0] = np.uint32(0xFFFFFFFF)
    assert frame.words_CW[0, 0] == -1


def test_more_experts_than_a_mask_holds_are_refused():
    with pytest.raises(ConfigError, match="top_k"):
        MessageShape(hidden_size=8, top_k=33, dtype=torch.float32)


def test_terms_that_are_not_understood_are_refused():
    with pytest.raises(DispatchError, match="not understood"):
        LinkTerms.from_json('{"version": 2, "colour": "red"}')


def test_what_only_a_newer_version_has_is_left_out_of_terms():
    terms = LinkTerms(
        version=3, transport="gloo", hidden_size=8, top_k=2, dtype="float32", capacity_rows=4,
        num_buffers=2, link_timeout_s=1.0,
    )  # fmt: skip
    newer = {**json.loads(terms.to_json()), "colour": "red"}

    assert LinkTerms.from_json(json.dumps(newer)) == terms
