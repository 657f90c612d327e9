"""config.pbtxt from frozen dataclasses, and back. The tensors are those of interfaces.md.

Written and read through Triton's own protobuf message, so that a field it does not know fails here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from samp_core.errors import SampError

MAX_BATCH = 64
# Rows that the tokenizer takes at once. A hand-over costs it and Triton more than a text, and it
# has to refuse what is beyond the queues faster than that comes.
TOKENIZER_BATCH = 4 * MAX_BATCH
# Seconds of work that may wait for a tier before further requests are refused (admission.py).
QUEUE_S = 1.0
# A tier's ensemble asks the tokenizer for `LENGTHS_<tier>`, which is LENGTHS: it has no other way
# to tell its steps who they work for.
OF_TIER = "LENGTHS_"


@dataclass(frozen=True)
class TensorConfig:
    """One input or output. `dims` without the batch; -1 is any length."""

    name: str
    dtype: str
    dims: tuple[int, ...]

    @property
    def ragged(self) -> bool:
        return -1 in self.dims


@dataclass(frozen=True)
class Step:
    """One model of an ensemble: its tensor name -> the ensemble's."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True)
class ModelConfig:
    """One served model: a Python model, or an ensemble when it has `steps`."""

    name: str
    inputs: tuple[TensorConfig, ...]
    outputs: tuple[TensorConfig, ...]
    parameters: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    max_batch_size: int = MAX_BATCH
    queue_delay_us: int = 0
    queue_s: float = QUEUE_S
    gpu: bool = False

    def to_pbtxt(self) -> str:
        """The text of config.pbtxt."""
        from google.protobuf import text_format

        return text_format.MessageToString(self._message())

    def _message(self) -> Any:
        from tritonclient.grpc import model_config_pb2 as pb

        message = pb.ModelConfig(name=self.name, max_batch_size=self.max_batch_size)
        for tensor in self.inputs:
            message.input.add(
                name=tensor.name,
                data_type=f"TYPE_{tensor.dtype}",
                dims=tensor.dims,
                allow_ragged_batch=tensor.ragged,
            )
        for tensor in self.outputs:
            message.output.add(name=tensor.name, data_type=f"TYPE_{tensor.dtype}", dims=tensor.dims)
        for key, value in sorted(self.parameters.items()):
            message.parameters[key].string_value = value
        if self.steps:
            message.platform = "ensemble"
            for step in self.steps:
                message.ensemble_scheduling.step.add(
                    model_name=step.model,
                    model_version=-1,
                    input_map=step.inputs,
                    output_map=step.outputs,
                )
            return message
        message.backend = "python"
        kinds = pb.ModelInstanceGroup
        message.instance_group.add(kind=kinds.KIND_GPU if self.gpu else kinds.KIND_CPU, count=1)
        # With no delay a lone request never waits; under load the queue forms by itself.
        message.dynamic_batching.max_queue_delay_microseconds = self.queue_delay_us
        set_queue_s(message, self.queue_s)
        return message


def set_queue_s(message: Any, queue_s: float) -> None:
    """The bound of the queues, in a Python model's config."""
    message.parameters["queue_s"].string_value = f"{queue_s:g}"


def drop_queue_policy(message: Any) -> None:
    """Take out of a Python model's config what Triton 24.10 pays for with its throughput.

    With any default_queue_policy a batch is formed only when an instance waits for one, and nobody
    wakes the batcher when an instance becomes free: what waits, waits for the next request or for
    half a second (docs/reliability.md).
    """
    message.dynamic_batching.ClearField("default_queue_policy")


