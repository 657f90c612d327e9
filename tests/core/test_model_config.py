"""config.pbtxt: written from dataclasses, parsed back by Triton's own message."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from samp_core import model_config as mc
from samp_core.errors import SampError

FEATURE = mc.TensorConfig("FEATURE", "FP32", (384,))
LABELS = ("rotten", 'fr"esh\n', "très bon", "好")


def _parts() -> dict[str, mc.ModelConfig]:
    tokenizer = mc.tokenizer_config("films", max_length=128, tiers=("exact", "fast"))
    encoder = mc.encoder_config(
        "films", "fast", feature=FEATURE, output="first", plan_sha256="0f" * 32, threads=2
    )
    head = mc.head_config(
        "films",
        head="classification",
        feature=FEATURE,
        outputs=(
            mc.TensorConfig("LABEL", "STRING", (1,)),
            mc.TensorConfig("SCORE", "FP32", (1,)),
            mc.TensorConfig("SCORES", "FP32", (4,)),
        ),
        labels=LABELS,
        queue_delay_us=250,
    )
    ensemble = mc.ensemble_config(tokenizer, encoder, head, model="films", tier="fast")
    return {"tokenizer": tokenizer, "encoder": encoder, "head": head, "ensemble": ensemble}


@pytest.mark.parametrize("role", ["tokenizer", "encoder", "head", "ensemble"])
def test_round_trip(role: str) -> None:
    config = _parts()[role]
    assert mc.from_pbtxt(config.to_pbtxt()) == config
    assert mc.from_pbtxt(config.to_pbtxt()).to_pbtxt() == config.to_pbtxt()


def _message(role: str) -> pb.ModelConfig:
    return text_format.Parse(_parts()[role].to_pbtxt(), pb.ModelConfig())


def test_names_and_tensors() -> None:
    """The table of interfaces.md, as Triton reads it."""
    ids = [("IDS", pb.TYPE_INT32, [-1]), ("TYPES", pb.TYPE_INT32, [-1])]
    lengths = ("LENGTHS", pb.TYPE_INT32, [1])
    text, truncated = ("TEXT", pb.TYPE_STRING, [1]), ("TRUNCATED", pb.TYPE_BOOL, [1])
    feature = ("FEATURE", pb.TYPE_FP32, [384])
    answers = [
        ("LABEL", pb.TYPE_STRING, [1]),
        ("SCORE", pb.TYPE_FP32, [1]),
        ("SCORES", pb.TYPE_FP32, [4]),
    ]
    of_tiers = [(f"LENGTHS_{tier}", pb.TYPE_INT32, [1]) for tier in ("exact", "fast")]
    expected = {
        "tokenizer": ("tokenizer_films", [text], [*ids, lengths, truncated, *of_tiers]),
        "encoder": ("encoder_films_fast", [*ids, lengths], [feature]),
        "head": ("head_films", [feature], answers),
        "ensemble": ("films_fast", [text], [*answers, truncated]),
    }
    for role, (name, inputs, outputs) in expected.items():
        message = _message(role)
        assert message.name == name
        assert message.max_batch_size == (256 if role == "tokenizer" else 64)
        assert [(t.name, t.data_type, list(t.dims)) for t in message.input] == inputs
        assert [(t.name, t.data_type, list(t.dims)) for t in message.output] == outputs


def test_only_inputs_of_any_length_are_ragged() -> None:
    for role in ("tokenizer", "encoder", "head", "ensemble"):
        for tensor in _message(role).input:
            assert tensor.allow_ragged_batch == (tensor.name in ("IDS", "TYPES")), tensor.name


def test_a_lone_request_waits_for_nobody_and_no_batch_for_a_queue_policy() -> None:
    for role, delay in (("tokenizer", 0), ("encoder", 0), ("head", 250)):
        message = _message(role)
        assert message.HasField("dynamic_batching")
        assert message.dynamic_batching.max_queue_delay_microseconds == delay
        assert not message.dynamic_batching.HasField("default_queue_policy")
        assert message.parameters["queue_s"].string_value == "1"
        assert [(g.kind, g.count) for g in message.instance_group] == [
            (pb.ModelInstanceGroup.KIND_CPU, 1)
        ]


def test_ensemble_wires_every_input_of_every_step() -> None:
    parts = _parts()
    message = _message("ensemble")
    assert message.platform == "ensemble"
    made = {"TEXT"}
    for step, role in zip(
        message.ensemble_scheduling.step, ("tokenizer", "encoder", "head"), strict=True
    ):
        assert step.model_name == parts[role].name
        assert set(step.input_map) == {t.name for t in parts[role].inputs}
        assert set(step.input_map.values()) <= made
        made |= set(step.output_map.values())
    assert {t.name for t in message.output} <= made
    # The tokenizer sees by this name whose request it is.
    lengths = {"LENGTHS_fast": "LENGTHS"}
    asked = message.ensemble_scheduling.step[0].output_map
    assert {n: t for n, t in asked.items() if n.startswith("LENGTHS")} == lengths


def test_parameters() -> None:
    assert json.loads(_message("head").parameters["labels"].string_value) == list(LABELS)
    encoder = {k: v.string_value for k, v in _message("encoder").parameters.items()}
    assert encoder == {
        "output": "first",
        "plan_sha256": "0f" * 32,
        "threads": "2",
        "tier": "fast",
        "queue_s": "1",
    }


def test_a_damaged_config_is_named() -> None:
    text = _parts()["encoder"].to_pbtxt().replace("max_batch_size", "max_batsch_size")
    with pytest.raises(SampError, match=r"models/x/config\.pbtxt: .*max_batsch_size"):
        mc.from_pbtxt(text, "models/x/config.pbtxt")


def test_only_an_encoder_of_a_gpu_plan_asks_for_a_gpu() -> None:
    given: dict[str, Any] = {"feature": FEATURE, "output": "first", "plan_sha256": "0f" * 32}
    config = mc.encoder_config("films", "fast", threads=2, gpu=True, **given)
    assert "KIND_GPU" in config.to_pbtxt()
    assert mc.from_pbtxt(config.to_pbtxt()) == config
    assert not any("KIND_GPU" in part.to_pbtxt() for part in _parts().values())
