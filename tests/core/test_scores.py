"""Multi-label, regression, reranking and embeddings: built, and equal to transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_tasks
import torch
from forked import forks
from scipy import stats
from small_tasks import HARD_TEXTS, TOPICS, SmallTask, embedding, logits

from samp_core import evaluate, heads, metrics, pipeline
from samp_core.build import pooling
from samp_core.config import BuildConfig
from samp_core.data import gold_values, make_rows, read_rows, split_rows
from samp_core.errors import SampError
from samp_core.manifest import read_manifest
from samp_core.rows import Text
from samp_core.tasks import TASKS

NAMES = ("multi-label", "regression", "reranking", "embedding")


@dataclass(frozen=True)
class Built:
    made: SmallTask
    out: Path
    report: dict[str, Any]

    @property
    def task(self) -> str:
        return self.made.task

    def texts(self, count: int) -> list[Text]:
        """Rows, and hard texts."""
        rows = self.made.rows[:count]
        if self.task == "reranking":
            given: list[Text] = [(str(row["text"]), str(row["text_pair"])) for row in rows]
            return given + list(zip(HARD_TEXTS, HARD_TEXTS[::-1], strict=True))
        return [*(str(row["text"]) for row in rows), *HARD_TEXTS]

    def theirs(self, text: Text) -> Any:
        parts = (text,) if isinstance(text, str) else text
        if self.task == "embedding":
            return embedding(self.made.model, self.made.tokenizer, *parts)
        return logits(self.made.model, self.made.tokenizer, *parts)


@pytest.fixture(scope="module", params=NAMES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    task = str(request.param)
    made = small_tasks.make(task, tmp_path_factory.mktemp(task))
    out = tmp_path_factory.mktemp("out")
    done = forks().samp(*made.command(out, "--tier", "loose:drop=50pt"))
    assert done.code == 0, done.err
    return Built(made, out, done.json)


def test_every_answer_is_transformers(built: Built) -> None:
    served = pipeline.load(built.out, "exact")
    texts = built.texts(120)
    theirs = np.array([built.theirs(text) for text in texts])
    assert np.abs(served.logits(texts) - theirs).max() < 1e-4
    answer = {name: np.asarray(rows) for name, rows in served.predict(texts).items()}
    if built.task == "multi-label":
        scores = torch.sigmoid(torch.tensor(theirs)).numpy()
        np.testing.assert_allclose(answer["SCORES"], scores, atol=2e-5)
        sure = np.abs(theirs) > 1e-3
        assert (answer["ACTIVE"] == (theirs > 0))[sure].all()
        assert answer["ACTIVE"].dtype == np.bool_
    elif built.task == "embedding":
        np.testing.assert_allclose(answer["EMBEDDING"], theirs, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(answer["EMBEDDING"], axis=1), 1, atol=1e-6)
    else:
        np.testing.assert_allclose(answer["SCORE"], theirs, atol=1e-4)


def test_a_row_alone_has_the_answer_it_has_in_a_batch(built: Built) -> None:
    served = pipeline.load(built.out, "exact")
    texts = built.texts(30)
    together = served.predict(texts)
    for place, text in enumerate(texts):
        for name, rows in served.predict([text]).items():
            np.testing.assert_allclose(rows[0], together[name][place], atol=1e-5)


def test_the_value_is_that_of_transformers_answers(built: Built) -> None:
    manifest = read_manifest(built.out)
    assert manifest.task == built.task
    assert manifest.labels == (TOPICS if built.task == "multi-label" else ())
    rows = split_rows(read_rows(built.made.data, task=TASKS[built.task])).verification
    tier = built.report["tiers"][0]
    if built.task == "multi-label":
        found = np.array([built.theirs(text) > 0 for text in rows.texts])
        gold = np.array([[name in row for name in TOPICS] for row in rows.labels])
        hits = (found & gold).sum()
        value = 2 * hits / (2 * hits + (found ^ gold).sum())
        assert tier["metric"] == "micro F1"
    else:
        if built.task == "embedding":
            mine = [built.theirs(a) @ built.theirs(b) for a, b in rows.texts]  # type: ignore[misc]
        else:
            mine = [float(built.theirs(text)[0]) for text in rows.texts]
        value = np.corrcoef(mine, rows.labels)[0, 1]
        rank = stats.spearmanr(mine, rows.labels).statistic
        note = next(w for w in built.report["warnings"] if w.startswith("Spearman"))
        assert f"exact {100 * rank:.2f}" in note
        assert tier["metric"] == ("Pearson of cosine" if built.task == "embedding" else "Pearson")
    assert tier["value"] == pytest.approx(100 * value, abs=2e-3)
    assert 50 < tier["value"] < 99.9
    assert tier["ci95"][0] < tier["value"] < tier["ci95"][1]


@pytest.mark.parametrize("how", ["mean", "first"])
def test_embeddings_without_scores_are_held_to_float(how: str, tmp_path: Path) -> None:
    made = small_tasks.make("embedding", tmp_path / "made", rows=200)
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in made.rows))
    (made.checkpoint / "1_Pooling").mkdir()
    (made.checkpoint / "1_Pooling" / "config.json").write_text(
        json.dumps(
            {"pooling_mode_cls_token": how == "first", "pooling_mode_mean_tokens": how == "mean"}
        )
    )
    out = tmp_path / "out"
    command = made.command(out, "--tier", "loose:drop=20pt", "--data", data)
    done = forks().samp(*command)
    assert done.code == 0, done.err
    exact, loose = done.json["tiers"]
    assert exact["metric"] == "cosine to float"
    assert exact["value"] == pytest.approx(100, abs=1e-4)
    texts = [str(row["text"]) for row in made.rows[:40]]
    theirs = np.array([embedding(made.model, made.tokenizer, text, how) for text in texts])
    np.testing.assert_allclose(pipeline.load(out, "exact").logits(texts), theirs, atol=1e-5)
    # The quantized tier's value is its mean cosine to float on the verification rows.
    rows = split_rows(read_rows(data, task=TASKS["embedding"])).verification
    pair = [pipeline.load(out, tier).logits(rows.texts) for tier in ("exact", "loose")]
    cosine = (pair[0].astype(np.float64) * pair[1]).sum(axis=1).mean()
    assert loose["value"] == pytest.approx(100 * cosine, abs=2e-3)


def test_a_pooling_that_we_do_not_have(tmp_path: Path) -> None:
    config = BuildConfig.model_validate({"model": tmp_path, "data": "x", "name": "m"})
    assert pooling(config) == "mean"
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(SampError, match="pooling_mode_max_tokens; allowed: pooling_mode_cls"):
        pooling(config)
    assert pooling(config.model_copy(update={"pooling": "first"})) == "first"


@pytest.mark.parametrize(
    ("task", "row", "why"),
    [
        ("multi-label", '{"text": "a", "labels": "food"}', 'labels is "food"'),
        ("multi-label", '{"text": "a", "labels": [""]}', "label is empty"),
        ("multi-label", '{"text": "a", "label": "food"}', "no column labels"),
        ("regression", '{"text": "a", "score": "high"}', 'score is "high"'),
        ("regression", '{"text": "a", "score": NaN}', "score is NaN"),
        ("regression", '{"text": "a", "score": true}', "score is true"),
        ("reranking", '{"text": "a", "score": 1}', "no column text_pair"),
        ("embedding", '{"text": "a", "score": 1}', "no column text_pair"),
        ("embedding", '{"text": "a", "text_pair": "b"}', "no column score"),
    ],
)
def test_each_fault_is_one_clear_error(tmp_path: Path, task: str, row: str, why: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(row + "\n")
    with pytest.raises(SampError) as caught:
        read_rows(path, task=TASKS[task])
    assert f"{path}:1" in caught.value.given
    assert why in caught.value.given


def test_tables_hold_lists_and_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,labels\na,"[""law"", ""food""]"\nb,[]\n')
    rows = read_rows(path, task=TASKS["multi-label"])
    assert rows.labels == (("food", "law"), ())
    assert gold_values(rows, "labels", TOPICS).tolist() == [[1, 0, 0, 1], [0, 0, 0, 0]]
    path.write_text("text,text_pair,score\na,b,1.5\nc,d,-2\n")
    for task in ("reranking", "embedding"):
        assert read_rows(path, task=TASKS[task]).labels == (1.5, -2.0)
    path.write_text("text\na\nb\n")
    assert read_rows(path, task=TASKS["embedding"]).labels == ("", "")


def test_checkpoints_of_another_task_are_refused() -> None:
    config = {"hidden_size": 4, "id2label": {"0": "x", "1": "y"}}
    state = {
        "bert.pooler.dense.weight": np.zeros((4, 4), np.float32),
        "bert.pooler.dense.bias": np.zeros(4, np.float32),
        "classifier.weight": np.zeros((2, 4), np.float32),
        "classifier.bias": np.zeros(2, np.float32),
    }
    with pytest.raises(SampError, match="classifier has 2 outputs; allowed: one output"):
        heads.get("regression").export(state, config)
    with pytest.raises(SampError, match="problem_type is regression"):
        heads.get("multi-label").export(state, {**config, "problem_type": "regression"})
    tensors = heads.get("entities").encoder_tensors
    assert tensors is not None
    with pytest.raises(SampError, match=r"labels x, y; allowed: BIO labels"):
        tensors(state, config)


# the metrics


def test_correlations_are_scipys() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        x = rng.normal(3, 2, 50).round(1)
        y = (x * rng.normal() + rng.normal(0, 3, 50)).round(0)
        sums = evaluate.moments(x, y).sum(axis=0)
        assert float(evaluate.pearson(sums)) == pytest.approx(stats.pearsonr(x, y).statistic)
        assert evaluate.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    flat = evaluate.moments(np.ones(9), np.arange(9)).sum(axis=0)
    assert float(evaluate.pearson(flat)) == 0.0


@pytest.mark.parametrize("task", ["regression", "embedding"])
def test_a_promised_correlation_is_bounded(task: str) -> None:
    """The bound holds in 95% of samples of a known population, and is not much too wide."""
    rng = np.random.default_rng(2)
    size = 100_000
    gold = rng.normal(size=size)
    control = evaluate.moments(0.8 * gold + 0.6 * rng.normal(size=size), gold)
    candidate = evaluate.moments(control[:, 1] + 0.3 * rng.normal(size=size), gold)
    metric = metrics.of(TASKS[task])
    true = metric.value(control) - metric.value(candidate)
    held, bounds = 0, []
    for _ in range(120):
        chosen = rng.integers(0, size, 400)
        test = metric.test(control[chosen], candidate[chosen], 1.0, 0.05)
        held += test.bound >= true
        bounds.append(test.bound)
    assert held >= 108  # 114 expected, less two and a half deviations
    assert np.mean(bounds) < 3 * true
    same = metric.test(control[:400], control[:400], 0.05, 0.05)
    assert (same.b, same.c, same.drop) == (0, 0, 0.0)
    assert 0.002 < same.bound < 0.03


def test_a_search_predicts_what_verification_finds() -> None:
    """The bound expected of n fresh rows is near the one that fresh rows give."""
    rng = np.random.default_rng(3)
    metric = metrics.of(TASKS["multi-label"], TOPICS)
    gold = rng.random((6000, 4)) < 0.3
    reference = np.where(gold, 1.0, -1.0) + rng.normal(0, 0.8, gold.shape)
    plan = reference + rng.normal(0, 0.15, gold.shape)
    rows = make_rows(map(str, range(6000)), [()] * 6000, Path("x"))

    class Part:
        def __init__(self, chosen: slice) -> None:
            self.gold, self.encodings = gold[chosen], rows.texts[chosen]

    search, fresh = slice(0, 1000), slice(1000, 6000)
    found = metric.candidate("p", 1.0, reference[search], plan[search], Part(search))
    assert found.lost is not None
    predicted = evaluate.expected_bound(found.lost, found.noise, found.worst, 5000)
    control, candidate = (metric.measure(x[fresh], Part(fresh)) for x in (reference, plan))
    bound = metric.test(control, candidate, 1.0, 0.05).bound
    assert predicted == pytest.approx(bound, abs=0.01)
    assert bound > found.lost - 0.01
