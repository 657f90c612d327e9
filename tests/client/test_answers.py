"""Rows to requests and tensors to answers, without a server."""

from __future__ import annotations

import numpy as np
import pytest
from samp_client import BadRequest
from samp_client.answers import kind_of, read
from samp_client.batches import encode_rows, split

CUT = np.zeros((2, 1), bool)


@pytest.mark.parametrize(
    ("outputs", "kind"),
    [
        (("LABEL", "SCORE", "SCORES"), "classification"),
        (("ACTIVE", "SCORES"), "multi-label"),
        (("SCORE",), "regression"),
        (("EMBEDDING",), "embedding"),
        (tuple(f"ENTITY_{n}" for n in ("LABEL", "SCORE", "START", "END", "COUNT")), "entities"),
        (("SCORES",), None),
        (("ENTITY_LABEL",), None),
    ],
)
def test_the_outputs_tell_the_task(outputs: tuple[str, ...], kind: str | None) -> None:
    assert kind_of([*outputs, "TRUNCATED"]) == kind
    assert kind_of(outputs) is None


def test_entities_are_cut_from_the_text_by_characters() -> None:
    tensors = {
        "TRUNCATED": CUT,
        "ENTITY_LABEL": np.array([[b"place", b"x"], [b"", b""]], dtype=np.object_),
        "ENTITY_SCORE": np.array([[0.5, 0.25], [0, 0]], np.float32),
        "ENTITY_START": np.array([[2, 7], [-1, -1]], np.int32),
        "ENTITY_END": np.array([[6, 8], [-1, -1]], np.int32),
        "ENTITY_COUNT": np.array([[2], [0]], np.int32),
    }
    texts = ["😀 Köln 🎉".encode(), "none"]
    one, other = read("entities", tensors, texts, 5, ())
    assert [(e.label, e.text, e.start, e.end) for e in one.entities] == [  # type: ignore[union-attr]
        ("place", "Köln", 2, 6),
        ("x", "🎉", 7, 8),
    ]
    assert (one.index, other.index) == (5, 6)
    assert other.fields() == {"entities": []}


def test_tensors_of_another_shape_are_an_error() -> None:
    for tensors in ({}, {"TRUNCATED": CUT}, {"TRUNCATED": CUT, "SCORE": np.zeros((3, 1))}):
        with pytest.raises((KeyError, ValueError)):
            read("regression", tensors, ["a", "b"], 0, ())


@pytest.mark.parametrize(
    ("rows", "given"),
    [
        ([("a", "b"), "c"], "text 1 is str"),
        ([b"ab"], "text 0 is bytes"),
        ([("a", "b", "c")], "text 0 is tuple"),
        ([("a", 5)], "text 0 is int"),
        ([("a", "b\ud800")], "text 0 has a lone surrogate"),
        ("ab", "texts is one text"),
    ],
)
def test_what_is_no_pair_is_refused(rows: object, given: str) -> None:
    with pytest.raises(BadRequest) as caught:
        encode_rows(rows, 2)  # type: ignore[arg-type]
    assert given in str(caught.value)


def test_pairs_are_split_by_the_size_of_both_texts() -> None:
    rows = encode_rows([("é", b"b"), ["c", "dddd"], ("e", "f")], 2)
    assert rows == [("é".encode(), b"b"), (b"c", b"dddd"), (b"e", b"f")]
    assert split(rows, 64, 6) == [range(1), range(1, 2), range(2, 3)]
    assert split(rows, 64, 8) == [range(2), range(2, 3)]
    with pytest.raises(BadRequest, match="text 0 is tuple"):
        encode_rows([("a", "b")], 1)
