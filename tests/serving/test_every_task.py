"""Every task through what is not its own test's: awaited, streamed, a file, A/B, a bare script."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import forks, wait_for
from samp_client import (
    ABClient,
    AsyncABClient,
    BadRequest,
    EntityPrediction,
    connect,
    connect_async,
    sticky_arm,
)
from small_tasks import HARD_TEXTS, embedding, find_entities
from task_servers import ServedTask, serve_small

from samp_core.control import Control
from samp_core.meters import FLUSH_S

ROOT = Path(__file__).resolve().parents[2]
CALLS = {
    "pairs": "predict",
    "entities": "entities",
    "multi-label": "active",
    "regression": "scores",
    "reranking": "scores",
    "embedding": "embed",
}
PAIRS = ("pairs", "reranking")
# Of a batch of another size: the scores of `exact` agree so far.
NEAR = 1e-4
FILE_ROWS = 4000


@pytest.fixture(scope="module", params=CALLS)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedTask]:
    task = str(request.param)
    with serve_small(task, tmp_path_factory.mktemp(task), rows=300) as made:
        yield made


@pytest.fixture(params=["grpc", "http"])
def protocol(request: pytest.FixtureRequest) -> Any:
    return request.param


def rows_of(served: ServedTask, count: int) -> list[Any]:
    """Rows of the data, hard texts, and texts longer than the model reads at once."""
    rows = [str(row["text"]) for row in served.made.rows[:count]]
    texts = [*rows, *HARD_TEXTS, *(f"{row[:40]} 😀 é ab " * 8 for row in rows[:5])]
    if served.made.task in PAIRS:
        return list(zip(texts, reversed(texts), strict=True))
    return list(texts)


def parts(value: Any) -> tuple[list[Any], list[float]]:
    """All that is exact in an answer's fields (labels, spans), and its floats, in their order."""
    if isinstance(value, float):
        return [], [value]
    if isinstance(value, (list, tuple, dict)):
        within = value.items() if isinstance(value, dict) else enumerate(value)
        found = [(key, parts(one)) for key, one in within]
        exact = [(key, one[0]) for key, one in found]
        return exact, [number for _, one in found for number in one[1]]
    return [value], []


def same(found: Any, expected: Any) -> bool:
    """Equal fields, numbers within NEAR."""
    (exact, numbers), (wanted, others) = parts(found), parts(expected)
    return exact == wanted and np.allclose(numbers, others, atol=NEAR, rtol=NEAR)


def expect(served: ServedTask, rows: list[Any], tier: str = "exact") -> list[Any]:
    """The blocking client's answers, which the tests of each task compare with transformers'."""
    with connect(served.server.grpc) as client:
        return list(client.answers(rows, tier))


def test_awaited(served: ServedTask, protocol: Any) -> None:
    rows = rows_of(served, 40)
    expected = expect(served, rows)
    name = CALLS[served.made.task]

    async def work() -> None:
        async with connect_async(served.address(protocol), protocol, concurrency=4) as client:
            named, small = await asyncio.gather(
                getattr(client, name)(rows, "exact"), client.answers(rows, "exact", rows=3)
            )
            wrong = "embed" if name != "embed" else "entities"
            with pytest.raises(BadRequest, match=rf"Client\.{name}\(\)"):
                await getattr(client, wrong)(rows[:1], "exact")
        for found in (named, small):
            assert [one.index for one in found] == list(range(len(rows)))
            assert [type(one) for one in found] == [type(one) for one in expected]
            assert [one.truncated for one in found] == [one.truncated for one in expected]
            for one, other in zip(found, expected, strict=True):
                assert same(one.fields(), other.fields())
        if served.made.task != "entities":
            return
        for text, one in zip(rows, named, strict=True):
            assert isinstance(one, EntityPrediction)
            assert not one.truncated
            ours = [(e.start, e.end, e.label) for e in one.entities]
            assert ours == [span[:3] for span in find_entities(served.made, text)], text
            assert all(e.text == text[e.start : e.end] != "" for e in one.entities)

    asyncio.run(work())


