"""What one node costs: KL against whole passes, cheap scores against what they foretell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bert
import numpy as np
import pytest
import torch
from samp_kernels.interface import pack_batch
from separable import small

from samp_core import calibrate, encoder, losses, sensitivity, torch_encoder
from samp_core.build import open_workbench, read_splits
from samp_core.cache import Cache
from samp_core.chain import Node, chain, plan_of
from samp_core.checkpoint import load_checkpoint
from samp_core.config import load_config
from samp_core.evaluate import spearman
from samp_core.heads import softmax_divergence
from samp_core.pipeline import batches
from samp_core.plan import Plan, Recipe
from samp_core.quantize import quantize_weight
from samp_core.sensitivity import (
    Score,
    beside,
    cheap_scores,
    estimated,
    even_share,
    measured_kl,
    with_kl,
)
from samp_core.workbench import Split, Workbench, silent


class Case:
    """A workbench on one backend, a plan with calibrated scales, the nodes, the search rows."""

    def __init__(self, folder: Path, backend: str, rows: int) -> None:
        config = load_config(
            small().yaml(folder / "b.yaml", out=str(folder / "out"), backend=backend), {}
        )
        self.bench: Workbench = open_workbench(config, silent)
        splits = read_splits(config, [])
        self.split: Split = self.bench.split(splits.search)
        self.split = replace(
            self.split,
            encodings=self.split.encodings[:rows],
            gold=self.split.gold[:rows],
            rows=splits.search,
        )
        ranges = self.bench.ranges(self.bench.split(splits.calibration))
        recipe = Recipe()
        self.base: Plan = replace(self.bench.base_plan(), scales=calibrate.scales(ranges, recipe))
        self.nodes: tuple[Node, ...] = chain(3, self.bench.quantizable(), recipe)

    def alone(self, name: str) -> Plan:
        return plan_of(self.base, self.nodes, [int(node.name == name) for node in self.nodes])

    def cheap(self, rows: int = sensitivity.CHEAP_ROWS) -> dict[str, Score]:
        return cheap_scores(self.bench, self.base, self.nodes, ["int8"], self.split, rows)["int8"]

    def movable(self) -> list[str]:
        return [node.name for node in self.nodes if len(node.options) > 1]


@pytest.fixture(scope="module", params=["onednn", "reference"])
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    made = Case(
        tmp_path_factory.mktemp("case"), request.param, 400 if request.param == "onednn" else 60
    )
    if not made.movable():
        pytest.skip("no int8 on this CPU")
    yield made
    made.bench.close()


def cross_entropy(case: Case, plan: Plan) -> float:
    logits = case.bench.logits(plan, case.split, "").astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    rows = np.arange(len(logits))
    chosen = logits[rows, case.split.gold] - np.log(np.exp(logits).sum(axis=1))
    return float(-chosen.mean())


def test_kl_of_one_site_is_that_of_whole_passes(case: Case) -> None:
    names = case.movable()
    found = measured_kl(case.bench, case.base, case.nodes, case.split, names)
    reference = case.bench.logits(case.base, case.split, "")
    whole = {
        name: softmax_divergence(reference, case.bench.logits(case.alone(name), case.split, ""))
        for name in names
    }
    assert list(found) == names
    assert found == pytest.approx(whole, rel=1e-4, abs=1e-9)
    assert max(whole.values()) > 100 * min(whole.values()) > 0


def test_layers_before_the_site_run_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case.bench, "cache", Cache(case.bench.cache.folder / "again"))
    passes: list[int] = []
    from_layer = encoder.LoopSession._from_layer

    def counted(self: Any, start: Any, *args: Any, **how: Any) -> Any:
        passes.append(start.layer)
        return from_layer(self, start, *args, **how)

    monkeypatch.setattr(encoder.LoopSession, "_from_layer", counted)
    names = case.movable()
    measured_kl(case.bench, case.base, case.nodes, case.split, names)
    packed = len(batches(case.split.encodings))
    layers = [int(name.split(".")[1]) for name in names]
    # The float pass, its last layer for the reference, and from each site's own layer on.
    assert sorted(passes) == sorted([0, 2, *layers] * packed)
    before = len(passes)
    measured_kl(case.bench, case.base, case.nodes, case.split, names)
    assert len(passes) == before, "a second time everything is found"


def test_what_the_budget_leaves_is_not_measured_but_found(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(case.bench, "cache", Cache(case.bench.cache.folder / "stopped"))
    names = case.movable()
    left = iter([False, False, *[True] * 2 * len(names)])
    first = measured_kl(
        case.bench, case.base, case.nodes, case.split, names[::-1], lambda: next(left)
    )
    assert list(first) == names[:-3:-1]
    # Resumed with no time at all, it still knows what it had measured.
    again = measured_kl(case.bench, case.base, case.nodes, case.split, names, lambda: True)
    assert again == first


def test_first_order_foretells_the_change_of_the_loss(case: Case) -> None:
    """Over the very rows: what int8 at one site does to the cross-entropy, up to second order."""
    names = case.movable()
    scores = case.cheap(len(case.split.gold))
    before = cross_entropy(case, plan_of(case.base, case.nodes, [0] * len(case.nodes)))
    checked = 0
    for name in names:
        score = scores[name]
        assert score.fisher is not None
        assert score.signed_whole is not None
        if score.fisher < 1e-3:  # small enough for a Taylor series
            changed = cross_entropy(case, case.alone(name)) - before
            assert changed == pytest.approx(score.signed_whole, abs=2 * score.fisher)
            checked += abs(changed) > 2 * score.fisher
    assert checked >= 3, "all changes are so small that the test shows nothing"


def test_the_second_order_ranks_as_the_measured_loss_does(case: Case) -> None:
    names = case.movable()
    scores = case.cheap()
    found = measured_kl(case.bench, case.base, case.nodes, case.split, names)
    assert set(scores) == set(names)
    fisher = [scores[name].fisher for name in names]
    assert spearman(list(found.values()), fisher) > 0.9
    ratio = np.array([scores[n].fisher / found[n] for n in names])  # type: ignore[operator]
    assert 0.5 < float(np.median(ratio)) < 2.5


def test_signal_to_noise_is_that_of_the_sites_output(case: Case) -> None:
    """Counted again for the first GEMM from the checkpoint's own tensors."""
    scores = case.cheap(len(case.split.gold))
    tensors = case.bench.checkpoint.tensors
    session = case.bench.loop_session(case.base)
    signal = noise = 0.0
    scale = case.base.scales["layer.0.qkv.input_scale"]
    weight = tensors["layer.0.qkv.weight"].astype(np.float64)
    q, scale_w = quantize_weight(tensors["layer.0.qkv.weight"], Recipe())
    for batch, _ in batches(case.split.encodings):
        hidden = case.bench.backend.to_host(session.layer_inputs(batch)[0].hidden)
        x = hidden[: batch.tokens].astype(np.float64)
        rounded = np.clip(np.rint(x / scale), -127, 127) * scale
        y = x @ weight.T
        error = rounded @ (q * scale_w[:, None].astype(np.float64)).T - y
        signal += float(((y + tensors["layer.0.qkv.bias"]) ** 2).sum())
        noise += float((error**2).sum())
    expected = 10 * np.log10(signal / noise)
    assert scores["layer.0.qkv"].sqnr_db == pytest.approx(expected, abs=0.02)


