"""BIO tags to entities: the one rule, for gold tags and for a model's answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.integer[Any]]

Span: TypeAlias = tuple[int, int, str]
"""(start, end, label) in code points of the text, end exclusive."""


def groups(tags: Sequence[str]) -> list[Span]:
    """(first, last, label) of each run of words, last inclusive, from one tag a word.

    B-x begins an entity; I-x continues an x that the word before belongs to, and else begins one.
    A tag without a prefix is an I- of that name; O is outside. transformers' pipelines do so too.
    """
    found: list[Span] = []
    inside = ""
    for index, tag in enumerate(tags):
        begins, label = tag.startswith("B-"), tag[2:] if tag[:2] in ("B-", "I-") else tag
        if tag == "O":
            inside = ""
            continue
        if begins or label != inside:
            found.append((index, index, label))
        else:
            found[-1] = (found[-1][0], index, label)
        inside = label
    return found


def first_tokens(words: IntArray) -> NDArray[np.intp]:
    """The place of each word's first token, from the word of every token, -1 for specials."""
    starts = np.ones(len(words), dtype=bool)
    starts[1:] = words[1:] != words[:-1]
    return np.flatnonzero(starts & (words >= 0))


def word_spans(offsets: IntArray, words: IntArray) -> tuple[IntArray, IntArray]:
    """Start and end of each word in its text: its first token's start, its last token's end."""
    ends = np.ones(len(words), dtype=bool)
    ends[:-1] = words[1:] != words[:-1]
    return offsets[first_tokens(words), 0], offsets[np.flatnonzero(ends & (words >= 0)), 1]
