"""An encoder's folder in a build: plan, shape and portable weights; written, read, made to run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from samp_kernels.interface import Array, EncoderConfig, KernelError, Session

from samp_core.backends import open_backend
from samp_core.encoder import prepare
from samp_core.errors import SampError
from samp_core.plan import Plan
from samp_core.tensors import load_tensors


def save_encoder(folder: Path, config: EncoderConfig, plan: Plan) -> None:
    """plan.json and encoder.json; the weights are written by repository.py beside them."""
    (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    text = json.dumps(asdict(config), indent=1) + "\n"
    (folder / "encoder.json").write_text(text, encoding="utf-8")


def load_encoder(folder: Path) -> tuple[EncoderConfig, Plan, dict[str, Array]]:
    """An encoder folder's config, plan and portable tensors."""
    from safetensors import SafetensorError

    config = EncoderConfig(**json.loads((folder / "encoder.json").read_text(encoding="utf-8")))
    plan = Plan.from_json((folder / "plan.json").read_text(encoding="utf-8"), "plan.json")
    try:
        tensors = load_tensors(folder / "weights.safetensors")
    except SafetensorError as error:
        raise SampError(
            "damaged_weights", f"weights.safetensors: {error}", "an intact file", "samp build again"
        ) from None
    return config, plan, tensors


def load_session(folder: Path, threads: int | None = None, gpu: int = 0) -> Session:
    """The session of an encoder folder, on the backend that its plan names."""
    config, plan, tensors = load_encoder(folder)
    return planned_session(config, tensors, plan, threads, gpu)


def planned_session(
    config: EncoderConfig,
    tensors: Mapping[str, Array],
    plan: Plan,
    threads: int | None = None,
    gpu: int = 0,
) -> Session:
    """A session on the backend that the plan names. SampError where this machine cannot run it."""
    backend = open_backend(plan.backend, threads, gpu)
    try:
        return prepare(backend, config, tensors, plan, threads=threads)
    except KernelError as error:
        raise SampError(
            "unsupported_plan", f"{error.op}: {error.got}", error.allowed,
            "plan again on this machine: samp build",
        ) from None  # fmt: skip
