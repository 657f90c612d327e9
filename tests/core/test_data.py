"""Labelled rows: every format and fault, and splits that share no text."""

from __future__ import annotations

import csv
import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samp_core.data import (
    Rows,
    Splits,
    combine_splits,
    label_ids,
    make_rows,
    read_rows,
    split_rows,
)
from samp_core.errors import SampError

HARD_TEXTS = [
    "plain",
    "",
    'says "so", twice',
    "two\nlines\r\nthree",
    "tab\tand, comma",
    "電影 \u2028 שלום \U0001f600 e\u0301",
    '"quoted"',
    "x" * 300_000,
]


def _numbered(n: int, source: str = "numbered.jsonl", prefix: str = "text") -> Rows:
    labels = [("no", "yes")[i % 2] for i in range(n)]
    return make_rows((f"{prefix} {i}" for i in range(n)), labels, Path(source))


def _key(text: str) -> str:
    return " ".join(text.split()).casefold()


def _keys(rows: Rows) -> set[str]:
    return {_key(text) for text in rows.texts}


def _assert_disjoint(splits: Splits) -> None:
    parts = (splits.calibration, splits.search, splits.verification)
    for one, other in combinations(parts, 2):
        assert not _keys(one) & _keys(other)


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("extension", ["jsonl", "csv", "tsv", "CSV"])
def test_every_format_gives_the_same_rows(
    tmp_path: Path, extension: str, newline: str, bom: bytes
) -> None:
    labels = ["a", "b"] * (len(HARD_TEXTS) // 2)
    path = tmp_path / f"rows.{extension}"
    with path.open("w", encoding="utf-8", newline="") as file:
        if extension == "jsonl":
            for text, label in zip(HARD_TEXTS, labels, strict=True):
                row = {"id": 7, "label": label, "text": text}
                file.write(json.dumps(row, ensure_ascii=False) + newline + newline)
        else:
            writer = csv.writer(
                file, delimiter="\t" if extension == "tsv" else ",", lineterminator=newline
            )
            writer.writerow(["id", "text", "label"])
            writer.writerows(
                [7, text, label] for text, label in zip(HARD_TEXTS, labels, strict=True)
            )
    path.write_bytes(bom + path.read_bytes())
    limit = csv.field_size_limit()
    rows = read_rows(path)
    assert rows.texts == tuple(HARD_TEXTS)
    assert rows.labels == tuple(labels)
    assert rows.source == path
    assert rows.sha256 == make_rows(HARD_TEXTS, labels, path).sha256
    assert csv.field_size_limit() == limit


def test_tsv_with_quotes_that_mean_nothing(tmp_path: Path) -> None:
    path = tmp_path / "plain.tsv"
    path.write_text('text\tlabel\n"Great" film\tpos\nso-so, 5" screen\tneg\n')
    assert read_rows(path).texts == ('"Great" film', 'so-so, 5" screen')


def test_whole_numbers_are_labels_and_texts_alone_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    assert read_rows(path).labels == ("0", "1")
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert read_rows(path, labelled=False).texts == ("a", "b")


FAULTS = [
    ("rows.parquet", b"x", "data_format", "unknown extension '.parquet'"),
    ("rows.jsonl", b"", "data_empty", "no rows"),
    ("rows.csv", b"text,label\n", "data_empty", "no rows"),
    ("rows.csv", b"sentence,label\na,b\n", "data_columns", "no column text, found 'sentence'"),
    ("rows.csv", b"a;b\nc;d\n", "data_columns", "no column text and no label, found 'a;b'"),
    ("rows.jsonl", b'{"text": "a"}\n', "data_columns", ":1: no column label, found 'text'"),
    ("rows.csv", b"text,label\na,x\nb,x\n", "data_one_class", "all 2 rows have the label 'x'"),
    ("rows.csv", b"text,label\nok,x\n\xff,y\n", "data_encoding", ":3: byte 0xff is not UTF-8"),
    ("rows.jsonl", b'{"text": "\\ud800", "label": "x"}', "data_encoding", ":1: text has an unp"),
    ("rows.jsonl", b'{"text": "a", "label": "x"}\n\n{"text', "data_json", ":3: "),
    ("rows.jsonl", b'["a", "x"]\n', "data_json", ':1: ["a", "x"]'),
    ("rows.jsonl", b'{"text": "a", "label": ""}', "data_label", ":1: label is empty"),
    ("rows.jsonl", b'{"text": "a", "label": NaN}', "data_label", ":1: label is empty"),
    ("rows.jsonl", b'{"text": "a", "label": null}', "data_label", ":1: label is empty"),
    ("rows.jsonl", b'{"text": "a", "label": 0.5}', "data_label", ":1: label is 0.5"),
    ("rows.jsonl", b'{"text": "a", "label": true}', "data_label", ":1: label is true"),
    ("rows.csv", b'text,label\n"a\nb",x\nc,nan\n', "data_label", ":4: label is empty"),
    ("rows.tsv", b"text\tlabel\na\t \n", "data_label", ":2: label is empty"),
    ("rows.jsonl", b'{"text": 5, "label": "x"}', "data_text", ":1: text is 5"),
    ("rows.csv", b"text,label\na, b,x\n", "data_csv", ":2: 3 fields"),
    ("rows.csv", b'text,label\na,x\n"b,y\nc,z\n', "data_csv", ":3: "),
    ("rows.tsv", b"text\tlabel\na\n", "data_csv", ":2: 1 fields"),
]


@pytest.mark.parametrize(("name", "content", "code", "given_part"), FAULTS)
def test_each_fault_is_one_clear_error(
    tmp_path: Path, name: str, content: bytes, code: str, given_part: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SampError) as caught:
        read_rows(path)
    error = caught.value
    assert error.code == code
    assert error.given.startswith(str(path))
    assert given_part in error.given
    assert error.allowed
    assert error.fix
    assert "\n" not in str(error)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    for name in ("absent.csv", "folder.csv"):
        with pytest.raises(SampError, match="data_file: .*" + name):
            read_rows(tmp_path / name)


def test_sizes_when_rows_are_many() -> None:
    splits = split_rows(_numbered(4000))
    assert (splits.calibration.n, splits.search.n, splits.verification.n) == (256, 1024, 2720)
    splits = split_rows(_numbered(4000), 100, 200, 300)
    assert (splits.calibration.n, splits.search.n, splits.verification.n) == (100, 200, 300)
    assert splits.unused == 3400


@pytest.mark.parametrize("n", [30, 31, 64, 100, 999, 2525])
def test_verification_keeps_half_when_rows_are_few(n: int) -> None:
    splits = split_rows(_numbered(n))
    sizes = [part.n for part in (splits.calibration, splits.search, splits.verification)]
    assert sum(sizes) == n
    assert min(sizes) >= 8
    assert sizes[2] >= (n // 3 if n < 100 else n // 2)
    if n >= 100:
        assert sizes[1] == pytest.approx(4 * sizes[0], rel=0.1) or sizes[0] == 8


def test_too_few_rows_is_an_error() -> None:
    with pytest.raises(SampError, match=r"data_few_rows: .*29 distinct texts"):
        split_rows(_numbered(29))
    with pytest.raises(SampError, match="20 distinct texts are left after dropping 80 rows"):
        split_rows(_numbered(100), exclude=_numbered(80))
    repeated = make_rows(["same"] * 1000, ["a"] * 1000, Path("x.csv"))
    with pytest.raises(SampError, match="1 distinct texts"):
        split_rows(repeated)


@given(
    st.lists(
        st.tuples(st.text("abcdAB \n", min_size=1, max_size=4), st.sampled_from("xy")),
        min_size=60,
        max_size=400,
    ),
    st.integers(0, 3),
    st.lists(st.text("abAB \n", max_size=2), max_size=5),
)
@settings(max_examples=80, deadline=None)
def test_splits_share_no_text_and_lose_no_row(
    pairs: list[tuple[str, str]], seed: int, trained: list[str]
) -> None:
    counts: Counter[str] = Counter()
    kept = []
    for text, label in pairs:  # a text three times at most: splits hold whole texts
        counts[_key(text)] += 1
        if counts[_key(text)] <= 3:
            kept.append((text, label))
    rows = make_rows((p[0] for p in kept), (p[1] for p in kept), Path("x.csv"))
    exclude = make_rows(trained, [""] * len(trained), Path("t.csv"))
    if len(_keys(rows) - _keys(exclude)) < 30:
        with pytest.raises(SampError, match="data_few_rows"):
            split_rows(rows, 20, 40, seed=seed, exclude=exclude)
        return
    splits = split_rows(rows, 20, 40, seed=seed, exclude=exclude)
    _assert_disjoint(splits)
    parts = (splits.calibration, splits.search, splits.verification)
    for part in parts:
        assert part.n >= 8
        assert not _keys(part) & _keys(exclude)
    split = sorted(p for part in parts for p in zip(part.texts, part.labels, strict=True))
    assert split == sorted(p for p in kept if _key(p[0]) not in _keys(exclude))
    assert splits.in_training == len(kept) - len(split)


def test_splits_are_stable() -> None:
    rows = _numbered(4000)
    first, again = split_rows(rows), split_rows(rows)
    assert first == again
    assert first.calibration.sha256 != split_rows(rows, seed=1).calibration.sha256
    shuffled = make_rows(reversed(rows.texts), reversed(rows.labels), rows.source)
    assert split_rows(shuffled) == first
    fewer = split_rows(make_rows(rows.texts[:-1], rows.labels[:-1], rows.source))
    # A row less moves at most the rows at the two borders.
    assert len(_keys(fewer.calibration) ^ _keys(first.calibration)) <= 2
    assert len(_keys(fewer.search) ^ _keys(first.search)) <= 3


def test_combining_two_files_with_overlap_and_training_rows() -> None:
    mixed = make_rows(
        [*(f"text {i}" for i in range(1500)), *(f"TEXT  {i}" for i in range(2000, 2010))],
        ["a", "b"] * 755,
        Path("dev.csv"),
    )
    final = make_rows((f"text {i}" for i in range(1400, 3000)), ["a", "b"] * 800, Path("test.csv"))
    trained = _numbered(100)
    splits = combine_splits(mixed, None, final, trained)
    _assert_disjoint(splits)
    assert splits.verification.texts != final.texts
    assert sorted(splits.verification.texts) == sorted(final.texts)
    assert splits.in_training == 100
    assert splits.overlapping == 110
    assert (splits.calibration.n, splits.search.n) == (256, 1024)
    assert splits.unused == 1510 - 100 - 110 - 256 - 1024
    assert splits.search.source == Path("dev.csv")
    assert splits.verification.source == Path("test.csv")
    assert combine_splits(mixed, None, final, trained) == splits


def test_combining_three_files() -> None:
    one, two, three = (
        make_rows(
            (f"t {i}" for i in range(*span)), ["a", "b"] * (len(range(*span)) // 2), Path(f"{span}")
        )
        for span in ((0, 300), (200, 600), (500, 900))
    )
    splits = combine_splits(one, two, three, calibration_size=150)
    _assert_disjoint(splits)
    assert (splits.calibration.n, splits.search.n, splits.verification.n) == (150, 300, 400)
    assert splits.overlapping == 200
    assert splits.unused == 50
    with pytest.raises(SampError, match=r"data_few_rows: .*: 0 distinct texts are left after drop"):
        combine_splits(three, None, three)


def test_small_first_file_is_cut_in_proportion() -> None:
    splits = combine_splits(_numbered(100), None, _numbered(100, prefix="other"))
    assert (splits.calibration.n, splits.search.n) == (20, 80)


def test_label_ids_by_name_or_index() -> None:
    rows = make_rows("abc", ["fresh", "rotten", "fresh"], Path("x.csv"))
    assert label_ids(rows, ["rotten", "fresh"]).tolist() == [1, 0, 1]
    numbers = make_rows("abc", ["0", "1", "1"], Path("x.csv"))
    assert label_ids(numbers, ["LABEL_0", "LABEL_1"]).tolist() == [0, 1, 1]
    # A head whose names are numbers: names win when all match.
    assert label_ids(numbers, ["1", "0"]).tolist() == [1, 0, 0]
    stars = make_rows("ab", ["0", "2"], Path("x.csv"))
    assert label_ids(stars, ["1", "2", "3"]).tolist() == [0, 2]


def test_labels_that_the_head_lacks_are_listed() -> None:
    rows = make_rows("abc", ["fresh", "stale", "0"], Path("x.csv"))
    with pytest.raises(SampError) as caught:
        label_ids(rows, ["rotten", "fresh"])
    assert "'0', 'stale'" in caught.value.given
    assert "'rotten', 'fresh'" in caught.value.allowed
    with pytest.raises(SampError, match="lacks: '2'"):
        label_ids(make_rows("ab", ["0", "2"], Path("x.csv")), ["0", "1"])
