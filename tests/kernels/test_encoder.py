"""The encoder against transformers, backends against each other, batches against single texts."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bert import (
    LENGTHS,
    Shape,
    backend,
    batch_of,
    float_plan,
    open_session,
    scaled_plan,
    texts,
    write_bert,
)
from close import BACKENDS, needs
from hypothesis import given, settings
from hypothesis import strategies as st
from samp_kernels.interface import (
    SITES,
    Array,
    Batch,
    KernelError,
    OutputKind,
    UnsupportedPrecision,
    pack_batch,
)

from samp_core import encoder
from samp_core.backends import open_backend
from samp_core.checkpoint import Checkpoint, load_checkpoint
from samp_core.encoder import LoopSession, check_plan, prepare, quantizable_sites
from samp_core.encoder_files import load_encoder, load_session, save_encoder
from samp_core.errors import SampError
from samp_core.order import restore_order, sort_by_length
from samp_core.plan import Plan, Recipe, SitePlan, mode_plan
from samp_core.quantize import export_weights

OUTPUTS: tuple[OutputKind, ...] = ("first", "mean", "tokens")
GEMMS = ("qkv", "out", "ffn_in", "ffn_out")
every_backend = pytest.mark.parametrize("name", BACKENDS)

SHAPES = {
    "plain": Shape(),
    "tanh gelu, odd sizes, pickled": Shape(3, 96, 3, 100, "gelu_new", safetensors=False),
    "classifier, head of 64": Shape(1, 128, 2, 64, classifier=True),
    "relu, old names": Shape(2, 48, 4, 31, "relu", classifier=True, old_names=True),
}

# Largest |onednn - reference| under one int8 plan. A value that lies on an edge goes to either
# side, and later layers carry the step on: a step of these tensors is about 0.03.
INT8_TOLERANCE = 0.3
# Alone and in a batch: interfaces.md, in states instead of logits. `cpu`: bit for bit.
ALONE = {("reference", "fp32"): 1e-12, ("onednn", "fp32"): 1e-5, ("cpu", "fp32"): 0.0,
         ("reference", "int8"): 1e-9, ("onednn", "int8"): 0.05, ("cpu", "int8"): 0.0}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("bert")
    write_bert(folder, Shape())
    return load_checkpoint(folder)


@pytest.fixture(scope="module")
def scaled(checkpoint: Checkpoint) -> Plan:
    return scaled_plan(checkpoint)


def quantize_sites(plan: Plan, sites: Any, recipe: Recipe | None = None) -> Plan:
    entry = SitePlan("int8", recipe or Recipe())
    return replace(plan, sites={**plan.sites, **dict.fromkeys(sites, entry)}, mode=None)


def all_sites(plan: Plan, kinds: tuple[str, ...]) -> list[str]:
    return [f"layer.{i}.{kind}" for i in range(plan.layers) for kind in kinds]


# fp32


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_exact_equals_transformers(shape: Shape, tmp_path: Path) -> None:
    model = write_bert(tmp_path, shape)
    checkpoint = load_checkpoint(tmp_path)
    ids, types = texts()
    width = max(LENGTHS)
    padded = [
        np.stack([np.pad(row, (0, width - len(row))) for row in part]) for part in (ids, types)
    ]
    mask = np.stack([np.arange(width) < length for length in LENGTHS])
    with torch.no_grad():
        states = model(
            input_ids=torch.from_numpy(padded[0]).long(),
            token_type_ids=torch.from_numpy(padded[1]).long(),
            attention_mask=torch.from_numpy(mask).long(),
        ).last_hidden_state.numpy()
    rows = [states[i, :length] for i, length in enumerate(LENGTHS)]
    wanted = {
        "first": np.stack([row[0] for row in rows]),
        "mean": np.stack([row.mean(axis=0) for row in rows]),
        "tokens": np.concatenate(rows),
    }
    for name in BACKENDS:
        if name == "cpu" and shape.ffn % 4:  # Its session wants whole groups of four.
            with pytest.raises(KernelError, match=r"ffn 31.*multiples of 4"):
                open_session(checkpoint, float_plan(checkpoint), name)
            continue
        session = open_session(checkpoint, float_plan(checkpoint), name)
        for output in OUTPUTS:
            y = session.run(pack_batch(ids, types), output=output)
            assert y.dtype == np.float32
            assert y.shape == wanted[output].shape
            assert np.abs(y - wanted[output]).max() <= 1e-4
            assert np.isfinite(y).all()


# any plan


@settings(max_examples=12, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_backends_agree_on_any_plan(
    data: st.DataObject, seed: int, checkpoint: Checkpoint, scaled: Plan
) -> None:
    needs("onednn", "int8")
    sites = data.draw(st.lists(st.sampled_from(all_sites(scaled, GEMMS)), min_size=1, unique=True))
    granularity = data.draw(st.sampled_from(["channel", "tensor"]))
    plan = quantize_sites(scaled, sites, Recipe(weight=granularity))
    output = data.draw(st.sampled_from(OUTPUTS))
    batch = batch_of(data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5)), seed)
    results = [open_session(checkpoint, plan, name).run(batch, output=output) for name in BACKENDS]
    for result in results[1:]:
        assert np.abs(results[0] - result).max() <= INT8_TOLERANCE
    exact = open_session(checkpoint, float_plan(checkpoint), "reference").run(batch, output=output)
    loss = np.abs(results[0] - exact)
    assert loss.max() > 1e-5, "the plan changed nothing"
    assert loss.mean() <= 0.2


@pytest.mark.parametrize("name", BACKENDS[1:])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_backends_agree_nearly_everywhere(
    granularity: Any, name: str, checkpoint: Checkpoint, scaled: Plan
) -> None:
    """Over many tokens the steps that fall to the other side are few, beside what int8 costs."""
    needs(name, "int8")
    plan = quantize_sites(scaled, all_sites(scaled, GEMMS), Recipe(weight=granularity))
    off, loss = [], []
    for seed in range(4):
        batch = batch_of([31, 9, 20, 1, 17], seed)
        a, b = (
            open_session(checkpoint, plan, n).run(batch, output="tokens")
            for n in ("reference", name)
        )
        exact = open_session(checkpoint, scaled, "reference").run(batch, output="tokens")
        off.append(np.abs(a - b).mean())
        loss.append(np.abs(a - exact).mean())
    assert np.mean(off) <= 3e-3
    assert 0.01 < np.mean(loss) < 0.06


@pytest.mark.parametrize("kind", SITES)
def test_each_site_is_quantized_where_the_plan_says(
    kind: str, checkpoint: Checkpoint, scaled: Plan
) -> None:
    """One site of one layer changes the result a little; the recipe's granularity matters."""
    batch = batch_of()
    exact = open_session(checkpoint, float_plan(checkpoint), "reference").run(batch)
    for layer in range(2):
        plan = quantize_sites(scaled, [f"layer.{layer}.{kind}"])
        y = open_session(checkpoint, plan, "reference").run(batch)
        assert 1e-5 < np.abs(y - exact).max() < 0.2


