"""Heads: the registry, a head from outside, and classification against transformers."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig

from samp_core import heads
from samp_core.errors import SampError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "checkpoints"

BUILT_IN = ["classification", "embedding", "entities", "multi-label", "regression"]
OUTSIDE = '''
"""Mean of the feature: a head that needs no weights."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from samp_core.heads import Head, TensorSpec


@dataclass(frozen=True)
class Unused:
    """A dataclass under postponed annotations needs its module to be importable by name."""

    width: int


def run(weights, feature, labels):
    return {"SCORE": feature.mean(axis=1, keepdims=True) * weights["scale"]}


HEAD = Head(
    name="outside-mean",
    encoder_output="mean",
    outputs=(TensorSpec("SCORE", "FP32", (1,)),),
    export=lambda state, config: {"scale": np.full(1, 2, dtype=np.float32)},
    logits=lambda weights, feature: run(weights, feature, [])["SCORE"],
    run=run,
)
'''


def _bert(hidden: int, classes: int) -> Any:
    torch.manual_seed(hidden + classes)
    config = BertConfig(
        vocab_size=50,
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=classes,
        initializer_range=0.1,
    )
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for bias in (model.bert.pooler.dense.bias, model.classifier.bias):
        torch.nn.init.normal_(bias)
    return model


def _state(model: Any) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def _theirs(model: Any, feature: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        hidden = torch.from_numpy(feature)[:, None, :]
        return np.asarray(model.classifier(model.bert.pooler(hidden)))


def _feature(rows: int, hidden: int) -> np.ndarray:
    return np.random.default_rng(rows).normal(size=(rows, hidden)).astype(np.float32)


@pytest.fixture
def clean_registry() -> Iterator[None]:
    before = dict(heads._registered)
    yield
    heads._registered.clear()
    heads._registered.update(before)


@pytest.mark.parametrize(("hidden", "classes"), [(32, 2), (384, 3), (384, 77), (768, 150)])
def test_classification_equals_transformers(hidden: int, classes: int) -> None:
    model = _bert(hidden, classes)
    head = heads.get("classification")
    weights = head.export(_state(model), model.config.to_dict())
    feature = _feature(40, hidden)
    # In float64: in float32 their sums, whose order depends on the CPU, are off by as much as ours.
    expected = _theirs(model.double(), feature.astype(np.float64))
    ours = head.logits(weights, feature)
    assert ours.dtype == np.float32
    # float32 sums of hidden terms round at about 1e-7 of their size.
    error = 1e-6 * max(1.0, np.abs(expected).max())
    assert np.abs(ours - expected).max() <= error

    labels = [f"label é {i}" for i in range(classes)]
    answers = head.run(weights, feature, labels)
    scores = torch.softmax(torch.from_numpy(expected), dim=1).numpy()
    # A softmax moves by at most half of what its logits do.
    assert np.abs(answers["SCORES"] - scores).max() <= error / 2 + 1e-7
    best = expected.argmax(axis=1)
    assert answers["LABEL"].tolist() == [[labels[i].encode()] for i in best]
    assert np.array_equal(answers["SCORE"][:, 0], answers["SCORES"].max(axis=1))
    assert [spec.name for spec in head.outputs] == list(answers)
    for spec in head.outputs:
        assert answers[spec.name].shape == (40, *spec.shape(classes))
        assert answers[spec.name].dtype == {"BYTES": np.object_, "FP32": np.float32}[spec.datatype]


@pytest.mark.parametrize(("hidden", "classes"), [(32, 2), (384, 3), (384, 77), (768, 9)])
def test_a_row_alone_has_the_bits_it_has_in_a_batch(hidden: int, classes: int) -> None:
    model = _bert(hidden, classes)
    head = heads.get("classification")
    weights = head.export(_state(model), model.config.to_dict())
    feature = _feature(64, hidden)
    labels = [str(i) for i in range(classes)]
    batch = head.run(weights, feature, labels)
    logits = head.logits(weights, feature)
    for start, size in ((0, 1), (1, 1), (63, 1), (5, 3), (17, 8), (3, 33)):
        part = slice(start, start + size)
        # A copy, so that its alignment differs from the row's in the batch.
        some = head.run(weights, feature[part].copy(), labels)
        for name, values in some.items():
            assert np.array_equal(values, batch[name][part])
        assert np.array_equal(head.logits(weights, feature[part].copy()), logits[part])
    assert head.run(weights, feature[:0], labels)["SCORES"].shape == (0, classes)


def test_large_logits_stay_finite() -> None:
    weights = {
        "pooler.weight": np.eye(2, dtype=np.float32),
        "pooler.bias": np.zeros(2, dtype=np.float32),
        "classifier.weight": np.array([[1e4, 0], [0, 1e4]], dtype=np.float32),
        "classifier.bias": np.zeros(2, dtype=np.float32),
    }
    answers = heads.get("classification").run(
        weights, np.array([[9, -9]], dtype=np.float32), ["a", "b"]
    )
    assert answers["LABEL"][0, 0] == b"a"
    assert answers["SCORES"].tolist() == [[1.0, 0.0]]


def test_half_precision_weights_are_exported_as_float32() -> None:
    model = _bert(32, 2).half()
    weights = heads.get("classification").export(_state(model), model.config.to_dict())
    assert {value.dtype for value in weights.values()} == {np.dtype(np.float32)}
    assert np.array_equal(
        weights["classifier.weight"], model.classifier.weight.detach().float().numpy()
    )


def test_faults_of_a_checkpoint_are_named() -> None:
    model = _bert(32, 3)
    state, config = _state(model), model.config.to_dict()
    export = heads.get("classification").export
    encoder_only = {k: v for k, v in state.items() if not k.startswith("classifier")}
    with pytest.raises(SampError, match=r"has no classifier\.weight, classifier\.bias"):
        export(encoder_only, config)
    with pytest.raises(SampError, match=r"classifier\.weight is \[3, 32\]; allowed: \[2, 32\]"):
        export(state, {**config, "id2label": {"0": "a", "1": "b"}})
    with pytest.raises(SampError, match="problem_type is regression"):
        export(state, {**config, "problem_type": "regression"})
    one = _bert(32, 1)
    with pytest.raises(SampError, match="classifier has 1 output"):
        export(_state(one), one.config.to_dict())


def test_a_head_from_outside_the_package(tmp_path: Path, clean_registry: None) -> None:
    path = tmp_path / "mean.py"
    path.write_text(OUTSIDE)
    assert "outside-mean" not in heads.names()
    heads.register(path)
    assert heads.register(str(path)).name == "outside-mean"  # again is harmless
    assert heads.names() == sorted([*BUILT_IN, "outside-mean"])
    head = heads.get("outside-mean")
    assert head.encoder_output == "mean"
    feature = _feature(3, 8)
    answers = head.run(head.export({}, {}), feature, [])
    assert np.allclose(answers["SCORE"][:, 0], 2 * feature.mean(axis=1))
    assert heads.source_file("outside-mean") == path

    copy = tmp_path / "served" / "head.py"
    copy.parent.mkdir()
    shutil.copy(heads.source_file("outside-mean"), copy)
    assert heads.load_file(copy).name == "outside-mean"
    with pytest.raises(SampError, match=r"already defined by .*mean\.py"):
        heads.register(copy)


def test_a_module_can_be_registered(tmp_path: Path, clean_registry: None) -> None:
    path = tmp_path / "as_module.py"
    path.write_text(OUTSIDE.replace("outside-mean", "as-module").replace("@dataclass", "#"))
    spec = importlib.util.spec_from_file_location("as_module", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert heads.register(module) is heads.get("as-module")
    assert heads.source_file("as-module") == path


def test_the_served_copy_of_classification_answers_the_same(tmp_path: Path) -> None:
    shutil.copy(heads.source_file("classification"), tmp_path / "head.py")
    served = heads.load_file(tmp_path / "head.py")
    model = _bert(32, 2)
    weights = served.export(_state(model), model.config.to_dict())
    feature = _feature(5, 32)
    assert np.array_equal(
        served.logits(weights, feature), heads.get("classification").logits(weights, feature)
    )


def test_faults_of_head_files(tmp_path: Path, clean_registry: None) -> None:
    with pytest.raises(SampError, match="head 'translation'; allowed: classification"):
        heads.get("translation")
    path = tmp_path / "bad.py"
    with pytest.raises(SampError, match="no such file"):
        heads.register(path)
    path.write_text("HEAD = 3\n")
    with pytest.raises(SampError, match="HEAD is int"):
        heads.register(path)
    path.write_text("import nothing_of_that_name\n")
    with pytest.raises(SampError, match="ModuleNotFoundError"):
        heads.register(path)
    path.write_text("HEAD = \n")
    with pytest.raises(SampError, match="SyntaxError"):
        heads.load_file(path)
    assert heads.names() == BUILT_IN


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/checkpoints beside the clone")
@pytest.mark.parametrize(("name", "classes"), [("rt", 2), ("banking", 77), ("sick", 3)])
def test_fine_tuned_checkpoints_equal_transformers(name: str, classes: int) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        SHARED / name, dtype=torch.float32
    ).eval()
    head = heads.get("classification")
    weights = head.export(_state(model), model.config.to_dict())
    ids = torch.tensor([[101, 1037, 2986, 2143, 102], [101, 2143, 2003, 6659, 102]])
    with torch.inference_mode():
        feature = np.asarray(model.bert(ids).last_hidden_state[:, 0])
        expected = np.asarray(model(ids).logits)
    ours = head.logits(weights, feature)
    assert ours.shape == (2, classes)
    assert np.abs(ours - expected).max() <= 1e-6 * max(1.0, np.abs(expected).max())


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/checkpoints beside the clone")
def test_a_token_classifier_is_refused() -> None:
    from safetensors.numpy import load_file

    state = load_file(SHARED / "wnut" / "model.safetensors")
    with pytest.raises(SampError, match=r"has no bert\.pooler\.dense\.weight"):
        heads.get("classification").export(state, {"hidden_size": 384})
