"""Every family on the one encoder: the same numbers as transformers' own models, and its heads."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from bert import backend, float_plan, open_session
from family import FAMILIES, LONGEST, WORDPIECE, padded, write_family, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from samp_kernels.cpu import missing
from samp_kernels.interface import SITES, Array, Batch, KernelError, pack_batch
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

import samp_core
from samp_core import calibrate, families, heads, serving, torch_encoder
from samp_core.checkpoint import Checkpoint, load_checkpoint
from samp_core.encoder import LoopSession, prepare
from samp_core.errors import SampError
from samp_core.plan import Plan, Recipe, mode_plan
from samp_core.quantize import export_weights
from samp_core.repository import TierFiles, build_lock, write_build
from samp_core.text import TextEncoder

every_family = pytest.mark.parametrize("family", FAMILIES)
BACKENDS = ("reference", "onednn", "cpu")


@cache
def made(family: str) -> tuple[Checkpoint, Any]:
    folder = Path(mkdtemp())
    model = write_family(folder, family)
    return load_checkpoint(folder), model


def rows(counts: list[int], seed: int = 0) -> list[Array]:
    """Ids without the padding id, which transformers' RoBERTa does not count as a position."""
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 60, n).astype(np.int32) for n in counts]


def packed(ids: list[Array], type_id: int = 0) -> Batch:
    return pack_batch(ids, [np.full_like(row, type_id) for row in ids])


def calibrated(checkpoint: Checkpoint) -> Plan:
    """The float plan with the scales of every site."""
    plan = float_plan(checkpoint)
    session = prepare(backend("reference"), checkpoint.config, checkpoint.tensors, plan)
    assert isinstance(session, LoopSession)
    ranges = calibrate.observe(session, [packed(rows([30, 11, 7], 9))], "tokens", np.asarray)
    return replace(plan, scales=calibrate.scales(ranges, Recipe()))


@every_family
@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=5, deadline=None)
@given(st.lists(st.integers(1, LONGEST), min_size=1, max_size=4), st.integers(0, 99))
def test_hidden_states_are_those_of_transformers(
    family: str, name: str, counts: list[int], seed: int
) -> None:
    if name == "cpu" and missing():
        pytest.skip(missing())
    checkpoint, model = made(family)
    ids = rows(counts, seed)
    session = open_session(checkpoint, float_plan(checkpoint, name), name)
    states = session.run(packed(ids), output="tokens")
    wanted = padded(model, ids).last_hidden_state
    at = 0
    for i, row in enumerate(ids):
        theirs = wanted[i, : len(row)].numpy()
        assert np.abs(states[at : at + len(row)] - theirs).max() <= 1e-4
        at += len(row)


@every_family
def test_the_torch_encoder_is_the_same_model(family: str) -> None:
    """What gradients are taken of."""
    checkpoint, _ = made(family)
    batch = packed(rows([5, 23, 1]))
    tensors = torch_encoder.as_tensors(checkpoint.tensors)
    session = open_session(checkpoint, float_plan(checkpoint), "reference")
    for output in ("first", "mean", "tokens"):
        states, _ = torch_encoder.forward(tensors, checkpoint.config, batch, output)  # type: ignore[arg-type]
        wanted = session.run(batch, output=output)  # type: ignore[arg-type]
        assert np.abs(states.detach().numpy() - wanted).max() <= 1e-5


@every_family
def test_int8_plans_run_every_site_and_stay_near(family: str) -> None:
    if missing():
        pytest.skip(missing())
    checkpoint, _ = made(family)
    plan = mode_plan(replace(calibrated(checkpoint), backend="cpu"), "full", 2, SITES, Recipe())
    batch = packed(rows([5, 33, 1, 12]))
    session = open_session(checkpoint, plan, "cpu")
    states = session.run(batch, output="tokens")
    assert session.executed() == dict.fromkeys(plan.sites, "int8")
    wanted = open_session(checkpoint, plan, "reference").run(batch, output="tokens")
    # A value on an edge goes to either side, and later layers carry the step on.
    assert np.abs(states - wanted).mean() <= 0.01
    alone = session.run(packed(rows([5, 33, 1, 12])[1:2]), output="tokens")
    np.testing.assert_array_equal(alone, states[5:38])