def test_streamed(served: ServedTask, protocol: Any) -> None:
    rows = rows_of(served, 60)
    expected = expect(served, rows)
    bad: Any = ("fine", b"\xff") if served.made.task in PAIRS else b"\xff"
    asked = [*rows[:7], bad, *rows[7:]]

    async def work() -> None:
        answers = []
        async with connect_async(served.address(protocol), protocol, concurrency=3) as client:
            async for outcome in client.stream(iter(asked), "exact", rows=5, first=1000):
                assert outcome.index == 1000 + len(answers)
                assert (outcome.error is None) == (outcome.index != 1007), outcome.error
                answers.append(outcome.answer)
        assert len(answers) == len(asked)
        for one, other in zip([*answers[:7], *answers[8:]], expected, strict=True):
            assert same(one.fields(), other.fields())

    asyncio.run(work())


def test_a_file_killed_and_gone_on_with(served: ServedTask, protocol: Any, tmp_path: Path) -> None:
    data = served.made.rows
    names = ("text", "text_pair") if served.made.task in PAIRS else ("text",)
    given = [{name: data[i % len(data)][name] for name in names} for i in range(FILE_ROWS)]
    file, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in given))
    command = [
        "predict", "--url", served.address(protocol), "--tier", "exact", "--in", file,
        "--out", out, "--json", *(["--http"] if protocol == "http" else []),
    ]  # fmt: skip
    part = tmp_path / "out.jsonl.part"
    running = forks().start(*command, "--concurrency", 1)
    assert wait_for(lambda: part.exists() and part.stat().st_size > 0, 30)
    running.kill()
    running.wait()
    assert not out.exists(), "it was not killed under way"
    done = forks().samp(*command)
    assert done.code == 0, done.err
    assert (done.json["rows"], done.json["failed"]) == (FILE_ROWS, 0)
    assert 0 < done.json["before"] < FILE_ROWS
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row.pop("index") for row in found] == list(range(FILE_ROWS))
    asked = [tuple(row.values()) if len(names) == 2 else row["text"] for row in data_of(given)]
    expected = expect(served, asked)
    for place, (row, wanted) in enumerate(zip(found, given, strict=True)):
        answer = expected[place % len(expected)]
        assert {name: row.pop(name) for name in names} == wanted
        assert (row.pop("error"), row.pop("truncated")) == (None, answer.truncated)
        assert same(row, answer.fields())