def test_per_token_scales_run_on_the_reference(checkpoint: Checkpoint, scaled: Plan) -> None:
    batch = batch_of()
    exact = open_session(checkpoint, float_plan(checkpoint), "reference").run(batch)
    recipe = Recipe(activation="token")
    plan = quantize_sites(scaled, all_sites(scaled, ("qkv", "ffn_in")), recipe)
    # Static scales are not even stored.
    y = open_session(checkpoint, replace(plan, scales={}), "reference").run(batch)
    assert 1e-5 < np.abs(y - exact).max() < 0.2


# batches


@every_backend
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(
    "lengths", [LENGTHS, (31, 9, 20, 1, 17), (9, 31, 31)], ids=["few", "rounded up", "and sorted"]
)
def test_alone_equals_in_a_batch(
    name: str,
    precision: str,
    output: OutputKind,
    lengths: tuple[int, ...],
    checkpoint: Checkpoint,
    scaled: Plan,
) -> None:
    needs(name, precision)
    sites = quantizable_sites(backend(name))
    plan = scaled if precision == "fp32" else quantize_sites(scaled, all_sites(scaled, sites))
    session = open_session(checkpoint, plan, name)
    ids, types = texts(lengths)
    together = session.run(pack_batch(ids, types), output=output)
    if output == "tokens":
        parts = np.split(together, np.cumsum(lengths)[:-1])
    else:
        parts = list(together[:, None])
    for i, part in enumerate(parts):
        alone = session.run(pack_batch([ids[i]], [types[i]]), output=output)
        assert np.abs(alone - part).max() <= ALONE[name, precision]
    # The rows do differ, so a row at another's place would be seen.
    assert np.abs(parts[0][0] - parts[1][0]).max() > 0.5