def test_fewer_rows_are_an_even_share(case: Case) -> None:
    """KL over a share of the rows is that of whole passes over those rows."""
    name = case.movable()[-1]
    found = measured_kl(case.bench, case.base, case.nodes, case.split, [name], rows=20)[name]
    places = np.linspace(0, len(case.split.encodings) - 1, 20).astype(int)
    reference, changed = (
        case.bench.logits(plan, case.split, "")[places] for plan in (case.base, case.alone(name))
    )
    assert found == pytest.approx(softmax_divergence(reference, changed), rel=1e-4, abs=1e-9)


# without a device


def test_a_slow_model_is_measured_on_fewer_rows() -> None:
    """All within a share of the budget, and the same for every build with that budget."""
    assert losses.enough_rows(512, 30, 0.003, 600.0) == 512
    assert losses.enough_rows(512, 60, 0.024, 600.0) == 128
    assert losses.enough_rows(512, 60, 0.024, 60.0) == losses.FEWEST_ROWS
    assert losses.enough_rows(40, 60, 9.0, 1.0) == 40
    for rows in (512, 500, 90):
        few = losses.enough_rows(rows, 60, 0.024, 600.0)
        assert few in (rows, losses.FEWEST_ROWS) or few * 0.024 * 60 * losses.SUFFIX <= 120.0


