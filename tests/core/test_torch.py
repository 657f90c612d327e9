"""A transformers model whose encoder runs a plan: the same calls, the same kinds of answer."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from bert import backend, float_plan
from family import FAMILIES, LONGEST, write_family, write_tokenizer
from samp_kernels.cpu import missing
from samp_kernels.interface import SITES, pack_batch

import samp_core
import samp_core.torch
from samp_core import calibrate, heads
from samp_core.checkpoint import load_checkpoint
from samp_core.encoder import LoopSession, prepare
from samp_core.errors import SampError, UsageError
from samp_core.plan import Plan, Recipe, mode_plan
from samp_core.quantize import export_weights
from samp_core.repository import TierFiles, build_lock, write_build
from samp_core.text import TextEncoder

NAME = "onednn" if missing() else "cpu"
SEQUENCE = transformers.AutoModelForSequenceClassification
AUTOS = {
    "bare": transformers.AutoModel,
    "sequence": SEQUENCE,
    "token": transformers.AutoModelForTokenClassification,
    "question": transformers.AutoModelForQuestionAnswering,
}


def padded_call(family: str, lengths: tuple[int, ...] = (7, 1, 23, 12)) -> dict[str, torch.Tensor]:
    """ids and mask [b, L] of rows of different lengths, padded on the right; types for BERT."""
    pad = 0 if family in ("bert", "distilbert") else 1
    rng = np.random.default_rng(0)
    ids = torch.full((len(lengths), max(lengths)), pad)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.from_numpy(rng.integers(5, 60, length))
        mask[row, :length] = 1
    call = {"input_ids": ids, "attention_mask": mask}
    if family == "bert":
        call["token_type_ids"] = torch.from_numpy(rng.integers(0, 2, ids.shape)) * mask
    return call


def planned(folder: Path, kind: Any = "float", layers: int = 0) -> Plan:
    """A plan with scales for the checkpoint in a folder."""
    checkpoint = load_checkpoint(folder)
    plan = float_plan(checkpoint)
    session = prepare(backend("reference"), checkpoint.config, checkpoint.tensors, plan)
    assert isinstance(session, LoopSession)
    rng = np.random.default_rng(1)
    ids = [rng.integers(5, 60, n).astype(np.int32) for n in (30, 9)]
    batch = pack_batch(ids, [np.zeros_like(row) for row in ids])
    ranges = calibrate.observe(session, [batch], "tokens", np.asarray)
    plan = replace(plan, backend=NAME, scales=calibrate.scales(ranges, Recipe()))
    able = SITES if NAME == "cpu" else ("qkv", "out", "ffn_in", "ffn_out")
    return mode_plan(plan, kind, layers, able, Recipe())


MPNET = Path(__file__).resolve().parents[2] / ".demo" / "twelve_layers" / "mpnet"
REVIEWS = (
    "a quiet, beautifully observed film that earns every one of its tears .",
    "dull .",
    "too long by half and far too pleased with its own jokes .",
    "the cast is better than the script deserves , and almost saves it .",
    "one of the year's best .",
    "nothing here that a hundred better thrillers have not done before , and with more wit .",
)


@pytest.mark.skipif(
    not (MPNET / "training.json").is_file(),
    reason="no .demo/twelve_layers/mpnet: python examples/twelve_layers/prepare.py mpnet",
)
def test_real_weights_of_twelve_layers() -> None:
    """all-mpnet-base-v2 with its head: float is the model itself, int8 what our own pass gives."""
    model = SEQUENCE.from_pretrained(MPNET).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(MPNET)(
        list(REVIEWS), padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        wanted = model(**tokens).logits.numpy()
    checkpoint = load_checkpoint(MPNET)
    plan = replace(float_plan(checkpoint), backend=NAME)
    fast = samp_core.torch.wrap(model, plan)
    np.testing.assert_allclose(fast(**tokens).logits.numpy(), wanted, rtol=0, atol=1e-4)
    assert set(fast.executed().values()) == {"fp32"}

    session = LoopSession(backend(NAME), checkpoint.config, checkpoint.tensors, plan)
    encoded = TextEncoder.load(MPNET).encode(list(REVIEWS))
    batch = pack_batch(
        [e.ids for e in encoded], [e.types for e in encoded],
        position_offset=checkpoint.config.position_offset,
    )  # fmt: skip
    ranges = calibrate.observe(session, [batch], "first", backend(NAME).to_host)
    scaled = replace(plan, scales=calibrate.scales(ranges, Recipe()))
    sites = SITES if NAME == "cpu" else ("qkv", "out", "ffn_in", "ffn_out")
    chosen = mode_plan(scaled, "full", 12, sites, Recipe())
    full = samp_core.torch.wrap(model, chosen)
    found = full(**tokens).logits.numpy()
    int8 = [site for site, ran in full.executed().items() if ran == "int8"]
    assert len(int8) == 12 * len(sites)
    assert np.abs(found - wanted).max() > 0.0
    # The same plan without PyTorch around it, under the model's own head.
    plain = prepare(
        backend(NAME), checkpoint.config, export_weights(checkpoint.tensors, chosen), chosen
    )
    with torch.no_grad():
        first = torch.from_numpy(plain.run(batch, output="first"))
        same = model.classifier(first[:, None]).numpy()
    np.testing.assert_allclose(found, same, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("auto", AUTOS)
def test_float_is_the_model_itself(family: str, auto: str, tmp_path: Path) -> None:
    model = write_family(tmp_path, family, AUTOS[auto])
    call = padded_call(family)
    with torch.no_grad():
        wanted = model(**call)
    fast = samp_core.torch.wrap(model, planned(tmp_path))
    got = fast(**call)
    assert type(got) is type(wanted)
    assert got.keys() == wanted.keys()
    real = call["attention_mask"].bool()
    for name in wanted:
        a, b = got[name], wanted[name]
        assert a.shape == b.shape
        if a.shape[:2] == real.shape:  # a token that is padding has no meaning
            a, b = a[real], b[real]
        assert float((a - b).abs().max()) <= 1e-4
    assert set(fast.executed().values()) == {"fp32"}


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_padding_on_the_left_and_none_at_all(family: str, tmp_path: Path) -> None:
    model = write_family(tmp_path, family)
    fast = samp_core.torch.wrap(model, planned(tmp_path))
    call = padded_call(family)
    left = {name: value.flip(1) for name, value in call.items()}
    alone = {"input_ids": call["input_ids"][2:3]}
    for some in (left, alone):
        with torch.no_grad():
            wanted = model(**some).last_hidden_state
        got = fast(**some).last_hidden_state
        real = some.get("attention_mask", torch.ones_like(some["input_ids"])).bool()
        assert float((got - wanted)[real].abs().max()) <= 1e-4
        assert float(got[~real].abs().sum()) == 0.0


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_an_int8_plan_answers_as_the_served_one(family: str, tmp_path: Path) -> None:
    """Written as a build writes it; wrapped from its plan.json."""
    from samp_kernels.onednn import has_vnni

    if NAME == "onednn" and not has_vnni():
        pytest.skip("onednn has no int8 on this CPU")
    model = write_family(tmp_path / "model", family, SEQUENCE, num_labels=3)
    tokenizer = write_tokenizer(tmp_path / "model", family)
    checkpoint = load_checkpoint(tmp_path / "model")
    plan = planned(tmp_path / "model", "full", 2)
    out = tmp_path / "out"
    with build_lock(out):
        folder = write_build(
            out, model="small", task="classification", head="classification",
            labels=checkpoint.labels, max_length=LONGEST, default_tier="exact", threads=1,
            text=TextEncoder.load(tmp_path / "model"), build={},
            head_weights=heads.get("classification").export(checkpoint.state, checkpoint.hf_config),
            encoder_config=checkpoint.config,
            tiers={"exact": TierFiles(plan, export_weights(checkpoint.tensors, plan))},
        )  # fmt: skip
    texts = ["a fine film", "dull", "", "one two three " * 20]
    served = samp_core.load(out, "exact", threads=1).logits(texts)
    again = SEQUENCE.from_pretrained(tmp_path / "model")
    call = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    place = folder / "models" / "encoder_small_exact" / "1"
    for named in (place, str(place / "plan.json"), plan):
        fast = samp_core.torch.wrap(again, named, threads=1)
        np.testing.assert_allclose(fast(**call).logits.numpy(), served, atol=1e-5)
    assert set(fast.executed()) == set(plan.sites)
    assert {fast.executed()[site] for site in plan.quantized_sites()} == {"int8"}
    float_logits = model(**call).logits.detach().numpy()
    assert np.abs(float_logits - served).max() > 1e-4, "int8 that changes nothing is not int8"


def test_the_callers_model_stays_as_it_is(tmp_path: Path) -> None:
    model = write_family(tmp_path, "bert", SEQUENCE)
    call = padded_call("bert")
    with torch.no_grad():
        before = model(**call).logits
    model.train()
    fast = samp_core.torch.wrap(model, planned(tmp_path))
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in fast.modules())
    first = fast(**call).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(first, before, atol=1e-4, rtol=0)
    torch.testing.assert_close(fast(**call).logits, first, atol=0, rtol=0)


def test_inference_only(tmp_path: Path) -> None:
    model = write_family(tmp_path, "bert", SEQUENCE)
    fast = samp_core.torch.wrap(model, planned(tmp_path))
    with pytest.raises(UsageError, match="inference_only"):
        fast.train()
    assert fast.eval() is fast
    call = padded_call("bert")
    labels = torch.tensor([0, 1, 0, 1])
    loss = fast(**call, labels=labels).loss
    assert not loss.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(loss, model(**call, labels=labels).loss, atol=1e-4, rtol=0)
    assert isinstance(fast(**call, return_dict=False), tuple)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs_embeds": torch.zeros(4, 23, 48)}, "inputs_embeds"),
        ({"position_ids": torch.zeros(4, 23, dtype=torch.long)}, "position_ids"),
        ({"output_attentions": True}, "output_attentions"),
        ({"input_ids": None}, "no input_ids"),
        ({"attention_mask": torch.ones(4, 22)}, r"attention_mask \[4, 22\]"),
        ({"attention_mask": torch.zeros(4, 23)}, "without a token"),
        ({"attention_mask": torch.tensor([[1, 0, 1] + [1] * 20] * 4)}, "gaps"),
        ({"attention_mask": torch.ones(4, 1, 1, 23)}, r"attention_mask \[4, 1, 1, 23\]"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_call_that_it_cannot_answer(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    fast = samp_core.torch.wrap(write_family(tmp_path, "bert"), planned(tmp_path))
    with pytest.raises(UsageError, match=f"wrapped_call: .*{words}"):
        fast(**{**padded_call("bert"), **change})


def test_a_plan_that_does_not_fit(tmp_path: Path) -> None:
    write_family(tmp_path / "a", "bert")
    other = write_family(tmp_path / "b", "bert", seed=1)
    plan = planned(tmp_path / "a")
    again = transformers.AutoModel.from_pretrained(tmp_path / "b")
    with pytest.raises(SampError, match="plan_mismatch"):
        samp_core.torch.wrap(again, plan)
    # A model that came from no folder is known by its shape alone.
    assert (
        samp_core.torch.wrap(other, plan)(**padded_call("bert")).last_hidden_state.isfinite().all()
    )
    shallow = write_family(tmp_path / "c", "bert", layers=1)
    with pytest.raises(SampError, match="plan for layers 2"):
        samp_core.torch.wrap(shallow, plan)
    with pytest.raises(UsageError, match="no_plan"):
        samp_core.torch.wrap(other, tmp_path)
    electra = transformers.ElectraModel(
        transformers.ElectraConfig(
            hidden_size=16, embedding_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, vocab_size=10,
        )
    )  # fmt: skip
    with pytest.raises(SampError, match="unsupported_architecture"):
        samp_core.torch.wrap(electra, plan)


def test_a_plan_that_nobody_measured_is_warned_of(tmp_path: Path) -> None:
    model = write_family(tmp_path, "bert")
    plan = planned(tmp_path, "full", 2)
    with pytest.warns(UserWarning, match="measured by no build"):
        samp_core.torch.wrap(model, plan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samp_core.torch.wrap(model, replace(plan, measured={"drop_bound": 0.001}))
        samp_core.torch.wrap(model, replace(float_plan(load_checkpoint(tmp_path)), backend=NAME))


def test_a_text_that_is_too_long(tmp_path: Path) -> None:
    fast = samp_core.torch.wrap(write_family(tmp_path, "bert"), planned(tmp_path))
    with pytest.raises(UsageError, match=f"{LONGEST + 1} tokens; allowed: at most {LONGEST}"):
        fast(input_ids=torch.full((1, LONGEST + 1), 7))


def test_the_package_itself_brings_no_torch() -> None:
    code = (
        "import sys, samp_core\nassert 'torch' not in sys.modules\n"
        "import samp_core.torch, torch\nassert torch.nn and samp_core.torch.wrap\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
