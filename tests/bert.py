"""Small random BERT checkpoints as transformers writes them, and plans with scales for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from samp_kernels.interface import Array, Backend, Batch, Session, pack_batch
from samp_kernels.onednn import OneDnnBackend
from samp_kernels.reference import ReferenceBackend

from samp_core import calibrate
from samp_core.checkpoint import Checkpoint
from samp_core.encoder import LoopSession, prepare
from samp_core.plan import Plan, Recipe, mode_plan
from samp_core.quantize import export_weights

THREADS = 2
LENGTHS = (7, 1, 12, 7, 3)


@cache
def backend(name: str) -> Backend:
    if name == "cpu":
        from samp_kernels.cpu.backend import CpuBackend

        return CpuBackend(THREADS)
    return OneDnnBackend(THREADS) if name == "onednn" else ReferenceBackend()


@dataclass(frozen=True)
class Shape:
    """One checkpoint to write: its sizes and the ways in which checkpoints differ."""

    layers: int = 2
    hidden: int = 64
    heads: int = 2
    ffn: int = 96
    act: str = "gelu"
    classifier: bool = False
    safetensors: bool = True
    old_names: bool = False


def write_bert(folder: Path, shape: Shape, seed: int = 0) -> Any:
    """Write a checkpoint whose every parameter matters; returns transformers' own model."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=50, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=shape.ffn, hidden_act=shape.act,
        max_position_embeddings=32, num_labels=3, attn_implementation="eager",
    )  # fmt: skip
    kind = transformers.BertForSequenceClassification if shape.classifier else None
    model = (kind or transformers.BertModel)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.0 + 0.2 * noise if name.endswith("LayerNorm.weight") else 0.2 * noise)
    model.save_pretrained(folder)
    if shape.old_names or not shape.safetensors:
        rewrite_weights(folder, shape)
    return model.bert if shape.classifier else model


def rewrite_weights(folder: Path, shape: Shape) -> None:
    """The same tensors under TensorFlow's names, or in pytorch_model.bin."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    state = load_file(file)
    if shape.old_names:
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, name in old.items():
            state = {key.replace(new, name): value for key, value in state.items()}
    if shape.safetensors:
        save_file(state, file)
    else:
        file.unlink()
        torch.save(state, folder / "pytorch_model.bin")


def texts(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> tuple[list[Array], list[Array]]:
    """Random ids and types, a row for each length."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, 50, length).astype(np.int32) for length in lengths]
    types = [rng.integers(0, 2, length).astype(np.int32) for length in lengths]
    return ids, types


def batch_of(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> Batch:
    return pack_batch(*texts(lengths, seed))


def float_plan(checkpoint: Checkpoint, backend_name: str = "reference") -> Plan:
    empty = Plan(checkpoint.sha256, checkpoint.plan_config(), backend_name, {}, {})
    return mode_plan(empty, "float", 0, (), Recipe())


def scaled_plan(checkpoint: Checkpoint, recipe: Recipe | None = None) -> Plan:
    """The float plan with calibrated scales for every site, so that any plan can be made of it."""
    plan = float_plan(checkpoint)
    reference = backend("reference")
    session = prepare(reference, checkpoint.config, checkpoint.tensors, plan)
    assert isinstance(session, LoopSession)
    batches = [batch_of(seed=seed) for seed in range(3)]
    ranges = calibrate.observe(session, batches, "tokens", reference.to_host)
    return replace(plan, scales=calibrate.scales(ranges, recipe or Recipe()))


def open_session(checkpoint: Checkpoint, plan: Plan, name: str, **kwargs: Any) -> Session:
    tensors = export_weights(checkpoint.tensors, plan)
    return prepare(backend(name), checkpoint.config, tensors, plan, **kwargs)
