"""Splitting texts into requests."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samp_client.batches import MAX_ROWS, encode_texts, split
from samp_client.errors import BadRequest


@given(
    st.lists(st.binary(max_size=20), max_size=200),
    st.integers(1, 70),
    st.integers(1, 100),
)
def test_groups_cover_the_rows_in_order_within_the_limits(rows, max_rows, max_bytes):
    groups = split(rows, max_rows, max_bytes)
    assert [index for group in groups for index in group] == list(range(len(rows)))
    for group in groups:
        assert 1 <= len(group) <= max_rows
        size = sum(len(rows[index]) for index in group)
        assert size <= max_bytes or len(group) == 1
    for left, right in pairwise(groups):
        joined = sum(len(rows[index]) for index in (*left, right[0]))
        assert len(left) == max_rows or joined > max_bytes, "a group ended too early"


def test_the_usual_split():
    assert split([b"x"] * 130) == [range(64), range(64, 128), range(128, 130)]
    assert len(split([b"x"] * MAX_ROWS)) == 1
    assert split([]) == []


def test_large_texts_travel_apart():
    megabyte = b"x" * 2**20
    assert [len(group) for group in split([megabyte] * 40)] == [16, 16, 8]
    assert [len(group) for group in split([b"x" * 2**25, b"y"])] == [1, 1]


@pytest.mark.parametrize("limits", [(0, 1), (1, 0)])
def test_limits_below_one_are_refused(limits):
    with pytest.raises(ValueError, match="limits"):
        split([b"x"], *limits)


def test_texts_become_utf8_and_bytes_pass_unchanged():
    assert encode_texts(["é", b"\xff", ""]) == ["é".encode(), b"\xff", b""]


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ("one text", "texts is one str"),
        (b"one text", "texts is one bytes"),
        (["fine", 3], "text 1 is int"),
        ([None], "text 0 is NoneType"),
        (["fine", "fine", "a\ud800"], "text 2 has a lone surrogate at character 1"),
    ],
)
def test_what_is_no_text_is_named(texts, said):
    with pytest.raises(BadRequest, match=said) as caught:
        encode_texts(texts)
    assert caught.value.allowed
    assert caught.value.fix


def test_rows_are_counted_from_the_given_first():
    with pytest.raises(BadRequest, match="text 64 is int"):
        encode_texts([1], 64)
