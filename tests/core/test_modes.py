"""SAMP's modes over orders of layers, and mixes that are read from a sample of texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samp_kernels.interface import GEMM_SITES, SITES

from samp_core.errors import UsageError
from samp_core.mix import mix_of, read_sample
from samp_core.modes import layer_order, modes
from samp_core.plan import Plan, Recipe, mode_plan
from samp_core.sensitivity import Score
from samp_core.text import Encoding


def full(layers: int, sites: tuple[str, ...]) -> Plan:
    return mode_plan(
        Plan("0" * 64, {"layers": layers}, "cpu", {}, {}), "full", layers, sites, Recipe()
    )


@given(st.permutations(range(4)), st.sampled_from([tuple(SITES), tuple(GEMM_SITES)]))
def test_a_mode_quantizes_the_first_layers_of_its_order(
    order: list[int], sites: tuple[str, ...]
) -> None:
    made = modes(full(4, sites), order, "mine")
    attention = set(sites) - set(GEMM_SITES)
    kinds = {"ffn_only": {"ffn_in", "ffn_out"}, "full": set(sites)}
    if attention:
        kinds["gemms"] = set(GEMM_SITES)
    assert set(made) == {f"{kind}({k}, mine)" for kind in kinds for k in range(1, 5)}
    for kind, chosen in kinds.items():
        names = [name for name in made if name.startswith(kind)]
        assert names == [f"{kind}({k}, mine)" for k in range(1, 5)], "decay-aware reads them so"
        for k, name in enumerate(names, start=1):
            wanted = {f"layer.{layer}.{site}" for layer in order[:k] for site in chosen}
            assert set(made[name].quantized_sites()) == wanted
            assert made[name].mode == name


def test_the_usual_modes_are_those_of_the_paper() -> None:
    whole = full(3, tuple(SITES))
    made = modes(whole, [0, 1, 2])
    assert made["full(3)"].key() == whole.key()
    for name in ("full(2)", "ffn_only(1)"):
        kind, k = name[:-3], int(name[-2])
        assert made[name] == mode_plan(whole, kind, k, tuple(SITES), Recipe())  # type: ignore[arg-type]


def test_orders() -> None:
    losses = {0: [3.0, 1.0], 1: [0.5, 0.1], 2: [2.0, 0.2]}
    scores = {
        f"layer.{layer}.{kind}": Score(f"layer.{layer}.{kind}", "int8", fisher, 20.0)
        for layer, found in losses.items()
        for kind, fisher in zip(("qkv", "out"), found, strict=True)
    }
    assert layer_order("first", 3, {}) == [0, 1, 2]
    assert layer_order("last", 3, {}) == [2, 1, 0]
    assert layer_order("sensitivity", 3, scores) == [1, 2, 0]


# a mix read from texts


def encodings(lengths: Sequence[int]) -> list[Encoding]:
    return [Encoding(np.ones(n, np.int32), np.zeros(n, np.int32), False, None) for n in lengths]


@given(st.lists(st.tuples(st.integers(2, 60), st.integers(1, 64)), min_size=1, max_size=40))
def test_shares_are_those_of_requests(rows: list[tuple[int, int]]) -> None:
    mix = mix_of(encodings([n for n, _ in rows]), [b for _, b in rows])
    assert sum(mix.shares.values()) == pytest.approx(1.0)
    assert {bucket.name for bucket in mix.buckets} == set(mix.shares)
    for bucket in mix.buckets:
        texts, tokens = map(int, bucket.name.split("x"))
        assert len(bucket.batch.cu_seqlens) - 1 == texts
        assert bucket.tokens == tokens
        assert bucket.batch.max_seqlen <= max(n for n, _ in rows)


def test_short_and_long_texts_have_their_own_shapes() -> None:
    mix = mix_of(encodings([4, 5, 6, 30, 31, 32, 80, 90, 100]), [1] * 9)
    assert mix.shares == pytest.approx({"1x5": 1 / 3, "1x31": 1 / 3, "1x90": 1 / 3})
    both = mix_of(encodings([10] * 8 + [20] * 2), [8] * 8 + [1] * 2)
    assert both.shares == pytest.approx({"8x80": 1 / 3, "1x20": 2 / 3})


def test_a_sample_is_read(tmp_path: Path) -> None:
    lines = [{"text": "a b"}, {"text": "c", "batch": 8, "label": "x"}]
    file = tmp_path / "sample.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert read_sample(file) == [("a b", 1), ("c", 8)]
    plain = tmp_path / "sample.txt"
    plain.write_text("a film\n\nanother\n")
    assert read_sample(plain) == [("a film", 1), ("another", 1)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"text": "a", "text_pair": "b"}))
    assert read_sample(pairs) == [(("a", "b"), 1)]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.jsonl", '{"text": "a"}\nnot json', "m.jsonl:2: it is not JSON"),
        ("m.jsonl", '{"label": "a"}', "m.jsonl:1: no text"),
        ("m.jsonl", '{"text": 5}', "m.jsonl:1: no text"),
        ("m.jsonl", '["a"]', "m.jsonl:1: no text"),
        ("m.jsonl", '{"text": "a", "batch": 0}', "m.jsonl:1: batch 0"),
        ("m.jsonl", '{"text": "a", "batch": 65}', "m.jsonl:1: batch 65"),
        ("m.jsonl", '{"text": "a", "batch": "8"}', "m.jsonl:1: batch '8'"),
        ("m.jsonl", '{"text": "a", "batch": true}', "m.jsonl:1: batch True"),
        ("m.jsonl", '{"text": "a", "text_pair": 1}', "text_pair 1"),
        ("m.jsonl", '{"text": "a", "text_pair": "b"}\n{"text": "a"}', "only some rows"),
        ("m.jsonl", "\n \n", "no texts"),
        ("m.csv", "text\na", "extension '.csv'"),
        ("absent.txt", None, "No such file"),
        ("m.txt", b"\xff\xfe\x00", "no UTF-8"),
    ],
)
def test_samples_that_are_none(
    name: str, content: str | bytes | None, words: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match="bad_mix") as caught:
        read_sample(file)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