@every_backend
@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(len(LENGTHS))), output=st.sampled_from(OUTPUTS))
def test_the_order_of_rows_is_irrelevant(
    name: str, order: list[int], output: OutputKind, checkpoint: Checkpoint
) -> None:
    session = open_session(checkpoint, float_plan(checkpoint), name)
    ids, types = texts()

    def rows(order: list[int]) -> list[Array]:
        batch = pack_batch([ids[i] for i in order], [types[i] for i in order])
        y = session.run(batch, output=output)
        return np.split(y, batch.cu_seqlens[1:-1]) if output == "tokens" else list(y)

    plain, shuffled = rows(list(range(len(LENGTHS)))), rows(order)
    for place, i in enumerate(order):
        assert np.abs(shuffled[place] - plain[i]).max() <= ALONE[name, "fp32"]


def test_equal_lengths_share_one_attention(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(checkpoint, float_plan(checkpoint), "onednn")
    calls: list[int] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def counted(q: Any, *args: Any, **how: Any) -> Any:
        calls.append(q.shape[0])
        return attend(q, *args, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    session.run(batch_of([7, 3, 7, 3, 7]))
    assert calls == [2, 3] * 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_sorting_is_undone(counts: list[int]) -> None:
    batch = pack_batch(
        [np.arange(n) + 100 * i for i, n in enumerate(counts)], [np.arange(n) for n in counts]
    )
    done, order = sort_by_length(batch)
    lengths = np.diff(done.cu_seqlens)
    assert lengths.tolist() == sorted(counts)
    assert done.max_seqlen == batch.max_seqlen
    assert (order is None) == (counts == sorted(counts))
    # Each row is whole, and its own.
    for begin, end in zip(done.cu_seqlens[:-1], done.cu_seqlens[1:], strict=True):
        assert done.ids[begin:end].tolist() == list(
            range(done.ids[begin], done.ids[begin] + end - begin)
        )
        assert done.positions[begin:end].tolist() == list(range(end - begin))
        assert done.types[begin:end].tolist() == list(range(end - begin))
    tokens = done.ids[:, None].astype(np.float32)
    back = restore_order(tokens, done.cu_seqlens, order, "tokens")
    assert back[:, 0].tolist() == batch.ids.tolist()
    first = restore_order(tokens[done.cu_seqlens[:-1]], done.cu_seqlens, order, "first")
    assert first[:, 0].tolist() == batch.ids[batch.cu_seqlens[:-1]].tolist()


# sessions


def test_sessions_share_packed_weights(checkpoint: Checkpoint, scaled: Plan) -> None:
    """Plans that differ in sites, granularity and scales, given one `packs`."""
    needs("onednn", "int8")
    wider = replace(scaled, scales={name: 2 * scale for name, scale in scaled.scales.items()})
    plans = [
        scaled,
        mode_plan(scaled, "full", 2, GEMMS, Recipe()),
        mode_plan(scaled, "ffn_only", 1, GEMMS, Recipe()),
        mode_plan(scaled, "full", 2, GEMMS, Recipe(weight="tensor")),
        mode_plan(wider, "full", 2, GEMMS, Recipe()),
    ]
    batch, packs = batch_of(), {}  # type: ignore[var-annotated]
    sessions = [open_session(checkpoint, plan, "onednn", packs=packs) for plan in plans]
    shared = [session.run(batch) for session in sessions]
    separate = [open_session(checkpoint, plan, "onednn").run(batch) for plan in plans]
    for a, b in zip(shared, separate, strict=True):
        assert np.array_equal(a, b)
    for i, a in enumerate(shared):
        assert all(np.abs(a - b).max() > 1e-4 for b in shared[:i])
    assert len(packs) == 8 * 3  # fp32, int8 by channel, int8 by tensor
    sessions[1].close()
    assert np.array_equal(sessions[2].run(batch), separate[2])


@every_backend
def test_profile_names_every_op(name: str, checkpoint: Checkpoint) -> None:
    session = open_session(checkpoint, float_plan(checkpoint), name)
    timings = session.profile(batch_of())
    assert [entry[:2] for entry in timings] == [
        ("embed_layernorm", "embeddings"),
        *(
            (op, f"layer.{layer}.{site}")
            for layer in range(2)
            for op, site in (
                ("gemm", "qkv"),
                ("attention", "attention"),
                ("gemm", "out"),
                ("add_layernorm", "out"),
                ("gemm", "ffn_in"),
                ("gemm", "ffn_out"),
                ("add_layernorm", "ffn_out"),
            )
        ),
    ]
    assert all(0.0 < seconds < 1.0 for _, _, seconds in timings)


def loop_session(checkpoint: Checkpoint, plan: Plan, name: str) -> LoopSession:
    """Over the ops, also where a backend has a session of its own."""
    tensors = export_weights(checkpoint.tensors, plan)
    return LoopSession(backend(name), checkpoint.config, tensors, plan)


@every_backend
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_pass_goes_on_from_a_layer(
    name: str, output: OutputKind, layer: int, checkpoint: Checkpoint, scaled: Plan
) -> None:
    """Float before the layer, int8 from it on: bit for bit what a whole pass computes."""
    needs(name, "int8")
    kinds = quantizable_sites(backend(name))
    plan = quantize_sites(scaled, [f"layer.{layer}.{kind}" for kind in kinds])
    whole = loop_session(checkpoint, plan, name)
    batch = batch_of()
    starts = loop_session(checkpoint, float_plan(checkpoint, name), name).layer_inputs(batch)
    assert [start.layer for start in starts] == [0, 1]
    before = encoder.FORWARDS
    expected = whole.run(batch, output=output)
    got = whole.run_from(starts[layer], output)
    assert before + 2 == encoder.FORWARDS
    np.testing.assert_array_equal(got, expected)
    ran = whole.executed()
    assert {site.split(".")[1] for site in ran} == set(map(str, range(layer, 2)))
    assert ran[f"layer.{layer}.ffn_in"] == "int8"
    other = loop_session(checkpoint, float_plan(checkpoint, name), name)
    assert not np.array_equal(other.run_from(starts[layer], output), got)


@every_backend
def test_passes_are_counted(name: str, checkpoint: Checkpoint) -> None:
    session = open_session(checkpoint, float_plan(checkpoint), name)
    before = encoder.FORWARDS
    session.run(batch_of())
    session.profile(batch_of())
    assert encoder.FORWARDS - before == 2


def test_a_saved_encoder_computes_the_same(
    checkpoint: Checkpoint, scaled: Plan, tmp_path: Path
) -> None:
    from safetensors.numpy import save_file

    needs("onednn", "int8")
    plan = replace(mode_plan(scaled, "full", 1, GEMMS, Recipe()), backend="onednn")
    save_encoder(tmp_path, checkpoint.config, plan)
    weights = tmp_path / "weights.safetensors"
    save_file(export_weights(checkpoint.tensors, plan), weights)
    assert load_encoder(tmp_path)[:2] == (checkpoint.config, plan)
    wanted = open_session(checkpoint, plan, "onednn").run(batch_of())
    assert np.array_equal(load_session(tmp_path).run(batch_of()), wanted)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SampError, match=r"damaged_weights: weights.safetensors"):
        load_session(tmp_path)


# what is refused


@every_backend
@pytest.mark.parametrize(
    ("site", "entry"),
    [
        ("layer.1.ffn_out", SitePlan("fp16")),
        ("layer.0.scores", SitePlan("fp8", Recipe())),
        ("layer.0.qkv", SitePlan("bits4", Recipe())),
        ("layer.0.out", SitePlan("int8", Recipe(activation="token"))),
    ],
)
def test_a_precision_that_is_lacking_is_refused_before_any_pass(
    name: str, site: str, entry: SitePlan, checkpoint: Checkpoint, scaled: Plan
) -> None:
    plan = replace(scaled, sites={**scaled.sites, site: entry})
    before = encoder.FORWARDS
    with pytest.raises(UnsupportedPrecision) as caught:
        prepare(backend(name), checkpoint.config, checkpoint.tensors, plan)
    assert encoder.FORWARDS - before == 0
    assert f"{site} {entry.precision}" in caught.value.got
    assert name in caught.value.op
    assert caught.value.allowed


@pytest.mark.parametrize("kind", ["scores", "context"])
def test_onednn_refuses_int8_attention(kind: str, checkpoint: Checkpoint, scaled: Plan) -> None:
    plan = quantize_sites(scaled, [f"layer.1.{kind}"])
    check_plan(backend("reference"), checkpoint.config, plan)
    message = rf"onednn attention.{kind}: got layer.1.{kind} int8 static; allowed: fp32"
    with pytest.raises(UnsupportedPrecision, match=message):
        open_session(checkpoint, plan, "onednn")
    assert "scores" not in quantizable_sites(backend("onednn"))
    assert quantizable_sites(backend("reference")) == SITES


@pytest.mark.parametrize("key", ["layers", "hidden", "heads", "ffn"])
def test_a_plan_for_another_shape_is_refused(
    key: str, checkpoint: Checkpoint, scaled: Plan
) -> None:
    for config in ({**scaled.config, key: 7}, {k: v for k, v in scaled.config.items() if k != key}):
        with pytest.raises(SampError, match=f"plan_mismatch: a plan for {key}"):
            check_plan(backend("reference"), checkpoint.config, replace(scaled, config=config))


def test_a_missing_scale_is_refused(checkpoint: Checkpoint, scaled: Plan) -> None:
    plan = quantize_sites(scaled, ["layer.1.out", "layer.0.scores"])
    for name in ("layer.1.out.input_scale", "layer.0.scores.k_scale"):
        less = replace(plan, scales={k: v for k, v in plan.scales.items() if k != name})
        with pytest.raises(SampError, match=f"no_scale: .*has no {name}"):
            export_weights(checkpoint.tensors, less)
        tensors = export_weights(checkpoint.tensors, plan)
        del tensors[name]
        with pytest.raises(KernelError, match=f"prepare: got no {name}"):
            prepare(backend("reference"), checkpoint.config, tensors, plan)


@every_backend
def test_a_bad_batch_is_refused_and_the_next_is_answered(name: str, checkpoint: Checkpoint) -> None:
    session = open_session(checkpoint, float_plan(checkpoint), name)
    good = batch_of()
    wanted = session.run(good)
    bad: list[Batch] = [
        dataclasses.replace(good, ids=good.ids + 1000),
        dataclasses.replace(good, types=good.types - 1),
        dataclasses.replace(good, positions=good.positions + 31),
    ]
    for batch in bad:
        with pytest.raises(KernelError, match=r"(embed_layernorm|run): got .*; allowed: 0 to"):
            session.run(batch)
        assert session.executed() == {}
    assert np.array_equal(session.run(good), wanted)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(
        SampError, match="unknown_backend: backend 'gpu'; allowed: cpu, cuda, onednn, refer"
    ):
        open_backend("gpu")