@every_family
def test_token_types_count_for_bert_alone(family: str) -> None:
    checkpoint, _ = made(family)
    session = open_session(checkpoint, float_plan(checkpoint), "reference")
    first, second = (session.run(packed(rows([7]), kind)) for kind in (0, 1))
    assert np.array_equal(first, second) == (family != "bert")


@every_family
@pytest.mark.parametrize("head", ["classification", "regression", "entities"])
def test_heads_are_those_of_transformers(family: str, head: str, tmp_path: Path) -> None:
    auto: Any = transformers.AutoModelForSequenceClassification
    more: dict[str, Any] = {"num_labels": 1 if head == "regression" else 3}
    if head == "entities":
        auto = transformers.AutoModelForTokenClassification
        more = {"id2label": {0: "O", 1: "B-x", 2: "I-x"}}
    if head == "regression":
        more["problem_type"] = "regression"
    model = write_family(tmp_path, family, auto, **more)
    checkpoint = load_checkpoint(tmp_path)
    spec = heads.get(head)
    weights = spec.export(checkpoint.state, checkpoint.hf_config)
    inside = {}
    if spec.encoder_tensors is not None:
        inside = spec.encoder_tensors(checkpoint.state, checkpoint.hf_config)
    plan = float_plan(checkpoint)
    tensors = {**export_weights(checkpoint.tensors, plan), **inside}
    session = prepare(backend("reference"), checkpoint.config, tensors, plan)
    ids = rows([9, 2, 25])
    feature = session.run(packed(ids), output=spec.encoder_output)
    logits = spec.logits(weights, feature)
    wanted = padded(model, ids).logits.numpy()
    if head == "entities":
        wanted = np.concatenate([wanted[i, : len(row)] for i, row in enumerate(ids)])
    assert np.abs(logits - wanted).max() <= 1e-4
    if head == "classification":
        own = torch_encoder.head_logits(
            torch_encoder.as_tensors(weights), torch.from_numpy(feature)
        )
        assert own is not None
        assert np.abs(own.numpy() - wanted).max() <= 1e-4


@every_family
def test_ids_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    write_family(tmp_path, family)
    theirs = write_tokenizer(tmp_path, family)
    ours = TextEncoder.load(tmp_path)
    assert ours.max_length == LONGEST
    start, end = (2, 3) if family in WORDPIECE and family != "mpnet" else (0, 2)
    texts = ["a film", "", "x" * 99, "one two three " * 20, "[SEP] </s> <mask>", "\u00e9t\u00e9"]
    pairs = [(a, b) for a, b in zip(texts, reversed(texts), strict=True) if a and b]
    for given_texts in (texts, pairs):
        wanted = [
            theirs(*((t,) if isinstance(t, str) else t), truncation=True)["input_ids"]
            for t in given_texts
        ]
        encoded = ours.encode(given_texts)  # type: ignore[arg-type]
        assert [row.ids.tolist() for row in encoded] == wanted
        assert all(row.ids[0] == start and row.ids[-1] == end for row in encoded)


def test_position_biases_are_those_of_transformers() -> None:
    """Every distance of MPNet's longest text, and of the small one."""
    for heads_, longest in ((12, 512), (3, 40)):
        config = transformers.MPNetConfig(
            num_hidden_layers=1, num_attention_heads=heads_, hidden_size=heads_ * 4
        )
        encoder = MPNetEncoder(config)
        with torch.no_grad():
            theirs = encoder.compute_position_bias(torch.zeros(1, longest, 4))[0].numpy()
            table = encoder.relative_attention_bias.weight.numpy()
        bias = families.position_bias(table, longest)
        assert bias.shape == (heads_, 2 * longest - 1)
        for query in range(longest):
            row = bias[:, longest - 1 - query : 2 * longest - 1 - query]
            np.testing.assert_array_equal(row, theirs[:, query])