def test_another_option_is_held_against_the_measured_one() -> None:
    known = with_kl({"a": score("a", 2.0), "b": score("b", 4.0)}, {"a": 6.0})
    assert beside(known, {"a": score("a", 1.0)}) == {"a": 3.0}
    assert beside(known, {"b": score("b", 8.0)}) == {"b": 24.0}


def score(name: str, fisher: float | None, sqnr: float = 20.0) -> Score:
    return Score(name, "int8", fisher, sqnr)


def test_what_is_not_measured_is_scaled_from_what_is() -> None:
    scores = {n: score(n, f) for n, f in (("a", 1.0), ("b", 2.0), ("c", 4.0), ("d", 8.0))}
    known = with_kl(scores, {"a": 3.0, "b": 6.0, "c": 40.0})
    assert estimated(known) == {"a": 3.0, "b": 6.0, "c": 40.0, "d": 24.0}
    assert estimated(scores) == {"a": 1.0, "b": 2.0, "c": 4.0, "d": 8.0}
    blind = {n: score(n, None, s) for n, s in (("a", 10.0), ("b", 20.0))}
    assert estimated(with_kl(blind, {"a": 5.0})) == pytest.approx({"a": 5.0, "b": 0.5})


def test_rows_that_do_not_fit_are_left_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = pack_batch([np.ones(5, int)] * 4, [np.zeros(5, int)] * 4)
    packed = [(batch, np.array([place])) for place in range(9)]
    config = Shape(hidden=8, layers=2)
    assert len(even_share(packed, config)) == 9
    # 4 bytes x 8 features x 2 layers x 20 tokens: 1280 bytes a batch.
    monkeypatch.setattr(sensitivity, "KEPT_BYTES", 3 * 1280)
    assert [int(place[0]) for _, place in even_share(packed, config)] == [0, 4, 8]
    monkeypatch.setattr(sensitivity, "KEPT_BYTES", 1)
    assert [int(place[0]) for _, place in even_share(packed, config)] == [0]


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int


@pytest.mark.parametrize("output", ["first", "mean", "tokens"])
def test_the_torch_encoder_is_the_encoder(output: Any, tmp_path: Path) -> None:
    shape = bert.Shape(2, 48, 4, 31, "gelu_new")
    bert.write_bert(tmp_path, shape)
    checkpoint = load_checkpoint(tmp_path)
    batch, _ = encoder.sort_by_length(bert.batch_of())
    plan = bert.float_plan(checkpoint)
    expected = bert.open_session(checkpoint, plan, "reference").run(batch, output=output)
    tensors = torch_encoder.as_tensors(checkpoint.tensors)
    feature, taps = torch_encoder.forward(tensors, checkpoint.config, batch, output)
    np.testing.assert_allclose(feature.detach().numpy(), expected, rtol=0, atol=2e-5)
    assert [tap.name for tap in taps] == [node.name for node in chain(2, (), Recipe())]


def test_other_heads_have_no_gradient() -> None:
    feature = torch.ones(2, 3)
    weights = {"classifier.weight": torch.ones(2, 3), "classifier.bias": torch.zeros(2)}
    assert torch_encoder.head_logits(weights, feature).tolist() == [[3, 3], [3, 3]]
    assert torch_encoder.head_logits({**weights, "norm.weight": feature}, feature) is None
    assert torch_encoder.head_logits({"dense.weight": feature}, feature) is None
