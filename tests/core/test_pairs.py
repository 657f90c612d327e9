"""Pairs of texts: tokens and logits equal to transformers, and a build of a small checkpoint."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import small_tasks
from forked import forks
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tasks import HARD_TEXTS, SmallTask

from samp_core import pipeline
from samp_core.data import read_rows, split_rows
from samp_core.errors import SampError
from samp_core.manifest import read_manifest
from samp_core.tasks import TASKS
from samp_core.text import TextEncoder

SHARED = Path(__file__).resolve().parents[3] / "shared"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallTask:
    return small_tasks.make("pairs", tmp_path_factory.mktemp("pairs"))


def _same(made: SmallTask, length: int, pairs: list[tuple[str, str]]) -> None:
    ours = TextEncoder.load(made.checkpoint, length).encode(pairs)
    wanted = made.tokenizer(
        *map(list, zip(*pairs, strict=True)), truncation="longest_first", max_length=length,
        return_offsets_mapping=True, return_special_tokens_mask=True,
    )  # fmt: skip
    whole = made.tokenizer(*map(list, zip(*pairs, strict=True)), verbose=False)["input_ids"]
    for i, one in enumerate(ours):
        assert one.ids.tolist() == wanted["input_ids"][i], pairs[i]
        assert one.types.tolist() == wanted["token_type_ids"][i]
        assert one.truncated == (len(whole[i]) > length)
        special = np.array(wanted["special_tokens_mask"][i], dtype=bool)
        offsets = np.where(special[:, None], -1, wanted["offset_mapping"][i])
        words = [-1 if w is None else w for w in wanted.word_ids(i)]
        assert one.offsets is not None
        assert one.words is not None
        assert one.offsets.tolist() == offsets.tolist()
        assert one.words.tolist() == words


@pytest.mark.parametrize("length", [5, 6, 17, 48])
def test_tokens_and_truncation_equal_transformers(small: SmallTask, length: int) -> None:
    rng = random.Random(length)
    texts = [*HARD_TEXTS, *small_tasks.sentences(200, rng), *(t * 4 for t in HARD_TEXTS)]
    pairs = [(rng.choice(texts), rng.choice(texts)) for _ in range(600)]
    _same(small, length, pairs)


@given(st.text("a 电😀é", max_size=60), st.text("b, ש\u0301", max_size=60), st.integers(5, 20))
@settings(max_examples=150, deadline=None)
def test_any_pair_equals_transformers(
    small: SmallTask, first: str, second: str, length: int
) -> None:
    _same(small, length, [(first, second)])


@pytest.fixture(scope="module")
def built(small: SmallTask, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("built")
    done = forks().samp(*small.command(out, "--tier", "quick:latency=1000"))
    assert done.code == 0, done.err
    return out, done.json


def test_a_build_answers_as_transformers_does(small: SmallTask, built: tuple[Path, dict]) -> None:
    out, report = built
    manifest = read_manifest(out)
    assert (manifest.task, manifest.labels) == ("pairs", small_tasks.LABELS["pairs"])
    exact = pipeline.load(out, "exact")
    pairs = [(str(row["text"]), str(row["text_pair"])) for row in small.rows]
    ours = exact.logits(pairs)
    theirs = np.stack([small_tasks.logits(small.model, small.tokenizer, *pair) for pair in pairs])
    assert np.abs(ours - theirs).max() < 1e-4
    # The accuracy is that of transformers' answers on the verification rows.
    rows = split_rows(read_rows(small.data, task=TASKS["pairs"])).verification
    place = {pair: i for i, pair in enumerate(pairs)}
    answers = [manifest.labels[theirs[place[pair]].argmax()] for pair in rows.texts]  # type: ignore[index]
    right = np.mean([a == b for a, b in zip(answers, rows.labels, strict=True)])
    assert report["tiers"][0]["value"] == round(100 * right, 3)
    assert 85 < report["tiers"][0]["value"] < 99
    # The order of a pair matters.
    swapped = exact.logits([pair[::-1] for pair in pairs])
    assert np.abs(swapped - ours).max() > 0.1


def test_pairs_of_two_splits_differ_in_one_text_at_least(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    lines = [f"a{i},b{j},{'xy'[(i + j) % 2]}" for i in range(20) for j in range(20)]
    path.write_text("text,text_pair,label\n" + "\n".join(lines + [line.upper() for line in lines]))
    splits = split_rows(read_rows(path, task=TASKS["pairs"]))
    parts = (splits.calibration, splits.search, splits.verification)
    keys = [{tuple(t.lower() for t in pair) for pair in part.texts} for part in parts]
    assert sum(map(len, keys)) == len(set.union(*keys)) == 400
    assert sum(part.n for part in parts) == 800


def test_rows_without_a_pair_are_refused(small: SmallTask, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n')
    with pytest.raises(SampError, match=r"no column text_pair.*columns text and text_pair and"):
        read_rows(path, task=TASKS["pairs"])
    path.write_text('{"text": "a", "text_pair": 5, "label": "x"}\n')
    with pytest.raises(SampError, match="text_pair is 5"):
        read_rows(path, task=TASKS["pairs"])


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared beside the clone")
def test_sick_pairs_equal_transformers() -> None:
    from transformers import AutoTokenizer

    rows = read_rows(SHARED / "data" / "sick-test.jsonl", task=TASKS["pairs"])
    assert rows.n == 4927
    theirs = AutoTokenizer.from_pretrained(SHARED / "checkpoints" / "sick")
    for length in (96, 24):
        first, second = map(list, zip(*rows.texts, strict=True))
        wanted = theirs(first, second, truncation="longest_first", max_length=length)
        ours = TextEncoder.load(SHARED / "checkpoints" / "sick", length).encode(rows.texts)
        assert [one.ids.tolist() for one in ours] == wanted["input_ids"]
        assert [one.types.tolist() for one in ours] == wanted["token_type_ids"]
