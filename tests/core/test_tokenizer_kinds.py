"""Every kind of tokenizer against transformers: 10,000 texts and pairs, offsets and truncation.

The vocabularies are trained here on film reviews and on texts of many scripts: WordPiece with case,
byte-level BPE as RoBERTa's, Unigram as XLM-R's. Both sides read the same tokenizer.json.
"""

from __future__ import annotations

import functools
import random
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text import SPECIAL_TEXTS, _generated
from test_text import reviews as reviews  # the fixture
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from samp_core import serving
from samp_core.text import Encoding, TextEncoder

E5 = Path(__file__).resolve().parents[2] / ".demo" / "twelve_layers" / "e5-small"
SCRIPTS = {
    "chinese": "\u4e2d\u6587\u548cEnglish\u6df7\u5408\u3002 \U00020bb7\u91ce\u5bb6",
    "japanese": "\u30d5\u30a3\u30eb\u30e0\u306f\u826f\u3044 \uff8a\uff9d\uff76\uff78",
    "korean and its parts": "\uc601\ud654 \u1100\u1161\u11a8",
    "thai": "\u0e2b\u0e19\u0e31\u0e07\u0e14\u0e35\u0e19\u0e33 \u0e01\u0e33",
    "hebrew and arabic": "\u05e9\u05b8\u05dc\u05d5\u05b9\u05dd \u0641\u0650\u064a\u0644\u0645 123",
    "right to left marks": "\u202eright to left\u202c \u2067\u05d0\u2069 \u200fb\u200e",
    "combining characters": "e\u0301\u0327\u0323 o\u0308 \u0301alone \u092b\u093c\u093f",
    "a tower of marks": "z" + "\u0300\u0316\u0334" * 40,
    "emoji joined": "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466!",
    "emoji of a skin tone": "\U0001f44d\U0001f3fd \U0001f9d1\U0001f3ff\u200d\U0001f680",
    "flags and keycaps": "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7 #\ufe0f\u20e3 \u2764\ufe0f",
    "control characters": "\x1b[31mred\x1b[0m\x07\x7f\x85\u2028\u2029 \x0b\x0c",
    "nul": "nul\x00inside\x00 \x00",
    "odd code points": "\ufeffbom \ufffd \ufffe \U0010ffff \ue000",
    "special tokens": "<s> a </s> <mask> <pad><unk> [CLS] [SEP][MASK]",
    "white space": "  two  spaces\t\ttabs \u00a0nbsp\u3000wide \u200b",
    "meta symbols": "\u2581meta \u2581\u2581 \u0120 \u010a ##ing",
    "a long word": "w" * 3000,
    "a long word of chinese": "\u7535\u5f71" * 900,
    "empty": "",
    "nothing but spaces": " \t\r\n\u2003",
}
TEXTS = [*SPECIAL_TEXTS, *SCRIPTS.values()]
ENDS = {"wordpiece": ("[CLS]", "[SEP]"), "bpe": ("<s>", "</s>"), "unigram": ("<s>", "</s>")}
NAMES = tuple(ENDS)
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>"]


def wordpiece(texts: list[str]) -> Any:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=3000, limit_alphabet=400, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(name, tokenizer.token_to_id(name)) for name in ENDS["wordpiece"]]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return tokenizer


def bpe(texts: list[str]) -> Any:
    """RoBERTa's: bytes, a space before a word belongs to it, two separators between a pair."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=ROBERTA,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    start, end = ((name, tokenizer.token_to_id(name)) for name in ENDS["bpe"])
    tokenizer.post_processor = processors.RobertaProcessing(end, start, add_prefix_space=False)
    return tokenizer


def unigram(texts: list[str]) -> Any:
    """XLM-R's: NFKC, runs of spaces as one, Metaspace, two separators between a pair."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=3000,
        special_tokens=[*ROBERTA, "<mask>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(name, tokenizer.token_to_id(name)) for name in ENDS["unigram"]]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ends
    )
    return tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, reviews: list[str]) -> dict[str, Path]:
    """A folder with a tokenizer.json of each kind, trained once."""
    found = {}
    for name, make in zip(NAMES, (wordpiece, bpe, unigram), strict=True):
        found[name] = tmp_path_factory.mktemp(name)
        make([*reviews[:500], *_generated(60)]).save(str(found[name] / "tokenizer.json"))
    return found


@pytest.fixture(scope="module")
def texts(reviews: list[str]) -> list[str]:
    """10,000 of up to 400 characters; test_scripts has the long ones."""
    return [text[:400] for text in (*TEXTS, *reviews, *_generated(1500 - len(TEXTS)))]