def test_a_bucket_by_hand() -> None:
    """Distances up to 7 have a bucket each; 8 to 127 share eight by their logarithm."""
    bias = families.position_bias(np.arange(32, dtype=np.float32)[:, None], 200)[0]
    for away in (0, 1, 7, 8, 11, 15, 17, 33, 63, 65, 127, 128, 199):
        bucket = away if away < 8 else min(15, 8 + int(8 * math.log(away / 8) / math.log(16)))
        assert bias[199 - away] == bucket
        assert bias[199 + away] == bucket + (16 if away else 0)


@pytest.mark.parametrize("name", BACKENDS)
def test_an_encoder_that_lost_its_position_bias_is_refused(name: str) -> None:
    if name == "cpu" and missing():
        pytest.skip(missing())
    checkpoint, _ = made("mpnet")
    tensors = {k: v for k, v in checkpoint.tensors.items() if k != "position_bias"}
    with pytest.raises(KernelError, match="no position_bias"):
        prepare(backend(name), checkpoint.config, tensors, float_plan(checkpoint, name))
    for wrong in (np.zeros((2, 79), np.float32), np.zeros((3, 78), np.float32)):
        changed, plan = {**tensors, "position_bias": wrong}, float_plan(checkpoint, name)
        with pytest.raises(KernelError, match=r"position_bias \[.*allowed.*\[3, 79\]"):
            prepare(backend(name), checkpoint.config, changed, plan)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_text_longer_than_the_biases_is_refused(name: str) -> None:
    if name == "cpu" and missing():
        pytest.skip(missing())
    checkpoint, _ = made("mpnet")
    session = open_session(checkpoint, float_plan(checkpoint, name), name)
    ids = rows([LONGEST + 1])
    batch = replace(packed(ids), positions=np.zeros(LONGEST + 1, np.int32))
    with pytest.raises(KernelError):
        session.run(batch)


def test_a_checkpoint_of_mpnet_without_its_biases_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_family(tmp_path, "mpnet")
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    del state["encoder.relative_attention_bias.weight"]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(SampError, match=r"no tensor encoder\.relative_attention_bias\.weight"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["onednn", "cpu"])
@pytest.mark.parametrize("family", ["mpnet", "xlm-roberta", "distilbert"])
def test_a_served_folder_answers_as_transformers(family: str, name: str, tmp_path: Path) -> None:
    """Written as a build writes it, read back as the server and `samp_core.load` read it."""
    if name == "cpu" and missing():
        pytest.skip(missing())
    auto = transformers.AutoModelForSequenceClassification
    model = write_family(tmp_path / "model", family, auto, num_labels=3)
    tokenizer = write_tokenizer(tmp_path / "model", family)
    checkpoint = load_checkpoint(tmp_path / "model")
    head = heads.get("classification").export(checkpoint.state, checkpoint.hf_config)
    plan = float_plan(checkpoint, name)
    out = tmp_path / "out"
    with build_lock(out):
        folder = write_build(
            out, model="small", task="classification", head="classification",
            labels=checkpoint.labels, max_length=LONGEST, default_tier="exact", threads=1,
            text=TextEncoder.load(tmp_path / "model"), head_weights=head, build={},
            encoder_config=checkpoint.config,
            tiers={"exact": TierFiles(plan, export_weights(checkpoint.tensors, plan))},
        )  # fmt: skip
    texts = ["a fine film", "dull", "", "one two three " * 20]
    ids = [np.array(row) for row in tokenizer(texts, truncation=True)["input_ids"]]
    wanted = torch.softmax(padded(model, ids).logits, dim=1).numpy()
    pipeline = samp_core.load(out, threads=1)
    assert np.abs(pipeline.predict(texts)["SCORES"] - wanted).max() <= 1e-4
    served = folder / "models" / "encoder_small_exact" / "1"
    encoder = serving.Encoder.load(served, {"threads": "1", "output": "first"})
    assert encoder.longest == LONGEST
    wide = np.zeros((1, LONGEST), np.int32)
    wide[0, : len(ids[0])] = ids[0]
    (answer,) = encoder.run([(wide, np.zeros_like(wide), np.array([[len(ids[0])]]))])
    feature = pipeline.session.run(packed([ids[0].astype(np.int32)]))
    np.testing.assert_array_equal(answer["FEATURE"], feature)
