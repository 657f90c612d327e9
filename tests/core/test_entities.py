"""Entities: grouping, offsets in any script, windows, and a build equal to transformers."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_tasks
from forked import forks
from hypothesis import given
from hypothesis import strategies as st
from small_tasks import HARD_TEXTS, SmallTask, find_entities

from samp_core import bio, evaluate, metrics, pipeline
from samp_core.data import gold_values, read_rows, split_rows
from samp_core.errors import SampError
from samp_core.manifest import read_manifest
from samp_core.pipeline import Pipeline
from samp_core.rows import Rows
from samp_core.tasks import TASKS
from samp_core.text import TextEncoder
from samp_core.windows import Windows

SHARED = Path(__file__).resolve().parents[3] / "shared"
ENTITIES = TASKS["entities"]
Found = list[tuple[int, int, str, float]]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallTask:
    return small_tasks.make("entities", tmp_path_factory.mktemp("entities"))


@pytest.fixture(scope="module")
def built(small: SmallTask, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("built")
    done = forks().samp(*small.command(out, "--tier", "loose:drop=60pt"))
    assert done.code == 0, done.err
    return out, done.json


def answers(served: Pipeline, texts: list[str]) -> list[Found]:
    out = served.predict(texts)
    counts = out["ENTITY_COUNT"][:, 0].tolist()
    columns = [out[f"ENTITY_{name}"] for name in ("START", "END", "LABEL", "SCORE")]
    return [
        [
            (int(start), int(end), label.decode(), float(score))
            for start, end, label, score in zip(*(c[i, :n] for c in columns), strict=True)
        ]
        for i, n in enumerate(counts)
    ]


def assert_same(ours: Found, theirs: Found, text: str) -> None:
    assert [one[:3] for one in ours] == [one[:3] for one in theirs], text
    np.testing.assert_allclose([o[3] for o in ours], [t[3] for t in theirs], atol=1e-5)


# grouping


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O O", []),
        ("B-x I-x O", [(0, 1, "x")]),
        ("B-x B-x", [(0, 0, "x"), (1, 1, "x")]),
        ("I-x I-x", [(0, 1, "x")]),
        ("B-x I-y I-y", [(0, 0, "x"), (1, 2, "y")]),
        ("B-x O I-x", [(0, 0, "x"), (2, 2, "x")]),
        ("x x B-x", [(0, 1, "x"), (2, 2, "x")]),
        ("B-creative-work I-creative-work", [(0, 1, "creative-work")]),
    ],
)
def test_tags_are_grouped(tags: str, expected: list[bio.Span]) -> None:
    assert bio.groups(tags.split()) == expected


@given(st.lists(st.sampled_from(["O", "B-x", "I-x", "B-y", "I-y"]), max_size=12))
def test_grouping_is_that_of_transformers_pipelines(tags: list[str]) -> None:
    from transformers import TokenClassificationPipeline

    words = [
        {"entity": tag, "score": 1.0, "start": i, "end": i + 1, "word": "w"}
        for i, tag in enumerate(tags)
    ]
    pipe = object.__new__(TokenClassificationPipeline)
    pipe.tokenizer = type("", (), {"convert_tokens_to_string": lambda self, t: ""})()
    theirs = [
        (group["start"], group["end"] - 1, group["entity_group"])
        for group in pipe.group_entities(words)
        if group["entity_group"] != "O"
    ]
    assert bio.groups(tags) == theirs


# windows


@given(st.integers(4, 20), st.data(), st.integers(2, 120))
def test_windows_cover_a_text_and_join_to_it(length: int, data: Any, tokens: int) -> None:
    windows = Windows(length, data.draw(st.integers(0, length - 3)))
    row = np.arange(tokens)
    parts = windows.cut(row)
    assert all(len(part) <= length for part in parts)
    assert all(part[0] == 0 and part[-1] == tokens - 1 for part in parts)
    joined = windows.join([part[:, None].astype(np.float32) for part in parts], tokens)
    assert joined[:, 0].tolist() == row.tolist()
    places = windows.places(tokens)
    for one, other in itertools.pairwise(places):
        assert one[1] - other[0] == windows.stride
    assert (places[0][0], places[-1][1]) == (1, tokens - 1)


@given(st.integers(5, 16), st.data(), st.integers(3, 80))
def test_a_token_comes_from_where_it_has_most_context(length: int, data: Any, tokens: int) -> None:
    windows = Windows(length, data.draw(st.integers(0, length - 3)))
    places = windows.places(tokens)
    parts = [np.full((end - start + 2, 1), i, np.float32) for i, (start, end) in enumerate(places)]
    chosen = windows.join(parts, tokens)[:, 0].astype(int)
    for token in range(1, tokens - 1):
        context = {
            i: min(token - start, end - 1 - token)
            for i, (start, end) in enumerate(places)
            if start <= token < end
        }
        best = max(context.values())
        assert chosen[token] == min(i for i, value in context.items() if value == best)


@pytest.mark.parametrize(("length", "stride"), [(48, 0), (48, 11), (20, 5), (10, 7)])
def test_windows_are_the_overflow_of_transformers(
    small: SmallTask, length: int, stride: int
) -> None:
    rng = random.Random(stride)
    for text in [t * 9 for t in small_tasks.sentences(40, rng)]:
        theirs = small.tokenizer(
            text, truncation=True, max_length=length, stride=stride, return_overflowing_tokens=True
        )["input_ids"]
        encoder = TextEncoder.load(small.checkpoint, length).with_windows(stride, 2000)
        (whole,) = encoder.encode([text])
        assert encoder.windows is not None
        assert [part.tolist() for part in encoder.windows.cut(whole.ids)] == theirs
        assert not whole.truncated


def test_a_stride_that_cannot_be(small: SmallTask) -> None:
    with pytest.raises(SampError, match=r"stride 46 of windows of 48 tokens; allowed: 0 to 45"):
        TextEncoder.load(small.checkpoint).with_windows(46, 4)


# a build


def test_every_answer_is_transformers(small: SmallTask, built: tuple[Path, dict]) -> None:
    """Scripts, emoji, combining marks, empty texts, and texts of several windows."""
    served = pipeline.load(built[0], "exact")
    texts = [str(row["text"]) for row in small.rows[:250]]
    texts += [*HARD_TEXTS, *(f"{t} {u} " * 12 for t, u in zip(HARD_TEXTS * 2, texts, strict=False))]
    count = {text: len(small.tokenizer(text, verbose=False)["input_ids"]) for text in texts}
    texts = [text for text in texts if count[text] <= served.text.longest]
    lengths = [count[text] for text in texts]
    assert sum(length > 48 for length in lengths) > 40
    assert max(lengths) > 300
    ours = answers(served, texts)
    total = 0
    for text, found in zip(texts, ours, strict=True):
        theirs = find_entities(small, text)
        assert_same(found, theirs, text)
        total += len(theirs)
        for start, end, *_ in found:
            assert text[start:end].strip() == text[start:end] != ""
    assert total > 500
    assert {label for found in ours for *_, label, _ in found} == {"person", "place"}


def test_a_text_alone_has_the_answer_it_has_in_a_batch(
    small: SmallTask, built: tuple[Path, dict]
) -> None:
    served = pipeline.load(built[0], "exact")
    texts = [str(row["text"]) for row in small.rows[:60]]
    for text, found in zip(texts, answers(served, texts), strict=True):
        assert_same(answers(served, [text])[0], found, text)


def test_the_f1_is_that_of_transformers_answers(small: SmallTask, built: tuple[Path, dict]) -> None:
    out, report = built
    manifest = read_manifest(out)
    assert (manifest.task, manifest.labels) == ("entities", small_tasks.TAGS)
    rows = split_rows(read_rows(small.data, task=ENTITIES)).verification
    hits = extra = missed = 0
    for text, gold in zip(rows.texts, rows.labels, strict=True):
        found = {one[:3] for one in find_entities(small, str(text))}
        hits += len(found & set(gold))
        extra += len(found - set(gold))
        missed += len(set(gold) - found)
    tier = report["tiers"][0]
    assert tier["metric"] == "entity F1"
    assert tier["value"] == round(100 * 2 * hits / (2 * hits + extra + missed), 3)
    assert 80 < tier["value"] < 99.5
    assert tier["ci95"][0] < tier["value"] < tier["ci95"][1]


def test_beyond_the_last_window_a_text_is_truncated(
    small: SmallTask, built: tuple[Path, dict]
) -> None:
    served = pipeline.load(built[0], "exact")
    most = served.text.longest
    text = "ab cd 😀 " * most
    short, long = served.text.encode(["ab", text])
    assert (short.truncated, long.truncated, len(long.ids)) == (False, True, most)
    found = answers(served, [text])[0]
    assert found
    assert max(end for _, end, *_ in found) < len(text)


def test_words_between_spaces(small: SmallTask, tmp_path: Path) -> None:
    encoder = TextEncoder.load(small.checkpoint, 48).with_windows(None, 4, spaces=True)
    encoder.save(tmp_path)
    texts = ["it's @abc , 电影。 x😀y", " a\u2028b ", *HARD_TEXTS]
    texts += [text * 20 for text in HARD_TEXTS]
    for served in (encoder, TextEncoder.load(tmp_path)):
        assert served.spaces
        for text, one in zip(texts, served.encode(texts), strict=True):
            assert one.offsets is not None
            assert one.words is not None
            for (start, _), word in zip(one.offsets.tolist(), one.words.tolist(), strict=True):
                expected = -1 if start < 0 else len(text[: start + 1].split()) - 1
                assert word == expected, text
    words = encoder.encode(["it's @abc ,"])[0].words
    assert words is not None
    assert words.tolist()[1:-1] == [0, 0, 0, 0, 1, 1, 1, 1, 2]


# rows


def test_tagged_tokens_and_spans_are_the_same_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"tokens": ["😀", "New", "York", "!"], "tags": ["O", "B-place", "I-place", "O"]}\n'
        '{"text": "no entity", "entities": []}\n'
    )
    one = read_rows(path, task=ENTITIES)
    assert one.texts == ("😀 New York !", "no entity")
    assert one.labels == (((2, 10, "place"),), ())
    path.write_text(
        '{"text": "😀 New York !", "entities": [{"start": 2, "end": 10, "label": "place"}]}\n'
        '{"tokens": ["no", "entity"], "tags": ["O", "O"]}\n'
    )
    assert read_rows(path, task=ENTITIES).sha256 == one.sha256
    assert read_rows(path, task=ENTITIES, labelled=False).texts == one.texts
    assert gold_values(one, "entities", small_tasks.TAGS)[0] == {(2, 10, "place")}
    with pytest.raises(SampError, match="labels the head lacks: 'place'"):
        gold_values(one, "entities", ("O", "B-person"))


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ('{"text": "abc", "entities": [{"start": 1, "end": 4, "label": "x"}]}', "3 characters"),
        ('{"text": "abc", "entities": [{"start": 1, "end": 1, "label": "x"}]}', "0 <= start < end"),
        ('{"text": "abc", "entities": [{"start": true, "end": 2, "label": "x"}]}', "start"),
        ('{"text": "abc", "entities": [5]}', "entity 5"),
        ('{"text": "abc", "entities": [{"start": 0, "end": 1, "label": ""}]}', "label is empty"),
        (
            '{"text": "abc", "entities": [{"start": 0, "end": 2, "label": "x"},'
            ' {"start": 1, "end": 3, "label": "x"}]}',
            "overlap",
        ),
        ('{"tokens": ["a", "b"], "tags": ["O"]}', "2 tokens and tags 1"),
        ('{"tokens": "a b", "tags": ["O"]}', "tokens is"),
        ('{"tokens": ["a"]}', "no column tags"),
        ('{"text": "abc"}', "no column entities"),
    ],
)
def test_each_fault_is_one_clear_error(tmp_path: Path, row: str, why: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(row + "\n")
    with pytest.raises(SampError) as caught:
        read_rows(path, task=ENTITIES)
    assert f"{path}:1" in caught.value.given
    assert why in str(caught.value)


# the metric


class _Counted:
    """A split for the metric's statistics: they read nothing of it."""

    gold = None
    encodings = range(400)


