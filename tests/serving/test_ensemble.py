"""The served path against transformers, and against itself in other company."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import classify, classify_all, infer, text_rows
from conftest import MAX_LENGTH, Served
from transformers import AutoModelForSequenceClassification, AutoTokenizer

FloatArray = Any
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def transformers_logits(served: Served) -> FloatArray:
    """transformers' own logits [texts, labels] of the whole test split."""
    tokenizer = AutoTokenizer.from_pretrained(served.checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(
        served.checkpoint, dtype=torch.float32
    ).eval()
    order = sorted(range(len(served.texts)), key=lambda i: len(served.texts[i]))
    logits = np.empty((len(served.texts), len(served.labels)), dtype=np.float32)
    with torch.inference_mode():
        for start in range(0, len(order), 64):
            rows = order[start : start + 64]
            batch = tokenizer(
                [served.texts[i] for i in rows],
                truncation=True,
                max_length=MAX_LENGTH,
                padding=True,
                return_tensors="pt",
            )
            logits[rows] = model(**batch).logits.numpy()
    return logits


def _requests(texts: tuple[str, ...], rows: int) -> list[list[str]]:
    return [list(texts[i : i + rows]) for i in range(0, len(texts), rows)]


def _log_scores(answers: list[Any]) -> FloatArray:
    return np.log(np.concatenate([answer["SCORES"] for answer in answers]).astype(np.float64))


def _log_softmax(logits: FloatArray) -> FloatArray:
    return torch.log_softmax(torch.from_numpy(logits).double(), dim=-1).numpy()


def test_exact_is_transformers_on_the_whole_split(
    served: Served, transformers_logits: FloatArray
) -> None:
    """Logits: transformers' pooler and classifier over the FEATURE that the server answers."""
    model = AutoModelForSequenceClassification.from_pretrained(
        served.checkpoint, dtype=torch.float32
    ).eval()
    worst = 0.0
    for start in range(0, len(served.texts), 64):
        texts = served.texts[start : start + 64]
        tokens = infer(served.grpc, f"tokenizer_{served.model}", TEXT=text_rows(texts))
        del tokens["TRUNCATED"]
        feature = infer(served.grpc, f"encoder_{served.model}_exact", **tokens)["FEATURE"]
        with torch.inference_mode():
            pooled = torch.tanh(model.bert.pooler.dense(torch.tensor(feature)))
            logits = model.classifier(pooled).numpy()
        worst = max(worst, float(np.abs(logits - transformers_logits[start : start + 64]).max()))
    print(f"\nexact against transformers: largest logit difference {worst:.2e}")
    assert worst < 1e-4


def test_exact_answers_are_transformers_answers(
    served: Served, transformers_logits: FloatArray
) -> None:
    """The whole ensemble, in requests of 7 rows, 4 in flight."""
    requests = _requests(served.texts, 7)
    answers = classify_all(served.grpc, f"{served.model}_exact", requests, 4)
    difference = np.abs(_log_scores(answers) - _log_softmax(transformers_logits)).max()
    assert difference < 2e-4  # a log-probability moves by at most twice what the logits do
    labels = np.concatenate([answer["LABEL"][:, 0] for answer in answers])
    margin = np.abs(np.diff(transformers_logits, axis=1)[:, 0])
    expected = np.array([served.labels[i].encode() for i in transformers_logits.argmax(axis=1)])
    assert (labels == expected)[margin > 1e-3].all()
    scores = np.concatenate([answer["SCORE"][:, 0] for answer in answers])
    assert (scores == np.exp(_log_scores(answers)).max(axis=1).astype(np.float32)).all()


def test_fast_keeps_the_task(served: Served) -> None:
    """Every GEMM in int8 with plain min-max scales: close to float, and not the float tier."""
    texts = served.texts[:800]
    both = {
        tier: classify_all(served.grpc, f"{served.model}_{tier}", _requests(texts, 16), 4)
        for tier in served.tiers
    }
    labels = {
        tier: np.concatenate([answer["LABEL"][:, 0] for answer in answers])
        for tier, answers in both.items()
    }
    assert (labels["exact"] == labels["fast"]).mean() > 0.95
    gold = np.array([label.encode() for label in served.gold[: len(texts)]])
    assert (labels["fast"] == gold).mean() > 0.78
    assert np.abs(_log_scores(both["exact"]) - _log_scores(both["fast"])).max() > 1e-3


@pytest.mark.parametrize(("tier", "tolerance"), [("exact", 2e-5), ("fast", 0.05)])
def test_alone_equals_in_a_batch(served: Served, tier: str, tolerance: float) -> None:
    """One text a request and nothing else in flight, against many requests of many sizes."""
    texts = served.texts[:160]
    name = f"{served.model}_{tier}"
    alone = _log_scores([classify(served.grpc, name, [text]) for text in texts])
    sizes = [1, 5, 2, 9, 3]
    requests, start = [], 0
    while start < len(texts):
        size = sizes[len(requests) % len(sizes)]
        requests.append(list(texts[start : start + size]))
        start += size
    together = _log_scores(classify_all(served.grpc, name, requests, 8))
    difference = np.abs(alone - together)
    print(f"\n{tier}: alone against in a batch, largest difference {difference.max():.2e}")
    assert difference.max() < tolerance
    clear = np.abs(np.diff(alone, axis=1)[:, 0]) > 0.1
    assert (alone.argmax(axis=1) == together.argmax(axis=1))[clear].all()


def test_one_execute_holds_requests_of_different_lengths(served: Served) -> None:
    requests = [[text] for text in served.texts[:240]]
    before = served.log.stat().st_size
    classify_all(served.grpc, f"{served.model}_fast", requests, 12)
    with served.log.open("rb") as stream:
        stream.seek(before)
        lines = re.findall(r"samp batch: (\d+) requests, .*lengths (.*)\"", stream.read().decode())
    batches = [set(re.findall(r"\d+", lengths)) for count, lengths in lines if int(count) >= 3]
    assert max(len(lengths) for lengths in batches) >= 3


def test_empty_text_answers_as_transformers_does(served: Served) -> None:
    tokenizer = AutoTokenizer.from_pretrained(served.checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(
        served.checkpoint, dtype=torch.float32
    ).eval()
    for text in ("", " ", "\t\n"):
        with torch.inference_mode():
            logits = model(**tokenizer(text, return_tensors="pt")).logits.numpy()
        answer = classify(served.grpc, f"{served.model}_exact", [text])
        assert np.abs(_log_scores([answer]) - _log_softmax(logits)).max() < 2e-4
        assert not answer["TRUNCATED"].any()


def test_tokenizer_is_padded_to_the_longest_row_of_each_request(served: Served) -> None:
    texts = ["short", "a much longer text than the first one", "word " * 500]
    answer = infer(served.grpc, f"tokenizer_{served.model}", TEXT=text_rows(texts))
    tokenizer = AutoTokenizer.from_pretrained(served.checkpoint)
    expected = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
    assert answer["IDS"].shape == answer["TYPES"].shape == (3, MAX_LENGTH)
    assert answer["LENGTHS"][:, 0].tolist() == [len(ids) for ids in expected]
    for row, ids in zip(answer["IDS"], expected, strict=True):
        assert row[: len(ids)].tolist() == ids
        assert not row[len(ids) :].any()
    assert answer["TRUNCATED"][:, 0].tolist() == [False, False, True]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_script_without_any_code_of_ours(served: Served, protocol: str) -> None:
    texts = ["a fine film", "a dull one 😀"]
    done = subprocess.run(
        [
            sys.executable, "-I", "-X", "importtime", ROOT / "examples" / "bare_client.py",
            "--url", getattr(served, protocol), *(["--http"] if protocol == "http" else []),
            f"{served.model}_exact", *texts,
        ],
        capture_output=True, text=True, check=False, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert not re.search(r"\| +samp_\w+$", done.stderr, re.MULTILINE), "it imports code of ours"
    expected = classify(served.grpc, f"{served.model}_exact", texts)
    for index, line in enumerate(done.stdout.splitlines()):
        answer = json.loads(line)
        assert answer["LABEL"] == [expected["LABEL"][index, 0].decode()]
        assert np.allclose(answer["SCORES"], expected["SCORES"][index], atol=1e-5)
        assert answer["TRUNCATED"] == [False]
    assert len(done.stdout.splitlines()) == 2


def test_the_metadata_is_all_that_a_client_needs(
    served: Served, request: pytest.FixtureRequest
) -> None:
    import tritonclient.http as triton_http

    client = triton_http.InferenceServerClient(served.http)
    request.addfinalizer(client.close)  # an idle connection holds up the server's stop
    for tier in served.tiers:
        metadata = client.get_model_metadata(f"{served.model}_{tier}")
        assert [(t["name"], t["datatype"], t["shape"]) for t in metadata["inputs"]] == [
            ("TEXT", "BYTES", [-1, 1])
        ]
        outputs = {t["name"]: (t["datatype"], t["shape"]) for t in metadata["outputs"]}
        assert outputs == {
            "LABEL": ("BYTES", [-1, 1]),
            "SCORE": ("FP32", [-1, 1]),
            "SCORES": ("FP32", [-1, len(served.labels)]),
            "TRUNCATED": ("BOOL", [-1, 1]),
        }
    config = client.get_model_config(f"head_{served.model}")
    assert config["parameters"]["labels"]["string_value"] == json.dumps(list(served.labels))
