"""Multi-label, regression, reranking, embeddings served: pinned tensors, and transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from calls import infer, text_rows
from forked import forks
from samp_client import BadRequest, connect
from samp_loadtest.run import run_loadtest
from small_tasks import HARD_TEXTS, TOPICS, embedding, logits
from task_servers import ServedTask, serve_small

OUTPUTS: dict[str, dict[str, Any]] = {
    "multi-label": {"ACTIVE": ("BOOL", [4]), "SCORES": ("FP32", [4])},
    "regression": {"SCORE": ("FP32", [1])},
    "reranking": {"SCORE": ("FP32", [1])},
    "embedding": {"EMBEDDING": ("FP32", [32])},
}
CALLS = {"multi-label": "active", "embedding": "embed"}
Row = Any


@pytest.fixture(scope="module", params=OUTPUTS)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedTask]:
    task = str(request.param)
    with serve_small(task, tmp_path_factory.mktemp(task), rows=300) as made:
        yield made


def rows_of(served: ServedTask, count: int) -> list[Row]:
    rows = served.made.rows[:count]
    if served.made.task == "reranking":
        given = [(str(row["text"]), str(row["text_pair"])) for row in rows]
        return [*given, *zip(HARD_TEXTS, HARD_TEXTS[::-1], strict=True)]
    return [*(str(row["text"]) for row in rows), *HARD_TEXTS]


def call(served: ServedTask, tier: str, rows: list[Row]) -> dict[str, Any]:
    pair = served.made.task == "reranking"
    columns = zip(*rows, strict=True) if pair else [rows]
    names = ("TEXT", "TEXT_PAIR")
    inputs = {n: text_rows(c) for n, c in zip(names, columns, strict=False)}
    return infer(served.server.grpc, f"small_{tier}", **inputs)


def theirs(served: ServedTask, row: Row) -> Any:
    if served.made.task == "embedding":
        return embedding(served.made.model, served.made.tokenizer, row)
    parts = (row,) if isinstance(row, str) else row
    return logits(served.made.model, served.made.tokenizer, *parts)


def test_the_metadata_is_all_that_a_client_needs(served: ServedTask) -> None:
    client = triton.InferenceServerClient(served.server.grpc)
    try:
        metadata = client.get_model_metadata("small_fast", as_json=True)
    finally:
        client.close()
    wanted = ["TEXT", "TEXT_PAIR"] if served.made.task == "reranking" else ["TEXT"]
    assert [tensor["name"] for tensor in metadata["inputs"]] == wanted
    outputs = {
        t["name"]: (t["datatype"], [int(n) for n in t["shape"][1:]]) for t in metadata["outputs"]
    }
    assert outputs == {**OUTPUTS[served.made.task], "TRUNCATED": ("BOOL", [1])}


def test_exact_is_transformers_for_a_bare_client(served: ServedTask) -> None:
    rows = rows_of(served, 100)
    requests = [rows[i : i + 1 + (i // 6) % 6] for i in range(0, len(rows), 6)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda r: call(served, "exact", r), requests))
    worst = 0.0
    for request, answer in zip(requests, answers, strict=True):
        expected = np.array([theirs(served, row) for row in request])
        if served.made.task == "multi-label":
            sure = np.abs(expected) > 1e-3
            assert (answer["ACTIVE"] == (expected > 0))[sure].all()
            expected = 1 / (1 + np.exp(-expected))
        (name,) = set(OUTPUTS[served.made.task]) - {"ACTIVE"}
        worst = max(worst, float(np.abs(answer[name] - expected).max()))
    print(f"\n{served.made.task}: served against transformers, largest difference {worst:.2e}")
    assert worst < 1e-4


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_typed_client(served: ServedTask, protocol: Any) -> None:
    rows = rows_of(served, 30)
    raw = call(served, "exact", rows)
    with connect(served.address(protocol), protocol) as client:
        found: list[Any] = getattr(client, CALLS.get(served.made.task, "scores"))(rows, "exact")
        assert [one.index for one in found] == list(range(len(rows)))
        assert [one.truncated for one in found] == raw["TRUNCATED"][:, 0].tolist()
        if served.made.task == "multi-label":
            np.testing.assert_allclose([one.scores for one in found], raw["SCORES"], atol=1e-5)
            for one, active in zip(found, raw["ACTIVE"].tolist(), strict=True):
                assert one.labels == TOPICS
                assert one.active == tuple(t for t, on in zip(TOPICS, active, strict=True) if on)
        elif served.made.task == "embedding":
            vectors = np.stack([one.embedding for one in found])
            np.testing.assert_allclose(vectors, raw["EMBEDDING"], atol=1e-5)
        else:
            np.testing.assert_allclose([one.score for one in found], raw["SCORE"][:, 0], atol=1e-4)
        with pytest.raises(BadRequest, match=r"allowed: a tier that answers classification"):
            client.predict(rows[:1], "exact")


def test_predict_and_load(served: ServedTask) -> None:
    where = ["predict", "--url", served.server.grpc, "--tier", "exact", "--in", served.made.data]
    done = forks().samp(*where, "--json")
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert len(lines) == len(served.made.rows)
    rows: list[Row] = [
        (line["text"], line["text_pair"]) if served.made.task == "reranking" else line["text"]
        for line in lines[:20]
    ]
    raw = call(served, "exact", rows)
    keys = {"multi-label": "scores", "embedding": "embedding"}
    (name,) = set(OUTPUTS[served.made.task]) - {"ACTIVE"}
    values = [line[keys.get(served.made.task, "score")] for line in lines[:20]]
    np.testing.assert_allclose(np.reshape(values, raw[name].shape), raw[name], atol=1e-4)
    shown = forks().samp(*where).out.splitlines()
    assert len(shown) == len(lines)
    figures = run_loadtest(served.server.grpc, "fast", users=3, seconds=2)
    assert figures["fast"]["failures"] == 0
    assert figures["fast"]["requests"] > 10


def test_tiers_are_compared_by_the_tasks_metric(served: ServedTask) -> None:
    task = served.made.task
    metrics = {"multi-label": "micro F1", "embedding": "Pearson of cosine"}
    command = ("ab", "--url", served.server.grpc, "--data", served.made.data, "--limit", 150)
    found = forks().samp(*command, "--promise", 95, "--json").json
    assert (found["metric"], found["accuracy"], found["mcnemar"]) == (
        metrics.get(task, "Pearson"), None, None,
    )  # fmt: skip
    assert found["n"] == 150
    assert found["values"]["control"] > 0.8
    low, high = found["difference"]["ci95"]
    assert low <= found["difference"]["value"] <= high
    assert found["verdict"] == "holds"
    assert found["agreement"] > 0.8
    same = forks().samp(*command, "--candidate", "exact", "--control", "fast").code
    assert same in (0, 1)
    if task == "embedding":
        texts = served.made.data.with_name("texts.jsonl")
        rows = [json.dumps({"text": row["text"]}) for row in served.made.rows[:60]]
        texts.write_text("\n".join(rows))
        alone = forks().samp(*command[:3], "--data", texts, "--promise", 50, "--json").json
        assert (alone["metric"], alone["n"]) == ("cosine to float", 60)
        assert alone["values"]["control"] == pytest.approx(1)
        assert alone["values"]["candidate"] == pytest.approx(alone["agreement"])