def test_the_promise_is_a_bound_with_a_worst_text() -> None:
    metric = metrics.of(ENTITIES, small_tasks.TAGS)
    rng = np.random.default_rng(0)
    control = np.stack([rng.poisson(1.2, 2000), rng.poisson(0.2, 2000), rng.poisson(0.3, 2000)], 1)
    control = control.astype(float)
    same = metric.test(control, control, 0.005, 0.05)
    assert (same.b, same.c, same.drop) == (0, 0, 0.0)
    # Nothing changed: about three texts of two entities, of 1.5 a text, bound the drop.
    assert 0.001 < same.bound < 0.006
    worse = control.copy()
    worse[:100, 0] -= np.minimum(worse[:100, 0], 1)
    worse[:100, 2] += control[:100, 0] - worse[:100, 0]
    test = metric.test(control, worse, 0.05, 0.05)
    assert test.b == int((control[:100, 0] > 0).sum())
    assert test.c == 0
    exact = float(evaluate.f1(control.sum(0)) - evaluate.f1(worse.sum(0)))
    assert test.drop == pytest.approx(exact)
    assert exact < test.bound < 2 * exact
    assert not metric.test(control, worse, exact, 0.05).passed


def test_a_bound_holds_on_fresh_texts_as_often_as_it_says() -> None:
    """Texts drawn from a known population, 200 times: the true drop is under the bound in 95%."""
    rng = np.random.default_rng(1)
    metric = metrics.of(ENTITIES, small_tasks.TAGS)
    size = 200_000
    control = np.stack([rng.poisson(1.0, size), rng.poisson(0.3, size), rng.poisson(0.4, size)], 1)
    hit = (rng.random(size) < 0.03) & (control[:, 0] > 0)
    candidate = control.copy()
    candidate[hit, 0] -= 1
    candidate[hit, 2] += 1
    control, candidate = control.astype(float), candidate.astype(float)
    true = float(evaluate.f1(control.sum(0)) - evaluate.f1(candidate.sum(0)))
    held = 0
    for _ in range(200):
        chosen = rng.integers(0, size, 600)
        held += metric.test(control[chosen], candidate[chosen], 1.0, 0.05).bound >= true
    assert held >= 184  # 190 expected, less two deviations


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared beside the clone")
def test_wnut_rows_and_tokens() -> None:
    from transformers import AutoTokenizer

    rows: Rows = read_rows(SHARED / "data" / "wnut17-test.jsonl", task=ENTITIES)
    assert rows.n == 1287
    assert sum(map(len, rows.labels)) == 1079
    theirs = AutoTokenizer.from_pretrained(SHARED / "checkpoints" / "wnut")
    ours = TextEncoder.load(SHARED / "checkpoints" / "wnut").encode(rows.texts)
    wanted = theirs(list(rows.texts), return_offsets_mapping=True)
    for i, one in enumerate(ours):
        assert one.ids.tolist() == wanted["input_ids"][i]
        assert one.offsets is not None
        assert one.words is not None
        assert one.offsets[1:-1].tolist() == [list(o) for o in wanted["offset_mapping"][i][1:-1]]
        assert one.words.tolist()[1:-1] == wanted.word_ids(i)[1:-1]
