"""`samp predict --in --out`: killed anywhere, it goes on; the answers are those of one go."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import forks, wait_for
from samp_client import connect
from tiny import write_tiny

from samp_core.file_job import survey
from samp_core.server import Server

ROWS = 6000
MILLION = 1_000_000
# The command, and what its process held at most.
MEASURED = """
import atexit, pathlib, sys
from samp_core.cli import main
atexit.register(lambda: print(pathlib.Path("/proc/self/status").read_text(), file=sys.stderr))
main()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    out = tmp_path_factory.mktemp("tiny")
    write_tiny(out)
    with Server.start(out, threads=1) as made:
        yield made


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Rows that can be answered, and some that cannot even be read."""
    rng = random.Random(0)
    lines = [
        json.dumps({"text": " ".join(rng.choices("abcde é😀", k=rng.randint(0, 12))), "n": place})
        for place in range(ROWS)
    ]
    lines[100] = '{"text": 5}'
    lines[3000] = '{"text": "half'
    lines[3001] = '{"text": "lone \\ud800"}'
    file = tmp_path / "rows.jsonl"
    file.write_bytes("\n".join(lines).encode() + b"\n\n" + b'{"text": "\xff"}\n')
    return file


BAD = {100: "data_text", 3000: "data_json", 3001: "data_encoding", ROWS: "data_encoding"}


def command(server: Server, rows: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("predict", "--url", server.grpc, "--tier", "exact", "--in", rows, "--out", out, *more)


def check(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["index"] for row in found] == list(range(ROWS + 1))
    for row in found:
        if row["index"] in BAD:
            assert str(row["error"]).startswith(f"{BAD[row['index']]}: ")
            assert (row["text"], set(row)) == (None, {"index", "text", "error"})
        else:
            assert row["error"] is None
            assert list(row)[:3] == ["index", "text", "truncated"]
    return found


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_killed_at_any_moment_it_goes_on(
    protocol: str, server: Server, rows: Path, tmp_path: Path
) -> None:
    more = ["--http", "--url", server.http] if protocol == "http" else []
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    done = forks().samp(*command(server, rows, whole, *more, "--json"))
    assert (done.code, done.lines) == (1, [])
    assert done.json["rows"] == ROWS + 1
    assert done.json["failed"] == len(BAD)
    expected = check(whole)
    part = tmp_path / "out.jsonl.part"
    rng = random.Random(protocol)
    kills = 0
    for _ in range(8):
        before = part.stat().st_size if part.exists() else 0
        running = forks().start(*command(server, rows, out, *more))
        wait_for(lambda size=before: part.exists() and part.stat().st_size > size, 20)
        time.sleep(rng.random() * 0.1)
        if running.ended.is_set():
            break
        running.kill()
        running.wait()
        kills += not out.exists()
        if kills == 2 and part.exists():  # a line cut in the middle, as a power cut leaves it
            with part.open("ab") as file:
                file.write(b'{"index": 99999, "text": "ha')
    assert kills >= 2, "it was not killed under way"
    last = forks().samp(*command(server, rows, out, *more))
    assert last.code == 1, last
    found = check(out)
    for one, other in zip(expected, found, strict=True):
        assert (one.get("text"), one.get("label")) == (other.get("text"), other.get("label"))
        assert one.get("scores", []) == pytest.approx(other.get("scores", []), abs=1e-4)
    assert not part.exists()
    again = forks().samp(*command(server, rows, out, *more))
    assert f"{ROWS + 1} of them before" in again.out
    with connect(server.grpc) as client:
        texts = [found[place]["text"] for place in (0, 2999, 3002)]
        labels = [one.label for one in client.predict(texts, "exact")]
        assert labels == [found[place]["label"] for place in (0, 2999, 3002)]


def test_what_would_mix_two_jobs_is_refused(server: Server, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine\n")
    refused = forks().samp(*command(server, rows, out))
    assert (refused.code, "out_exists" in refused.err) == (1, True)
    assert out.read_text() == "mine\n"
    out.unlink()
    running = forks().start(*command(server, rows, out, "--concurrency", 1))
    part = tmp_path / "out.jsonl.part"
    assert wait_for(lambda: part.exists() and part.stat().st_size > 0, 20)
    second = forks().samp(*command(server, rows, out))
    assert "out_in_use" in second.err
    running.kill()
    running.wait()
    kept = part.read_bytes()
    before = rows.read_bytes()
    rows.write_bytes(before.replace(b'"n": 5000', b'"n": 5001'))
    changed = forks().samp(*command(server, rows, out))
    assert changed.code == 1
    (line,) = changed.lines
    assert line.startswith("samp: input_changed: ")
    assert part.read_bytes() == kept
    rows.write_bytes(before)
    assert forks().samp(*command(server, rows, out)).code == 1
    check(out)
    usage = forks().samp("predict", "--out", out, "text")
    assert (usage.code, "--in" in usage.err) == (2, True)


def test_failed_rows_are_asked_again_and_nothing_else(
    server: Server, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    assert forks().samp(*command(server, rows, out)).code == 1
    lines = out.read_bytes().splitlines(keepends=True)
    for place in (7, 2000, 5999):
        row = json.loads(lines[place])
        failed = {"index": place, "text": row["text"], "error": "deadline_exceeded: late"}
        lines[place] = json.dumps(failed).encode() + b"\n"
    lines[8] = lines[8].replace(b'"error": null', b'"kept": 1, "error": null')
    out.write_bytes(b"".join(lines))
    done = forks().samp(*command(server, rows, out, "--retry-errors"))
    assert (done.code, f"{len(BAD)} failed" in done.out) == (1, True)
    found = check(out)
    assert found[8]["kept"] == 1, "a row that was answered was asked again"
    assert not (tmp_path / "out.jsonl.redo").exists()


def test_csv_and_a_file_that_is_none(server: Server, tmp_path: Path) -> None:
    table, out = tmp_path / "rows.csv", tmp_path / "out.jsonl"
    table.write_bytes(b'text,other\n"a\nb",1\nc,2,3\n"d ""e""",4\n\xff,5\n')
    assert forks().samp(*command(server, table, out)).code == 1
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["text"] for row in found] == ["a\nb", None, 'd "e"', None]
    table.write_text("other\na\n")
    none = forks().samp(*command(server, table, tmp_path / "none.jsonl"))
    assert (none.code, "no column text" in none.err) == (1, True)
    assert not (tmp_path / "none.jsonl.job").exists()