@functools.cache
def transformers_own(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


@functools.cache
def our_own(folder: Path, length: int) -> TextEncoder:
    return TextEncoder.load(folder, length)


def ragged(rows: Iterable[Sequence[Any]], width: int = 1) -> tuple[Any, Any]:
    """Lengths of the rows and all values one after the other: compared in one go."""
    rows = list(rows)
    flat = [np.asarray(row, dtype=np.int64).reshape(-1, width) for row in rows]
    return np.array([len(row) for row in flat]), np.concatenate([np.zeros((0, width)), *flat])


def assert_same(
    folder: Path, length: int, texts: list[str], second: list[str] | None = None
) -> list[Encoding]:
    """Ids, types, offsets and words equal those of transformers, text by text. Ours."""
    wanted = transformers_own(folder)(
        texts, second, truncation="longest_first", max_length=length, return_token_type_ids=True,
        return_offsets_mapping=True, return_special_tokens_mask=True, return_attention_mask=False,
    )  # fmt: skip
    given = texts if second is None else list(zip(texts, second, strict=True))
    ours = our_own(folder, length).encode(given)
    assert len(ours) == len(wanted["input_ids"]) == len(texts)
    _, special = ragged(wanted["special_tokens_mask"])
    words = ([-1 if word is None else word for word in e.word_ids] for e in wanted.encodings)
    for part, width, mine, theirs in (
        ("ids", 1, (one.ids for one in ours), wanted["input_ids"]),
        ("types", 1, (one.types for one in ours), wanted["token_type_ids"]),
        ("words", 1, (one.words for one in ours), words),
        ("offsets", 2, (one.offsets for one in ours), wanted["offset_mapping"]),
    ):
        (lengths, values), (lengths_wanted, values_wanted) = (
            ragged(mine, width),  # type: ignore[arg-type]
            ragged(theirs, width),
        )
        if part == "offsets":
            values_wanted[special[:, 0] == 1] = -1
        unlike = np.flatnonzero(lengths != lengths_wanted)
        assert not len(unlike), f"{part}: as many as theirs, but in text {unlike[0]}"
        places = np.flatnonzero((values != values_wanted).any(axis=1))
        where = np.searchsorted(np.cumsum(lengths), places[:1], side="right")
        assert not len(places), f"{part} of text {where[0]}: {given[where[0]]!r:.200}"
    return ours


def whole_lengths(folder: Path, texts: list[str]) -> Any:
    """Tokens of every text without special tokens or truncation, by transformers."""
    found = transformers_own(folder)(
        texts, add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    return np.array([len(ids) for ids in found["input_ids"]])


@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_texts_and_pairs(
    name: str, folders: dict[str, Path], texts: list[str]
) -> None:
    folder = folders[name]
    assert len(texts) == 10_000
    lengths = whole_lengths(folder, texts)
    truncated = np.array([one.truncated for one in assert_same(folder, 40, texts)])
    np.testing.assert_array_equal(truncated, lengths + 2 > 40)
    assert 500 < truncated.sum() < 9500
    order = random.Random(1).sample(range(10_000), 10_000)
    # Two separators between the texts where the family has them; types only where BERT has them.
    special = 3 if name == "wordpiece" else 4
    # Room for an odd number of tokens: one text keeps one more.
    pairs = assert_same(folder, 77 + special, texts, [texts[i] for i in order])
    truncated = np.array([one.truncated for one in pairs])
    np.testing.assert_array_equal(truncated, lengths + lengths[order] > 77)
    assert 500 < truncated.sum() < 9500
    assert any(one.types.any() for one in pairs) == (name == "wordpiece")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts(name: str, script: str, folders: dict[str, Path]) -> None:
    """Whole, as a pair and cut short; a token's offsets are the characters that it stands for."""
    text, folder = SCRIPTS[script], folders[name]
    (one,) = assert_same(folder, 8000, [text])
    assert not one.truncated
    assert one.offsets is not None
    inside = one.offsets[1:-1]
    assert ((inside >= 0) & (inside <= len(text))).all()
    assert (np.diff(inside[:, 0]) >= 0).all()
    tokenizer = transformers_own(folder).backend_tokenizer
    if name == "bpe":
        # It loses nothing: the tokens are the text, but for the space that <mask> takes with it.
        decoded = tokenizer.decode(one.ids[1:-1].tolist(), skip_special_tokens=False)
        assert decoded == text.replace(" <mask>", "<mask>")
    if name == "wordpiece":
        for number, (start, end) in zip(one.ids[1:-1].tolist(), inside.tolist(), strict=True):
            token = tokenizer.id_to_token(number)
            if token != "[UNK]":
                cleaned = [c for c in text[start:end] if unicodedata.category(c)[0] != "C"]
                assert token.removeprefix("##") == "".join(cleaned) or text[start:end] == token
    # The library itself chokes on a long text beside a long one: see test_text.py's long pair.
    beside = text[:40]
    for length in (7, 16):
        assert_same(folder, length, [text, beside, "a film"], ["a dull film", beside, text])
        assert len(assert_same(folder, length, [text])[0].ids) <= length


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.text(max_size=40), st.text(max_size=20)), min_size=1, max_size=4),
    length=st.integers(6, 40),
)
def test_any_text_at_all(
    name: str, folders: dict[str, Path], rows: list[tuple[str, str]], length: int
) -> None:
    first, second = map(list, zip(*rows, strict=True))
    lengths = whole_lengths(folders[name], first)
    ours = assert_same(folders[name], length, first)
    assert [one.truncated for one in ours] == (lengths + 2 > length).tolist()
    assert_same(folders[name], length, first, second)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    first = TextEncoder.load(folders[name], 24)
    first.save(tmp_path)
    again = TextEncoder.load(tmp_path)
    for one, other in zip(first.encode(TEXTS), again.encode(TEXTS), strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.offsets, other.offsets)
        assert one.truncated == other.truncated


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_truncation_in_the_file_do_not_count(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    plain = Tokenizer.from_file(str(folders[name] / "tokenizer.json"))
    plain.enable_padding(length=77, direction="left")
    plain.enable_truncation(5, stride=2, strategy="only_first", direction="left")
    plain.save(str(tmp_path / "tokenizer.json"))
    ours = TextEncoder.load(tmp_path, 16).encode([*TEXTS, ("one " * 20, "two " * 30)])
    usual = TextEncoder.load(folders[name], 16).encode([*TEXTS, ("one " * 20, "two " * 30)])
    assert [one.ids.tolist() for one in ours] == [one.ids.tolist() for one in usual]
    assert [one.truncated for one in ours] == [one.truncated for one in usual]


@pytest.mark.parametrize("name", NAMES)
def test_bytes_that_are_not_utf8_are_one_refusal_a_request(
    name: str, folders: dict[str, Path]
) -> None:
    """What the served tokenizer does with a batch of requests; over Triton: test_bad_input.py."""

    def column(*rows: bytes) -> Any:
        return np.array([[row] for row in rows], dtype=object)

    encoder = TextEncoder.load(folders[name], 16)
    good = [column(b"a film", b""), column("\u4e2d\x00 \U0001f1e9\U0001f1ea".encode())]
    bad = [
        (column(b"fine", b"caf\xe9", b"\xff"), "TEXT row 1: byte 0xe9 at 3 is not UTF-8"),
        (column(b"\xed\xa0\x80"), "TEXT row 0: byte 0xed at 0 is not UTF-8"),
        (column(b"\xc0\x80"), "TEXT row 0: byte 0xc0 at 0 is not UTF-8"),
        (column(b"cut \xf0\x9f\x91"), "TEXT row 0: byte 0xf0 at 4 is not UTF-8"),
    ]
    served = serving.Tokenizer(encoder)
    answers = served.run([(one,) for one in (good[0], *(rows for rows, _ in bad), good[1])])
    for (_, why), answer in zip(bad, answers[1:-1], strict=True):
        assert isinstance(answer, serving.RequestError)
        assert str(answer) == f"{why}; allowed: UTF-8 text"
        assert answer.labels == (("reason", "not_utf8"),)
    for rows, answer in zip(good, (answers[0], answers[-1]), strict=True):
        assert isinstance(answer, dict)
        alone = encoder.encode([row.decode() for row in rows[:, 0]])
        assert answer["LENGTHS"][:, 0].tolist() == [len(one.ids) for one in alone]
        for ids, one in zip(answer["IDS"], alone, strict=True):
            assert ids[: len(one.ids)].tolist() == one.ids.tolist()
    (answer,) = serving.Tokenizer(encoder, ("TEXT", "TEXT_PAIR")).run(
        [(column(b"a"), column(b"\x80"))]
    )
    assert "TEXT_PAIR row 0: byte 0x80 at 0 is not UTF-8" in str(answer)


@pytest.mark.skipif(
    not (E5 / "tokenizer.json").is_file(),
    reason="no e5-small here: examples/twelve_layers/prepare.py e5-small makes it",
)
def test_the_unigrams_of_multilingual_e5(texts: list[str]) -> None:
    """Its own vocabulary of 250,000 pieces, on 3,000 texts and as many pairs."""
    some = [*texts[:1500], *texts[-1500:]]
    lengths = whole_lengths(E5, some)
    truncated = [one.truncated for one in assert_same(E5, 40, some)]
    assert truncated == (lengths + 2 > 40).tolist()
    assert_same(E5, 40, some, some[::-1])
    wide, plain = our_own(E5, 40).encode(["\uff21\ufb01lm", "Afilm"])
    assert wide.ids.tolist() == plain.ids.tolist()
