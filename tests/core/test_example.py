"""The demo's rows and checkpoint: what they promise, caching, and what an interruption leaves."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "film_reviews"
DATA = ROOT / ".demo" / "film_reviews"
CHECKPOINT = ROOT / ".demo" / "checkpoint"


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLE / script), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rows") / "film_reviews"
    run("prepare.py", "--out", str(out))
    return out


@pytest.fixture(scope="module")
def trained() -> str:
    """What train.py prints; trains where `make demo-checkpoint` has not run yet."""
    return run("train.py")


def test_rows_are_complete_and_labelled(prepared: Path) -> None:
    counts = {path.stem: len(rows(path)) for path in prepared.iterdir()}
    assert counts == {"train": 9_351, "held_out": 930, "verification": 2_525}
    for path in prepared.iterdir():
        assert all(row.keys() == {"text", "label"} and row["text"].strip() for row in rows(path))
        assert {row["label"] for row in rows(path)} == {"fresh", "rotten"}


def test_no_text_is_in_two_splits(prepared: Path) -> None:
    texts = [{row["text"].strip() for row in rows(path)} for path in prepared.iterdir()]
    assert len(set.union(*texts)) == sum(len(split) for split in texts)


def test_every_reader_sees_the_same_lines(prepared: Path) -> None:
    for path in prepared.iterdir():
        assert len(path.read_text(encoding="utf-8").splitlines()) == len(rows(path))


def test_a_second_preparation_writes_nothing(prepared: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in prepared.iterdir()}
    run("prepare.py", "--out", str(prepared))
    assert {path: path.stat().st_mtime_ns for path in prepared.iterdir()} == before


def test_the_checkpoint_is_a_usual_folder(trained: str) -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "fresh", "1": "rotten"}
    assert {"model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
        path.name for path in CHECKPOINT.iterdir()
    }
    tokenizer = json.loads((CHECKPOINT / "tokenizer.json").read_text())
    assert tokenizer["padding"] is None
    assert tokenizer["truncation"] is None


def test_the_score_is_the_checkpoints(trained: str) -> None:
    """transformers' own forward over the first 500 verification rows agrees with the record."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    printed = float(re.search(r"accuracy (0\.\d+) on 2,525", trained)[1])  # type: ignore[index]
    assert printed > 0.80
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model: Any = AutoModelForSequenceClassification.from_pretrained(CHECKPOINT).eval()
    some = rows(DATA / "verification.jsonl")[:500]
    right = 0
    with torch.inference_mode():
        for start in range(0, len(some), 50):
            part = some[start : start + 50]
            texts = [row["text"] for row in part]
            logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
            labels = [model.config.id2label[index] for index in logits.argmax(-1).tolist()]
            right += sum(label == row["label"] for label, row in zip(labels, part, strict=True))
    # Four standard errors of a share over 500 rows.
    assert abs(right / len(some) - printed) < 4 * (0.25 / len(some)) ** 0.5


def test_a_second_training_only_prints_the_score(trained: str) -> None:
    before = (CHECKPOINT / "model.safetensors").stat().st_mtime_ns
    begun = time.monotonic()
    again = run("train.py")
    assert time.monotonic() - begun < 20
    assert "(cached)" in again
    assert re.search(r"accuracy 0\.\d+", again)[0] in trained  # type: ignore[index]
    assert (CHECKPOINT / "model.safetensors").stat().st_mtime_ns == before


def test_a_killed_training_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "checkpoint"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"old")
    (out / "training.json").write_text('{"key": "of other rows"}')
    before = digest(out)
    arguments = ["--out", str(out), "--data", str(tmp_path / "rows")]
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLE / "train.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        # Files appear in the new folder long before the training is done.
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("checkpoint.new/*")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.1)
        assert list(tmp_path.glob("checkpoint.new/*"))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert digest(out) == before


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
