"""Pairs served: the pinned tensors, a bare client, ours, the command line, and transformers."""

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
from small_tasks import HARD_TEXTS, LABELS, logits
from task_servers import SHARED, ServedTask, serve_small

from samp_core.server import Server

NAMES = LABELS["pairs"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedTask]:
    with serve_small("pairs", tmp_path_factory.mktemp("pairs")) as made:
        yield made


def pairs_of(served: ServedTask, count: int) -> list[tuple[str, str]]:
    rows = [(str(row["text"]), str(row["text_pair"])) for row in served.made.rows[:count]]
    return rows + list(zip(HARD_TEXTS, HARD_TEXTS[::-1], strict=True))


def log_softmax(x: Any) -> Any:
    wide = np.asarray(x, np.float64)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def call(address: str, ensemble: str, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    first, second = zip(*pairs, strict=True)
    return infer(address, ensemble, TEXT=text_rows(first), TEXT_PAIR=text_rows(second))


def test_the_metadata_is_all_that_a_client_needs(served: ServedTask) -> None:
    client = triton.InferenceServerClient(served.server.grpc)
    try:
        metadata = client.get_model_metadata("small_fast", as_json=True)
    finally:
        client.close()
    given = {t["name"]: (t["datatype"], t["shape"]) for t in metadata["inputs"]}
    assert given == {"TEXT": ("BYTES", ["-1", "1"]), "TEXT_PAIR": ("BYTES", ["-1", "1"])}
    outputs = {t["name"]: (t["datatype"], t["shape"]) for t in metadata["outputs"]}
    assert outputs == {
        "LABEL": ("BYTES", ["-1", "1"]),
        "SCORE": ("FP32", ["-1", "1"]),
        "SCORES": ("FP32", ["-1", "3"]),
        "TRUNCATED": ("BOOL", ["-1", "1"]),
    }


def test_exact_is_transformers_for_a_bare_client(served: ServedTask) -> None:
    """Requests of many sizes, four in flight."""
    pairs = pairs_of(served, 200)
    requests = [pairs[i : i + 1 + (i // 9) % 9] for i in range(0, len(pairs), 9)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda r: call(served.server.grpc, "small_exact", r), requests))
    worst = 0.0
    for request, answer in zip(requests, answers, strict=True):
        theirs = [logits(served.made.model, served.made.tokenizer, *pair) for pair in request]
        worst = max(worst, float(np.abs(np.log(answer["SCORES"]) - log_softmax(theirs)).max()))
        best = np.argmax(theirs, axis=1)
        margin = np.diff(np.sort(theirs, axis=1)[:, -2:], axis=1)[:, 0]
        same = answer["LABEL"][:, 0] == np.array([NAMES[i].encode() for i in best])
        assert same[margin > 1e-3].all()
        cut = [len(served.made.tokenizer(*p, verbose=False)["input_ids"]) > 48 for p in request]
        assert answer["TRUNCATED"][:, 0].tolist() == cut
    print(f"\npairs: served against transformers, largest log-score difference {worst:.2e}")
    assert worst < 5e-4


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_typed_client(served: ServedTask, protocol: Any) -> None:
    pairs = pairs_of(served, 60)
    raw = call(served.server.grpc, "small_exact", pairs[:60])
    with connect(served.address(protocol), protocol) as client:
        info = client.describe("exact")
        assert (info.kind, info.inputs) == ("classification", ("TEXT", "TEXT_PAIR"))
        found = client.predict(pairs, "exact")
        assert [one.index for one in found] == list(range(len(pairs)))
        assert [one.label.encode() for one in found[:60]] == raw["LABEL"][:, 0].tolist()
        np.testing.assert_allclose([one.scores for one in found[:60]], raw["SCORES"], atol=1e-5)
        as_bytes = client.predict([(a.encode(), b.encode()) for a, b in pairs[:5]], "exact")
        assert [one.label for one in as_bytes] == [one.label for one in found[:5]]
        with pytest.raises(BadRequest, match=r"text 1 is str; allowed: \(text, text_pair\)"):
            client.predict([pairs[0], "alone"], "exact")
        with pytest.raises(BadRequest, match=r"answers classification.*predict\(\)"):
            client.entities(["a"], "exact")
        outcomes = list(client.outcomes([pairs[0], (b"\xff", b"a"), ("a", "lone \ud800")], "exact"))
        assert [one.error is None for one in outcomes] == [True, False, False]
        assert "TEXT row 0: byte 0xff" in str(outcomes[1].error)
        bad = list(client.outcomes([("fine", b"b\xfe")], "exact"))
        assert "TEXT_PAIR row 0: byte 0xfe" in str(bad[0].error)


def test_predict_on_the_command_line(served: ServedTask) -> None:
    pairs = pairs_of(served, 3)[:3]
    with connect(served.server.grpc) as client:
        expected = [one.label for one in client.predict(pairs, "exact")]
    where = ["predict", "--url", served.server.grpc, "--tier", "exact"]
    flags = [part for _, second in pairs for part in ("--pair", second)]
    given = [first for first, _ in pairs]
    done = forks().samp(*where, "--json", *flags, "--", *given)
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [(row["text"], row["text_pair"]) for row in rows] == pairs
    assert [row["label"] for row in rows] == expected
    shown = forks().samp(*where, "--in", served.made.data).out.splitlines()
    assert [line.split("\t")[0] for line in shown[:3]] == expected
    assert len(shown) == len(served.made.rows)
    lines = "".join(f"{a}\t{b}\n" for a, b in pairs).encode()
    typed = forks().samp(*where, stdin=lines).out.splitlines()
    assert [line.split("\t")[0] for line in typed] == expected
    alone = forks().samp(*where, "one text")
    assert alone.code == 1
    assert "(text, text_pair)" in alone.out
    uneven = forks().samp(*where, "a", "b", "--pair", "c")
    assert uneven.code == 2
    assert "one --pair for each text" in uneven.err


def test_two_tiers_are_compared_on_labelled_pairs(served: ServedTask) -> None:
    done = forks().samp(
        "ab", "--url", served.server.grpc, "--data", served.made.data, "--limit", 60, "--json",
        "--promise", 50,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["n"] == 60
    assert done.json["accuracy"]["control"] > 0.8


def test_pairs_under_load(served: ServedTask) -> None:
    rows = [(str(row["text"]), str(row["text_pair"])) for row in served.made.rows[:40]]
    path = served.out / "pairs.jsonl"
    path.write_text("".join(json.dumps({"text": a, "text_pair": b}) + "\n" for a, b in rows))
    for texts in (path, None):
        figures = run_loadtest(served.server.grpc, "fast", users=4, seconds=2, texts=texts)
        assert figures["fast"]["failures"] == 0
        assert figures["fast"]["requests"] > 20


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared beside the clone")
def test_sick_served_is_transformers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The whole test split through the exact ensemble, and its accuracy."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = SHARED / "checkpoints" / "sick"
    rows = [json.loads(line) for line in (SHARED / "data/sick-test.jsonl").open(encoding="utf-8")]
    out = tmp_path_factory.mktemp("sick")
    done = forks().start(
        "build", "--model", folder, "--task", "pairs", "--data", SHARED / "data/sick-test.jsonl",
        "--name", "sick", "--max-length", 96, "--calibrator", "minmax", "--tier", "fast:drop=2pt",
        "--strategy", "samp", "--out", out, "--json",
    ).wait(600)  # fmt: skip
    assert done.code == 0, done.err
    assert 84 < done.json["tiers"][0]["value"] < 89
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    pairs = [(row["text"], row["text_pair"]) for row in rows]
    theirs = np.empty((len(pairs), 3))
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
    with torch.inference_mode():
        for start in range(0, len(order), 64):
            part = order[start : start + 64]
            batch = tokenizer(
                [pairs[i][0] for i in part], [pairs[i][1] for i in part], truncation=True,
                max_length=96, padding=True, return_tensors="pt",
            )  # fmt: skip
            theirs[part] = model(**batch).logits.numpy()
    with Server.start(out) as server:
        requests = [pairs[i : i + 32] for i in range(0, len(pairs), 32)]
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(lambda r: call(server.grpc, "sick_exact", r), requests))
    ours = np.log(np.concatenate([answer["SCORES"] for answer in answers]).astype(np.float64))
    labels = np.concatenate([answer["LABEL"][:, 0] for answer in answers])
    right = np.mean(labels == np.array([row["label"].encode() for row in rows]))
    worst = np.abs(ours - log_softmax(theirs)).max()
    print(f"\nSICK: largest log-score difference {worst:.2e}, accuracy {100 * right:.2f}")
    assert worst < 2e-4
    assert right == pytest.approx(0.865, abs=0.005)