def test_the_end_of_a_million_rows(server: Server, tmp_path: Path) -> None:
    """What a kill after 999,000 rows leaves: the rest is asked, in little memory."""
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    part, kept = tmp_path / "out.jsonl.part", MILLION - 1000
    answer = '"truncated": false, "label": "no", "score": 0.9, "scores": [0.9, 0.1], "error": null}'
    with rows.open("w") as file, part.open("w") as done:
        for place in range(MILLION):
            file.write(f'{{"text": "a b {place}"}}\n')
            if place < kept:
                done.write(f'{{"index": {place}, "text": "a b {place}", {answer}\n')
        done.write(f'{{"index": {kept}, "text": "half')
    facts = {"schema": 1, "sha256": survey(rows).sha256, "rows": MILLION, "asked": "tiny_exact"}
    (tmp_path / "out.jsonl.job").write_text(json.dumps(facts) + "\n")
    words = map(str, command(server, rows, out, "--json"))
    ended = subprocess.run(
        [sys.executable, "-c", MEASURED, *words], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout)
    assert (found["rows"], found["before"], found["failed"]) == (MILLION, kept, 0)
    match = re.search(r"VmHWM:\s+(\d+) kB", ended.stderr)
    assert match is not None
    print(f"\n1,000 of 1,000,000 rows: {found['seconds']} s, at most {int(match[1]) / 1000:.0f} MB")
    assert int(match[1]) < 200_000
    with out.open() as lines:
        for place, line in enumerate(lines):
            assert line.startswith(f'{{"index": {place}, "text": "a b {place}", ')
    assert place == MILLION - 1
    for large in (rows, out):  # 200 MB
        large.unlink()