def data_of(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows before they are repeated."""
    return given[: given.index(given[0], 1)]


def test_sticky_arms(served: ServedTask, protocol: Any) -> None:
    rows = rows_of(served, 20)
    weights = {"exact": 1.0, "fast": 1.0}
    by_arm = {tier: expect(served, rows, tier) for tier in weights}
    arms = [sticky_arm(f"user {i % 7}", weights) for i in range(len(rows))]
    assert set(arms) == set(weights)
    users = {id(row): f"user {i % 7}" for i, row in enumerate(rows)}
    options: dict[str, Any] = {"weights": weights, "key": lambda row: users[id(row)]}
    name = CALLS[served.made.task]
    records: list[Any] = []
    with connect(served.address(protocol), protocol) as client:
        found = getattr(ABClient(client, record=records.append, **options), name)(rows)

    async def work() -> list[Any]:
        async with connect_async(served.address(protocol), protocol) as client:
            again: list[Any] = await getattr(AsyncABClient(client, **options), name)(rows)
            return again

    for answers in (found, asyncio.run(work())):
        assert [one.index for one in answers] == list(range(len(rows)))
        for i, (arm, one) in enumerate(zip(arms, answers, strict=True)):
            if arm == "exact":  # int8 may round otherwise beside other rows
                assert same(one.fields(), by_arm[arm][i].fields())
    assert sorted(one.arm for one in records) == sorted(arms)
    assert all(one.error is None and one.answer is not None for one in records)
    json.dumps([one.fields() for one in records])


def test_counters(served: ServedTask) -> None:
    """Of one request: rows, tokens as transformers counts them, windows, and cut texts."""
    before = settled(served)
    rows = rows_of(served, 30)[:64]
    answers = expect(served, rows)
    tokens = []
    for row in rows:
        both = row if isinstance(row, tuple) else (row,)
        tokens += pieces(served, *([text] for text in both))
    cut = sum(one.truncated for one in answers)
    wanted = {
        "texts_total": len(rows),
        "tokens_total": sum(tokens),
        "padded_tokens_total": max(tokens) * len(tokens),
        "batch_tokens_count": 1,
        "batch_tokens_sum": sum(tokens),
        "truncated_total": cut,
    }
    assert (cut == 0) == (served.made.task == "entities")
    found: dict[str, float] = {}

    def counted() -> bool:
        now = counters(served)
        found.update({name: now.get(name, 0) - before.get(name, 0) for name in wanted})
        return found == wanted

    assert wait_for(counted, 10), (found, wanted)


def counters(served: ServedTask) -> dict[str, float]:
    """Those of the tokenizer and of `exact`, without our prefix."""
    found = {}
    for line in Control(served.server.metrics).text("/metrics").splitlines():
        if line.startswith("samp_") and "fast" not in line and "le=" not in line:
            name, value = line.rsplit(" ", 1)
            found[name.partition("{")[0].removeprefix("samp_")] = float(value)
    return found


def settled(served: ServedTask) -> dict[str, float]:
    """When what was answered before has been handed over: each process does so once a second."""
    while True:
        found = counters(served)
        time.sleep(2.5 * FLUSH_S)
        if counters(served) == found:
            return found


def pieces(served: ServedTask, *texts: list[str]) -> list[int]:
    """Tokens of a row, of entities those of each window, as transformers cuts them."""
    if served.made.task == "entities":
        options = {"return_overflowing_tokens": True, "stride": (48 - 2) // 4}
    else:
        options = {}
    ids = served.made.tokenizer(*texts, truncation=True, max_length=48, **options)["input_ids"]
    return [len(one) for one in ids]


def test_a_script_without_any_code_of_ours(served: ServedTask, protocol: Any) -> None:
    rows = rows_of(served, 4)
    pairs = served.made.task in PAIRS
    flags = [word for row in rows if pairs for word in ("--pair", row[1])]
    texts = [row[0] if pairs else row for row in rows]
    done = subprocess.run(
        [
            sys.executable, "-I", "-X", "importtime", ROOT / "examples" / "bare_client.py",
            "--url", served.address(protocol), *(["--http"] if protocol == "http" else []),
            *flags, "small_exact", "--", *texts,
        ],
        capture_output=True, text=True, check=False, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tritonclient" in done.stderr
    assert not re.search(r"\| +samp_\w+$", done.stderr, re.MULTILINE), "it imports code of ours"
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    expected = expect(served, rows)
    for row, answer in zip(printed, expected, strict=True):
        assert row["TRUNCATED"] == [answer.truncated]
        fields = answer.fields()
        if served.made.task == "entities":
            found = zip(*(row[f"ENTITY_{part}"] for part in ("LABEL", "START", "END")), strict=True)
            wanted = [(e["label"], e["start"], e["end"]) for e in fields["entities"]]
            assert list(found) == wanted
        elif served.made.task == "multi-label":
            pairs_of = zip(answer.labels, row["ACTIVE"], strict=True)
            assert [label for label, on in pairs_of if on] == list(fields["active"])
            assert same(row["SCORES"], fields["scores"])
        elif served.made.task == "embedding":
            assert same(row["EMBEDDING"], fields["embedding"])
        else:
            assert same(row["SCORE"], [fields["score"]])
            assert row.get("LABEL") in (None, [fields.get("label")])


def test_loaded_by_samp_loadtest(served: ServedTask, protocol: Any) -> None:
    """Both tiers in one mix, with the rows of the data, offered in another shape over each way."""
    http = ["--http", "--shape", "bursts"] if protocol == "http" else ["--shape", "ramp"]
    done = forks().samp(
        "loadtest", "--url", served.address(protocol), *http, "--tier", "exact=1,fast=2",
        "--texts", served.made.data, "--rate", 60, "--seconds", 3, "--rows", 2, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert set(done.json) == {"exact", "fast"}
    for figures in done.json.values():
        assert figures["failures"] == 0
        assert figures["requests"] > 5
        assert figures["server_compute_ms"] > 0


def test_embeddings_of_the_first_token(tmp_path: Path) -> None:
    with serve_small("embedding", tmp_path, "--pooling", "first", rows=300) as served:
        texts = rows_of(served, 30)
        found = np.stack([one.embedding for one in expect(served, texts)])
        fast = np.stack([one.embedding for one in expect(served, texts, "fast")])
    made = served.made
    wanted = np.stack([embedding(made.model, made.tokenizer, text, "first") for text in texts])
    np.testing.assert_allclose(found, wanted, atol=NEAR)
    for vectors in (found, fast):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    mean = np.stack([embedding(made.model, made.tokenizer, text) for text in texts])
    assert np.abs(found - mean).max() > 100 * NEAR, "both are the same here"