def from_pbtxt(text: str, source: str = "config.pbtxt") -> ModelConfig:
    """Parse a config that `to_pbtxt` wrote. Raises SampError naming the place that is wrong."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as pb

    try:
        message = text_format.Parse(text, pb.ModelConfig())
    except text_format.ParseError as error:
        raise SampError(
            "bad_config", f"{source}: {error}", "Triton's ModelConfig", "build again"
        ) from None

    def tensors(fields: Sequence[Any]) -> tuple[TensorConfig, ...]:
        return tuple(
            TensorConfig(f.name, pb.DataType.Name(f.data_type)[5:], tuple(f.dims)) for f in fields
        )

    batching = message.dynamic_batching
    return ModelConfig(
        name=message.name,
        inputs=tensors(message.input),
        outputs=tensors(message.output),
        parameters={k: v.string_value for k, v in message.parameters.items() if k != "queue_s"},
        steps=tuple(
            Step(s.model_name, dict(s.input_map), dict(s.output_map))
            for s in message.ensemble_scheduling.step
        ),
        max_batch_size=message.max_batch_size,
        queue_delay_us=batching.max_queue_delay_microseconds,
        queue_s=float(message.parameters["queue_s"].string_value or QUEUE_S),
        gpu=any(group.kind == pb.ModelInstanceGroup.KIND_GPU for group in message.instance_group),
    )


def tokenizer_config(
    model: str,
    *,
    max_length: int,
    pair: bool = False,
    places: bool = False,
    tiers: Sequence[str] = (),
    queue_delay_us: int = 0,
    queue_s: float = QUEUE_S,
) -> ModelConfig:
    """TEXT, for pairs TEXT_PAIR -> IDS, TYPES `[b, longest row]`, LENGTHS, TRUNCATED `[b, 1]`.

    places: also OFFSETS and WORD_IDS, which token heads need. tiers: whose queues it guards.
    """
    return ModelConfig(
        name=f"tokenizer_{model}",
        inputs=(TEXT, TEXT_PAIR) if pair else (TEXT,),
        outputs=(
            *(IDS, TYPES, LENGTHS, TRUNCATED),
            *((OFFSETS, WORD_IDS) if places else ()),
            *(TensorConfig(OF_TIER + tier, "INT32", (1,)) for tier in tiers),
        ),
        parameters={"max_length": str(max_length)},
        max_batch_size=TOKENIZER_BATCH,
        queue_delay_us=queue_delay_us,
        queue_s=queue_s,
    )


def encoder_config(
    model: str,
    tier: str,
    *,
    feature: TensorConfig,
    output: str,
    plan_sha256: str,
    threads: int,
    windows: str = "",
    queue_delay_us: int = 0,
    plan: str = "",
    gpu: bool = False,
    queue_s: float = QUEUE_S,
) -> ModelConfig:
    """IDS, TYPES, LENGTHS -> the feature that the head reads; `output` is the session's kind.

    plan: in a line, for `samp status`. gpu: the plan's backend runs on one.

    windows: JSON of windows.Windows, for token heads that read texts longer than the model.
    """
    return ModelConfig(
        name=f"encoder_{model}_{tier}",
        inputs=(IDS, TYPES, LENGTHS),
        outputs=(feature,),
        parameters={
            "output": output,
            "plan_sha256": plan_sha256,
            "threads": str(threads),
            "tier": tier,
            **({"windows": windows} if windows else {}),
            **({"plan": plan} if plan else {}),
        },
        queue_delay_us=queue_delay_us,
        queue_s=queue_s,
        gpu=gpu,
    )


def head_config(
    model: str,
    *,
    head: str,
    feature: TensorConfig,
    outputs: Sequence[TensorConfig],
    labels: Sequence[str],
    queue_delay_us: int = 0,
    queue_s: float = QUEUE_S,
) -> ModelConfig:
    """The feature -> the task's outputs; `labels` (JSON) are in the order of SCORES."""
    return ModelConfig(
        name=f"head_{model}",
        inputs=(feature, LENGTHS, OFFSETS, WORD_IDS) if feature.ragged else (feature,),
        outputs=tuple(outputs),
        parameters={"head": head, "labels": json.dumps(list(labels), ensure_ascii=False)},
        queue_delay_us=queue_delay_us,
        queue_s=queue_s,
    )


def ensemble_config(
    tokenizer: ModelConfig,
    encoder: ModelConfig,
    head: ModelConfig,
    *,
    model: str,
    tier: str,
    promise: float | None = None,
) -> ModelConfig:
    """TEXT -> the head's outputs and TRUNCATED, through the three models.

    promise: the tier's largest drop in points of its metric, for clients that compare tiers.
    """

    def same(tensors: Sequence[TensorConfig]) -> dict[str, str]:
        return {tensor.name: tensor.name for tensor in tensors}

    asked = same(tokenizer.outputs)
    if OF_TIER + tier in asked:
        del asked[LENGTHS.name]
        asked = {n: n for n in asked if not n.startswith(OF_TIER)} | {OF_TIER + tier: LENGTHS.name}

    return ModelConfig(
        name=f"{model}_{tier}",
        inputs=tokenizer.inputs,
        outputs=(*head.outputs, TRUNCATED),
        parameters={
            "labels": head.parameters["labels"],
            "tier": tier,
            **({} if promise is None else {"promise_points": f"{promise:g}"}),
        },
        steps=(
            Step(tokenizer.name, same(tokenizer.inputs), asked),
            Step(encoder.name, same(encoder.inputs), same(encoder.outputs)),
            Step(head.name, same(head.inputs), same(head.outputs)),
        ),
    )


TEXT = TensorConfig("TEXT", "STRING", (1,))
TEXT_PAIR = TensorConfig("TEXT_PAIR", "STRING", (1,))
IDS = TensorConfig("IDS", "INT32", (-1,))
TYPES = TensorConfig("TYPES", "INT32", (-1,))
LENGTHS = TensorConfig("LENGTHS", "INT32", (1,))
TRUNCATED = TensorConfig("TRUNCATED", "BOOL", (1,))
OFFSETS = TensorConfig("OFFSETS", "INT32", (-1, 2))
WORD_IDS = TensorConfig("WORD_IDS", "INT32", (-1,))


def gpu_of(args: Mapping[str, str]) -> int:
    """The GPU of this instance: Triton makes one on each that it sees."""
    on_gpu = args.get("model_instance_kind") == "GPU"
    return int(args["model_instance_device_id"]) if on_gpu else 0
