"""Activation ranges against the activations themselves, and scales as a function of ranges."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samp_kernels.interface import Array, Batch, pack_batch
from samp_kernels.reference import ReferenceBackend
from tiny import CONFIG, tiny_weights

from samp_core import calibrate
from samp_core.encoder import LoopSession
from samp_core.errors import SampError
from samp_core.plan import CALIBRATORS, Plan, Recipe
from samp_core.reach import percentile

PLAN = Plan("0", {"layers": 1, "hidden": 16, "heads": 2, "ffn": 32}, "reference", {}, {})
SITES = {
    *(f"layer.0.{name}" for name in ("qkv", "out", "ffn_in", "ffn_out")),
    *("layer.0.scores.q", "layer.0.scores.k", "layer.0.context.v"),
}


def session(weights: dict[str, Array] | None = None) -> LoopSession:
    return LoopSession(ReferenceBackend(), CONFIG, weights or tiny_weights(0), PLAN)


def batch_of(lengths: list[int], seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, CONFIG.vocab, length) for length in lengths]
    return pack_batch(ids, [np.zeros_like(row) for row in ids])


BATCHES = [batch_of([3, 9, 1], 0), batch_of([5], 1), batch_of([7, 7], 2)]


def observe(weights: dict[str, Array] | None = None, output: Any = "tokens") -> dict[str, Array]:
    return calibrate.observe(session(weights), BATCHES, output, np.asarray)


def activations(output: Any) -> dict[str, Array]:
    """Every site's inputs over all batches, [rows, channels], as the session shows them."""
    seen: dict[str, list[Array]] = {}

    def note(name: str, value: Any) -> None:
        if name.endswith(".attention"):
            hidden = CONFIG.hidden
            for place, part in enumerate(("scores.q", "scores.k", "context.v")):
                x = value[0][:, place * hidden : (place + 1) * hidden]
                seen.setdefault(f"layer.0.{part}", []).append(x)
        else:
            seen.setdefault(name, []).append(value)

    for batch in BATCHES:
        session().observe(batch, output, note)
    return {name: np.concatenate(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("output", ["first", "tokens"])
def test_ranges_are_those_of_the_activations(output: str) -> None:
    ranges, inputs = observe(output=output), activations(output)
    assert set(inputs) == SITES
    beside = {f"{name}.{part}" for name in SITES for part in ("amax", "channels")}
    assert set(ranges) == SITES | beside
    tokens, rows = sum(b.tokens for b in BATCHES), sum(b.sequences for b in BATCHES)
    for name, x in inputs.items():
        amax = np.abs(x).max()
        assert ranges[f"{name}.amax"].tolist() == [amax]
        each = np.abs(x).max(axis=0).astype(np.float32)
        np.testing.assert_array_equal(ranges[f"{name}.channels"], each)
        histogram, _ = np.histogram(np.abs(x), bins=calibrate.BINS, range=(0, amax))
        assert np.abs(histogram - ranges[name]).sum() <= 4, "more than edges differ"
        assert ranges[name].sum() == x.size
        assert ranges[name][-1] >= 1
        # With one row a text asked for, the last layer computes only that row.
        late = name.rsplit(".", 1)[1] in ("out", "ffn_in", "ffn_out")
        width = CONFIG.ffn if name.endswith("ffn_out") else CONFIG.hidden
        assert x.size == width * (rows if late and output == "first" else tokens)


def test_two_passes_a_batch_and_progress() -> None:
    steps: list[int] = []
    calibrate.observe(session(), BATCHES, "first", np.asarray, lambda: steps.append(1))
    assert len(steps) == 2 * len(BATCHES)


def test_batches_side_by_side_give_the_same() -> None:
    """In threads that end in any order, the ranges are those of one by one."""
    backwards = iter([0.06, 0.03, 0.0] * 2)

    def slow(batch: Batch, do: Any, wait: float) -> Any:
        time.sleep(wait)
        return do(batch)

    def each(do: Any, batches: Any) -> Any:
        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(lambda b, w: slow(b, do, w), batches, list(islice(backwards, 3))))

    plain = observe()
    found = calibrate.observe(session(), BATCHES, "tokens", np.asarray, each=each)
    assert found.keys() == plain.keys()
    for name, values in plain.items():
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize(
    ("tensor", "site"),
    [
        ("embeddings.ln.bias", "layer.0.qkv"),
        ("layer.0.qkv.bias", "layer.0.scores.q"),
        ("layer.0.out.bias", "layer.0.ffn_in"),
        ("layer.0.ffn_in.bias", "layer.0.ffn_out"),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_finite_names_its_site(tensor: str, site: str, value: float) -> None:
    weights = tiny_weights(0)
    weights[tensor][0] = value
    with pytest.raises(SampError, match=f"not_finite: the input of {site} holds NaN or infinity"):
        observe(weights)


def test_a_site_of_zeros() -> None:
    """An ffn that never fires has no range; its scale is small and positive, not 0."""
    weights = tiny_weights(0)
    weights["layer.0.ffn_in.weight"][:] = 0
    weights["layer.0.ffn_in.bias"][:] = 0
    ranges = observe(weights)
    assert ranges["layer.0.ffn_out"].sum() == 0
    for calibrator in CALIBRATORS:
        recipe = Recipe(calibrator=calibrator)
        assert 0 < calibrate.scales(ranges, recipe)["layer.0.ffn_out.input_scale"] < 1e-6


# scales


def test_scales_by_stored_name() -> None:
    ranges, inputs = observe(), activations("tokens")
    scales = calibrate.scales(ranges, Recipe())
    gemms = {f"layer.0.{name}" for name in ("qkv", "out", "ffn_in", "ffn_out")}
    wanted = {f"{name}.input_scale": np.abs(inputs[name]).max() / 127 for name in gemms}
    for name in SITES - gemms:
        wanted[f"{name}_scale"] = np.abs(inputs[name]).max() / 127
    wanted["layer.0.context.p_scale"] = 1 / 127
    assert scales == wanted
    assert all(type(value) is float for value in scales.values())


def test_fp8_scales_are_the_reach_over_448() -> None:
    ranges, inputs = observe(), activations("tokens")
    gemms = [f"layer.0.{name}" for name in ("qkv", "out", "ffn_in", "ffn_out")]
    found = calibrate.fp8_scales(ranges, Recipe())
    wanted = {f"{name}.fp8_input_scale": np.abs(inputs[name]).max() / 448 for name in gemms}
    assert found == wanted
    percent = Recipe(calibrator="percentile", percentile=99.0)
    less = calibrate.fp8_scales(ranges, percent)
    whole = calibrate.scales(ranges, percent)
    for name in gemms:
        ratio = whole[f"{name}.input_scale"] / less[f"{name}.fp8_input_scale"]
        assert ratio == pytest.approx(448 / 127)
    assert list(calibrate.fp8_scales(ranges, {gemms[1]: Recipe()})) == [
        f"{gemms[1]}.fp8_input_scale"
    ]
    with pytest.raises(SampError, match=r"mse for fp8; allowed: minmax, percentile"):
        calibrate.fp8_scales(ranges, Recipe(calibrator="mse"))


def test_scales_are_a_pure_function() -> None:
    ranges = observe()
    kept = {name: value.copy() for name, value in ranges.items()}
    recipe = Recipe(calibrator="percentile", percentile=99.0)
    first = calibrate.scales(ranges, recipe)
    assert list(calibrate.scales(ranges, recipe).items()) == list(first.items())
    assert all(np.array_equal(kept[name], ranges[name]) for name in kept)
    # They come in the order of the ranges: a plan's file does not depend on the run.
    many = {f"layer.{i}.qkv{end}": value for i in range(12) for end, value in
            (("", np.ones(calibrate.BINS, np.int64)), (".amax", np.array([1.0])))}  # fmt: skip
    assert list(calibrate.scales(many, Recipe())) == [
        f"layer.{i}.qkv.input_scale" for i in range(12)
    ]


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9, 100.0])
def test_percentile_scales_are_those_of_the_activations(percent: float) -> None:
    scales = calibrate.scales(observe(), Recipe(calibrator="percentile", percentile=percent))
    for name, x in activations("tokens").items():
        stored = f"{name}_scale" if name.count(".") == 3 else f"{name}.input_scale"
        wanted = np.percentile(np.abs(x), percent, method="inverted_cdf")
        assert abs(scales[stored] * 127 - wanted) <= 1.01 * np.abs(x).max() / calibrate.BINS
    assert scales["layer.0.context.p_scale"] == 1 / 127


def test_the_percentile_has_a_default() -> None:
    ranges = observe()
    given = calibrate.scales(ranges, Recipe(calibrator="percentile", percentile=99.99))
    assert calibrate.scales(ranges, Recipe(calibrator="percentile")) == given


def test_an_unknown_calibrator_is_refused() -> None:
    with pytest.raises(SampError, match="unknown_calibrator: max; allowed: minmax, percentile, m"):
        calibrate.scales(observe(), Recipe(calibrator="max"))


def test_a_recipe_for_each_site() -> None:
    ranges = observe()
    found = calibrate.scales(
        ranges,
        {
            "layer.0.ffn_out": Recipe(calibrator="percentile", percentile=99.0),
            "layer.0.scores": Recipe(calibrator="mse"),
            "layer.0.context": Recipe(),
            "layer.0.qkv": Recipe(activation="token"),
        },
    )
    percent = calibrate.scales(ranges, Recipe(calibrator="percentile", percentile=99.0))
    mse, plain = (calibrate.scales(ranges, Recipe(calibrator=c)) for c in ("mse", "minmax"))
    assert found == {
        "layer.0.ffn_out.input_scale": percent["layer.0.ffn_out.input_scale"],
        "layer.0.scores.q_scale": mse["layer.0.scores.q_scale"],
        "layer.0.scores.k_scale": mse["layer.0.scores.k_scale"],
        **{
            f"layer.0.context.{part}_scale": plain[f"layer.0.context.{part}_scale"] for part in "pv"
        },
        "layer.0.qkv.input_scale": plain["layer.0.qkv.input_scale"],
    }
    assert calibrate.outliers(ranges, {"layer.0.out": Recipe(outliers=1)}).keys() == {"layer.0.out"}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3000),
    st.sampled_from([50.0, 90.0, 99.0, 99.9, 99.99, 100.0]),
    st.floats(0.1, 6.0),
    st.integers(0, 2**32 - 1),
)
def test_percentile_against_numpy(count: int, percent: float, tail: float, seed: int) -> None:
    x = np.abs(np.random.default_rng(seed).standard_normal(count)) ** tail + 1e-9
    amax = float(x.max())
    histogram, _ = np.histogram(x, bins=calibrate.BINS, range=(0, amax))
    got = percentile(histogram, amax, percent)
    # Where the share falls on a value, floating point decides between it and the next.
    place = count * percent / 100
    low, high = (np.sort(x)[min(int(np.ceil(place + e)), count) - 1] for e in (-1e-6, 1e-6))
    assert low - 1e-9 * amax <= got <= high + (1 + 1e-6) * amax / calibrate.BINS
    numpy = float(np.percentile(x, percent, method="inverted_cdf"))
    assert numpy in (low, high)
    assert got <= amax * (1 + 1e-12)
    if percent == 100.0:
        assert got == amax


def test_percentile_of_nothing() -> None:
    assert percentile(np.zeros(calibrate.BINS, np.int64), 3.0, 99.0) == 3.0
