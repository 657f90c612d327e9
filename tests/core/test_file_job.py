"""A file of any length: memory does not grow with it, and what is answered is not read again."""

from __future__ import annotations

import asyncio
import gc
import json
import tracemalloc
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from samp_core import questions
from samp_core.errors import SampError
from samp_core.file_job import Job, survey


@dataclass(frozen=True)
class Length:
    """An answer that shows which text it is of."""

    length: int
    truncated: bool = False

    def fields(self) -> dict[str, Any]:
        return {"length": self.length}


@dataclass(frozen=True)
class Outcome:
    answer: Length
    error: None = None


def write_rows(path: Path, count: int, width: int = 0) -> None:
    with path.open("w") as file:
        for place in range(count):
            file.write(json.dumps({"text": f"row {place} {'x' * width}"}) + "\n")


def answer(source: Path, out: Path, asked: list[str] | None = None) -> Job:
    async def stream(rows: Iterable[Any]) -> AsyncIterator[Outcome]:
        waiting = []
        for row in rows:
            if asked is not None:
                asked.append(row)
            waiting.append(Outcome(Length(len(row))))
            if len(waiting) == 64:  # as requests of many rows are
                for one in waiting:
                    yield one
                waiting.clear()
        for one in waiting:
            yield one

    job = Job(survey(source), out, "lengths")
    try:
        asyncio.run(job.answer(stream, lambda done: None))
    finally:
        job.close()
    return job


def peak(folder: Path, count: int) -> int:
    """Bytes that Python held at most for a file of so many rows."""
    source, out = folder / f"{count}.jsonl", folder / f"{count}.out"
    write_rows(source, count, 1000)
    gc.collect()
    tracemalloc.start()
    try:
        assert answer(source, out).rows == count
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peak(tmp_path, 100)  # imports
    small, large = peak(tmp_path, 3_000), peak(tmp_path, 9_000)
    print(f"\nat most {small / 1e6:.2f} MB for 3,000 rows, {large / 1e6:.2f} MB for 9,000")
    assert large < 1.5 * small


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv"])
@pytest.mark.parametrize("kept", [0, 1, 2998, 2999])
def test_it_goes_on_behind_the_last_whole_line(ending: str, kept: int, tmp_path: Path) -> None:
    source, out = tmp_path / f"rows.{ending}", tmp_path / "out"
    texts = [f"row {place}" for place in range(3000)]
    if ending == "jsonl":
        source.write_text("\n\n".join(json.dumps({"text": text}) for text in texts))
    else:
        source.write_text("\n".join(["text", *texts]) + "\n")
    answer(source, out)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.unlink()
    half = b'{"index": %d, "text": "ha' % kept
    (tmp_path / "out.part").write_bytes(b"".join(lines[:kept]) + half)
    asked: list[str] = []
    answer(source, out, asked)
    assert out.read_bytes() == whole
    assert asked == texts[kept:]
    assert not (tmp_path / "out.part").exists()


def test_answered_rows_are_not_parsed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "rows.jsonl"
    write_rows(source, 1000)
    loads, parsed = json.loads, []

    def counted(text: str) -> Any:
        parsed.append(text)
        return loads(text)

    monkeypatch.setattr(questions.json, "loads", counted)
    assert sum(1 for _ in questions.rows_of(source, 990)) == 10
    assert len(parsed) == 10


def test_bad_rows_are_counted_among_those_passed_over(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b'{"text": "a"}\n\n{"text": 5}\n{"half\n{"text": "\xff"}\n{"text": "b"}\n')
    whole = list(questions.rows_of(source))
    assert [isinstance(row, SampError) for row in whole] == [False, True, True, True, False]
    for skip in range(7):
        rest = list(questions.rows_of(source, skip))
        assert [str(row) for row in rest] == [str(row) for row in whole[skip:]]
